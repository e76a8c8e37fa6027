"""Token Merge with Attention as a torch.fx graph transformation of diffusers models.

Public names are imported on first use, so that ``import toma_fx`` costs little more than Python.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

_HERE = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_HERE, "passes")):
    # A checkout in which links became files, as git makes them on Windows. The folders that they
    # name are beside this one, and no other checkout's may be taken, which may be installed.
    _BESIDE = os.path.dirname(_HERE)
    for _name in ("passes", "runtime"):
        if not os.path.isfile(os.path.join(_BESIDE, _name, "__init__.py")):
            raise ImportError(
                f"{_HERE} holds no folder {_name!r}, and neither does {_BESIDE}: a part of toma_fx "
                "is missing; install it with pip install, or check the repository out again"
            )
    __path__.append(_BESIDE)

if TYPE_CHECKING:
    from toma_fx.backend import backend as backend
    from toma_fx.calibrate import Calibration as Calibration
    from toma_fx.calibrate import calibrate as calibrate
    from toma_fx.calibrate_theta import ThetaCalibration as ThetaCalibration
    from toma_fx.calibrate_theta import calibrate_theta as calibrate_theta
    from toma_fx.config import MergeConfig as MergeConfig
    from toma_fx.derive import derive as derive
    from toma_fx.errors import TomaError as TomaError
    from toma_fx.errors import TomaWarning as TomaWarning
    from toma_fx.export import export as export
    from toma_fx.report import report as report
    from toma_fx.runtime.current_order import token_order as token_order
    from toma_fx.schedule import Memory as Memory
    from toma_fx.schedule import Schedule as Schedule
    from toma_fx.tracing import trace as trace
    from toma_fx.transform import restore as restore
    from toma_fx.transform import transform as transform

__version__ = "0.1.0"

_MODULES = {
    "Calibration": "toma_fx.calibrate",
    "Memory": "toma_fx.schedule",
    "MergeConfig": "toma_fx.config",
    "Schedule": "toma_fx.schedule",
    "ThetaCalibration": "toma_fx.calibrate_theta",
    "TomaError": "toma_fx.errors",
    "TomaWarning": "toma_fx.errors",
    "backend": "toma_fx.backend",
    "calibrate": "toma_fx.calibrate",
    "calibrate_theta": "toma_fx.calibrate_theta",
    "derive": "toma_fx.derive",
    "export": "toma_fx.export",
    "report": "toma_fx.report",
    "restore": "toma_fx.transform",
    "token_order": "toma_fx.runtime.current_order",
    "trace": "toma_fx.tracing",
    "transform": "toma_fx.transform",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: object) -> None:
        # Importing toma_fx.report sets toma_fx.report to that module; the function stays.
        if name not in _MODULES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a checker would take any name for one that __getattr__ has
    __all__ = list(_MODULES)

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_MODULES[name]), name)
        return value

    def __dir__():
        return sorted({*globals(), *_MODULES})
