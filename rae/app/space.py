"""Writes a folder that runs as a Hugging Face Space: the page with a model, this library's source, and its requirements."""

from __future__ import annotations

import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from omegaconf import DictConfig
from packaging.requirements import Requirement

from rae.cli.config import plain
from rae.cli.errors import compose
from rae.cli.groups import conf_dir
from rae.cli.models import open_model
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.io.files import read_json, write_json, write_text

SETTINGS = "space.json"
MODEL = "model"
_KEPT = (
    *("sampler", "guidance", "encode", "batch_size", "count", "max_count", "max_steps", "max_scale"),
    *("precision", "matmul", "seed"),
)
"""Keys of ``rae-app`` that also apply to the Space's page."""
_APP = '''"""The page of rae-app. `rae-app space_dir=…` wrote this folder."""

from pathlib import Path

from rae.app.command import open_space

demo, options = open_space(Path(__file__).parent)
if __name__ == "__main__":
    demo.launch(**options)
'''


def write_space(cfg: DictConfig) -> Path:
    """Writes the folder ``space_dir``: ``app.py``, ``requirements.txt``, ``README.md``, ``space.json``, the library and the model.

    A model on the hub is referenced by its id; any other is exported into the folder.

    Raises:
        ConfigError: The folder is not empty, or the library's requirements are unknown.
    """
    folder = Path(cfg.space_dir).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"space_dir={cfg.space_dir} holds something already: give a new or an empty folder")
    settings = {key: plain(cfg)[key] for key in _KEPT}
    if _is_on_the_hub(cfg):
        text, settings["checkpoint"] = True, cfg.checkpoint  # it may be text-conditional
    else:
        model, _ = open_model(cfg, keep_guide=True)
        text = isinstance(model, Generator) and model.text_encoder is not None
        model.save_pretrained(folder / MODEL)
        settings["checkpoint"] = MODEL
    texts = {
        "app.py": _APP,
        "requirements.txt": "".join(f"{line}\n" for line in requirements(["app", *(["text"] if text else [])])),
        "README.md": _readme(folder.name),
    }
    for name, content in texts.items():
        write_text(folder / name, content)
    write_json(folder / SETTINGS, settings)
    package = Path(sys.modules["rae"].__file__ or "").parent
    for source in {package, conf_dir()}:
        if source == package or not source.is_relative_to(package):
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def read_space(folder: Path) -> DictConfig:
    """The page's configuration in a folder that :func:`write_space` wrote, open to the Space's visitors."""
    settings = read_json(folder / SETTINGS)
    cfg = compose("app", ["host=0.0.0.0", "names=[.hf.space]"])
    if settings["checkpoint"] == MODEL:
        settings["checkpoint"] = str(folder / MODEL)
    for key, value in settings.items():
        cfg[key] = value
    return cfg


def requirements(extras: list[str]) -> list[str]:
    """Packages that this library requires, including those of the given extras.

    Raises:
        ConfigError: The library is not installed, so its requirements are unknown.
    """
    try:
        lines = metadata.requires("rae") or []
    except metadata.PackageNotFoundError:
        raise ConfigError("space_dir=… asks pip what rae requires, and it is not installed: pip install -e .") from None
    found = []
    for one in map(Requirement, lines):
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras):
            one.marker = None
            found.append(str(one))
    return sorted(set(found))


def _is_on_the_hub(cfg: DictConfig) -> bool:
    """Whether the checkpoint is a hub id and no part of the model is replaced."""
    changed = [cfg.get(key) for key in ("decoder", "decoder_checkpoint", "guide_checkpoint", "negative_prompt")]
    return not any(changed) and not Path(cfg.checkpoint).expanduser().exists()


def _readme(name: str) -> str:
    python = ".".join(platform.python_version_tuple()[:2])
    return f"""---
title: {name}
sdk: gradio
sdk_version: {metadata.version("gradio")}
python_version: "{python}"
app_file: app.py
---

Images of a representation autoencoder: reconstructions and samples. `rae-app space_dir=…` of rae {metadata.version("rae")} wrote
this folder; `hf upload --repo-type space OWNER/NAME . .` uploads it, and `python app.py` runs it here.
"""
