"""Representation Autoencoders and diffusion transformers on their latents."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """``rae.compose``, ``rae.build`` and ``rae.load``, imported when first used: they need Hydra."""
    if name in ("compose", "build", "load"):
        from rae import cli  # noqa: PLC0415

        return getattr(cli, name)
    raise AttributeError(f"module 'rae' has no attribute {name!r}")
