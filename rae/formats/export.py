"""Exported models: ``model.safetensors`` and a self-contained ``config.json``, in a folder or on the hub.

``config.json`` describes each part by its class and arguments, how to decode and sample (image size, latent shape, shift,
prediction, classes), and holds hashes of the stored weights and of the encoder's. An encoder whose weights are on the hub is
referenced (repository and revision) instead of stored, and its hash is checked on loading.
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
"""Required entries of a part's description."""


# --- writing -----------------------------------------------------------------------------------------------------


def save(
    model: RAE | Generator, folder: str | Path, store_encoder: bool | None = None, **card: str | Path | None
) -> Path:
    """Exports a model, with a model card unless the folder already holds a ``README.md``.

    Args:
        model: Autoencoder or generator.
        folder: Folder to create; it must not already hold an export.
        store_encoder: Whether to store the encoder's weights too; None stores them unless they come from the hub.
        card: Content of the card; see :func:`rae.formats.card.model_card`.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder already holds an export.
        FileNotFoundError: The card's scores file does not exist.
        ValueError: The encoder should be stored but was loaded without weights, or the card's scores file holds no scores.
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
    """The encoder's entry in an export.

    Args:
        autoencoder: The model.
        store: Whether to store its weights in the export; None stores them unless they come from the hub.

    Raises:
        ValueError: It should be stored but was loaded without weights.
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
    """A bundle's record of the encoder described by an export."""
    record: dict[str, Any] = {"entry": entry}
    if entry["sha256"].startswith("published:") or not entry["stored"]:  # earlier versions hashed resized weights
        record["fingerprint"] = {"weights": entry["sha256"], "dtype": entry["model"].get("dtype") or "float32"}
    return record


def describe_text_encoder(encoder: TextEncoder) -> dict[str, Any]:
    """The text encoder's entry in an export, which stores its weights unless they come from the hub."""
    description = describe(encoder)
    description |= {"checkpoint": None} if "checkpoint" in description else {}
    return {"model": description, "stored": not encoder.recoverable, **encoder.fingerprint()}


def push(
    model: RAE | Generator, repo_id: str, private: bool = False, message: str | None = None, **options: Any
) -> str:
    """Exports a model and uploads it to the Hugging Face hub.

    Args:
        model: Autoencoder or generator.
        repo_id: ``owner/name``; created if it does not exist.
        private: Whether a new repository is private.
        message: Commit message.
        options: As for :func:`save`. An existing card in the repository is replaced only if content for it is given.

    Returns:
        URL of the commit.

    Raises:
        ValueError: ``repo_id`` is not of the form ``owner/name``.
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
    """The folder of an export: a local one, or the download of a hub id (from the cache if possible).

    Args:
        source: Folder, or hub id ``owner/name``.
        revision: Branch, tag or commit of the hub's repository; None for main.

    Raises:
        FileNotFoundError: The folder does not exist, and the hub cannot be reached or does not know the id.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not _HUB_ID.match(str(source)) or path.exists():
        raise FileNotFoundError(f"{str(source)!r} is neither a folder nor a hub id (owner/name)")
    return fetch_all(str(source), revision, patterns=_FILES)


def read_description(folder: Path) -> dict[str, Any]:
    """Reads and checks the ``config.json`` of an export.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not an export of this library, has a later format, or is damaged.
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
    """The parts that a description lacks or describes wrongly; a text encoder, called ``text``, may be absent."""
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
    """Reads an export: its description, and its weights, whose hash is checked when they are read.

    Args:
        path: The folder.
        averaged: Not used: an export holds one set of weights.

    Raises:
        ValueError: The description is damaged or names classes that are not parts of a model; or, when weights are read, the
            file is truncated or not the exported one.
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
