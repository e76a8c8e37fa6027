"""Outputs, arguments, configuration, saving and loading."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checks.base import Base, cast, changed

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Calls(Base):
    """What a call takes and returns."""

    def test_output_has_the_shape_of_the_input(self) -> None:
        output = self.run(self.merged())
        assert output.shape == self.inputs()[self.main_input].shape
        assert output.isfinite().all()
        assert changed(output, self.run(self.untouched()))

    def test_two_calls_are_equal(self) -> None:
        model = self.merged()
        assert torch.equal(self.run(model), self.run(model))
        assert torch.equal(self.run(copy.deepcopy(model)), self.run(model))

    def test_tuple_and_output_object_are_equal(self) -> None:
        model = self.merged()
        with torch.no_grad():
            as_tuple = model(**self.inputs(), return_dict=False)
            as_object = model(**self.inputs(), return_dict=True)
        assert type(as_tuple) is tuple
        assert torch.equal(as_tuple[0], as_object.sample)
        assert torch.equal(as_object[0], as_object["sample"])
        with torch.no_grad():
            untouched = self.untouched()(**self.inputs())
        assert type(as_object) is type(untouched)

    def test_arguments_may_be_positional(self) -> None:
        model, inputs = self.merged(), self.inputs()
        names = list(inspect.signature(model.forward).parameters)
        assert names == list(inspect.signature(self.untouched().forward).parameters)
        positional = [inputs.pop(name) for name in names[:3]]
        with torch.no_grad():
            assert torch.equal(model(*positional, **inputs).sample, self.run(model))

    def test_wrong_arguments_are_refused_as_python_does(self) -> None:
        model, inputs = self.merged(), self.inputs()
        names = list(inspect.signature(model.forward).parameters)
        with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
            model(**inputs, nonsense=1)
        with pytest.raises(TypeError, match="too many positional arguments"):
            model(*[None] * (len(names) + 1))
        with pytest.raises(TypeError, match=f"multiple values for argument '{names[0]}'"):
            model(inputs[names[0]], **inputs)
        with pytest.raises(TypeError, match=f"missing a required argument: '{names[0]}'"):
            model(**{name: value for name, value in inputs.items() if name != names[0]})

    def test_attributes_are_found_as_before(self) -> None:
        model: Any = self.merged()
        model.noted = 5
        assert model.noted == 5
        assert model.save_pretrained.__name__ == "save_pretrained"
        with pytest.raises(AttributeError, match=f"'{type(model).__name__}'.*'does_not_exist'"):
            model.does_not_exist  # noqa: B018
        with pytest.warns(FutureWarning, match="in_channels"):
            assert model.in_channels == model.config.in_channels

    def test_configuration_makes_an_untouched_model(self) -> None:
        untouched, model = self.untouched(), self.merged()
        assert model.config == untouched.config
        for cls in (type(untouched), type(model)):
            again = cls.from_config(model.config)
            assert type(again) is type(untouched)
            again.load_state_dict(model.state_dict())
            self.same(again.eval(), self.run(untouched))
            self.same(self.merged(again), self.run(model))

    def test_dtype_is_kept(self) -> None:
        for dtype in DTYPES:
            model = self.merged().to(dtype)
            assert model.dtype == dtype
            assert {p.dtype for p in model.parameters()} == {dtype}
            with torch.no_grad():
                assert model(**cast(self.inputs(), dtype)).sample.dtype == dtype


class Saving(Base):
    """What is saved is the untouched model; loaded and transformed, it is the merged one."""

    def check_reloaded(self, model: Any, folder: Path, **options: Any) -> None:
        loaded = self.reload(model, folder, **options)
        assert type(loaded) is type(self.untouched())
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        self.same(loaded, self.run(self.untouched()))
        self.same(self.merged(loaded), self.run(model))

    def test_save_and_load(self, tmp_path: Path) -> None:
        model = self.merged()
        model.save_pretrained(tmp_path)
        self.check_reloaded(model, tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert type(loaded) is type(self.untouched())

    def test_variant(self, tmp_path: Path) -> None:
        model = self.merged()
        model.save_pretrained(tmp_path, variant="fp16")
        with pytest.raises(OSError, match="no file named"):
            self.reload(model, tmp_path)
        self.check_reloaded(model, tmp_path, variant="fp16")

    @pytest.mark.parametrize("variant", [None, "fp16"])
    def test_shards(self, tmp_path: Path, variant: str | None) -> None:
        model = self.merged()
        model.save_pretrained(tmp_path, max_shard_size="40KB", variant=variant)
        assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
        self.check_reloaded(model, tmp_path, variant=variant)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = self.merged().to(dtype)
        model.save_pretrained(tmp_path)
        for low_memory in (True, False):
            loaded = self.reload(model, tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_memory)
            assert loaded.dtype == self.merged(loaded).dtype == dtype

    def test_state_dict_goes_both_ways(self) -> None:
        model, other = self.merged(), self.untouched()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.9)
        output = self.run(other)
        other.load_state_dict(model.state_dict(), strict=True)
        self.same(other, self.run(self.untouched()))
        assert changed(output, self.run(other))
        model.load_state_dict(other.state_dict(), strict=True)
        self.same(model, self.run(self.merged()))
