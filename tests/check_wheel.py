"""Build an sdist, and a wheel from it; look into both; transform a model with the wheel.

The sdist holds every file that is under version control, and the wheel every module of toma_fx and
nothing of the repository beside it. `toma_fx.bench` runs without the part that evaluates images.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROGRAM = """
import importlib, pathlib, pkgutil, sys
import torch, diffusers
import toma_fx, toma_fx.bench
for module in pkgutil.iter_modules(toma_fx.bench.__path__, "toma_fx.bench."):
    importlib.import_module(module.name)
assert not [name for name in sys.modules if name.startswith("toma_fx.lab")], "bench needs the lab"
import toma_fx.cli
from toma_fx import passes, runtime
from toma_fx.inputs import random_inputs

site = pathlib.Path(sys.argv[1])
for module in (toma_fx, passes, runtime):
    assert site in pathlib.Path(module.__file__).parents, f"{module} is not the installed one"
assert (site / "toma_fx/py.typed").exists()
torch.manual_seed(0)
model = diffusers.FluxTransformer2DModel(
    num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
    axes_dims_rope=(4, 6, 6), in_channels=4, joint_attention_dim=8, pooled_projection_dim=8,
)
transformed = toma_fx.transform(model)
inputs = random_inputs(model, height=128)
with torch.no_grad():
    assert not torch.equal(model(**inputs).sample, transformed(**inputs).sample)
assert toma_fx.report(transformed, height=128).saved > 0
print(toma_fx.__version__, "works from its wheel")
"""


NOT_IN_SDIST = {".gitignore", "toma_fx/passes", "toma_fx/runtime"}  # the last two are links


def check_sdist(sdist: Path) -> None:
    """Everything that git knows is in the sdist."""
    if not (ROOT / ".git").exists():
        return  # the tree is an unpacked sdist itself
    git = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(git, check=True, capture_output=True, text=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = tracked - held - NOT_IN_SDIST
    assert not missing, f"the sdist lacks {sorted(missing)}; name them in MANIFEST.in"


def check_wheel(wheel: Path) -> None:
    """The wheel's modules are the tree's, byte for byte."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name: setuptools["package-dir"].get(name) for name in setuptools["packages"]}
    paths = {name.replace(".", "/"): folder for name, folder in folders.items()}
    tree = {
        f"{package}/{file.name}": file.read_bytes()
        for package, folder in paths.items()
        for file in (ROOT / (folder or package)).iterdir()
        if file.suffix == ".py" or file.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        held = {name: archive.read(name) for name in names}
    folders_held = {name.partition("/")[0] for name in held}
    assert folders_held == {"toma_fx"}, f"the wheel also holds {sorted(folders_held - {'toma_fx'})}"
    lines = sum(data.count(b"\n") for name, data in held.items() if name.endswith(".py"))
    size = sum(len(data) for name, data in held.items() if name.endswith(".py"))
    print(f"the wheel holds {lines} lines of Python, {size / 1000:.0f} kB")
    different = sorted(n for n in tree.keys() | held.keys() if tree.get(n) != held.get(n))
    assert not different, f"wheel and tree differ in {different}"


def check_readme(wheel: Path) -> None:
    """What an index shows is the README, and no link or picture of it leads nowhere."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        shown = archive.read(name).decode().partition("\n\n")[2]
    title = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[0]
    assert shown.startswith(title), f"the index would show {shown[:80]!r}"
    relative = re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", shown)
    assert not relative, f"links of the readme on an index lead nowhere: {relative}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist, site = Path(folder, "dist"), Path(folder, "site")
        python = [sys.executable, "-m"]
        build = [*python, "build", "--outdir", str(dist), str(ROOT)]
        subprocess.run(build, check=True, capture_output=True)
        (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
        check_sdist(sdist)
        check_wheel(wheel)
        check_readme(wheel)
        subprocess.run([*python, "twine", "check", "--strict", str(sdist), str(wheel)], check=True)
        install = ["pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
        subprocess.run([*python, *install], check=True)
        environment = {**os.environ, "PYTHONPATH": str(site)}
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(site)], check=True, cwd=folder, env=environment
        )


if __name__ == "__main__":
    main()
