"""Exported models: ``model.safetensors`` and a ``config.json`` that says everything about them, in a folder or on the hub.

``config.json`` describes each part by its class and arguments, tells how to decode and sample (image size, latent shape, shift,
prediction, classes) and holds hashes: of the stored weights, and of the encoder's. An encoder whose weights are on the hub is
named there (repository and revision) instead of stored, and its hash is compared when it is loaded.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import Tensor

from rae.autoencoder import RAE
from rae.encoder.text import TextEncoder
from rae.formats.bundle import Bundle
from rae.formats.card import CARD, model_card
from rae.formats.original import refuse_existing
from rae.generator import Generator
from rae.io.describe import TARGET, check, describe
from rae.io.files import read_json, write_text
from rae.io.hub import fetch_all
from rae.io.names import below, prefixed
from rae.io.tensors import read_file, save_state, state_hash

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT, VERSION = "rae", 1
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILES = ["*.json", "*.safetensors"]
_FIELDS: dict[str, dict[str, type]] = {
    "encoder": {"model": dict, "stored": bool, "sha256": str},
    "weights": {"file": str, "sha256": str},
}
"""What a description must say of a part."""


# --- writing -----------------------------------------------------------------------------------------------------


def save(
    model: RAE | Generator, folder: str | Path, store_encoder: bool | None = None, **card: str | Path | None
) -> Path:
    """Exports a model, with a model card where the folder holds no ``README.md``.

    Args:
        model: Autoencoder or generator.
        folder: Folder to make; it must not hold an export.
        store_encoder: Whether the encoder's weights are stored too; None: unless they come from the hub.
        card: What the card is to say; see :func:`rae.formats.card.model_card`.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds an export.
        FileNotFoundError: The card's scores do not exist.
        ValueError: The encoder is to be stored and was loaded without weights, or the card's scores are none.
    """
    folder = Path(folder).expanduser()
    refuse_existing(folder, CONFIG, WEIGHTS)
    autoencoder = model.autoencoder if isinstance(model, Generator) else model
    encoder = describe_encoder(autoencoder, store_encoder)
    state = prefixed("decoder", autoencoder.decoder.state_dict()) | prefixed("latent", autoencoder.latent.state_dict())
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": VERSION,
        "library_version": metadata.version("rae"),
        "kind": "autoencoder",
        "image_size": autoencoder.image_size,
        "latent_shape": list(autoencoder.latent_shape),
        "encoder": encoder,
        "decoder": describe(autoencoder.decoder),
        "latent": {"eps": autoencoder.latent.eps, "form": autoencoder.latent.form, **autoencoder.space},
    }
    if encoder["stored"] and autoencoder.encoder is not None:
        state |= prefixed("encoder", autoencoder.encoder.published_state())
    if isinstance(model, Generator):
        state |= prefixed("denoiser", model.denoiser.state_dict())
        config |= {
            "kind": "generator",
            "num_classes": model.num_classes,
            "class_names": list(model.class_names),
            "shift": model.flow.shift,
            "prediction": model.flow.prediction,
            "denoiser": describe(model.denoiser),
            "flow": describe(model.flow),
            "sampler": describe(model.sampler),
            "guidance": describe(model.guidance),
            "guide": None if model.guide is None else describe(model.guide),
        }
        if model.text_encoder is not None:
            config["text_encoder"] = describe_text_encoder(model.text_encoder)
            if config["text_encoder"]["stored"]:
                state |= prefixed("text_encoder", model.text_encoder.state_dict())
        if model.guide is not None:
            state |= prefixed("guide", model.guide.state_dict())
    config["weights"] = {"file": WEIGHTS, "sha256": state_hash(state)}
    said = model_card(config, **{"source": folder.name, **card})  # type: ignore[arg-type]
    save_state(state, folder / WEIGHTS, {"format": "pt"})
    if not (folder / CARD).exists():
        write_text(folder / CARD, said)
    text = json.dumps(config, indent=2)
    return write_text(folder / CONFIG, text).parent


def describe_encoder(autoencoder: RAE, store: bool | None) -> dict[str, Any]:
    """What an export says of its encoder.

    Args:
        autoencoder: The model.
        store: Whether its weights go into the export; None stores those that cannot be had from the hub.

    Raises:
        ValueError: It is to be stored and was loaded without weights.
    """
    encoder = autoencoder.encoder
    if encoder is None:
        entry = autoencoder.encoder_entry
        if entry is None or entry["stored"] or store:
            raise ValueError(
                "the model was loaded without its encoder's weights; load it with encoder=True to export it"
            )
        return entry
    arguments = encoder.arguments
    from_hub = arguments.get("pretrained", False) and arguments.get("checkpoint") is None
    stored = not from_hub if store is None else store
    description = describe(encoder)
    description |= {
        key: value for key, value in (("checkpoint", None), ("pretrained", not stored)) if key in description
    }
    if "hub_id" in description and not stored:
        description["hub_id"] = getattr(encoder, "hub_id", None)
    return {"model": description, "stored": stored, "sha256": encoder.weights_hash()}


def encoder_record(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle notes of an encoder that an export describes."""
    record: dict[str, Any] = {"entry": entry}
    if entry["sha256"].startswith("published:") or not entry["stored"]:  # former versions hashed resized weights
        record["fingerprint"] = {"weights": entry["sha256"], "dtype": entry["model"].get("dtype") or "float32"}
    return record


def describe_text_encoder(encoder: TextEncoder) -> dict[str, Any]:
    """What an export says of its text encoder, whose weights it stores unless they come from the hub."""
    description = describe(encoder)
    description |= {"checkpoint": None} if "checkpoint" in description else {}
    return {"model": description, "stored": not encoder.recoverable, **encoder.fingerprint()}


def push(
    model: RAE | Generator, repo_id: str, private: bool = False, message: str | None = None, **options: Any
) -> str:
    """Exports a model and uploads it to the Hugging Face hub.

    Args:
        model: Autoencoder or generator.
        repo_id: ``owner/name``; made where it does not exist.
        private: Whether a new repository is private.
        message: Commit message.
        options: As for :func:`save`. A card that the repository has is replaced only where something is said for it.

    Returns:
        The commit's address.

    Raises:
        ValueError: ``repo_id`` is no ``owner/name``.
    """
    if not _HUB_ID.match(repo_id):
        raise ValueError(f"repo_id={repo_id!r} must be owner/name")
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, **{"source": repo_id, **options})
        api.create_repo(repo_id, private=private, exist_ok=True)
        given = any(value is not None for name, value in options.items() if name != "store_encoder")
        if not given and api.file_exists(repo_id, CARD):
            (Path(folder) / CARD).unlink()
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message or "Upload of a model of rae"
        )
    return str(commit)


# --- reading -----------------------------------------------------------------------------------------------------


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The folder of an export: the one given, or the one that a hub id is downloaded to (its cache first).

    Args:
        source: Folder, or hub id ``owner/name``.
        revision: Branch, tag or commit of the hub's repository; None for main.

    Raises:
        FileNotFoundError: There is no such folder, and the hub cannot be reached or does not know the id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not _HUB_ID.match(str(source)) or path.exists():
        raise FileNotFoundError(f"{str(source)!r} is neither a folder nor a hub id (owner/name)")
    return fetch_all(str(source), revision, patterns=_FILES)


def read_description(folder: Path) -> dict[str, Any]:
    """What ``config.json`` of an export says.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no export of this library, or one of a later format.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} is no exported model: it holds no {CONFIG}")
    config = read_json(file)
    if config.get("format") != FORMAT:
        raise ValueError(f"{str(file)!r} does not describe a model of this library (format {FORMAT!r})")
    version = config.get("format_version", 0)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{str(file)!r} has format version {version}, this library reads up to {VERSION}; upgrade it")
    check(config, str(file))
    parts = ["encoder", "decoder", "latent", "weights"]
    parts += ["denoiser", "flow", "sampler", "guidance"] if config.get("kind") == "generator" else []
    if wrong := unusable(config, parts, "text_encoder"):
        raise ValueError(f"{str(file)!r} says nothing usable of {', '.join(wrong)}: export the model again")
    if config["weights"]["file"] in (".", "..") or config["weights"]["file"] != Path(config["weights"]["file"]).name:
        raise ValueError(
            f"{str(file)!r} is refused: weights.file={config['weights']['file']!r} must be the name of a file in its own folder"
        )
    return config


def unusable(config: Mapping[str, Any], parts: Iterable[str], text: str) -> list[str]:
    """The parts of which a description says nothing usable; a text encoder, under the name ``text``, may be absent."""
    told = [*parts, *([text] if config.get(text) is not None else [])]
    fields = {**_FIELDS, text: {"model": dict, "stored": bool}}
    return [
        name
        for name in told
        if not isinstance(part := config.get(name), dict)
        or not all(isinstance(part.get(key), kind) for key, kind in fields.get(name, {}).items())
    ]


def recognises(path: Path) -> bool:
    """Whether a folder is an export."""
    config = path / CONFIG
    return config.is_file() and "format" in read_json(config)


def read(path: Path, averaged: bool = True) -> Bundle:
    """What an export says of its model, and its weights, which are compared with their hash when they are read.

    Args:
        path: The folder.
        averaged: Not used: an export holds one set of weights.

    Raises:
        ValueError: The description is damaged, or asks for what is no part of a model; or, when weights are read, the file is
            truncated or not the one that was exported.
    """
    config = read_description(path)
    file, wanted = path / config["weights"]["file"], config["weights"]["sha256"]

    @cache
    def state() -> dict[str, Tensor]:
        weights: dict[str, Tensor] = read_file(file)
        if (found := state_hash(weights)) != wanted:
            raise ValueError(
                f"{str(file)!r} is not the file that was exported: its hash is {found[:16]}…, not {wanted[:16]}…; "
                "export or download it again"
            )
        return weights

    described = {"encoder": config["encoder"]["model"], "decoder": config["decoder"]}
    described["latent"] = {TARGET: "rae.latent.LatentNormalizer", "shape": config["latent_shape"], **config["latent"]}
    described |= {name: config.get(name) for name in ("denoiser", "flow", "sampler", "guidance", "guide")}
    described["class_names"] = config.get("class_names")
    networks = [name for name in ("decoder", "latent", "denoiser", "guide") if described[name] is not None]
    entry = config["encoder"]
    record = encoder_record(entry)
    networks += ["encoder"] if entry["stored"] else []
    text = dict(config.get("text_encoder") or {})
    if text:
        described["text_encoder"] = text.pop("model")
        networks += ["text_encoder"] if text.pop("stored") else []
    states = {name: lambda name=name: below(name, state()) for name in networks}
    return Bundle(str(path), described, states, ((str(path), record),), text or None)
