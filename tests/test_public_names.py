"""The names of the package, whichever of them or of its modules is asked for first."""

import ast
import inspect
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import toma_fx

ROOT = Path(__file__).parent.parent
NAMES: list[str] = toma_fx.__all__  # type: ignore[attr-defined]
BOTH = ["backend", "calibrate", "derive", "export", "report", "transform"]
"""A function of the package, and the module that holds it."""

PROGRAM = """
import sys
from importlib import import_module
from types import FunctionType
import toma_fx

names = sys.argv[1:]
for name in names:
    import_module(f"toma_fx.{name}")
    for each in names:
        assert each not in vars(toma_fx), f"toma_fx.{each} is a module once {name} is imported"
for name in names:
    function = getattr(toma_fx, name)
    assert type(function) is FunctionType and function.__name__ == name, name
for name in names:
    function = getattr(toma_fx, name)
    del sys.modules[f"toma_fx.{name}"]  # so that the module comes after the name
    import_module(f"toma_fx.{name}")
    assert getattr(toma_fx, name) is function, name
"""


@pytest.mark.parametrize("names", [BOTH, BOTH[::-1]], ids=["a to z", "z to a"])
def test_functions_stay_in_every_order(names: list[str]) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BOTH)
def test_a_function_outlasts_its_module_being_set(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = getattr(toma_fx, name)
    module = import_module(f"toma_fx.{name}")
    setattr(toma_fx, name, module)  # as an import does
    assert getattr(toma_fx, name) is function
    monkeypatch.delattr(toma_fx, name)
    setattr(toma_fx, name, module)
    assert getattr(toma_fx, name) is function
    monkeypatch.setattr(toma_fx, name, test_a_function_outlasts_its_module_being_set)
    assert getattr(toma_fx, name) is test_a_function_outlasts_its_module_being_set


def test_every_name_is_there() -> None:
    star: dict[str, Any] = {}
    exec("from toma_fx import *", star)
    for name in NAMES:
        value = getattr(toma_fx, name)
        assert star[name] is value
        assert not isinstance(value, ModuleType)
        assert value.__module__ == toma_fx._MODULES[name]
        assert pickle.loads(pickle.dumps(value)) is value
    assert {*NAMES, "__version__"} <= {*dir(toma_fx)}
    assert sorted(NAMES) == NAMES


def test_checkers_and_editors_see_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(toma_fx))
    conditions = (node for node in tree.body if isinstance(node, ast.If))
    guarded = next(node for node in conditions if ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert seen == toma_fx._MODULES


def test_other_names_are_errors() -> None:
    with pytest.raises(AttributeError, match="module 'toma_fx' has no attribute 'transfrom'"):
        _ = toma_fx.transfrom  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="transfrom"):
        from toma_fx import transfrom  # type: ignore[attr-defined] # noqa: F401


def test_modules_are_attributes_once_imported() -> None:
    import toma_fx.passes.capture

    assert toma_fx.passes.capture is sys.modules["toma_fx.passes.capture"]
