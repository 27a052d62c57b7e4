"""Model cards: the ``README.md`` of an export, with the metadata header for the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rae.io.describe import TARGET
from rae.io.files import flat, parse_json

CARD = "README.md"
_LICENCES = {  # the first match counts: some architectures are named after others
    "eupe": "FAIR Noncommercial Research License",
    "webssl|moco|ijepa": "CC-BY-NC-4.0: not for commercial use",
    r"\bmae\b": "CC-BY-NC-4.0: not for commercial use",
    "tips|pe core|pe spatial|pe lang|siglip": "Apache-2.0",
    "dinov3": "DINOv3 License of Meta",
    "dinov2": "Apache-2.0",
    "clip": "MIT (OpenAI's repository)",
}
"""Licences of encoders' weights."""
_NAMED = 10  # classes listed on a card


def read_result(path: str | Path) -> dict[str, Any]:
    """Reads the scores and their protocol from a ``scores.json`` of ``rae-evaluate`` or ``rae-reconstruct``.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It holds no scores.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"scores={path} does not exist: give a scores.json of rae-evaluate or rae-reconstruct")
    found = parse_json(file.read_bytes(), str(path))
    if not isinstance(found, dict) or not isinstance(found.get("scores"), dict):
        raise ValueError(f"scores={path} holds no scores: give a scores.json of rae-evaluate or rae-reconstruct")
    identity = found.get("identity")
    protocol = identity.get("protocol") if isinstance(identity, dict) else None
    return {"scores": found["scores"], "protocol": protocol if isinstance(protocol, dict) else {}}


def model_card(
    config: Mapping[str, Any],
    source: str = "FOLDER",
    scores: str | Path | None = None,
    license: str | None = None,
    trained_on: str | None = None,
) -> str:
    """Writes the model card of an export.

    Args:
        config: Content of its ``config.json``.
        source: Where it is loaded from: a hub id, or a folder.
        scores: A ``scores.json``, whose scores and protocol the card lists; None for none.
        license: The hub's name of the licence, e.g. ``apache-2.0``; None if the owner has not chosen one.
        trained_on: Description of the training data; None if not stated.

    Raises:
        FileNotFoundError: The scores file does not exist.
        ValueError: The file holds no scores.
    """
    generator = config["kind"] == "generator"
    text = config.get("text_encoder") is not None
    task = ("text-to-image" if text else "unconditional-image-generation") if generator else "image-feature-extraction"
    tags = ["rae", "representation-autoencoder", *(["flow-matching", "diffusion"] if generator else [])]
    header = {"license": license or "other", "library_name": "rae", "pipeline_tag": task, "tags": tags}
    told = '"a sentence"' if text else "0"
    use = f'pictures = draw({told}, output="pil")' if generator else 'model.reconstruct("photo.jpg").save("again.png")'
    kind, name = ("Generator", "draw") if generator else ("RAE", "model")
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        "# " + ("Diffusion transformer on the latents of a" if generator else "A") + " representation autoencoder",
        f'```python\nfrom rae import {kind}\n\n{name} = {kind}.from_pretrained("{source}")\n{use}\n```',
        "## Model\n\n" + _table(_facts(config)),
    ]
    if scores is None:
        parts.append("## Scores\n\nNone were given.")
    else:
        result = read_result(scores)
        parts.append("## Scores\n\n" + _table(result["scores"]))
        if result["protocol"]:
            parts.append("Taken by this protocol:\n\n" + _table(flat(result["protocol"])))
    parts += [
        f"## Data\n\n{trained_on or 'Not stated.'}",
        f"## Licence\n\n{f'{license}.' if license else 'Not stated by the owner.'} {_encoder_licence(config['encoder'])}",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(config: Mapping[str, Any]) -> dict[str, Any]:
    encoder = config["encoder"]["model"]
    named = {key: encoder[key] for key in ("hub_id", "model", "revision") if encoder.get(key)}
    facts = {
        "images": "{0}×{0} pixels".format(config["image_size"]),
        "latents": "×".join(map(str, config["latent_shape"])),
        "encoder": ", ".join([_kind(encoder), *(f"{key} {value}" for key, value in named.items())]),
        "decoder": _kind(config["decoder"]),
    }
    if config["kind"] == "generator":
        names = config["class_names"]
        some = f": {', '.join(map(str, names[:_NAMED]))}{', …' if len(names) > _NAMED else ''}" if names else ""
        facts |= {
            "denoiser": f"{_kind(config['denoiser'])}, predicts {config['prediction']}, time shift {config['shift']:.4g}",
            "classes": f"{config['num_classes']}{some}",
            "sampler": json.dumps(config["sampler"]),
            "guidance": json.dumps(config["guidance"]),
        }
    return facts | {"sha256 of the weights": config["weights"]["sha256"], "rae": config["library_version"]}


def _kind(description: Mapping[str, Any]) -> str:
    return str(description[TARGET]).rpartition(".")[2]


def licence_of(encoder: Mapping[str, Any]) -> str | None:
    """The licence of an encoder's weights, from the names in its description; None if unknown."""
    names = re.sub(r"[_./-]", " ", f"{encoder.get('hub_id')} {encoder.get('model')}".lower())
    return next((text for name, text in _LICENCES.items() if re.search(name, names)), None)


def _encoder_licence(entry: Mapping[str, Any]) -> str:
    """States where the encoder's weights are, and their licence."""
    found = licence_of(entry["model"])
    stored = "are stored here" if entry["stored"] else "come from the hub"
    if found is None or (entry["stored"] and not entry["model"].get("hub_id")):
        return f"The encoder's weights {stored}; whether they have a licence of their own is not known here."
    return f"The encoder's weights {stored}, under their own licence: {found}."


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    """Formats a table cell; an absolute path is reduced to its last part, not to reveal local folders."""
    if isinstance(value, float):
        return f"{value:.5g}"
    text = Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)
    return " ".join(text.replace("|", "\\|").split())
