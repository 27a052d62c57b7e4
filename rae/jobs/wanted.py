"""What to generate: a class or a prompt for every sample, from a command's keys."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from rae.flow import evaluations
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.io.files import parse_json_lines
from rae.rng import sample_seed

LAYOUTS = ("geneval", "dpg")
"""Layouts of text-to-image benchmarks: GenEval (arXiv 2310.11513) and DPG-Bench (arXiv 2403.05135)."""
DPG_PICTURES = 4
"""Samples per prompt in one DPG-Bench picture, two by two."""


_LABELS = {"equal": "balanced", "random": "random"}


class Prompt(NamedTuple):
    """A text, the name of its source, and what else the source says about it."""

    text: str
    name: str
    said: Mapping[str, Any] | None = None


def wanted(cfg: DictConfig, generator: Generator, prompts: Sequence[Prompt]) -> list[int] | list[str]:
    """The class or the prompt of every sample, which depends only on the configuration.

    Args:
        cfg: Configuration with the keys of :func:`label_list` and :func:`prompt_list`.
        generator: Determines whether samples are conditioned on classes or text.
        prompts: From :func:`prompt_list`.

    Raises:
        ConfigError: A number is below 1, or a class-conditional model gets prompts, or a text-conditional one classes or nothing.
    """
    for key in ("batch_size", "part_size"):
        if cfg[key] < 1:
            raise ConfigError(f"{key}={cfg[key]} must be at least 1")
    if generator.text_encoder is None:
        if prompts or cfg.negative_prompt is not None:
            raise ConfigError(
                f"prompt and prompts are for models that are told a text; this one is told {_told(generator)}: classes=[…]"
            )
        return label_list(cfg, generator.num_classes)
    if cfg.classes != "all" or cfg.labels != "equal":
        raise ConfigError(
            f"classes={cfg.classes} and labels={cfg.labels} are for models that are told a class; this one is told a text: "
            'prompt="…" or prompts=FILE'
        )
    if not prompts:
        raise ConfigError('this model is told a text: prompt="…", or prompts=FILE (a prompt a line, or JSON lines)')
    return [prompt.text for prompt in prompts for _ in range(cfg.samples_per_prompt)]


def _told(generator: Generator) -> str:
    return f"one of {generator.num_classes} classes" if generator.num_classes else "no text"


def prompt_list(cfg: DictConfig) -> list[Prompt]:
    """The prompts that ``prompt`` or ``prompts`` gives; empty if neither is given.

    ``prompts`` is a text file with one prompt per line, a ``.jsonl`` whose lines hold ``prompt`` (GenEval) or ``text``, or a
    folder of text files with one prompt each (DPG-Bench).

    Raises:
        ConfigError: Both are given, a prompt is empty, a line holds none, or ``samples_per_prompt`` is below 1.
        FileNotFoundError: The file does not exist.
    """
    if cfg.prompt is not None and cfg.prompts is not None:
        raise ConfigError("prompt and prompts are both given: give one of them")
    if cfg.prompt is not None:
        found = [Prompt(str(cfg.prompt), "0")]
    elif cfg.prompts is not None:
        found = _read_prompts(Path(cfg.prompts).expanduser())
    else:
        return []
    for prompt in found:
        if not prompt.text.strip():
            raise ConfigError(f"prompt {prompt.name!r} is empty: say what is to be drawn")
    if cfg.samples_per_prompt < 1:
        raise ConfigError(f"samples_per_prompt={cfg.samples_per_prompt} must be at least 1")
    return found


def check_layout(cfg: DictConfig, prompts: Sequence[Prompt]) -> None:
    """Rejects prompts that a benchmark's layout cannot hold.

    Raises:
        ConfigError: Says what the layout needs.
    """
    if cfg.layout is None:
        return
    if cfg.layout not in LAYOUTS:
        raise ConfigError(f"layout={cfg.layout} is unknown; choose {' or '.join(LAYOUTS)}, or null")
    if cfg.layout == "geneval" and not (prompts and all(prompt.said and "tag" in prompt.said for prompt in prompts)):
        raise ConfigError(
            "layout=geneval needs prompts=evaluation_metadata.jsonl of GenEval, whose lines hold prompt and tag"
        )
    if cfg.layout == "dpg" and (cfg.samples_per_prompt != DPG_PICTURES or not prompts):
        raise ConfigError(
            f"layout=dpg needs prompts=FOLDER (dpg_bench/prompts) and samples_per_prompt={DPG_PICTURES}, which make one picture"
        )


def _read_prompts(path: Path) -> list[Prompt]:
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        found = [Prompt(_text(file).strip(), file.stem) for file in files]
    elif path.suffix == ".jsonl":
        found = []
        for number, value in parse_json_lines(_text(path), str(path)).items():
            text = value.get("prompt", value.get("text")) if isinstance(value, dict) else None
            if not isinstance(text, str):
                raise ConfigError(f'prompts={path}: line {number} holds no prompt; every line needs {{"prompt": "…"}}')
            found.append(Prompt(text, str(len(found)), value))
    else:
        lines = [line.strip() for line in _text(path).split("\n")]
        found = [Prompt(line, str(number)) for number, line in enumerate(filter(None, lines))]
    if not found:
        raise ConfigError(f"prompts={path} holds no prompt")
    return found


def _text(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts={str(path)!r} does not exist: give a text file, a .jsonl file, or a folder of text files"
        )
    try:
        return path.read_text("utf-8-sig")  # drops the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompts={str(path)!r} is no text file: {error}") from error


def class_list(classes: object, num_classes: int) -> list[int]:
    """The classes to generate: all for ``all``, or those listed.

    Raises:
        ConfigError: It is neither, or a class is out of range.
    """
    if classes == "all":
        return list(range(num_classes))
    listed = [classes] if isinstance(classes, int) else classes
    if not isinstance(listed, list) or not listed or not all(isinstance(item, int) for item in listed):
        raise ConfigError(f"classes={classes!r} must be all or a list of numbers, e.g. classes=[0,7]")
    if wrong := [item for item in listed if not 0 <= item < num_classes]:
        raise ConfigError(f"classes={wrong} lie outside 0 … {num_classes - 1}, the classes of this run")
    return listed


def label_list(cfg: DictConfig, num_classes: int) -> list[int]:
    """The label of every sample, which depends only on the configuration.

    ``labels=equal`` gives ``samples_per_class`` of each of the ``classes``, class by class; ``random`` draws ``count`` labels,
    each from the seed and the sample's index; a file lists them (text, .npy, or an .npz with ``arr_1``).

    Raises:
        ConfigError: A number is below 1, or a label is out of range or not an integer.
        FileNotFoundError: The file does not exist.
    """
    classes = class_list(
        OmegaConf.to_container(cfg.classes) if OmegaConf.is_list(cfg.classes) else cfg.classes, num_classes
    )
    if cfg.samples_per_class < 1:
        raise ConfigError(f"samples_per_class={cfg.samples_per_class} must be at least 1")
    if cfg.labels == "equal":
        return [label for label in classes for _ in range(cfg.samples_per_class)]
    if cfg.labels == "random":
        if not isinstance(cfg.count, int) or cfg.count < 1:
            raise ConfigError(f"labels=random needs count=… (how many samples), got count={cfg.count}")
        return [classes[sample_seed(cfg.seed, "label", number) % len(classes)] for number in range(cfg.count)]
    return _listed_labels(Path(cfg.labels).expanduser(), num_classes)


def _listed_labels(path: Path, num_classes: int) -> list[int]:
    if not path.is_file():
        raise FileNotFoundError(f"labels={str(path)!r} does not exist; choose equal, random, or give a file of labels")
    try:
        if path.suffix == ".npy":
            values = np.load(path)
        elif path.suffix == ".npz":
            values = np.load(path)["arr_1"]
        else:
            values = np.array([int(word) for word in path.read_text().split()])
        with np.errstate(invalid="ignore"):
            whole = values.astype(np.int64)
        if not np.array_equal(whole, values):
            raise ValueError("they are no whole numbers")
    except (ValueError, KeyError, OSError, OverflowError, zipfile.BadZipFile) as error:
        raise ConfigError(f"labels={str(path)!r} holds no list of labels: {error}") from error
    labels: list[int] = whole.ravel().tolist()
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong or not labels:
        raise ConfigError(f"labels={str(path)!r} must hold labels in 0 … {num_classes - 1}, got {wrong[:8] or 'none'}")
    return labels


def hash_of(wanted: Sequence[int] | Sequence[str]) -> str:
    """SHA-256 of labels or prompts."""
    if wanted and isinstance(wanted[0], str):
        return hashlib.sha256(json.dumps(list(wanted)).encode()).hexdigest()
    return hashlib.sha256(np.asarray(wanted, dtype=np.int64).tobytes()).hexdigest()


def how_sampled(labels: str, generator: Generator) -> dict[str, Any]:
    """The rule behind the labels, or "prompts", and the network evaluations per sample, for ``samples.json``."""
    counts = None
    if generator.sampler.evaluations is not None:
        counts = evaluations(generator.sampler, generator.guidance, generator.flow.shift)
    rule = "prompts" if generator.text_encoder is not None else _LABELS.get(labels, "list")
    return {"label_rule": rule, "evaluations": counts}
