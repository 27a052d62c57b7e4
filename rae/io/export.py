"""Models that can be saved to a folder or the hub and loaded back by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound="Exportable")


def _format(module: str) -> Any:
    """Imports a format module by name: formats depend on the models, but not the reverse."""
    return importlib.import_module(f"rae.formats.{module}")


class Exportable:
    """Base of models that can be exported."""

    @classmethod
    def from_pretrained(cls: type[T], source: str | Path, revision: str | None = None, encoder: bool = True) -> T:
        """Loads an exported model in evaluation mode; a generator has its exported sampler, guidance and guide.

        Args:
            source: Folder, or ``owner/name`` on the Hugging Face hub. An autoencoder also loads from an exported generator or
                diffusers' ``AutoencoderRAE``.
            revision: Branch, tag or commit on the hub.
            encoder: Whether to load the encoder's weights too; without them the model can decode and sample, but not encode.

        Raises:
            FileNotFoundError: The folder or repository does not exist.
            ValueError: The files do not match their description, or hold another kind of model.
        """
        model: T = _format("open").from_pretrained(cls, source, revision, encoder)
        return model

    def save_pretrained(self, folder: str | Path, store_encoder: bool | None = None, **card: str | Path | None) -> Path:
        """Writes ``model.safetensors`` and a self-describing ``config.json``, for :meth:`from_pretrained`.

        Stores the encoder's weights unless they come from the hub, or as set by ``store_encoder``. Raises FileExistsError if the
        folder already holds an export. Writes a model card, ``README.md``, unless there is one; it can include ``scores`` (a
        ``scores.json``), ``license`` (the hub's name for it) and ``trained_on`` (a text).
        """
        written: Path = _format("export").save(self, folder, store_encoder, **card)
        return written

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the files of :meth:`save_pretrained` to ``owner/name``, created if needed; returns the commit's URL.

        The ``options`` are those of :func:`rae.formats.export.push`.
        """
        return str(_format("export").push(self, repo_id, **options))
