"""Exported programs of a model with memory: the caller keeps what a run remembers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import toma_fx
from tests.memory_runs import build, calls_of, difference, draw, merging
from toma_fx.errors import ModelError

# A loop as users write it, over requests that take turns.
DRIVE = """
import sys, torch

folder, every, extrapolates, *names = sys.argv[1:]
every, extrapolates = int(every), extrapolates == "True"
programs = {name: torch.export.load(f"{folder}/model.{name}.pt2").module() for name in names}
requests, ran = {}, set()
for request, step, inputs, expected in torch.load(f"{folder}/calls.pt"):
    kept = requests.setdefault(request, {"full": []})
    name = "remember" if step % every == 0 else "recall"
    ran.add(name)
    with torch.no_grad():
        if name == "remember":
            output, plan, memory = programs[name](**inputs)
            kept["before"] = kept.get("memory", memory)
            kept |= {"plan": plan, "memory": memory}
            kept["full"] = [*kept["full"], step][-2:]
        else:
            first, last = kept["full"][0], kept["full"][-1]
            given = {"plan": kept["plan"], "memory": kept["memory"]}
            if extrapolates:
                ahead = torch.tensor((step - last) / max(last - first, 1))
                given |= {"memory_before": kept["before"], "ahead": ahead}
            (output,) = programs[name](**given, **inputs)
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-4)
assert ran == set(names)
assert not any(name.startswith(("toma_fx", "diffusers")) for name in sys.modules)
"""


def inputs_of(call: dict[str, Any]) -> dict[str, Any]:
    """What of a call a program takes."""
    return {name: value for name, value in call.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "every", "options"),
    [
        ("flux", 2, {}),
        ("unet", 3, {"extrapolate": False}),
        pytest.param("unet", 2, {}, marks=pytest.mark.slow),
        pytest.param("wan", 2, {}, marks=pytest.mark.slow),
        pytest.param("flux", 2, {"control": False}, marks=pytest.mark.slow),
        pytest.param("flux", 2, {"theta": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_a_loop_over_programs_needs_only_torch_and_keeps_requests_apart(
    name: str, every: int, options: dict[str, Any], tmp_path: Path
) -> None:
    model = merging(name, every=every, **options)
    example = inputs_of(calls_of(name, seed=9)[2])
    programs = toma_fx.export(model, example, path=tmp_path / "model.pt2")
    assert {*programs} == {"remember", "recall"}
    assert {path.name for path in tmp_path.iterdir()} == {f"model.{n}.pt2" for n in programs}
    assert len(model.toma_state) == 0
    # The same prompt for both: only what the loop hands on tells them apart.
    runs = [calls_of(name, seed=seed) for seed in range(2)]
    outputs = [draw(merging(name, every=every, **options), run) for run in runs]
    calls = [
        (request, step, inputs_of(runs[request][step]), outputs[request][step])
        for step in range(len(runs[0]))
        for request in range(2)
    ]
    torch.save(calls, tmp_path / "calls.pt")
    extrapolates = str(options.get("extrapolate", True))
    command = [sys.executable, "-P", "-c", DRIVE, str(tmp_path), str(every), extrapolates]
    subprocess.run([*command, *programs], check=True, cwd=tmp_path)


@torch.no_grad()
def test_what_the_programs_take_and_return() -> None:
    model, call = merging("flux", region="stripe"), inputs_of(calls_of("flux")[0])
    programs = {name: each.module() for name, each in toma_fx.export(model, call).items()}
    output, plan, memory = programs["remember"](**call)
    assert torch.equal(output, draw(merging("flux", region="stripe"), [call])[0])
    assert set(plan) == {"transformer_blocks", "single_transformer_blocks"}
    assert set(memory) == {block.path for block in model.toma_recipe.merged}
    for updates in memory.values():  # of text and image, whole and merged
        assert [update.shape[1] for update in updates] == [6, 64, 6, 16]
    given = {"plan": plan, "memory": memory}
    (alone,) = programs["recall"](
        **given, memory_before=memory, ahead=torch.tensor(3.0), **call
    )  # which has nothing to extrapolate from
    assert difference(alone, output) < 1e-5


@torch.no_grad()
def test_above_a_level_there_is_a_program_for_untouched_steps() -> None:
    model, calls = merging("flux", merge_below=0.3), calls_of("flux")
    programs = toma_fx.export(model, inputs_of(calls[0]))
    assert {*programs} == {"remember", "recall", "untouched"}
    (output,) = programs["untouched"].module()(**inputs_of(calls[0]))
    assert difference(output, draw(merging("flux", merge_below=0.3), calls[:1])[0]) < 1e-5


def test_one_graph_cannot_hold_all_steps_and_says_what_to_do() -> None:
    call = inputs_of(calls_of("flux")[0])
    with pytest.raises(ModelError, match=r"Memory\(.* model\.compile\(\).*toma_fx.export"):
        torch.export.export(merging("flux"), (), call, strict=False)
    program = torch.export.export(build("flux"), (), call, strict=False)
    with pytest.raises(ModelError, match=r"Memory\(.*takes several graphs.*toma_fx.export"):
        toma_fx.transform(program, memory=toma_fx.Memory())
