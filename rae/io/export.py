"""Models that are written to a folder or to the hub, and had back from there by name."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound="Exportable")


def _format(module: str) -> Any:
    """A module of the formats, by name: they know the models, which do not know them."""
    return importlib.import_module(f"rae.formats.{module}")


class Exportable:
    """Base of models that can be exported."""

    @classmethod
    def from_pretrained(cls: type[T], source: str | Path, revision: str | None = None, encoder: bool = True) -> T:
        """Loads an exported model in evaluation mode, a generator with the sampler, guidance and guide it was exported with.

        Args:
            source: Folder, or ``owner/name`` on the Hugging Face hub. An autoencoder is also had from an exported generator and
                from diffusers' ``AutoencoderRAE``.
            revision: Branch, tag or commit on the hub.
            encoder: Whether the encoder's weights are loaded too; without them the model decodes and samples, and cannot encode.

        Raises:
            FileNotFoundError: There is no such folder or repository.
            ValueError: The files are not what their description says, or are of another kind of model.
        """
        model: T = _format("open").from_pretrained(cls, source, revision, encoder)
        return model

    def save_pretrained(self, folder: str | Path, store_encoder: bool | None = None, **card: str | Path | None) -> Path:
        """Writes ``model.safetensors`` and a self-describing ``config.json``, from which :meth:`from_pretrained` makes it again.

        The encoder's weights are stored unless they come from the hub, or as ``store_encoder`` says. A folder that holds an
        export already raises FileExistsError. A ``README.md`` is the model's card, which says more with ``scores`` (a
        ``scores.json``), ``license`` (the hub's name of one) and ``trained_on`` (words); one that is there already stays.
        """
        written: Path = _format("export").save(self, folder, store_encoder, **card)
        return written

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads what :meth:`save_pretrained` writes to ``owner/name``, made where it does not exist; the commit's address.

        The ``options`` are those of :func:`rae.formats.export.push`.
        """
        return str(_format("export").push(self, repo_id, **options))
