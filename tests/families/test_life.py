"""Users' operations on a transformed model of each newer family."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.families.lives import LIVES, first_of, quick_first, run
from tests.matrix.frame import difference
from toma_fx import restore, transform

# diffusers, of its own import in Chroma.
pytestmark = pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning")


class Models:
    """An untouched model of a family, what it draws, and what it draws when it merges."""

    def __init__(self, name: str) -> None:
        self.life = LIVES[name]
        self.untouched = self.life.build()
        self.call = self.life.call(self.untouched)
        self.expected = run(self.untouched, self.call)
        self.merged = transform(self.untouched, ratio=0.5)
        self.drawn = run(self.merged, self.call)
        assert difference(self.drawn, self.expected) > 1e-3

    def check(self, model: Any) -> None:
        """Assert that a model draws what the merged one does."""
        assert torch.equal(run(model, self.call), self.drawn)

    def call_fails_checkpointed(self) -> bool:
        """Whether diffusers cannot checkpoint the untouched model."""
        self.untouched.enable_gradient_checkpointing()
        try:
            self.untouched(**self.call)
        except TypeError:
            return True
        finally:
            self.untouched.disable_gradient_checkpointing()
        return False


@pytest.fixture
def models(request: pytest.FixtureRequest) -> Models:
    return Models(request.param)


EACH = pytest.mark.parametrize("models", LIVES, indirect=True)


@EACH
def test_saved_copied_and_restored(models: Models, tmp_path: Path) -> None:
    merged, cls = models.merged, type(models.untouched)
    models.check(copy.deepcopy(merged))
    models.check(pickle.loads(pickle.dumps(merged)))
    assert merged.config == models.untouched.config
    merged.save_pretrained(tmp_path)
    assert type(merged).__name__ == cls.__name__
    loaded = type(merged).from_pretrained(tmp_path).eval()
    assert type(loaded) is cls
    assert torch.equal(run(loaded, models.call), models.expected)
    models.check(transform(loaded, ratio=0.5))
    other = models.life.build(seed=1)
    assert difference(run(transform(other), models.call), models.drawn) > 1e-2
    other = transform(other, ratio=0.5)
    other.load_state_dict(models.untouched.state_dict())
    models.check(other)
    back = restore(other)
    assert type(back) is cls
    assert torch.equal(run(back, models.call), models.expected)


def _group_offload(model: Any) -> Any:
    model.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1)
    return model


def _leaf_offload(model: Any) -> Any:
    model.enable_group_offload("cpu", offload_type="leaf_level")
    return model


def _accelerate_offload(model: Any) -> Any:
    return accelerate.cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("offload", [_group_offload, _leaf_offload, _accelerate_offload])
@pytest.mark.parametrize("models", quick_first(LIVES), indirect=True)
def test_offloaded(models: Models, offload: Callable[[Any], Any]) -> None:
    models.check(offload(models.merged))


@EACH
def test_cast_layer_by_layer(models: Models) -> None:
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    models.untouched.enable_layerwise_casting(**cast)
    before = run(transform(models.untouched, ratio=0.5), models.call)
    after = transform(models.life.build(), ratio=0.5)
    after.enable_layerwise_casting(**cast)
    assert torch.equal(run(after, models.call), before)
    assert difference(before, models.drawn) > 1e-4
    assert torch.equal(run(restore(after), models.call), run(models.untouched, models.call))


@pytest.mark.parametrize("own", [False, True], ids=["torch's", "a user's"])
@EACH
def test_gradient_checkpointing(models: Models, own: bool) -> None:
    if not own and models.call_fails_checkpointed():
        pytest.skip("diffusers' own error: a block is given an argument by name")
    if "attention_mask" in models.call:  # which diffusers' checkpointed blocks are not all given
        models.call["attention_mask"] = None
        models.drawn = run(models.merged, models.call)
    runs = []

    def counted(block: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(block)
        return checkpoint(block, *args, use_reentrant=False, **kwargs)

    grads = []
    for checkpointed in (False, True):
        model = models.merged
        if checkpointed:
            model.enable_gradient_checkpointing(*[counted] if own else [])
        model.train().zero_grad()
        output = model(**models.call, return_dict=False)[0]
        output = output if isinstance(output, Tensor) else torch.stack(output)
        torch.testing.assert_close(output.detach(), models.drawn, rtol=1e-4, atol=1e-4)
        output.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert bool(runs) == own
    plain, saved = grads
    assert plain.keys() == saved.keys()
    largest = max(float(grad.abs().max()) for grad in plain.values())
    for name, grad in plain.items():
        torch.testing.assert_close(saved[name], grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


@EACH
def test_two_threads_at_two_sizes(models: Models) -> None:
    calls = [models.call, models.life.other(models.untouched)]
    alone = [run(models.merged, call) for call in calls]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            drawn = pool.map(lambda call: run(models.merged, call), calls)
            for one, other in zip(alone, drawn, strict=True):
                assert torch.equal(one, other)


@EACH
def test_each_row_of_a_batch_is_what_it_is_alone(models: Models) -> None:
    first = first_of(models.call)
    alone = run(models.merged, first)
    assert difference(models.drawn[:1], alone) < 1e-4
    assert difference(models.expected[:1], alone) > 1e-3
