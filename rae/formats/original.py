"""Files of the original projects: decoder, latent statistics, denoiser, training checkpoints.

Hub: ``nyu-visionx/RAE-collections`` and ``nyu-visionx/RAEv2-models``; the keys are the same except for denoisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.autoencoder import RAE
from rae.denoiser import Denoiser, InContextDiT, RiT
from rae.formats import raev2
from rae.formats.bundle import Bundle
from rae.formats.decoder import state_from_ours
from rae.formats.denoiser import ours_to_original
from rae.io.names import below
from rae.io.tensors import is_state, read_file, save_state
from rae.latent import LatentNormalizer

LAYOUTS = {
    "original": ("model.pt", "stat.pt", "stage2_model.pt"),
    "raev2": ("decoder.pt", "stats.pt", "checkpoint.pt"),
}
"""File names of decoder, statistics and denoiser in the published collections."""
SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
_OF_DENOISERS = ("t_embedder.", "time_embedding.")
_PREFIXES = ("module.", "_orig_mod.", "net.")  # of DistributedDataParallel, torch.compile and RiT


def read_original(path: str | Path, averaged: bool = True) -> dict[str, Tensor]:
    """Reads a state dict from a file of the original project: plain, or inside a training checkpoint.

    Args:
        path: ``.pt``, ``.pth``, ``.bin`` or ``.safetensors``.
        averaged: Whether to use the moving average (``ema``) if the file holds one besides ``model``.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no state dict.
    """
    content: Mapping[str, Any] = read_file(path)
    if isinstance(content, Mapping):
        averages = ("ema", "model_ema1")  # the second is RiT's
        order = (*averages, "model", "state_dict") if averaged else ("model", "state_dict", *averages)
        content = next((content[name] for name in order if isinstance(content.get(name), Mapping)), content)
    if not is_state(content):
        raise ValueError(f"{str(path)!r} holds no state dict: named tensors are needed, plain or below ema or model")
    state = {}
    for key, value in content.items():
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        state[key] = value
    return state


def recognises(path: Path) -> bool:
    """Whether a path is a weight file."""
    return path.is_file() and path.suffix in SUFFIXES


def read(path: Path, averaged: bool = True) -> Bundle:
    """Reads the weights of a decoder or denoiser from a published file or training checkpoint, which does not describe them.

    Args:
        path: The file.
        averaged: Whether to use the moving average if the file holds one.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds no state dict.
    """
    state = read_original(path, averaged)
    inside = below("decoder", state)
    part = "denoiser" if any(key.startswith(_OF_DENOISERS) for key in state) else "decoder"
    return Bundle(str(path), states={part: lambda: inside or state})


def statistics(latent: LatentNormalizer) -> dict[str, Tensor]:
    """Mean and variance for the original's statistics file, whose readers divide by √(var + 1e-5)."""
    scale = latent.scale.double()
    var = latent.var if latent.form == "variance" and latent.eps == 1e-5 else (scale.square() - 1e-5).float()
    return {"mean": latent.mean.clone(), "var": var.clone()}


def save_original(
    autoencoder: RAE, folder: str | Path, denoiser: Denoiser | None = None, layout: str = "original"
) -> Path:
    """Writes decoder, latent statistics and, optionally, a denoiser's weights in the original projects' format.

    Args:
        autoencoder: Its decoder and latent statistics are written.
        folder: Folder to write into.
        denoiser: Also written if given.
        layout: ``original``: ``model.pt``, ``stat.pt``, ``stage2_model.pt``; ``raev2``: ``decoder.pt``, ``stats.pt`` and
            ``checkpoint.pt``, which holds the weights as ``ema``.

    Raises:
        FileExistsError: One of the files already exists.
        ValueError: Unknown layout, or a model that readers of the layout would misinterpret.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    if isinstance(denoiser, RiT):
        raise ValueError(
            f"to={layout}: readers of the layout know no denoiser that learns a class token; choose to=rae"
        )
    if autoencoder.latent.space != "encoder":
        raise ValueError(
            f"to={layout}: its files have no latents of latent.space={autoencoder.latent.space}; use to=rae"
        )
    in_context = isinstance(denoiser, InContextDiT)
    if autoencoder.decoder.output != ("raw" if layout == "raev2" else "encoder") or (
        denoiser is not None and in_context != (layout == "raev2")
    ):
        raise ValueError(
            f"to={layout}: original is for decoders with output=encoder and label denoisers, raev2 for output=raw and denoisers "
            f"told in context; this model has output={autoencoder.decoder.output} and "
            f"{'no denoiser' if denoiser is None else type(denoiser).__name__}"
        )
    decoder, stats, weights = LAYOUTS[layout]
    folder = Path(folder).expanduser()
    files: dict[str, Mapping[str, Tensor]] = {
        decoder: state_from_ours(autoencoder.decoder, "original"),
        stats: statistics(autoencoder.latent),
    }
    if isinstance(denoiser, InContextDiT):
        files[weights] = raev2.from_ours(denoiser)
    elif denoiser is not None:
        files[weights] = ours_to_original(denoiser)
    refuse_existing(folder, *files)
    for name, state in files.items():
        wrapped = name == weights and layout == "raev2"
        with torch.no_grad():
            save_state(state, folder / name, below="ema" if wrapped else None)
    return folder


def refuse_existing(folder: Path, *names: str) -> None:
    """Checks that no earlier export would be overwritten.

    Raises:
        FileExistsError: Names the first file that already exists.
    """
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(f"{str(folder / name)!r} exists: choose another folder, or remove it")
