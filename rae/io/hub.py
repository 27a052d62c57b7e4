"""Finds weights of frozen networks and data sets: local, else cached, else downloaded, else one clear error."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import torch
from huggingface_hub import HfApi, RepoFile, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

from rae.io.files import file_hash
from rae.io.tensors import is_state, read_file

HUB_FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


def cached_file(url: str) -> Path:
    """Path in torch's hub cache of the download from a URL."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def find_file(given: str | None, url: str, what: str, remedy: str) -> Path:
    """The given local file, or else that of a URL, downloaded once into torch's hub cache.

    Args:
        given: The local file; None for none.
        url: The URL; the file's name ends with a prefix of its SHA-256, as for torch's files.
        what: What the file holds, for messages.
        remedy: Option that gives a local file, for messages.

    Raises:
        FileNotFoundError: The given file does not exist, or without one, the URL is neither cached nor can be downloaded.
    """
    if given is not None:
        file = Path(given).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"the file of {what}, {str(file)!r}, does not exist; get it from {url}")
        return file
    cached = cached_file(url)
    if not cached.is_file():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(cached), hash_prefix=cached.stem.rpartition("-")[2])
        except (URLError, OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{what} are neither in {cached} nor can they be downloaded from {url} ({error}); give a local file with {remedy}"
            ) from None
    return cached


def read_weights(
    checkpoint: str | None,
    hub_id: str | None,
    revision: str | None,
    option: str = "encoder.checkpoint",
    names: Sequence[str] = HUB_FILES,
) -> dict[str, Tensor]:
    """Reads a state dict from a local file, or else from the hub (from its cache if possible).

    Args:
        checkpoint: Local file.
        hub_id: Repository on the Hugging Face hub.
        revision: Branch, tag or commit of the repository.
        option: Name of the option that gives the local file, for messages.
        names: Files of the repository; the first that exists is read.

    Raises:
        FileNotFoundError: No file and no connection; names the repository, the cache and the option.
        ValueError: The file holds no state dict.
    """
    if checkpoint is not None:
        state = read_file(checkpoint)
    elif hub_id is None:
        raise FileNotFoundError(f"no weights are named: give {option}=/path/to/file (.safetensors, .bin, .pt or .pth)")
    else:
        state = read_file(fetch_weights(hub_id, revision, option, names))
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not is_state(state):
        raise ValueError(f"{checkpoint or hub_id} holds no state dict: {option} needs a file of named tensors")
    return state


def fetch_weights(hub_id: str, revision: str | None, option: str, names: Sequence[str] = HUB_FILES) -> Path:
    """The weight file of a repository, from the hub's cache if possible; arguments and errors as in :func:`read_weights`."""
    problem: Exception | None = None
    cached_only = False
    for name in names:
        try:
            return Path(hf_hub_download(hub_id, name, revision=revision, local_files_only=cached_only))
        except LocalEntryNotFoundError as error:  # no connection: the cache may hold another name; do not ask again
            problem = problem if cached_only else error
            cached_only = True
        except (RepositoryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
            problem = error
            if not isinstance(error, EntryNotFoundError):
                break
    raise _unreachable(
        f"weights of {hub_id!r}", revision, problem, f"give a local file with {option}=/path/to/file"
    ) from None


def fetch(hub_id: str, name: str, revision: str | None, folder: Path) -> Path:
    """Downloads one file of a repository to ``folder``, under its own name; keeps an existing file, resumes a partial one.

    Raises:
        FileNotFoundError: It cannot be downloaded.
    """
    try:
        return Path(hf_hub_download(hub_id, name, revision=revision, local_dir=folder))
    except Exception as error:  # the hub's errors have no common base
        raise _unreachable(f"{name!r} of {hub_id!r}", revision, error, f"put the file at {folder / name}") from None


def fetch_all(hub_id: str, revision: str | None, folder: Path | None = None, patterns: list[str] | None = None) -> Path:
    """Downloads a repository, or its files that match some patterns, to ``folder`` or the hub's cache.

    Raises:
        FileNotFoundError: It cannot be downloaded.
    """
    try:
        return Path(snapshot_download(hub_id, revision=revision, local_dir=folder, allow_patterns=patterns))
    except Exception as error:  # the hub's errors have no common base
        raise _unreachable(f"{hub_id!r}", revision, error, "give a local folder instead") from None


def published_hashes(hub_id: str, names: Sequence[str] | None, revision: str | None) -> dict[str, str]:
    """SHA-256 of the large files of a repository, from the hub, which has none for small files.

    Args:
        hub_id: Repository on the Hugging Face hub.
        names: Files of the repository; None for all.
        revision: Branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: The hub cannot be queried.
    """
    api = HfApi()
    try:
        found = (
            api.list_repo_tree(hub_id, recursive=True, revision=revision)
            if names is None
            else api.get_paths_info(hub_id, list(names), revision=revision)
        )
        return {file.path: file.lfs.sha256 for file in found if isinstance(file, RepoFile) and file.lfs is not None}
    except Exception as error:  # the hub's errors have no common base
        raise _unreachable(f"hashes of {hub_id!r}", revision, error, "leave the files as they are") from None


def check_hash(path: Path, expected: str) -> None:
    """Checks a file's SHA-256; raises ValueError if it differs."""
    if (found := file_hash(path)) != expected:
        raise ValueError(
            f"{str(path)!r} is not the hub's file: SHA-256 {found[:16]}…, there {expected[:16]}…; delete it and fetch it again"
        )


class DatasetFiles(NamedTuple):
    """Content of a data set on the hub."""

    commit: str
    names: list[str]
    """Paths of all files, relative to the repository's root."""
    card: dict[str, Any]
    """The header of its README, which may define the splits."""


def list_dataset(repo: str, revision: str | None) -> DatasetFiles:
    """Lists a data set on the hub, and checks access to it.

    Raises:
        FileNotFoundError: The data set or its revision does not exist; access is gated; or the hub cannot be reached.
    """
    try:
        info = HfApi().dataset_info(repo, revision=revision)
        if info.gated:
            HfApi().auth_check(repo, repo_type="dataset")
    except Exception as error:  # the hub's errors have no common base
        raise _no_dataset(repo, revision, error) from None
    card = info.card_data.to_dict() if info.card_data else {}
    return DatasetFiles(info.sha or "main", [file.rfilename for file in info.siblings or []], card)


def fetch_dataset(repo: str, revision: str | None, names: list[str] | None = None) -> Path:
    """Downloads files of a data set, by path, to the hub's cache; None uses those already there, without asking the hub.

    Raises:
        FileNotFoundError: They are not available.
    """
    try:
        return Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=names, local_files_only=names is None
            )
        )
    except Exception as error:  # the hub's errors have no common base
        raise _no_dataset(repo, revision, error) from None


def dataset_url(repo: str, commit: str, name: str) -> str:
    """URL of a file of a data set, for fsspec."""
    return f"hf://datasets/{repo}@{commit}/{name}"


class UnansweredError(FileNotFoundError):
    """The hub cannot be reached."""


def _no_dataset(repo: str, revision: str | None, error: Exception) -> FileNotFoundError:
    """Explains an error of the hub for a data set."""
    page = f"{constants.ENDPOINT}/datasets/{repo}"
    if isinstance(error, GatedRepoError):
        why = f"is gated: ask for access at {page}, then log in with `hf auth login`, or set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError | HFValidationError):
        why = "is neither a folder here nor a data set on the hub (a private one needs `hf auth login`, or HF_TOKEN)"
    elif isinstance(error, RevisionNotFoundError):
        why = f"has no revision {revision!r}: give a branch, tag or commit of {page} with data.revision, or null"
    else:
        reason = textwrap.shorten((str(error).strip().splitlines() or [""])[0], 120, placeholder=" …")
        return UnansweredError(
            f"data.repo={repo} is no folder here, the cache {constants.HF_HUB_CACHE} does not hold it, and the hub cannot be "
            f"reached ({type(error).__name__}: {reason}): connect once, or give the path of a copy"
        )
    return FileNotFoundError(f"data.repo={repo} {why}")


def _unreachable(what: str, revision: str | None, problem: Exception | None, remedy: str) -> FileNotFoundError:
    if isinstance(problem, GatedRepoError):
        page = what.rpartition(" ")[2].strip("'")
        remedy = (
            f"it is gated: ask for access on https://huggingface.co/{page}, log in with `hf auth login` (or set HF_TOKEN), and try "
            f"again; or {remedy}"
        )
        return FileNotFoundError(f"no {what} (revision {revision or 'main'}): {remedy}")
    reason = textwrap.shorten((str(problem).strip().splitlines() or [""])[0], 160, placeholder=" …")
    return FileNotFoundError(
        f"no {what} (revision {revision or 'main'}): the cache {constants.HF_HUB_CACHE} does not hold it and the download failed "
        f"({type(problem).__name__}: {reason}); connect once, or {remedy}"
    )
