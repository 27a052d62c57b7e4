"""Where trained weights come from: a run of ours, an export, diffusers' folder, or a file of the original project."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.denoiser import Denoiser
from rae.encoder import AbsentEncoder, Encoder, differences
from rae.formats import export as pretrained
from rae.formats.diffusers import is_diffusers, load_diffusers, load_diffusers_decoder
from rae.formats.original import load_original_decoder, load_original_denoiser
from rae.formats.run import LAST, find_checkpoint, load_trained, read_encoder
from rae.formats.shares import REST
from rae.generator import Generator
from rae.io.files import parse_json
from rae.io.tensors import load_strict

KINDS = ("run", "export", "diffusers", "file")
_MAY_DIFFER = ("input_size",)
_FILES = (".pt", ".pth", ".bin", ".safetensors")


def kind_of(source: str | Path) -> tuple[str, Path]:
    """What a path or hub id is, and where it lies on disk.

    Returns:
        One of ``run`` (folder or ``.ckpt`` of a training run), ``export`` (``save_pretrained``), ``diffusers`` and ``file``
        (weights of the original project), with the path; a hub id is downloaded first.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: It is none of these.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return ("file" if path.suffix in _FILES else "run"), path
    if (path / LAST).exists() or (path / REST).is_file():
        return "run", path
    if not path.is_dir() and ("/" not in str(source) or path.is_absolute()):
        return "run", find_checkpoint(path)  # says that it does not exist
    folder = pretrained.resolve(source)
    if is_diffusers(folder):
        return "diffusers", folder
    config = folder / pretrained.CONFIG
    if config.is_file() and "format" in parse_json(config.read_bytes(), str(config)):
        return "export", folder
    raise ValueError(
        f"{str(source)!r} holds no trained model: give the folder of a run (with {LAST}), of an export or of diffusers, "
        f"a hub id, or a weight file ({', '.join(_FILES)})"
    )


def load_decoder_from(decoder: ViTDecoder, source: str | Path, averaged: bool = True) -> None:
    """Fills a decoder with trained weights from anywhere, strictly.

    Args:
        decoder: The decoder to fill.
        source: See :func:`kind_of`.
        averaged: Whether to take the moving average of the weights, where the source has one.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: The weights do not fit; all keys are listed.
    """
    kind, path = kind_of(source)
    if kind == "run":
        load_trained(decoder, path, "autoencoder.decoder", averaged)
    elif kind == "file":
        load_original_decoder(decoder, path, averaged)
    elif kind == "diffusers":
        load_diffusers_decoder(decoder, path)
    else:
        config = pretrained.read_description(path)
        load_strict(
            decoder, pretrained.part(pretrained.read_state(path, config), "decoder"), f"decoder of {str(source)!r}"
        )


def load_denoiser_from(denoiser: Denoiser, source: str | Path, averaged: bool = True) -> None:
    """Fills a denoiser with trained weights from anywhere, strictly; arguments and errors as for :func:`load_decoder_from`.

    Args:
        denoiser: The denoiser to fill.
        source: See :func:`kind_of`.
        averaged: Whether to take the moving average of the weights, where the source has one.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: It holds no denoiser, or one that does not fit.
    """
    kind, path = kind_of(source)
    if kind == "run":
        load_trained(denoiser, path, "denoiser", averaged)
    elif kind == "file":
        load_original_denoiser(denoiser, path, averaged)
    elif kind == "diffusers":
        raise ValueError(f"{str(source)!r} is diffusers' autoencoder: it holds no denoiser")
    else:
        config = pretrained.read_description(path)
        load_strict(
            denoiser, pretrained.part(pretrained.read_state(path, config), "denoiser"), f"denoiser of {str(source)!r}"
        )


def settle_encoder(encoder: Encoder, sources: Iterable[str | Path]) -> None:
    """Makes an encoder that of the sources which a model is opened from, and refuses to be another.

    Args:
        encoder: The encoder; random weights become those that the first source keeps. For an absent one, the sources are
            compared among themselves.
        sources: Runs and exports that were made with an encoder; other kinds do not say with which. The side that images are
            resized to may differ: decoders serve other grids.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: Names what differs.
    """
    records: list[tuple[str, dict[str, Any] | None]] = []
    for source in dict.fromkeys(map(str, sources)):
        kind, path = kind_of(source)
        if kind in ("run", "export"):
            records.append((source, read_encoder(path) if kind == "run" else pretrained.read_encoder(path)))
    if not isinstance(encoder, AbsentEncoder):
        for number, (source, record) in enumerate(records):
            if number == 0:
                encoder.take(record, source, _MAY_DIFFER)
            elif record is not None:
                encoder.check(record["fingerprint"], source, _MAY_DIFFER)
        return
    known = [(source, record["fingerprint"]) for source, record in records if record is not None]
    for source, described in known[1:]:
        first = known[0][1]
        both = {key: value for key, value in described.items() if key in first}  # an export says less than a run
        if found := differences(both, first, _MAY_DIFFER):
            raise ValueError(f"{source} was made with another encoder than {known[0][0]}: {found}")


def load_autoencoder(source: str | Path, encoder: bool = True) -> RAE:
    """An autoencoder from an export, diffusers' folder or the hub id of either.

    Args:
        source: Folder or hub id.
        encoder: Whether the encoder's weights are loaded; decoding does without.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: The source does not say what its networks are.
    """
    kind, path = kind_of(source)
    if kind == "diffusers":
        return load_diffusers(path)
    if kind == "export":
        return pretrained.load_autoencoder(path, encoder=encoder)
    raise ValueError(f"{str(source)!r} is a {kind}; give an exported folder, diffusers' folder or a hub id")


def from_pretrained(kind: type, source: str | Path, revision: str | None, encoder: bool) -> RAE | Generator:
    """A model of the kind asked for; see :meth:`rae.io.export.Exportable.from_pretrained`."""
    folder = pretrained.resolve(source, revision)
    return (
        pretrained.load_generator(folder, encoder=encoder)
        if issubclass(kind, Generator)
        else load_autoencoder(folder, encoder)
    )
