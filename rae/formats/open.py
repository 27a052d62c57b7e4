"""Opens trained weights: one of our runs, an export, a diffusers folder, or a file of the original project."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from rae.denoiser import Denoiser
from rae.flow import EulerSampler, NoGuidance, PublishedGrid
from rae.formats import diffusers, export, original, pipeline, run
from rae.formats.bundle import Bundle, assemble, make_part
from rae.generator import Generator
from rae.io.describe import describe
from rae.io.errors import ConfigError

FORMATS: tuple[ModuleType, ...] = (original, run, diffusers, pipeline, export)
"""Formats, each with ``recognises(path)`` and ``read(path, averaged)``; the first that recognises a path reads it."""


def find(source: str | Path, revision: str | None = None) -> tuple[ModuleType, Path]:
    """Finds the format of a source and its location on disk.

    Args:
        source: A run's folder, a ``.ckpt``, an export, a diffusers folder, a weight file, or the hub id of such a folder, which
            is downloaded.
        revision: Branch, tag or commit on the hub.

    Raises:
        FileNotFoundError: The source does not exist.
        ValueError: It is none of these.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if "/" not in str(source) or path.is_absolute():
            run.find_checkpoint(path)  # raises, as it does not exist
        try:
            path = export.resolve(source, revision)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no {str(source)!r} here, and as a hub id: {error}") from error
    for kind in FORMATS:
        if kind.recognises(path):
            return kind, path
    raise ValueError(
        f"{str(source)!r} holds no trained model: give the folder of a run (with {run.LAST}), of an export or of diffusers, "
        f"a hub id, or a weight file ({', '.join(original.SUFFIXES)})"
    )


def read(source: str | Path, averaged: bool = True, revision: str | None = None) -> Bundle:
    """Reads a model's description and weights from a source; see :func:`find`.

    Args:
        source: Where the model is.
        averaged: Whether to use the moving average of the weights, if the source has one.
        revision: Branch, tag or commit on the hub.
    """
    kind, path = find(source, revision)
    bundle: Bundle = kind.read(path, averaged)
    return bundle


def complete(bundle: Bundle, averaged: bool = True, given: str | None = None, keep_guide: bool = False) -> Bundle:
    """Adds the decoder and guide that a description references, and the default sampler and guidance if it has none.

    Args:
        bundle: The model.
        averaged: Whether an autoencoder's decoder uses the moving average of its weights; a generator's always does.
        given: Decoder to use instead of the model's own; a denoiser's is referenced by its ``decoder_checkpoint``.
        keep_guide: Whether to keep a guide that the guidance does not use.

    Raises:
        ConfigError: Something else must be given too.
    """
    said, generates = bundle.description, bundle.description.get("denoiser") is not None
    if said.get("decoder") is None:
        what = f"is a run of stage {said.get('stage')}, without a decoder; give one of stage 1 or 2"
        weights = "holds weights alone: add model=… (see conf/model) to say of what"
        raise ConfigError(f"checkpoint={bundle.source} {what if 'stage' in said else weights}")
    decoder = given or (said.get("decoder_checkpoint") if generates and "decoder" not in bundle.states else None)
    if decoder is not None:
        bundle = bundle.with_decoder(read(decoder, averaged or generates))
    if "decoder" not in bundle.states:
        raise ConfigError(
            f"checkpoint={bundle.source} holds no decoder: add decoder_checkpoint=… (a stage-1 run, export or weight file)"
        )
    if not generates:
        return bundle
    unsaid = {"sampler": EulerSampler(PublishedGrid()), "guidance": NoGuidance()}  # published files hold only weights
    bundle = bundle.override({name: describe(part) for name, part in unsaid.items() if said.get(name) is None})
    if bundle.wants_guide:
        if said.get("guide_checkpoint") is not None:
            return bundle.with_guide(read(said["guide_checkpoint"]))
        if "guide" not in bundle.states:
            raise ConfigError(
                "autoguidance needs guide_checkpoint=… (run or export of a smaller, less trained denoiser)"
            )
    return bundle if bundle.wants_guide or keep_guide else bundle.without("guide")


def load_denoiser(bundle: Bundle, option: str) -> Denoiser:
    """Builds the trained denoiser of a run or export, for example a guide for autoguidance.

    Args:
        bundle: The run or the export.
        option: The key that named it, for the message.

    Raises:
        ConfigError: It holds no denoiser, or does not describe how to build it.
    """
    described = bundle.description.get("denoiser")
    if described is None or "denoiser" not in bundle.states:
        raise ConfigError(f"{option}={bundle.source} has no denoiser; give a run of stage 2 or its export")
    denoiser: Denoiser = make_part("denoiser", described)
    bundle.fill("denoiser", denoiser)
    return denoiser.eval()


def from_pretrained(kind: type, source: str | Path, revision: str | None, encoder: bool) -> Any:
    """Loads a model of the requested class; see :meth:`rae.io.export.Exportable.from_pretrained`."""
    bundle = read(source, revision=revision)
    if not issubclass(kind, Generator) and "decoder" in bundle.states:
        bundle = bundle.without("denoiser", "guide")
    model = assemble(complete(bundle), encoder)
    if issubclass(kind, Generator) and not isinstance(model, Generator):
        raise ValueError(f"{str(source)!r} is an autoencoder, without a denoiser; load it with RAE.from_pretrained")
    return model if isinstance(model, kind) else model.autoencoder
