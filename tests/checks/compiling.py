"""torch.compile and torch.export."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.checks.base import Base


class Compiling(Base):
    """No graph break, no recompilation, the numbers of the uncompiled model."""

    sizes: ClassVar[list[dict[str, int]]]
    """Sizes of images that one dynamic graph serves."""

    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def test_whole_model(self) -> None:
        model, output = self.merged(), self.run(self.merged())
        model.compile(fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            self.same(model, output)
            self.same(model, output)

    def test_repeated_blocks(self) -> None:
        model, output = self.merged(), self.run(self.merged())
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager", dynamic=False)
        self.same(model, output)
        with torch._dynamo.config.patch(error_on_recompile=True):
            self.same(model, output)

    @torch.no_grad()
    def test_sizes(self) -> None:
        frames, model = CompileCounter(), self.merged()
        compiled: Any = torch.compile(model, fullgraph=True, dynamic=True, backend=frames)
        for size in self.sizes:
            inputs = self.inputs(**size)
            torch.testing.assert_close(compiled(**inputs).sample, model(**inputs).sample)
        assert frames.frame_count == 1

    @torch.no_grad()
    def test_compiled_group_offload(self) -> None:
        model, output = self.merged(), self.run(self.merged())
        model.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1)
        model.compile(backend="eager")
        self.same(model, output)
        self.same(model, output)

    @torch.no_grad()
    def test_export(self, tmp_path: Path) -> None:
        model = self.merged()
        program = torch.export.export(model, (), self.inputs(), strict=False)
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        self.same(loaded, self.run(model))

    @pytest.mark.slow
    @torch.no_grad()
    def test_ahead_of_time(self, tmp_path: Path) -> None:
        model = self.merged()
        program = torch.export.export(model, (), self.inputs(), strict=False)
        path = str(tmp_path / "model.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        package = torch._inductor.aoti_load_package(path)
        self.same(package, self.run(model))
