"""The GPU kernels: their devices, their compiled code and, through `kernel_cases`, their picks."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from tests.runtime.tokens import cut, random_tokens, signs
from toma_fx.runtime import selector
from toma_fx.runtime.selector import KERNEL_TOKENS, facility_location_by_loop

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from toma_fx.runtime import kernels  # noqa: E402

ROOT = Path(__file__).parent.parent.parent
SHARED_MEMORY = 99 * 1024
"""Bytes that a program can have on the smallest GPUs from compute capability 8.0 on."""


def run_cases(environment: dict[str, str]) -> None:
    cases = Path(__file__).with_name("kernel_cases.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(cases)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


def test_kernels_under_the_interpreter() -> None:
    run_cases({"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu() -> None:
    run_cases({"TRITON_INTERPRET": "0"})


# What they compile to: triton needs no GPU to compile for one.


class Launch:
    """Stands where a kernel is launched, and keeps what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.arguments = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}

        return launch

    def compile(self, capability: int) -> Any:
        """As the launch would: numbers of 1 are constants, multiples of 16 known as such."""
        warps = self.arguments.pop("num_warps")
        types, constants, hints = {}, {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            value = self.arguments[name]
            if name.isupper() or (isinstance(value, int) and value == 1):
                types[name], constants[name] = "constexpr", value
                continue
            number = 16 if isinstance(value, Tensor) else value
            if number % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
            types[name] = TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
        source = ASTSource(self.kernel, types, constants, hints)
        target = GPUTarget("cuda", capability, 32)
        return triton.compile(source, target=target, options={"num_warps": warps})


TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


def spilled_bytes(ptx: str, capability: int, folder: Path) -> int:
    """Bytes that do not fit in registers, as NVIDIA's assembler reports them."""
    assembler = str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")
    (folder / "kernel.ptx").write_text(ptx)
    architecture = f"sm_{capability}" + ("a" if capability >= 90 else "")
    command = [assembler, "-v", f"--gpu-name={architecture}", "kernel.ptx", "-o", "kernel.cubin"]
    report = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    (spilled,) = re.findall(r"(\d+) bytes spill stores", report.stderr)
    return int(spilled)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *[(size, torch.bfloat16) for size in (16, 64, 256)],
        *[(size, torch.float32) for size in (64, 128)],
    ],
)
def test_kernels_fit_on_chip(
    size: int, dtype: torch.dtype, capability: int, padded: bool, tmp_path: Path
) -> None:
    launches = Launch(kernels._pick_by_tokens), Launch(kernels._pick_by_similarity)
    tokens = torch.zeros(2, 2 * size, 640, dtype=dtype)
    counts = torch.tensor([size, size - 1]) if padded else None
    kernels._launch(*launches, tokens, size, size // 2, counts)
    (launch,) = [launch for launch in launches if launch.arguments]
    compiled = launch.compile(capability)

    assert compiled.metadata.shared <= SHARED_MEMORY
    if size != 128:  # which keeps a quarter of an SM's registers in one variable
        assert spilled_bytes(compiled.asm["ptx"], capability, tmp_path) == 0
    if launch is launches[0]:
        matrix_product = "wgmma.mma_async" if capability == 90 else "mma.sync"
        assert matrix_product in compiled.asm["ptx"]


# Where they are chosen.


@pytest.mark.parametrize("counts", [None, torch.tensor([32, 31, 5])])
def test_the_operator_runs_the_loop_on_the_cpu(counts: Tensor | None) -> None:
    tokens = signs(2, 96, 16, seed=0)
    picks = torch.ops.toma.facility_location(tokens, 32, 7, counts)
    assert torch.equal(picks, facility_location_by_loop(tokens, 32, 7, counts))
    torch.library.opcheck(
        torch.ops.toma.facility_location.default,
        (tokens, 32, 7, counts),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_a_kernel_is_chosen_on_gpus_that_triton_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    def capability_of(device: torch.device) -> tuple[int, int]:
        return {0: (7, 5), 1: (8, 0), 2: (12, 0)}[device.index]

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
    devices = [torch.device(name) for name in ("cpu", "meta", "cuda:0", "cuda:1", "cuda:2")]
    chosen = [selector._runs_kernels(device) for device in devices]
    assert chosen == [False, False, False, True, True]


@pytest.fixture
def kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this machine had a GPU, for what is traced and not run."""

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(selector, "_runs_kernels", lambda device: True)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())


def traced(function: Any, tokens: Tensor, **options: Any) -> fx.GraphModule:
    """What Inductor would get to compile."""
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *args: (torch.zeros(()),)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep)
    torch.compile(function, backend=backend, fullgraph=True, **options)(tokens)  # type: ignore[no-untyped-call]
    (graph,) = graphs
    return graph


class Select(nn.Module):
    """With a size that is a constant of its graph, as a model's is."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, tokens: Tensor) -> Any:
        return torch.ops.toma.select(tokens, cut(tokens, self.size), "facility_location")


LAUNCH = torch.ops.higher_order.triton_kernel_wrapper_functional
LOOP = torch.ops.higher_order.while_loop


@pytest.mark.usefixtures("kernels_run_here")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("size", [16, 64, KERNEL_TOKENS])
def test_a_compiled_graph_holds_one_launch(size: int, dynamic: bool) -> None:
    graph = traced(Select(size), random_tokens(2, 2 * KERNEL_TOKENS, 24), dynamic=dynamic).graph
    (launch,) = graph.find_nodes(op="call_function", target=LAUNCH)
    assert launch.kwargs["tensors_to_clone"] == ["picks"]  # the tokens are known to be only read
    assert not graph.find_nodes(op="call_function", target=LOOP)


@pytest.mark.usefixtures("kernels_run_here")
def test_one_launch_serves_many_sizes_that_regions_do_not_divide() -> None:
    graph = traced(Select(64), random_tokens(2, 1357, 24), dynamic=True).graph
    (launch,) = graph.find_nodes(op="call_function", target=LAUNCH)
    assert launch.kwargs["tensors_to_clone"] == ["picks"]
    into_places = torch.ops.aten.index_select.default
    assert len(graph.find_nodes(op="call_function", target=into_places)) == 1
    assert not graph.find_nodes(op="call_function", target=LOOP)


@pytest.mark.usefixtures("kernels_run_here")
def test_larger_regions_keep_the_loop() -> None:
    graph = traced(Select(KERNEL_TOKENS + 1), random_tokens(1, 2 * (KERNEL_TOKENS + 1), 24)).graph
    assert graph.find_nodes(op="call_function", target=LOOP)
    assert not graph.find_nodes(op="call_function", target=LAUNCH)


FIRST_USE = """
import sys
import torch
before = set(sys.modules)
import toma_fx.runtime
new = {name for name in set(sys.modules) - before if not name.startswith("toma_fx")}
assert not new, new  # least of all triton and torch's compiler

from toma_fx.runtime import selector
selector._runs_kernels = lambda device: True
tokens = torch.empty(2, 64, 24, device="meta")
picks = torch.ops.toma.select(tokens, [8, 16, 64, 4], "facility_location")
assert picks.shape == (2, 4, 8)
assert "toma_fx.runtime.kernels" in sys.modules
"""


def test_the_kernels_are_imported_when_they_are_first_used() -> None:
    subprocess.run([sys.executable, "-c", FIRST_USE], check=True, cwd=ROOT)


PROGRAM = """
import sys
sys.modules.update(toma_fx=None, triton=None)  # importing either is an error
import torch
program = torch.export.load("program.pt2")
targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
assert "while_loop" in targets, targets
tokens, expected = torch.load("case.pt")
assert torch.equal(program.module()(tokens), expected)
"""


@pytest.mark.usefixtures("kernels_run_here")
def test_an_exported_program_holds_the_loop_and_runs_without_us(tmp_path: Path) -> None:
    tokens = random_tokens(2, 64, 24)
    program = torch.export.export(Select(16), (tokens,), strict=False).run_decompositions()
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((tokens, Select(16)(tokens)), tmp_path / "case.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=tmp_path, env=environment)
