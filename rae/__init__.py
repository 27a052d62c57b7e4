"""Representation Autoencoders and diffusion transformers on their latents."""

import importlib
from typing import Any

__version__ = "0.1.0"

_FACE = {
    "RAE": "rae.autoencoder:RAE",
    "Generator": "rae.generator:Generator",
    "Stage1Module": "rae.training.stage1:Stage1Module",
    "Stage2Module": "rae.training.stage2:Stage2Module",
    "ImageNetDataModule": "rae.data:ImageFolderDataModule",
    "ConfigError": "rae.io.errors:ConfigError",
    "compose": "rae.cli.errors:compose",
    "build": "rae.cli.build:build",
    "load": "rae.cli.models:load",
}
"""The package's public names and where each is defined; imported on first use."""

__all__ = ["__version__", *_FACE]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name in _FACE:
        module, _, found = _FACE[name].partition(":")
        return getattr(importlib.import_module(module), found)
    raise AttributeError(f"module 'rae' has no attribute {name!r}; it offers {', '.join(_FACE)}")


def __dir__() -> list[str]:
    return sorted(__all__)
