"""The trained pipelines that the repository holds, and how they are called to draw at their best.

A wheel holds none of them.
"""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "small_models"
PROMPTS = FOLDER / "prompts.txt"
"""Scenes that their training did not show."""
CALIBRATION = FOLDER / "calibration.txt"
"""Others, for `toma-fx calibrate`."""

_SIZE = {"height": 128, "width": 128}
_SETTINGS: dict[str, dict[str, Any]] = {
    "sdxl": {**_SIZE, "guidance": 3.0},
    # The text length and the guidance of its training; its guidance embedding says nothing.
    "flux": {**_SIZE, "arguments": {"true_cfg_scale": 2.0, "max_sequence_length": 24}},
}


def own_settings(model: str) -> dict[str, Any]:
    """Fields of `toma_fx.lab.draw.Task` that the model's card names.

    Args:
        model: hub name or folder; empty for all but the repository's own.
    """
    path = Path(model).resolve()
    return _SETTINGS.get(path.name, {}) if path.parent == FOLDER else {}
