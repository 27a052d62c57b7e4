"""Exported models: ``model.safetensors`` and a ``config.json`` that says everything about them, in a folder or on the hub.

``config.json`` describes each part by its class and arguments, tells how to decode and sample (image size, latent shape, shift,
prediction, classes) and holds hashes: of the stored weights, and of the encoder's. An encoder whose weights are on the hub is
named there (repository and revision) instead of stored, and its hash is compared when it is loaded.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from rae.autoencoder import RAE
from rae.denoiser import Denoiser
from rae.encoder import AbsentEncoder, Encoder
from rae.formats.original import refuse_existing
from rae.generator import Generator
from rae.io.describe import check, describe, rebuild
from rae.io.files import parse_json, write_atomically
from rae.io.hub import fetch_all
from rae.io.tensors import load_strict, read_file, save_state, state_hash
from rae.latent import LatentNormalizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT, VERSION = "rae", 1
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILES = ["*.json", "*.safetensors"]
_ENTRY = {"model": dict, "stored": bool, "sha256": str}
"""What ``config.json`` says of the encoder."""


# --- writing -----------------------------------------------------------------------------------------------------


def save(model: RAE | Generator, folder: str | Path, store_encoder: bool | None = None) -> Path:
    """Exports a model.

    Args:
        model: Autoencoder or generator.
        folder: Folder to make; it must not hold an export.
        store_encoder: Whether the encoder's weights are stored too; None: unless they come from the hub.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder holds an export.
        ValueError: The encoder is to be stored and was loaded without weights.
    """
    folder = Path(folder).expanduser()
    refuse_existing(folder, CONFIG, WEIGHTS)
    autoencoder = model.autoencoder if isinstance(model, Generator) else model
    encoder = describe_encoder(autoencoder.encoder, store_encoder)
    state = _prefixed("decoder", autoencoder.decoder.state_dict()) | _prefixed(
        "latent", autoencoder.latent.state_dict()
    )
    config: dict[str, Any] = {
        "format": FORMAT,
        "format_version": VERSION,
        "library_version": metadata.version("rae"),
        "kind": "autoencoder",
        "image_size": autoencoder.image_size,
        "latent_shape": list(autoencoder.latent_shape),
        "encoder": encoder,
        "decoder": describe(autoencoder.decoder),
        "latent": {"eps": autoencoder.latent.eps, "form": autoencoder.latent.form},
    }
    if encoder["stored"]:
        state |= _prefixed("encoder", autoencoder.encoder.published_state())
    if isinstance(model, Generator):
        state |= _prefixed("denoiser", model.denoiser.state_dict())
        config |= {
            "kind": "generator",
            "num_classes": model.num_classes,
            "shift": model.flow.shift,
            "prediction": model.flow.prediction,
            "denoiser": describe(model.denoiser),
            "flow": describe(model.flow),
            "sampler": describe(model.sampler),
            "guidance": describe(model.guidance),
            "guide": None if model.guide is None else describe(model.guide),
        }
        if model.guide is not None:
            state |= _prefixed("guide", model.guide.state_dict())
    config["weights"] = {"file": WEIGHTS, "sha256": state_hash(state)}
    save_state(state, folder / WEIGHTS, {"format": "pt"})
    text = json.dumps(config, indent=2)
    return write_atomically(folder / CONFIG, lambda file: file.write(text.encode())).parent


def describe_encoder(encoder: Encoder, store: bool | None) -> dict[str, Any]:
    """What an export says of its encoder.

    Args:
        encoder: The encoder of the model.
        store: Whether its weights go into the export; None stores those that cannot be had from the hub.

    Raises:
        ValueError: It is to be stored and was loaded without weights.
    """
    if isinstance(encoder, AbsentEncoder):
        if encoder.exported is None or encoder.exported["stored"] or store:
            raise ValueError(
                "the model was loaded without its encoder's weights; load it with encoder=True to export it"
            )
        return encoder.exported
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


def push(
    model: RAE | Generator, repo_id: str, private: bool = False, message: str | None = None, **options: Any
) -> str:
    """Exports a model and uploads it to the Hugging Face hub.

    Args:
        model: Autoencoder or generator.
        repo_id: ``owner/name``; made where it does not exist.
        private: Whether a new repository is private.
        message: Commit message.
        options: As for :func:`save`.

    Returns:
        The commit's address.

    Raises:
        ValueError: ``repo_id`` is no ``owner/name``.
    """
    if not _HUB_ID.match(repo_id):
        raise ValueError(f"repo_id={repo_id!r} must be owner/name")
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder, **options)
        api.create_repo(repo_id, private=private, exist_ok=True)
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
    config = parse_json(file.read_bytes(), str(file))
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{str(file)!r} does not describe a model of this library (format {FORMAT!r})")
    version = config.get("format_version", 0)
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{str(file)!r} has format version {version}, this library reads up to {VERSION}; upgrade it")
    check(config, str(file))
    parts = ["encoder", "decoder", "latent", "weights"]
    parts += ["denoiser", "flow", "sampler", "guidance"] if config.get("kind") == "generator" else []
    if absent := [name for name in parts if not isinstance(config.get(name), dict)]:
        raise ValueError(f"{str(file)!r} says nothing of {', '.join(absent)}: export the model again")
    wrong = [name for name, kind in _ENTRY.items() if not isinstance(config["encoder"].get(name), kind)]
    if (
        wrong
        or not isinstance(config["weights"].get("sha256"), str)
        or not isinstance(config["weights"].get("file"), str)
    ):
        raise ValueError(
            f"{str(file)!r} is damaged: {', '.join(wrong) or 'weights'} says nothing; export the model again"
        )
    if config["weights"]["file"] in (".", "..") or config["weights"]["file"] != Path(config["weights"]["file"]).name:
        raise ValueError(
            f"{str(file)!r} is refused: weights.file={config['weights']['file']!r} must be the name of a file in its own folder"
        )
    return config


def read_encoder(folder: Path) -> dict[str, Any]:
    """What an export keeps of its encoder, see :meth:`rae.encoder.Encoder.record`."""
    config = read_description(folder)
    entry = config["encoder"]
    record: dict[str, Any] = {"fingerprint": _fingerprint(entry)}
    return record | ({"weights": part(read_state(folder, config), "encoder")} if entry["stored"] else {})


def read_state(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The stored weights, whose hash must be the one that ``config.json`` gives.

    Args:
        folder: The export.
        config: Its description, from :func:`read_description`.

    Raises:
        FileNotFoundError: There is no weight file.
        ValueError: The file is truncated, or is not the one that was exported.
    """
    file = folder / config["weights"]["file"]
    state: dict[str, Tensor] = read_file(file)
    found = state_hash(state)
    if found != config["weights"]["sha256"]:
        wanted = config["weights"]["sha256"]
        raise ValueError(
            f"{str(file)!r} is not the file that was exported: its hash is {found[:16]}…, not {wanted[:16]}…; "
            "export or download it again"
        )
    return state


def part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The weights of one part, without its prefix.

    Args:
        state: Weights of a whole model, by name.
        name: What their names begin with: ``encoder``, ``decoder``, ``latent``, ``denoiser`` or ``guide``.
    """
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


@contextlib.contextmanager
def _in_words(folder: Path) -> Iterator[None]:
    """Says of values that no export holds which file is to blame; what users give by mistake is refused where it is used."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{str(folder / CONFIG)!r} describes no model that could be built ({type(error).__name__}); export the model again"
        ) from error


def load_autoencoder(source: str | Path, revision: str | None = None, encoder: bool = True) -> RAE:
    """An exported autoencoder, or that of an exported generator; arguments as for :meth:`rae.autoencoder.RAE.from_pretrained`."""
    folder = resolve(source, revision)
    config = read_description(folder)
    state = read_state(folder, config)
    with _in_words(folder):
        return _autoencoder(config, state, folder, encoder).eval()


def load_generator(source: str | Path, revision: str | None = None, encoder: bool = True) -> Generator:
    """An exported generator; arguments as for :meth:`rae.generator.Generator.from_pretrained`.

    Raises:
        ValueError: The export holds an autoencoder alone, or weights that do not fit.
    """
    folder = resolve(source, revision)
    config = read_description(folder)
    if config["kind"] != "generator":
        raise ValueError(
            f"{str(folder)!r} is an exported {config['kind']}, without a denoiser; load it with RAE.from_pretrained"
        )
    state = read_state(folder, config)
    with _in_words(folder):
        return Generator(
            _autoencoder(config, state, folder, encoder),
            make_denoiser(config, state, "denoiser", folder),
            rebuild(config["flow"]),
            rebuild(config["sampler"]),
            rebuild(config["guidance"]),
            None if config["guide"] is None else make_denoiser(config, state, "guide", folder),
        ).eval()


def make_denoiser(config: Mapping[str, Any], state: Mapping[str, Tensor], name: str, folder: Path) -> Denoiser:
    """A denoiser of an export with its weights: ``denoiser`` or ``guide``.

    Args:
        config: The export's description.
        state: Its weights.
        name: Which of the two.
        folder: The export, for messages.

    Raises:
        ValueError: The weights do not fit its description.
    """
    denoiser: Denoiser = _empty(config[name])
    load_strict(denoiser, part(state, name), f"{name} of {str(folder)!r}")
    return denoiser


def _autoencoder(config: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path, with_encoder: bool) -> RAE:
    encoder = _encoder(config["encoder"], part(state, "encoder"), folder, with_encoder)
    decoder = _empty(config["decoder"])
    load_strict(decoder, part(state, "decoder"), f"decoder of {str(folder)!r}")
    latent = LatentNormalizer(config["latent_shape"], **{**part(state, "latent"), **config["latent"]})
    return RAE(encoder, decoder, latent)


def _encoder(entry: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path, with_weights: bool) -> Encoder:
    model = entry["model"]
    if not with_weights:
        absent = AbsentEncoder(*(model[key] for key in ("channels", "stride", "input_size", "mean", "std")))
        absent.exported = dict(entry)
        return absent
    with torch.random.fork_rng(devices=[]):
        encoder: Encoder = rebuild(model)
    if entry["stored"]:
        encoder.load_published(state, f"encoder of {str(folder)!r}")  # their hash was compared on reading
        return encoder
    if found := encoder.differences(_fingerprint(entry)):
        raise ValueError(
            f"the encoder of {str(folder)!r} is not the one that the model was trained with: {found}; its revision in {CONFIG} "
            "may have moved"
        )
    return encoder


def _fingerprint(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"weights": entry["sha256"], "dtype": entry["model"].get("dtype") or "float32"}


def _empty(description: Mapping[str, Any]) -> Any:
    """A network whose weights are about to be loaded; the global generator is left as it is."""
    with torch.random.fork_rng(devices=[]):
        return rebuild(description)


def _prefixed(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in state.items()}
