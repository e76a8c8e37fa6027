"""Token Merge with Attention as a torch.fx graph transformation of diffusers models."""

from toma_fx.backend import backend
from toma_fx.calibrate import Calibration, calibrate
from toma_fx.config import MergeConfig, Schedule
from toma_fx.errors import TomaError
from toma_fx.export import export
from toma_fx.report import report
from toma_fx.tracing import trace
from toma_fx.transform import restore, transform

__version__ = "0.1.0"
__all__ = [
    "Calibration",
    "MergeConfig",
    "Schedule",
    "TomaError",
    "backend",
    "calibrate",
    "export",
    "report",
    "restore",
    "trace",
    "transform",
]
