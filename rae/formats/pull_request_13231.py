"""Folders of diffusers' pull request 13231: ``RAEDiTPipeline`` and ``RAEDiT2DModel``, DiT-DH for class labels.

Names are the original's except in attention, whose three projections are separate, and in feed-forward layers, where SwiGLU's
value precedes its gate. Guidance and steps are call arguments of that pipeline and not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rae.flow import EulerSampler, FlowMatching, FullGrid, NoGuidance
from rae.formats.bundle import Bundle
from rae.formats.denoiser import denoiser_from_config
from rae.formats.diffusers import read_weights
from rae.io.describe import describe
from rae.io.files import read_json
from rae.io.names import join

PIPELINE, TRANSFORMER = "RAEDiTPipeline", "RAEDiT2DModel"
_PAIRS = ("hidden_size", "depth", "num_heads")
_STEPS = 50  # that pipeline's default


def read(path: Path, index: Mapping[str, Any], autoencoder: Bundle) -> Bundle:
    """Reads a generator written by ``RAEDiTPipeline.save_pretrained``, without guidance and with 50 Euler steps.

    Args:
        path: The folder.
        index: Content of its ``model_index.json``.
        autoencoder: Content of its ``vae``.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An unsupported option.
    """
    described, state = denoiser(path / "transformer", read_json(path / "transformer" / "config.json"))
    if (names := class_names(index)) is None:
        raise ValueError(f"{str(path / 'model_index.json')!r} says nothing usable of id2label: export the model again")
    described = {
        **autoencoder.description,
        "denoiser": described,
        "flow": describe(FlowMatching(shift=_shift(path / "scheduler" / "scheduler_config.json"))),
        "sampler": describe(EulerSampler(FullGrid(_STEPS))),
        "guidance": describe(NoGuidance()),
        "guide": None,
        "class_names": names,
    }
    states = {**autoencoder.states, "denoiser": state}
    return replace(autoencoder, source=str(path), description=described, states=states)


def class_names(index: Mapping[str, Any]) -> list[str] | None:
    """Names of the classes 0, 1, … in a ``model_index.json``, where diffusers sorts them as strings; None if invalid."""
    names = index.get("id2label") or {}
    if not (isinstance(names, dict) and all(label.isdecimal() for label in names)):
        return None
    return [str(names[label]) for label in sorted(names, key=int)]


def denoiser(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]:
    """Description and weights, in the original's naming, of a folder written by ``RAEDiT2DModel.save_pretrained``.

    Args:
        folder: The folder.
        config: Content of its ``config.json``.

    Raises:
        ValueError: An unsupported option.
    """
    given = {key: _pair(config.get(key)) if key in _PAIRS else value for key, value in config.items()}
    given |= {"input_size": config.get("sample_size")}
    if not config.get("class_dropout_prob", 0.1) > 0:
        raise ValueError(f"{str(folder)!r}: class_dropout_prob=0 leaves no row for no class, which denoisers have here")
    if config.get("use_qknorm", False) and not config.get("use_rmsnorm", True):
        raise ValueError(
            f"{str(folder)!r}: use_qknorm with use_rmsnorm=false has another epsilon there than LayerNorm here"
        )
    try:
        with torch.device("meta"):
            described = describe(denoiser_from_config(given))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(folder)!r} does not describe a {TRANSFORMER}: {error}") from error
    return described, partial(_weights, folder)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _weights(folder: Path) -> dict[str, Tensor]:
    """Reads the weights and renames them to the original's naming."""
    state, out = read_weights(folder), {}
    for key, value in state.items():
        if ".mlp.net.0.proj." in key and _is_gated(key, state):
            out[key.replace(".net.0.proj.", ".w12.")] = torch.cat(value.chunk(2)[::-1])
            continue
        last = "w3" if ".mlp.net.2." in key and _is_gated(key, state) else "fc2"
        names = {".attn.to_out.0.": ".attn.proj.", ".net.0.proj.": ".fc1.", ".net.2.": f".{last}."}
        for theirs, ours in names.items():
            key = key.replace(theirs, ours)
        out[key] = value
    return join(out, {"attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v")})


def _is_gated(key: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a feed-forward layer is SwiGLU: its first projection outputs twice the input width of its second."""
    layer = key.partition(".net.")[0]
    return state[f"{layer}.net.0.proj.weight"].shape[0] == 2 * state[f"{layer}.net.2.weight"].shape[1]


def _shift(file: Path) -> float:
    """The scheduler's time shift."""
    config = {"shift": 1.0, **read_json(file)}
    unread = ("shift_terminal", "invert_sigmas", "stochastic_sampling")
    odd = [key for key, value in config.items() if (key.startswith("use_") or key in unread) and value]
    if not isinstance(config["shift"], int | float):
        odd.append(f"shift={config['shift']!r}")
    if config.get("_class_name") != "FlowMatchEulerDiscreteScheduler" or odd:
        raise ValueError(
            f"{str(file)!r}: {config.get('_class_name')} with {', '.join(odd) or 'its own times'} has no counterpart; a "
            "FlowMatchEulerDiscreteScheduler with a shift alone is read"
        )
    return float(config["shift"])
