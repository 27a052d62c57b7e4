"""The folder of ``rae-app space_dir=…``: what is in it, and that it runs alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from rae.app import space
from rae.app.command import app, open_viewer
from rae.generator import Generator
from rae.io.errors import ConfigError
from tests.app.test_app import configuration, generator


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A Space, the only thing in its folder beside the model that it is made of."""
    folder = tmp_path_factory.mktemp("spaces")
    model = generator().save_pretrained(folder / "model")
    given = ["guidance=cfg", "guidance.scale=2", "sampler=heun", "sampler.grid.points=5", "count=3", "seed=4"]
    (folder / "log").mkdir()  # as Hydra does
    app(configuration(model, *given, f"space_dir={folder}/space", f"output_dir={folder}/log"))
    assert sorted(path.name for path in folder.iterdir()) == ["model", "space"]
    return folder / "space"


def test_what_a_space_holds(written):
    names = {path.name for path in written.iterdir()}
    assert names == {"app.py", "requirements.txt", "README.md", "space.json", "model", "rae", "conf"}
    assert not list(written.rglob("__pycache__"))
    header = yaml.safe_load((written / "README.md").read_text().split("---\n")[1])
    assert (header["sdk"], header["app_file"], header["title"]) == ("gradio", "app.py", "space")
    required = {Requirement(line).name for line in (written / "requirements.txt").read_text().splitlines()}
    assert {"torch", "lightning", "gradio", "timm"} <= required
    assert not {"onnx", "scikit-learn", "pytest", "transformers"} & required
    assert str(written.parent) not in (written / "space.json").read_text()
    again = Generator.from_pretrained(written / "model")
    assert again.autoencoder.encoder is not None
    cfg = space.read_space(written)
    assert (cfg.host, list(cfg.names), cfg.count, cfg.seed) == ("0.0.0.0", [".hf.space"], 3, 4)
    viewer = open_viewer(cfg)[0]
    assert repr(viewer.generator.guidance) == "ClassifierFreeGuidance(scale=2, interval=[0.0, 1.0])"
    assert repr(viewer.generator.sampler) == "HeunSampler(4 steps, 8 evaluations)"


@pytest.mark.slow
def test_a_space_runs_from_its_own_files(written, tmp_path):
    """Its page is built, not served, from a folder that holds nothing; all that is imported of the library is the Space's."""
    code = (
        f"import sys; sys.path.insert(0, {str(written)!r}); import app, rae; "
        "labels = [one['props'].get('label') for one in app.demo.get_config_file()['components']]; "
        "print(rae.__file__); print(labels); print(app.options['server_name'], app.options['app_kwargs'])"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PYTHONDONTWRITEBYTECODE"] = "1"
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    file, labels, options = done.stdout.strip().splitlines()[-3:]
    assert Path(file) == written / "rae" / "__init__.py"
    assert all(label in labels for label in ("'Samples'", "'Reconstruction'", "'Class, 0 … 3'"))
    assert options.startswith("0.0.0.0")
    assert ".hf.space" in options
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_a_model_of_the_hub_is_named_and_not_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "open_model", lambda *args, **options: pytest.fail("it was opened"))
    app(configuration("someone/model", f"space_dir={tmp_path}/space"))
    assert json.loads((tmp_path / "space" / "space.json").read_text())["checkpoint"] == "someone/model"
    assert not (tmp_path / "space" / "model").exists()
    assert space.read_space(tmp_path / "space").checkpoint == "someone/model"


def test_a_folder_that_holds_something_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something already: give a new or an empty folder"):
        app(configuration("someone/model", f"space_dir={tmp_path}"))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    monkeypatch.setattr(
        space.metadata, "requires", lambda name: (_ for _ in ()).throw(space.metadata.PackageNotFoundError)
    )
    with pytest.raises(ConfigError, match="it is not installed: pip install -e"):
        space.requirements(["app"])
