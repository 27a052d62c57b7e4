"""Writes and reads generators as folders of diffusers' ``DiffusionPipeline``, which samples without this library.

``model_index.json`` holds flow, sampler, guidance, classes and encoder; ``transformer/`` and ``guide/`` hold denoisers, ``vae/``
diffusers' own ``AutoencoderRAE`` or, if that would build a different network, our decoder with the latent statistics. The Python
files are only for diffusers: reading a folder runs none of them. Folders of diffusers' pull request 13231 are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from rae.autoencoder import RAE
from rae.encoder.text import TextEncoder, TransformersTextEncoder
from rae.formats import diffusers, pull_request_13231
from rae.formats.bundle import KINDS, Bundle
from rae.formats.diffusers import CONFIG, WEIGHTS, class_name, read_weights, save_diffusers
from rae.formats.export import describe_encoder, describe_text_encoder, encoder_record, unusable
from rae.formats.original import refuse_existing
from rae.formats.pull_request_13231 import class_names
from rae.formats.single_file import single_file
from rae.generator import Generator
from rae.io.describe import TARGET, check, describe, targets_of
from rae.io.files import read_json, write_json, write_text
from rae.io.names import below, prefixed
from rae.io.tensors import read_file, save_state
from rae.latent import LatentNormalizer

INDEX = "model_index.json"
CODE = "pipeline.py"
FORMAT = 1
PIPELINE, TRANSFORMER, DECODER, TEXT_ENCODER = "RAEPipeline", "RAETransformer", "RAEDecoder", "RAETextEncoder"
FILES = (INDEX, CODE, "transformer", "guide", "vae", "scheduler", "text_encoder", "tokenizer")
"""The files and folders written."""
_EXTRA = "rae.safetensors"  # in vae/: weights that have no place in diffusers
_DIFFUSERS = "0.42.0"  # the version for which these folders are written
_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_WITHOUT = ("AdaptiveSampler",)  # torchdiffeq's


# --- writing -----------------------------------------------------------------------------------------------------


def save_pipeline(model: Generator, folder: str | Path, store_encoder: bool | None = None) -> Path:
    """Writes a generator for diffusers' ``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)``.

    Args:
        model: The generator.
        folder: Folder to create; it must not already hold such files.
        store_encoder: As in :func:`rae.formats.export.save`. diffusers' own ``AutoencoderRAE`` always holds the encoder.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder already holds such files.
        ValueError: The model has an adaptive sampler, a language model with random weights, or a class of another library.
    """
    folder = Path(folder).expanduser()
    refuse_existing(folder, *FILES)
    index = _index(model)
    _refuse(model, index)
    for name, network in (("transformer", model.denoiser), ("guide", model.guide)):
        if network is not None:
            index[name] = [_save_code(folder / name, "transformer"), TRANSFORMER]
            _save_model(folder / name, TRANSFORMER, {"description": describe(network)}, _state("denoiser", network))
    if model.text_encoder is not None:
        index |= _save_text_encoder(model.text_encoder, folder)
    index["vae"], index["encoder"] = _save_autoencoder(model.autoencoder, folder / "vae", store_encoder)
    index["scheduler"] = ["diffusers", _SCHEDULER]
    scheduler = {"_class_name": _SCHEDULER, "num_train_timesteps": 1000, "shift": float(model.flow.shift)}
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_text(folder / CODE, single_file("rae.formats.components.pipeline", "Draws images with a generator of rae."))
    return write_json(folder / INDEX, index).parent


def _index(model: Generator) -> dict[str, Any]:
    return {
        "_class_name": [CODE.removesuffix(".py"), PIPELINE],
        "_diffusers_version": _DIFFUSERS,
        "rae_format": FORMAT,
        "flow": describe(model.flow),
        "sampler": describe(model.sampler),
        "guidance": describe(model.guidance),
        "latent": _normalisation(model.autoencoder.latent),
        "id2label": {str(label): name for label, name in enumerate(model.class_names)} or None,
        "negative_prompt": model.negative_prompt,
        **{part: [None, None] for part in ("guide", "text_encoder", "tokenizer")},
    }


def _save_text_encoder(encoder: TextEncoder, folder: Path) -> dict[str, Any]:
    """Writes the text encoder and returns its entry in the index."""
    index: dict[str, Any] = {"text": describe_text_encoder(encoder)}
    if isinstance(encoder, TransformersTextEncoder):
        for name, part in (("text_encoder", encoder.network), ("tokenizer", encoder.tokenizer)):
            part.save_pretrained(folder / name)
            index[name] = ["transformers", type(part).__name__]
        return index
    inside = folder / "text_encoder"
    _save_model(inside, TEXT_ENCODER, {"description": index["text"]["model"]}, _state("encoder", encoder))
    return {**index, "text_encoder": [_save_code(inside, "text_encoder"), TEXT_ENCODER]}


def _normalisation(latent: LatentNormalizer) -> dict[str, Any]:
    return {"shape": list(latent.shape), "eps": latent.eps, "form": latent.form}


def _refuse(model: Generator, index: Mapping[str, Any]) -> None:
    """Raises ValueError for features that the written files do not support."""
    networks = [describe(part) for part in (model.denoiser, model.guide, model.text_encoder) if part is not None]
    names = targets_of([*networks, index["sampler"], index["guidance"], index["flow"]])
    if foreign := [name for name in names if not name.startswith("rae.")]:
        raise ValueError(
            f"to=diffusers: {foreign[0]} is no class of this library, and the folder would lack its code; to=rae exports it"
        )
    if (space := model.autoencoder.latent.space) != "encoder":
        raise ValueError(
            f"to=diffusers: its decoder takes no latents of latent.space={space}; to=rae exports the model"
        )
    if wrong := [name for name in names if name.rpartition(".")[2] in _WITHOUT]:
        raise ValueError(
            f"to=diffusers: {wrong[0]} needs torchdiffeq, which readers of the folder may lack: add sampler=euler or another one "
            "with fixed steps"
        )
    if isinstance(model.text_encoder, TransformersTextEncoder) and not model.text_encoder.recoverable:
        raise ValueError(
            "to=diffusers: text_encoder.pretrained=false leaves random weights of a language model; load some"
        )


def _save_autoencoder(autoencoder: RAE, folder: Path, store: bool | None) -> tuple[list[str], dict[str, Any]]:
    """Writes the decoder; returns its class for diffusers and the encoder's entry in the index."""
    latent = autoencoder.latent
    try:
        save_diffusers(autoencoder, folder)
    except ValueError:  # diffusers would build a different network
        entry = describe_encoder(autoencoder, store)
        stored = entry["stored"] and autoencoder.encoder is not None
        if stored:
            save_state(prefixed("encoder", autoencoder.encoder.published_state()), folder / _EXTRA)
        moments = prefixed("latent", latent.state_dict())
        config = {"description": describe(autoencoder.decoder), "normalisation": _normalisation(latent)}
        _save_model(folder, DECODER, config, _state("decoder", autoencoder.decoder) | moments)
        return [_save_code(folder, "decoder"), DECODER], entry
    save_state(prefixed("latent", latent.state_dict()), folder / _EXTRA)  # diffusers stores them rounded
    return ["diffusers", diffusers.CLASS], describe_encoder(autoencoder, True)


def _state(name: str, network: Any) -> dict[str, Tensor]:
    return prefixed(name, network.state_dict())


def _save_model(folder: Path, name: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    save_state(state, folder / WEIGHTS, {"format": "pt"})
    write_json(folder / CONFIG, {"_class_name": name, "_diffusers_version": _DIFFUSERS, **config})


def _save_code(folder: Path, component: str) -> str:
    """Writes the file with a component's class; returns its name without extension."""
    name = f"rae_{component}"
    write_text(folder / f"{name}.py", single_file(f"rae.formats.components.{component}", f"The {component} of rae."))
    return name


# --- reading -----------------------------------------------------------------------------------------------------


def recognises(path: Path) -> bool:
    """Whether a folder holds a diffusers pipeline, or only a denoiser."""
    return (path / INDEX).is_file() or class_name(path) in (TRANSFORMER, pull_request_13231.TRANSFORMER)


def read(path: Path, averaged: bool = True) -> Bundle:
    """Reads a generator written by :func:`save_pipeline` or diffusers' pull request 13231, without running the folder's code.

    Args:
        path: The folder, or its ``transformer`` or ``guide`` folder, which is only a denoiser.
        averaged: Not used: such a folder holds one set of weights.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Another pipeline, or a damaged description.
    """
    if not (path / INDEX).is_file():
        described, state = _denoiser(path)
        return Bundle(str(path), {"denoiser": described}, {"denoiser": state}, mapped=True)
    index = read_json(path / INDEX)
    name = index.get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name
    if name == pull_request_13231.PIPELINE:
        return pull_request_13231.read(path, index, diffusers.read(path / "vae"))
    if name != PIPELINE:
        version = str(index.get("_diffusers_version"))
        raise ValueError(
            f"{str(path)!r} holds the pipeline {str(name)[:80]!r} of diffusers {version[:20]}, which is no model of this library: "
            f"read are {PIPELINE}, which rae-convert to=diffusers writes, and {pull_request_13231.PIPELINE}"
        )
    _check_index(path / INDEX, index)
    described = {key: index[key] for key in ("flow", "sampler", "guidance")}
    described["denoiser"], denoiser = _denoiser(path / "transformer")
    described["class_names"] = class_names(index)
    states: dict[str, Any] = {"denoiser": denoiser}
    described["guide"] = None
    if (path / "guide").is_dir():
        described["guide"], states["guide"] = _denoiser(path / "guide")
    text = dict(index.get("text") or {})
    if text:
        described |= {"text_encoder": text.pop("model"), "negative_prompt": index.get("negative_prompt")}
        if text.pop("stored"):
            states["text_encoder"] = partial(_part, path / "text_encoder" / WEIGHTS, "encoder")
    parts, weights, record = _autoencoder(path / "vae", index)
    records = ((str(path), record),)
    return Bundle(str(path), described | parts, states | weights, records, text or None, mapped=True)


def _check_index(file: Path, index: Mapping[str, Any]) -> None:
    version = index.get("rae_format")
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(f"{str(file)!r} has rae_format {version!r}, this library reads up to {FORMAT}; upgrade it")
    parts = ("flow", "sampler", "guidance", "latent", "encoder")
    wrong = unusable(index, parts, "text")
    if class_names(index) is None:
        wrong.append("id2label")
    if wrong:
        raise ValueError(f"{str(file)!r} says nothing usable of {', '.join(wrong)}: export the model again")
    check({key: index.get(key) for key in (*parts, "text", "id2label", "negative_prompt")}, str(file), KINDS)


def _denoiser(folder: Path) -> tuple[dict[str, Any], Any]:
    """Description and weights in a denoiser's folder."""
    config = read_json(folder / CONFIG)
    if config.get("_class_name") == pull_request_13231.TRANSFORMER:
        return pull_request_13231.denoiser(folder, config)
    described = config.get("description")
    if config.get("_class_name") != TRANSFORMER or not isinstance(described, dict) or TARGET not in described:
        raise ValueError(f"{str(folder / CONFIG)!r} does not describe a {TRANSFORMER}: export the model again")
    check(described, str(folder / CONFIG))
    return described, partial(_part, folder / WEIGHTS, "denoiser")


def _autoencoder(folder: Path, index: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Descriptions and weights of encoder, decoder and latent statistics, and the record of the encoder."""
    entry, extra = index["encoder"], folder / _EXTRA
    kept = set(read_file(extra)) if extra.is_file() else set()
    latent = {TARGET: "rae.latent.LatentNormalizer", **index["latent"]}
    if diffusers.recognises(folder):
        bundle = diffusers.read(folder)
        described, states = dict(bundle.description), dict(bundle.states)
        described["encoder"] = entry["model"]
        if "latent.mean" in kept:
            described["latent"], states["latent"] = latent, partial(_part, extra, "latent")
        return described, states, encoder_record(entry)
    config = read_json(folder / CONFIG)
    if config.get("_class_name") != DECODER or not isinstance(config.get("description"), dict):
        raise ValueError(f"{str(folder / CONFIG)!r} does not describe a {DECODER}: export the model again")
    check(config["description"], str(folder / CONFIG))
    described = {"encoder": entry["model"], "decoder": config["description"], "latent": latent}
    states = {name: partial(_part, folder / WEIGHTS, name) for name in ("decoder", "latent")}
    if any(key.startswith("encoder.") for key in kept):
        states["encoder"] = partial(_part, extra, "encoder")
    elif entry["stored"]:  # a copy saved by diffusers
        return {**described, "encoder": None}, states, None
    return described, states, encoder_record(entry)


def _part(file: Path, name: str) -> dict[str, Tensor]:
    return below(name, read_weights(file.parent) if file.name == WEIGHTS else read_file(file))
