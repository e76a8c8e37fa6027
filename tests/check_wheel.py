"""Build sdist and wheel, install the wheel outside the tree, and transform a model with it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

PROGRAM = """
import pathlib, sys
import torch, diffusers
import toma_fx, toma_fx.cli
from toma_fx import passes, runtime

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
inputs = toma_fx.inputs.random_inputs(model, height=128)
with torch.no_grad():
    assert not torch.equal(model(**inputs).sample, transformed(**inputs).sample)
assert toma_fx.report(transformed, height=128).saved > 0
print(toma_fx.__version__, "works from its wheel")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist, site = Path(folder, "dist"), Path(folder, "site")
        python = [sys.executable, "-m"]
        build = [*python, "build", "--outdir", str(dist), str(ROOT)]
        subprocess.run(build, check=True, capture_output=True)
        (wheel,) = dist.glob("*.whl")
        install = ["pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
        subprocess.run([*python, *install], check=True)
        environment = {**os.environ, "PYTHONPATH": str(site)}
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(site)], check=True, cwd=folder, env=environment
        )


if __name__ == "__main__":
    main()
