"""torch.compile and torch.export."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checks.base import Base


class Compiling(Base):
    """The numbers of the uncompiled model; graphs are counted in ``test_compile``."""

    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

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
