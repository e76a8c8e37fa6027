"""``toma-fx bench`` from end to end, on models of a test."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from toma_fx.bench import presets
from toma_fx.bench.contenders import Setting
from toma_fx.bench.operators import OPERATORS
from toma_fx.bench.record import Record
from toma_fx.cli import main

TINY = ["bench", "--tiny", "--repeats", "1", "--eager"]


def run(*arguments: str, out: Path) -> list[dict[str, Any]]:
    assert main([*TINY, *arguments, "--out", str(out)]) == 0
    (file,) = out.glob("*.json")
    whole = json.loads(file.read_text())
    assert "toma-fx bench --tiny" in whole["command"]
    tables: list[dict[str, Any]] = whole["tables"]
    return tables


@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_model_level_is_the_default(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (table,) = run(model, "--ratio", "0.25", "0.5", out=tmp_path)
    shown = [(row["contender"], row["ratio"]) for row in table["rows"]]
    ours = [(name, ratio) for ratio in (0.25, 0.5) for name in ("lower_bound", "default")]
    assert shown == [("untouched, eager", None), *ours]
    planned = [row["planning_seconds"] for row in table["rows"] if row["contender"] == "default"]
    assert all(seconds > 0 for seconds in planned)
    assert "of the bound's saving" in capsys.readouterr().out


def test_all_variants_and_rival_files(tmp_path: Path) -> None:
    rival = str(Path(__file__).parents[2] / "examples" / "rivals" / "todo.py")
    (table,) = run("--variants", "all", "--rival", rival, out=tmp_path)
    names = [row["contender"] for row in table["rows"] if not row["failure"]]
    assert names[1:6] == ["lower_bound", "default", "toma", "toma_tile", "toma_stripe"]
    assert names[6:] == ["toma_once", "tomesd, eager", "todo, eager"]


def test_operators_write_a_plot_of_what_varies(tmp_path: Path) -> None:
    sizes = ["--tokens", "64", "256", "--channels", "16", "--region-tokens", "16", "64"]
    (table,) = run("--level", "op", "--cpu-time", *sizes, out=tmp_path)
    assert any("CPU time" in note for note in table["notes"])
    assert {row["region_tokens"] for row in table["rows"]} == {16, 64}
    assert len(list(tmp_path.glob("*.png"))) == 1


def test_operators_vary_one_by_one_from_the_first(tmp_path: Path) -> None:
    sizes = ["--tokens", "64", "256", "--channels", "16", "--region-tokens", "16", "64"]
    (table,) = run("--level", "op", "--one-by-one", "--batch", "1", "2", *sizes, out=tmp_path)
    found = {(row["tokens"], row["batch"], row["region_tokens"]) for row in table["rows"]}
    assert found == {(64, 1, 16), (256, 1, 16), (64, 2, 16), (64, 1, 64)}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("build", [tiny_sdxl_pipeline, tiny_flux_pipeline])
def test_images_of_a_checkpoint_have_a_psnr(build: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "pipeline")
    build().save_pretrained(folder)
    image = ["--level", "image", "--steps", "2", "--size", "128", "--dtype", "float32"]
    (table,) = run(folder, *image, "--variants", "default:skip=", out=tmp_path / "out")
    untouched, merged = table["rows"]
    assert untouched["psnr"] is None
    assert 5 < merged["psnr"] < 100


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize("model", ["sdxl", "flux"])
def test_images_of_random_weights(model: str, tmp_path: Path) -> None:
    (table,) = run(model, "--level", "image", "--steps", "1", "--no-memory", out=tmp_path)
    assert [row["contender"] for row in table["rows"]][1:] == ["lower_bound", "default"]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["bench", "--variants", "steps=4"], "takes fewer steps"),
        (["bench", "--repeats", "0"], "repeats=0"),
        (["bench", "--tiny", "--blocks", "1", "2"], "blocks=(1, 2)"),
        (["bench", "--level", "block", "--tiny", "--stack"], "--stack is for"),
        (["bench", "--cpu-time", "--preset", "readme"], "--cpu-time sees nothing"),
        (["bench", "elsewhere", "--level", "op"], "give --tokens"),
        (["bench", "elsewhere", "--tiny"], "tiny=True is for random weights"),
        (["bench", "--cold", "--eager"], "eager=True has no meaning with --cold"),
        (["bench", "--cold", "--out", "there"], "out=there has no meaning with --cold"),
        (["bench", "--cold", "--level", "block"], "level=block has no meaning with --cold"),
        (["bench", "--cold", "--variants", "tomesd"], "variants=tomesd has no meaning"),
        (["bench", "--cold", "--batch", "1", "2"], "batch=[1, 2] must be one number"),
        (["bench", "--cold", "--blocks", "1", "2"], "blocks=(1, 2)"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_cold_starts_have_processes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["flux", "--cold", "--tiny", "--blocks", "1", "1", "--size", "128"]
    # Without its options the process would start on all of Flux, which is larger than a test.
    assert main(["bench", *arguments, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "untouched" in out and "default 0.5" in out


def test_more_weights_than_memory_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toma_fx.bench.contenders.available_memory", lambda: 2**20)
    assert main(["bench", "flux"]) == 2
    assert "--blocks 1" in capsys.readouterr().err


def test_a_preset_goes_on_after_a_failure_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise RuntimeError("out of memory")

    def good() -> Any:
        return [presets._operators(Setting(tiny=True, compiled=False))]

    parts = {"one": fail, "two": good}
    monkeypatch.setitem(presets.PRESETS, "readme", lambda tiny, compiled: parts)
    assert main(["bench", "--preset", "readme", "--tiny", "--out", str(tmp_path)]) == 2
    assert "RuntimeError: out of memory" in capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    failed, measured = json.loads(file.read_text())["tables"]
    assert failed["rows"] == [{"part": "one", "failure": "RuntimeError: out of memory"}]
    assert len(measured["rows"]) == len(OPERATORS) + 2  # tomesd merges and unmerges


def test_parts_after_the_time_are_named_not_dropped() -> None:
    tables = list(presets.run_preset("h200", Record(command=""), tiny=True, minutes=0.0))
    assert len(tables) == len(presets.h200(tiny=True))
    assert all("not started after" in table.rows[0]["failure"] for table in tables)


PRESETS = pytest.mark.parametrize("name", ["readme", "h200"])


def check_preset(name: str, *, compiled: bool) -> None:
    record = Record(command=name)
    how: dict[str, Any] = {"tiny": True, "compiled": compiled, "minutes": 60.0}
    tables = list(presets.run_preset(name, record, **how))
    plain = [table for table in tables if "additions" not in table.title]  # some need a GPU
    assert [row["failure"] for t in plain for row in t.rows if row.get("failure")] == []
    assert record.tables == tables


@PRESETS
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_presets_run_at_small_size(name: str) -> None:
    check_preset(name, compiled=False)


@pytest.mark.slow
@PRESETS
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_presets_run_compiled(name: str) -> None:
    check_preset(name, compiled=True)
