"""The trained pipelines of the repository, and the settings with which they draw best.

A wheel holds none of them.
"""

from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "small_models"
PROMPTS = FOLDER / "prompts.txt"
"""Prompts of scenes that their training did not show."""
CALIBRATION = FOLDER / "calibration.txt"
"""Other prompts, for `toma-fx calibrate`."""

_SETTINGS: dict[str, dict[str, Any]] = {
    "sdxl": {"height": 256, "width": 256, "guidance": 7.5},
    # The text length and the guidance of its training; its guidance embedding says nothing.
    "flux": {
        "height": 128,
        "width": 128,
        "arguments": {"true_cfg_scale": 2.0, "max_sequence_length": 24},
    },
}


def own_settings(model: str) -> dict[str, Any]:
    """Fields of `toma_fx.lab.draw.Task` that the model's card names.

    Args:
        model: hub name or folder. For all but the repository's own models there are no fields.
    """
    path = Path(model).resolve()
    return _SETTINGS.get(path.name, {}) if path.parent == FOLDER else {}
