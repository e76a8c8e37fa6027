"""Calibrations in folders and on the hub: reading, refusals and their messages."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import toma_fx
from tests.lab.test_calibrate import made_up
from tests.pipelines import tiny_flux_pipeline, tiny_sdxl_pipeline
from tests.tiny import tiny_flux, tiny_sdxl_unet
from toma_fx import Calibration, Memory, MergeConfig, ThetaCalibration
from toma_fx.calibration_files import Origin, architecture_hash, origin_of
from toma_fx.errors import ConfigError, ModelError
from toma_fx.setting import config_of

ROOT = Path(__file__).parents[2]
ORIGIN = Origin(
    name="small",
    model="UNet2DConditionModel",
    source="owner/small",
    hash=architecture_hash(tiny_sdxl_unet()),
    steps=25,
    guidance=7.5,
    toma_fx=toma_fx.__version__,
)
RATIOS = replace(made_up({"a": 1.0, "b": 2.0}, {"a": 100, "b": 50}), origin=ORIGIN)
THETA = ThetaCalibration(
    base=MergeConfig(ratio=0.9, memory=Memory()), errors={0.0: 0.3, 0.5: 0.1}, origin=ORIGIN
)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A cache as huggingface_hub lays it out, with a repository in which a calibration is."""
    repository = tmp_path / "hub" / "models--owner--calibrations"
    commit = "0123456789abcdef0123456789abcdef01234567"
    RATIOS.save_pretrained(repository / "snapshots" / commit)
    for reference in ("main", "v1"):
        file = repository / "refs" / reference
        file.parent.mkdir(exist_ok=True)
        file.write_text(commit)
    return tmp_path / "hub"


def test_a_folder_holds_one_of_each_kind(tmp_path: Path) -> None:
    for made in (RATIOS, THETA):
        made.save_pretrained(tmp_path / "new")
        assert type(made).from_pretrained(tmp_path / "new") == made
    files = sorted(file.name for file in (tmp_path / "new").iterdir())
    assert files == ["calibration.json", "theta.json"]
    (tmp_path / "new" / "theta.json").rename(tmp_path / "other.json")
    found = ThetaCalibration.from_pretrained(str(tmp_path), filename="other.json")
    assert found.config == THETA.config == replace(THETA.base, memory=Memory(theta=0.5))


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_repository_is_read_from_the_cache(hub: Path, revision: str | None) -> None:
    found = Calibration.from_pretrained(
        "owner/calibrations",
        model=tiny_sdxl_unet(),
        revision=revision,
        cache_dir=hub,
        local_files_only=True,
    )
    assert found == RATIOS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"name": "owner/others"},
            "'owner/others' is no folder here, huggingface_hub's cache has",
        ),
        ({"revision": "v2"}, "of its revision 'v2', and the hub was not asked or not reached; "),
        ({"filename": "gone.json"}, "has no 'gone.json' of its revision 'main'"),
        ({"name": "no/such/folder"}, "'no/such/folder' is neither a folder here nor the name of a"),
    ],
)
def test_what_the_cache_lacks_is_said(hub: Path, given: dict[str, Any], message: str) -> None:
    given = {"name": "owner/calibrations", "cache_dir": hub, "local_files_only": True, **given}
    with pytest.raises(ConfigError, match=message) as error:
        Calibration.from_pretrained(**given)
    assert "give a folder that save_pretrained wrote" in str(error.value)
    assert "Error(" not in str(error.value)
    assert "\n" not in str(error.value)


PROGRAM = """
import sys
from toma_fx import Calibration, TomaError
for name in sys.argv[1:]:
    try:
        found = Calibration.from_pretrained(f"owner/{name}", token=False, revision="v1")
        print(found.origin.name)
    except TomaError as error:
        print(error)
"""
ANSWERS = {
    "RepoNotFound": (404, "'owner/RepoNotFound' is no hub repository that this token can see; "),
    "GatedRepo": (403, "'owner/GatedRepo' is given only to those who accept its terms; "),
    "RevisionNotFound": (404, "'owner/RevisionNotFound' has no revision 'v1'; "),
    "EntryNotFound": (404, "'owner/EntryNotFound' holds no 'calibration.json'; "),
    "there": (200, "small"),
}


def test_a_hub_that_answers(tmp_path: Path) -> None:
    """A server that speaks as the hub does, asked by huggingface_hub itself."""
    RATIOS.save_pretrained(tmp_path)
    body = (tmp_path / "calibration.json").read_bytes()

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            name = self.path.split("/")[2]
            self.send_response(ANSWERS[name][0])
            if name == "there":
                self.send_header("ETag", '"abc"')
                self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
            else:
                self.send_header("X-Error-Code", name)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *ANSWERS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == len(ANSWERS), said
    for line, (_, expected) in zip(said, ANSWERS.values(), strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is not JSON .Expecting value in line 1, column 1."),
        ("[" * 100_000, "it is nested deeper than any calibration"),
        ("[1]", r"its content must be a dictionary, not \[1\]"),
        ("{}", "it lacks 'base'"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        Calibration.from_pretrained(tmp_path)
    assert "give a file of Calibration.save, or make one with toma_fx.calibrate" in str(error.value)
    with pytest.raises(ConfigError, match=r"theta.json' is no .*: there is no such file; give a"):
        ThetaCalibration.from_pretrained(tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not text"):
        Calibration.load(file)
    with pytest.raises(ConfigError, match=r"it cannot be read \(Is a directory\)"):
        Calibration.load(tmp_path)


@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        (RATIOS, {"more": 1}, "it holds 'more', which a Calibration does not have"),
        (RATIOS, {"kind": "Cake"}, "it holds a Cake, and a Calibration was expected"),
        (RATIOS, {"format": 2}, r"it has format 2, and toma_fx 0.\S+ reads 1"),
        (RATIOS, {"base": None}, "its base must be a dictionary, not null"),
        (RATIOS, {"base": {"rato": 1}}, "rato=1 is not an option; choose from ratio"),
        (RATIOS, {"parts": {"a": "b"}}, 'its parts must be a list of strings, not "b"'),
        (RATIOS, {"errors": {"a": 1}}, "its errors must be of a, b, not of a;"),
        (RATIOS, {"errors": {"a": 1, "b": float("nan")}}, "its errors must be numbers, not NaN"),
        (RATIOS, {"uniform": {}}, "are not of the same ratios"),
        (RATIOS, {"by_ratio": {"0.5": 1}}, "are not of the same ratios"),
        (RATIOS, {"by_ratio": {"half": 1}}, "its by_ratio must be by numbers, not by half"),
        (RATIOS, {"origin": {"name": "a"}}, "its origin lacks 'model', or holds"),
        (THETA, {"kind": "Calibration"}, "it holds a Calibration, and a ThetaCalibration was"),
        (THETA, {"base": {}}, "must hold a memory, and a theta"),
        (THETA, {"errors": {"0.5": "1"}}, 'its errors must be numbers, not "1"'),
    ],
)
def test_files_that_were_changed(
    tmp_path: Path, made: Any, change: dict[str, Any], message: str
) -> None:
    made.save_pretrained(tmp_path)
    file = tmp_path / made.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as error:
        type(made).from_pretrained(tmp_path)
    assert "Error(" not in str(error.value)


def test_files_of_before_there_was_a_format(tmp_path: Path) -> None:
    RATIOS.save_pretrained(tmp_path)
    file = tmp_path / "calibration.json"
    content = json.loads(file.read_text())
    for name in ("kind", "format", "origin"):
        content.pop(name)
    file.write_text(json.dumps(content))
    assert Calibration.from_pretrained(tmp_path) == replace(RATIOS, origin=None)
    with pytest.raises(ModelError, match="noted no model, so it cannot be checked against this UN"):
        Calibration.from_pretrained(tmp_path, model=tiny_sdxl_unet())


def test_another_model_is_refused(tmp_path: Path) -> None:
    RATIOS.save_pretrained(tmp_path)
    pipe = tiny_sdxl_pipeline()
    toma_fx.transform(pipe)  # a transformed model has the same architecture
    assert Calibration.from_pretrained(tmp_path, model=pipe) == RATIOS
    deeper = tiny_sdxl_unet(transformer_layers_per_block=(1, 2, 2))
    with pytest.raises(
        ModelError,
        match=r"'small' was made with a UNet2DConditionModel of 'owner/small' of architecture "
        r"\w+, and this UNet2DConditionModel has architecture \w+; take a calibration of",
    ):
        Calibration.from_pretrained(tmp_path, model=deeper)
    with pytest.raises(ModelError, match="this FluxTransformer2DModel has architecture"):
        RATIOS.check(tiny_flux_pipeline())


def test_the_hash_is_of_the_architecture_alone(tmp_path: Path) -> None:
    model = tiny_sdxl_unet()
    model.save_pretrained(tmp_path / "unet")
    loaded = type(model).from_pretrained(tmp_path / "unet", torch_dtype=torch.bfloat16)
    assert {architecture_hash(m) for m in (model, loaded, tiny_sdxl_unet(seed=1))} == {ORIGIN.hash}
    # An option that is written out, at the value that it has anyway.
    assert architecture_hash(tiny_sdxl_unet(dropout=0.0)) == ORIGIN.hash
    assert architecture_hash(tiny_sdxl_unet(dropout=0.1)) != ORIGIN.hash
    assert architecture_hash(tiny_flux()) == architecture_hash(toma_fx.transform(tiny_flux()))


def test_the_origin_names_no_machine(tmp_path: Path) -> None:
    tiny_sdxl_pipeline().save_pretrained(tmp_path / "mine")
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "mine")
    assert origin_of(pipe, "").steps is None
    call: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
    pipe("a", guidance_scale=3, output_type="latent", **call)
    found = origin_of(pipe, "")
    assert found == replace(ORIGIN, name="mine", source="mine", steps=2, guidance=3.0)
    pipe.register_to_config(_name_or_path="owner/name")
    assert (origin_of(pipe, "a").source, origin_of(pipe, "a").name) == ("owner/name", "a")
    pipe.register_to_config(_name_or_path="C:\\Users\\me\\model\\")
    assert origin_of(pipe, "").source == "model"
    assert origin_of(tiny_sdxl_pipeline(), "").name == "UNet2DConditionModel"


def test_the_command_line_takes_both_kinds(tmp_path: Path) -> None:
    RATIOS.save(tmp_path / "ratios.json")
    THETA.save(tmp_path / "theta.json")
    assert config_of({"calibration": tmp_path / "theta.json"}) == THETA.config
    assert THETA.config.memory == Memory(theta=0.5)
    other = config_of({"calibration": tmp_path / "theta.json", "ratio": 0.75})
    assert other == replace(THETA.config, ratio=0.75)
    assert config_of({"calibration": tmp_path / "ratios.json", "ratio": 0.25}) == (
        RATIOS.config(0.25)
    )
    with pytest.raises(ConfigError, match="memory cannot be given beside calibration"):
        config_of({"calibration": tmp_path / "theta.json", "memory": 3})
    (tmp_path / "broken.json").write_text("[")
    with pytest.raises(ConfigError, match="is no calibration that toma_fx saved"):
        config_of({"calibration": tmp_path / "broken.json"})
