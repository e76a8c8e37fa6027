"""Offloading and layerwise casting, as far as a CPU runs them."""

import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import toma_fx
from tests.checks.base import Base, changed

CPU = torch.device("cpu")


class Memory(Base):
    """What saves memory works after `transform`."""

    def test_accelerate_offloads_to_cpu_and_disk(self, tmp_path: Path) -> None:
        output = self.run(self.merged())
        self.same(accelerate.cpu_offload(self.merged(), CPU), output)
        model = self.merged()
        accelerate.disk_offload(model, tmp_path, CPU)
        assert any(tmp_path.iterdir())
        self.same(model, output)

    @pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
    def test_group_offload(self, kind: str, tmp_path: Path) -> None:
        def offload(model: Any, **options: Any) -> None:
            count = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            model.enable_group_offload(CPU, offload_type=kind, **count, **options)

        output = self.run(self.merged())
        for options in ({}, {"non_blocking": True}, {"offload_to_disk_path": str(tmp_path)}):
            model = self.merged()
            offload(model, **options)
            self.same(model, output)

    @pytest.mark.parametrize("storage", [torch.float16, torch.float8_e4m3fn], ids=str)
    def test_layerwise_casting(self, storage: torch.dtype) -> None:
        model = self.merged()
        output, size = self.run(model), model.get_memory_footprint()
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        assert model.get_memory_footprint() < size
        cast = self.run(model)
        assert cast.isfinite().all()
        assert not torch.equal(cast, output)  # rounded
        before = self.untouched()
        before.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        self.same(self.merged(before), cast)
        assert changed(cast, self.run(before))

    def test_layerwise_casting_after_transforming_stays_when_it_is_restored(self) -> None:
        cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
        reference = self.untouched()
        reference.enable_layerwise_casting(**cast)
        transformed = self.merged()
        transformed.enable_layerwise_casting(**cast)
        merged = self.run(transformed)
        assert changed(merged, self.run(reference))
        self.same(toma_fx.restore(transformed), self.run(reference))
        assert torch.equal(self.run(self.merged(transformed)), merged)

    def test_layerwise_casting_in_training(self) -> None:
        model = self.merged().train()
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
        with torch.autocast("cpu"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
            output = model(**self.inputs()).sample
        output.square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
