"""Finds the files of a split of a data set in Hugging Face's layouts, local or on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rae.io.files import parse_json
from rae.io.hub import UnansweredError, dataset_url, fetch_dataset, list_dataset

PARQUET = ".parquet"
ENDINGS = (PARQUET, ".arrow")
"""Supported file types."""
_NAMES = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}
"""File name patterns of the splits, after ``datasets``; other splits match their own name."""
_PART = re.compile(r"-(\d+)-of-(\d+)\.\w+$")


def find_tables(repo: str, split: str, config: str | None, revision: str | None, stream: bool) -> list[str]:
    """Paths, or with ``stream`` URLs, of the files of a split.

    Args:
        repo: A folder (any layout, or the output of ``save_to_disk`` of ``datasets``), or a data set on the hub, whose files
            are downloaded into the hub's cache.
        split: Name of the split.
        config: Which of several data sets in one repository; None for the default one.
        revision: Branch, tag or commit on the hub; None for the newest.
        stream: Whether to leave files on the hub instead of downloading them.

    Raises:
        FileNotFoundError: The data set, split or configuration does not exist or is not accessible.
        ValueError: Files are missing or of an unsupported type.
    """
    if Path(repo).expanduser().is_dir():
        return _below(Path(repo).expanduser(), split, config)
    try:
        listed = list_dataset(repo, revision)
    except UnansweredError as problem:
        try:
            folder = fetch_dataset(repo, revision)
        except FileNotFoundError:
            raise problem from None
        return _below(folder, split, config)
    names = files_of(listed.names, listed.card, split, config, repo)
    if not stream:
        folder = fetch_dataset(repo, revision, names)
        return [str(folder / name) for name in names]
    if not all(name.endswith(PARQUET) for name in names):
        raise ValueError(
            f"data.stream=true reads Parquet alone, and {repo!r} holds {names[0]!r}; set data.stream=false"
        )
    return [dataset_url(repo, listed.commit, name) for name in names]


def files_of(names: Sequence[str], card: Mapping[str, Any], split: str, config: str | None, repo: str) -> list[str]:
    """Selects the files of a split, by the data set's card or else by name; ``repo`` is its name for messages.

    Raises:
        FileNotFoundError: The split has no files.
        ValueError: Some are missing.
    """
    tables = sorted(name for name in names if name.endswith(ENDINGS))
    patterns = _patterns(card, split, config, repo)
    if patterns is not None:
        found = [name for name in tables if any(_matches(name, pattern) for pattern in patterns)]
    else:
        inside = [name for name in tables if config is None or config in name.split("/")[:-1]]
        found = [name for name in inside if _is_of(name, split)]
        if not found and split == "train" and not any(_is_of(name, other) for name in inside for other in _NAMES):
            found = inside
    if not found:
        listed = ", ".join(tables[:4]) or "no .parquet or .arrow file"
        kind = f" of configuration {config!r}" if config else ""
        raise FileNotFoundError(f"{repo!r} has no files of split {split!r}{kind}; it holds {listed}")
    _check_parts(found, repo)
    return found


def _below(root: Path, split: str, config: str | None) -> list[str]:
    """Files of a split in a folder."""
    if (root / "dataset_dict.json").is_file():
        known = _saved(root / "dataset_dict.json", "splits")
        if split not in known["splits"]:
            raise FileNotFoundError(
                f"{str(root)!r} has no split {split!r}; it has {', '.join(map(str, known['splits']))}"
            )
        root = root / split
    if (root / "state.json").is_file():
        state = _saved(root / "state.json", "_data_files")
        if state.get("_split") not in (None, split):
            raise FileNotFoundError(f"{str(root)!r} is the split {state['_split']!r}, not {split!r}")
        return [str(root / Path(str(entry["filename"])).name) for entry in state["_data_files"]]
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in ENDINGS]
    card = root / "README.md"
    head = re.match(r"---\n(.*?)\n---", card.read_text("utf-8"), re.DOTALL) if card.is_file() else None
    try:
        described = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError as error:
        raise ValueError(f"the head of {str(card)!r} is no YAML ({error}); correct it, or remove the file") from error
    card_data = described if isinstance(described, dict) else {}
    return [str(root / name) for name in files_of(names, card_data, split, config, str(root))]


def _saved(file: Path, key: str) -> dict[str, Any]:
    """Reads a file of ``save_to_disk``; raises ValueError if its list ``key`` is missing or invalid."""
    content = parse_json(file.read_bytes(), str(file))
    found = content.get(key) if isinstance(content, dict) else None
    listed = found if isinstance(found, list) else []
    if key == "_data_files":
        listed = [one for one in listed if isinstance(one, dict) and "filename" in one]
    if not listed or listed != found:
        raise ValueError(f"{str(file)!r} is not what save_to_disk writes: it lists no {key}; save the data set anew")
    return dict(content)


def _patterns(card: Mapping[str, Any], split: str, config: str | None, repo: str) -> list[str] | None:
    """File patterns of a split from a data set's card; None if it gives none."""
    configs = {str(one.get("config_name")): one for one in card.get("configs") or () if isinstance(one, dict)}
    if not configs:
        return None
    first = next((name for name, one in configs.items() if one.get("default")), None)
    name = (
        config or first or ("default" if "default" in configs else next(iter(configs)) if len(configs) == 1 else None)
    )
    if name not in configs:
        raise FileNotFoundError(
            f"{repo!r} has the configurations {', '.join(configs)}: choose one with data.config_name"
            + (f", not {config!r}" if config else "")
        )
    files = configs[name].get("data_files")
    if files is None:
        return None
    if not isinstance(files, list) or not files or not isinstance(files[0], dict):
        files = [{"split": "train", "path": files}]
    by_split = {str(one.get("split")): one.get("path") for one in files}
    if split not in by_split:
        raise FileNotFoundError(f"{repo!r} has no split {split!r}; it has {', '.join(by_split)}")
    found = by_split[split]
    return [str(one) for one in (found if isinstance(found, list) else [found])]


def _matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern: ``*`` stays within a folder, ``**`` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    signs = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(signs.get(part, re.escape(part)) for part in parts), name) is not None


def _is_of(name: str, split: str) -> bool:
    words = _NAMES.get(split, re.escape(split))
    return re.search(rf"(?:^|[-._ 0-9/])(?:{words})(?:[-._ 0-9/]|$)", name) is not None


def _check_parts(names: Sequence[str], repo: str) -> None:
    """Raises ValueError if files are numbered ``-00003-of-00294`` and some are missing."""
    series: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := _PART.search(name):
            series.setdefault((name[: match.start()], int(match[2])), set()).add(int(match[1]))
    for (start, total), found in series.items():
        if len(found) < total:
            raise ValueError(
                f"{repo!r} holds {len(found)} of the {total} files {start}-…-of-{total:05d}: get the others too"
            )
