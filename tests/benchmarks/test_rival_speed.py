"""Rivals are timed beside our models, or the table says why not."""

from typing import Any

import torch

from benchmarks.rivals import main, rival_contenders, tomesd
from tests.tiny import tiny_flux, tiny_sdxl_unet
from toma_fx.bench.compare import compare
from toma_fx.bench.contenders import Setting
from toma_fx.bench.levels import Timed, models

SETTING = Setting(height=128, dtype=torch.float32, repeats=1, compiled=False)


def timed_with_tomesd(model: Any) -> Timed:
    (timed,) = models(
        model, SETTING, rivals=lambda call: rival_contenders([tomesd()], model, SETTING, call)
    )
    return timed


def test_rivals_run_or_say_why() -> None:
    with torch.no_grad():
        outputs: list[Any] = [e.run() for e in timed_with_tomesd(tiny_sdxl_unet()).contenders]
    assert not torch.allclose(outputs[0].sample, outputs[-1].sample)  # it acts
    row = compare(timed_with_tomesd(tiny_flux()), SETTING, title="tiny").rows[-1]
    assert row["contender"] == "tomesd, eager"
    assert "merges in UNets" in row["failure"]


def test_the_table_names_rivals_by_name_and_by_file(tmp_path: Any, capsys: Any) -> None:
    tiny_sdxl_unet().save_pretrained(tmp_path)
    chosen = ["--rival", "tomesd", "tofu", "examples/rivals/todo.py", "--variant", "default"]
    how = ["--height", "128", "--repeats", "1", "--eager", "--dtype", "float32"]
    main([str(tmp_path), *chosen, *how])
    shown = capsys.readouterr().out
    for name in ("tomesd, eager", "tofu, eager", "todo, eager", "default"):
        assert name in shown
