"""LoRA adapters in a model: added, saved, loaded, fused, several at once, exchanged in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.peft import PeftAdapterMixin
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.checks.base import Base, changed

WEIGHTS = "pytorch_lora_weights.safetensors"
FILE: dict[str, Any] = {"prefix": None, "use_safetensors": True, "weight_name": WEIGHTS}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def lora(rank: int = 4, **options: Any) -> LoraConfig:
    """A LoRA that changes the output, as training leaves it."""
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=LAYERS, init_lora_weights=False, **options
    )


def add(model: Any, seed: int = 0, name: str = "default", **options: Any) -> Any:
    """Add a LoRA of random weights; returns the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_adapter(lora(**options), adapter_name=name)
    return model.eval()


def adapted(model: nn.Module) -> bool:
    """Whether any layer has an adapter."""
    return any(isinstance(m, BaseTunerLayer) for m in model.modules())


@pytest.mark.filterwarnings("ignore:Already found a .peft_config. attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter one was active which is now deleted:UserWarning")
class Adapters(Base):
    """LoRA after `transform`; the saved weights are those of an untouched model's LoRA."""

    @pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
    def test_save_unload_load(self, tmp_path: Path, dora: bool) -> None:
        model = self.merged()
        assert isinstance(model, PeftAdapterMixin)
        plain = self.run(model)
        output = self.run(add(model, use_dora=dora))
        assert changed(output, plain)
        metadata = model.peft_config["default"].to_dict()
        model.save_lora_adapter(tmp_path)
        model.unload_lora()
        assert not adapted(model)
        self.same(model, plain)
        for low_memory in (False, True):
            model = self.merged()
            model.load_lora_adapter(tmp_path, **FILE, low_cpu_mem_usage=low_memory)
            assert adapted(model)
            self.same(model, output)
            loaded = model.peft_config["default_0"].to_dict()
            assert {**loaded, "inference_mode": None} == {**metadata, "inference_mode": None}
        untouched = self.untouched()
        untouched.load_lora_adapter(tmp_path, **FILE)
        self.same(self.merged(untouched), output)

    def test_unknown_adapter_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nobody not found"):
            add(self.merged()).save_lora_adapter(tmp_path, adapter_name="nobody")

    def test_several_at_once(self) -> None:
        model = self.merged()
        plain = self.run(model)
        add(model, 0, "one")
        add(model, 1, "two", rank=2)
        model.set_adapters(["one", "two"], [0.7, 0.3])
        both = self.run(model)
        model.set_adapters("one")
        one = self.run(model)
        self.same(add(self.merged(), 0), one)
        assert changed(both, one)
        model.disable_lora()
        self.same(model, plain)
        model.enable_lora()
        self.same(model, one)
        model.delete_adapters(["one", "two"])
        self.same(model, plain)

    def test_fuse_and_unfuse(self) -> None:
        model = self.merged()
        plain = self.run(model)
        output = self.run(add(model))
        model.fuse_lora()
        torch.testing.assert_close(self.run(model), output, rtol=1e-3, atol=1e-3)
        model.unfuse_lora()
        model.unload_lora()
        torch.testing.assert_close(self.run(model), plain, rtol=1e-3, atol=1e-3)

    def test_scale_of_a_call(self) -> None:
        model = add(self.merged())
        output = self.run(model)
        self.same(model, self.run(model, **{self.attention_kwargs: {"scale": 1.0}}))
        assert changed(self.run(model, **{self.attention_kwargs: {"scale": 0.2}}), output)
        without = self.run(model, **{self.attention_kwargs: {"scale": 0.0}})
        self.same(self.merged(), without)

    @pytest.mark.parametrize("ranks", [(4, 8), (8, 4)], ids=str)
    def test_exchange_without_recompiling(self, tmp_path: Path, ranks: tuple[int, int]) -> None:
        outputs = []
        for seed, rank in enumerate(ranks):
            model = add(self.merged(), seed, rank=rank)
            outputs.append(self.run(model))
            model.save_lora_adapter(tmp_path / str(seed))
        torch.compiler.reset()
        frames, model = CompileCounter(), self.merged()
        model.enable_lora_hotswap(target_rank=max(ranks))
        model.load_lora_adapter(tmp_path / "0", **FILE, adapter_name="swapped")
        model.compile(fullgraph=True, backend=frames, dynamic=False)
        torch.testing.assert_close(self.run(model), outputs[0], rtol=1e-4, atol=1e-4)
        model.load_lora_adapter(tmp_path / "1", **FILE, adapter_name="swapped", hotswap=True)
        torch.testing.assert_close(self.run(model), outputs[1], rtol=1e-4, atol=1e-4)
        assert frames.frame_count == 1
        torch.compiler.reset()
