"""From keys to batches: seeded data sets, collation, a loader that Lightning leaves unchanged, broken files."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Sampler

from rae.data.sampler import Key
from rae.data.storage import UnreachableError
from rae.data.transforms import ImageTransform, open_for
from rae.rng import sample_seed, uniform

log = logging.getLogger(__name__)

Sample = dict[str, Any]
"""``image`` (uint8 3×H×W) or ``latent`` (C×h×w or K×C×h×w), ``label``, ``index`` (int); optionally ``caption`` (text) or
``text`` (its features L×C), and ``broken``, (name, reason) of bad files."""

_STACKED = ("image", "latent")

Batches = Sampler[list[Key]]
"""Yields the keys of each batch; has a length."""

_LISTED = 100  # broken files named at the end


class BrokenFilesError(RuntimeError):
    """Too many files cannot be read."""


class SeededDataset(Dataset[Sample], Sized, ABC):
    """A map-style image data set whose augmentation depends only on a given seed."""

    @abstractmethod
    def load(self, index: int, seed: int) -> Sample:
        """The sample at a position, augmented with draws from a seed."""

    def load_many(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Sample]:
        """The samples of a batch, by position, each with draws from its seed."""
        return [self.load(index, seed) for index, seed in zip(indices, seeds, strict=True)]

    def augment_seed(self, seed: int, epoch: int, index: int) -> int:
        """Augmentation seed of the sample at a position, given the run's seed and the epoch."""
        return sample_seed(seed, "augment", epoch, index)

    @abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample at a position, with a fixed augmentation."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside of the data set's {len(self)} samples")
        index %= len(self)
        return self.load(index, self.augment_seed(0, 0, index))


class Names(Sequence[str]):
    """Many names in two arrays: workers share their memory, whereas reading a list's strings would copy it."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode(errors="surrogateescape") for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, position: Any) -> Any:
        """The name at a position, or the list of names in a slice."""
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        start, end = self._ends[range(len(self))[position]], self._ends[range(len(self))[position] + 1]
        return self._bytes[start:end].decode(errors="surrogateescape")


class ImageFiles(SeededDataset):
    """Labelled images, opened and transformed on access; with captions if :meth:`captions` gives any.

    An unreadable image is replaced by the next readable one, the same in every run, as long as the fraction of unreadable
    images is at most ``max_bad_share``.
    """

    def __init__(self, labels: ArrayLike, transform: ImageTransform, max_bad_share: float) -> None:
        self.labels: NDArray[np.int64] = np.asarray(labels, np.int64)
        self.transform = transform
        self.max_bad_share = max_bad_share

    @abstractmethod
    def name(self, position: int) -> str:
        """Name of the image at a position, for messages; its path, unless :meth:`file` is overridden."""

    def file(self, position: int) -> str | IO[bytes]:
        """The image file at a position: a path, or a binary file open for reading."""
        return self.name(position)

    def label(self, position: int) -> int:
        """The class of the image at a position."""
        return int(self.labels[position])

    captioned = False
    """Whether there are captions."""

    def captions(self, position: int) -> Sequence[str]:
        """The captions of the image at a position; a sample gets one of them, drawn by its seed."""
        return ()

    def caption(self, position: int, seed: int) -> str:
        """One of an image's captions, drawn uniformly; raises ValueError if there is none or it is empty."""
        texts = self.captions(position)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("it has no caption, or an empty one")
        return texts[int(uniform([sample_seed(seed, "caption")])[0] * len(texts))].strip()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names_hash(self) -> str:
        """SHA-256 of all names and labels in order, to compare two listings."""
        digest = hashlib.sha256()
        for position, label in enumerate(self.labels.tolist()):
            digest.update(f"{self.name(position)}|{label}\n".encode())
        return digest.hexdigest()

    def load(self, index: int, seed: int) -> Sample:
        """The image at a position, or the next readable one, with the same draws.

        Raises:
            BrokenFilesError: More consecutive images are unreadable than are allowed in the whole data set.
        """
        broken: list[tuple[str, str]] = []
        while True:
            position = (index + len(broken)) % len(self)
            try:
                text = {"caption": self.caption(position, seed)} if self.captioned else {}
                image = self.transform(open_for(self.transform, self.file(position)), seed)
            except UnreachableError:
                raise
            except Exception as error:  # decoders raise all kinds of errors on damaged bytes
                broken.append((self.name(position), first_line(error)))
                check_share(len(broken), len(self), self.max_bad_share, [name for name, _ in broken])
            else:
                return {"image": image, "label": self.label(position), "index": index, "broken": broken, **text}


class KeyedDataset(Dataset[Sample]):
    """Looks up samples by (epoch, index) and derives their augmentation seed from both and the run's seed."""

    def __init__(self, dataset: SeededDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitems__(self, keys: list[Key]) -> list[Sample]:
        """All samples of a batch, which torch's loader requests together; or only ``error``, see :class:`BatchLoader`."""
        seeds = [self.dataset.augment_seed(self.seed, epoch, index) for epoch, index in keys]
        try:
            samples = self.dataset.load_many([index for _, index in keys], seeds)
        except (BrokenFilesError, UnreachableError, ValueError) as error:
            return [{"error": error}]  # if raised in a worker, torch would bury its message in a traceback
        return [{**sample, "epoch": epoch} for sample, (epoch, _) in zip(samples, keys, strict=True)]


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Collates samples: ``image`` uint8 B×3×H×W or ``latent`` B×(K×)C×h×w; ``label``, ``index``, ``epoch`` int64 B.

    Captions are ``caption``, a list of B texts, and ``wrong_caption``, texts that almost match; cached text features are
    ``text`` B×L×C, padded to the longest, and ``text_mask``.
    ``replaced``, bool B, marks samples that replace an unreadable image; ``broken`` names the unreadable ones.
    """
    if "error" in samples[0]:
        return samples[0]
    batch: dict[str, Any] = {
        name: torch.stack([sample[name] for sample in samples]) for name in _STACKED if name in samples[0]
    }
    for name in ("label", "index", "epoch"):
        batch[name] = torch.tensor([int(sample[name]) for sample in samples], dtype=torch.int64)
    for name in ("caption", "wrong_caption"):
        if name in samples[0]:
            batch[name] = [sample[name] for sample in samples]
    if "text" in samples[0]:
        lengths = torch.tensor([len(sample["text"]) for sample in samples])
        batch["text"] = pad_sequence([sample["text"] for sample in samples], batch_first=True)
        batch["text_mask"] = torch.arange(batch["text"].shape[1]) < lengths[:, None]
    batch["replaced"] = torch.tensor([bool(sample.get("broken")) for sample in samples])
    batch["broken"] = [entry for sample in samples for entry in sample.get("broken", ())]
    return batch


class BrokenFiles:
    """Counts unreadable files, warns once for each and raises once their fraction exceeds ``max_share``."""

    def __init__(self, length: int, max_share: float) -> None:
        self.length = length
        self.max_share = max_share
        self.reasons: dict[str, str] = {}

    def add(self, entries: list[tuple[str, str]]) -> None:
        """Records (name, reason) pairs; raises BrokenFilesError if more than the allowed fraction is broken."""
        for name, reason in entries:
            if name not in self.reasons:
                self.reasons[name] = reason
                log.warning("%s cannot be read (%s); the next readable file takes its place", name, reason)
        check_share(len(self.reasons), self.length, self.max_share, list(self.reasons))

    def gather(self) -> None:
        """Adds the files found by the other processes, so that the fraction is global; every process must call this."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        found: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(found, self.reasons)
        for reasons in found:
            self.reasons = {**reasons, **self.reasons}
        self.add([])

    def summarise(self) -> None:
        """Logs the unreadable files, if any."""
        if self.reasons:
            names = "".join(f"\n  {name}" for name in list(self.reasons)[:_LISTED])
            more = f"\n  and {len(self.reasons) - _LISTED} more" if len(self.reasons) > _LISTED else ""
            log.warning("%d of %d files could not be read:%s%s", len(self.reasons), self.length, names, more)


def _rows(values: Any, chosen: Tensor) -> Any:
    """The entries of a tensor or list selected by a mask."""
    return values[chosen] if isinstance(values, Tensor) else [values[row] for row in chosen.nonzero()[:, 0].tolist()]


def first_line(error: Exception) -> str:
    """Type and first line of the message of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def check_share(
    count: int, length: int, max_share: float, names: Sequence[str], option: str = "data.max_bad_share"
) -> None:
    """Raises BrokenFilesError if ``count`` broken files, called ``names``, are too many of all ``length``."""
    if count > max_share * length:
        raise BrokenFilesError(
            f"at least {count} of {length} files cannot be read, more than {option}={max_share:g} allows, "
            f"e.g. {', '.join(names[:3])}; repair or remove them, or raise {option}"
        )


class BatchLoader:
    """Wraps a torch DataLoader that yields batches of keyed samples.

    It is deliberately not a subclass of DataLoader: Lightning would replace a DataLoader's sampler with its own distributed
    sampler, but here the data are already sharded. Its (empty) state tells Lightning that training can resume in the middle
    of an epoch; the data module's state holds the position.

    ``batches`` yields the keys of each batch, ``broken`` counts the unreadable files. ``replace=False`` drops the images that
    would replace these; batches may then be smaller, or empty.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        batches: Batches,
        seed: int,
        num_workers: int,
        pin_memory: bool,
        broken: BrokenFiles,
        replace: bool = True,
    ) -> None:
        self.batches = batches
        self.replace = replace
        self.broken = broken
        self.loader: DataLoader[Sample] = DataLoader(
            KeyedDataset(dataset, seed),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory and torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
        )

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # Starts the workers and asks for the position now, not at the first batch.
        return self._counted(iter(self.loader))

    def close(self) -> None:
        """Stops the workers; the garbage collector would wait seconds for each of them."""
        iterator = self.loader._iterator
        self.loader._iterator = None
        if iterator is not None and self.loader.num_workers:
            iterator._shutdown_workers()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """Nothing; see the class."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing; see the class."""

    def _counted(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Tensor]]:
        try:
            for batch in batches:
                if "error" in batch:
                    raise batch["error"]
                self.broken.add(batch.pop("broken"))
                own = ~batch.pop("replaced")
                yield batch if self.replace or own.all() else {key: _rows(value, own) for key, value in batch.items()}
        except Exception:
            self.close()
            raise
