"""Several data sets in one run, each with a fixed fraction of the steps or samples."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rae.data.latents import LatentsDataModule
from rae.data.loader import Sample, SeededDataset
from rae.data.mixture_sampler import InTurn, MixtureBatchSampler
from rae.data.module import ImageDataModule

log = logging.getLogger(__name__)

MIXES = ("step", "sample")


class MixtureDataset(SeededDataset):
    """Concatenation of named data sets; each sample is augmented as in its own data set."""

    def __init__(self, parts: Mapping[str, SeededDataset]) -> None:
        self.parts = list(parts.values())
        self.names = list(parts)
        self.offsets = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def place(self, index: int) -> tuple[int, int]:
        """Source number of a position, and the position within that source."""
        source = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return source, index - int(self.offsets[source])

    @property
    def names_hash(self) -> str | None:
        """SHA-256 of the hashes of all parts; None if a part has none."""
        hashes = [getattr(part, "names_hash", None) for part in self.parts]
        return (
            None
            if None in hashes
            else hashlib.sha256(repr([*zip(self.names, hashes, strict=True)]).encode()).hexdigest()
        )

    def augment_seed(self, seed: int, epoch: int, index: int) -> int:
        """The sample's augmentation seed in its own source."""
        source, own = self.place(index)
        return self.parts[source].augment_seed(seed, epoch, own)

    def load(self, index: int, seed: int) -> Sample:
        """The sample at a position."""
        return self.load_many([index], [seed])[0]

    def load_many(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Sample]:
        """The samples of a batch; samples of the same source are read together."""
        places = [self.place(index) for index in indices]
        found: dict[int, Sample] = {}
        for source in dict.fromkeys(source for source, _ in places):
            numbers = [number for number, place in enumerate(places) if place[0] == source]
            samples = self.parts[source].load_many([places[n][1] for n in numbers], [seeds[n] for n in numbers])
            found.update(zip(numbers, samples, strict=True))
        return [{**found[number], "index": index} for number, index in enumerate(indices)]


class MixtureDataModule(ImageDataModule):
    """Images of several data sets, each with its own transform and captions.

    Each source keeps its own order, epochs and augmentation, as if used alone; ``batch_size``, ``num_workers`` and ``seed`` are
    the mixture's. Validation scores the sources one after another, each separately.

    Args:
        sources: By name, ``data``, an image data module, and ``weight``, above 0 (default 1).
        mix: ``step``: all images of a global batch come from one source (RAEv2's general recipe); ``sample``: every batch
            mixes all sources.
        epoch_images: Images per epoch; None for the weighted mean of the sources' sizes, as in RAEv2.
        batch_size: Samples per process and step.
        num_workers: Loader processes.
        options: The other arguments of :class:`ImageDataModule`; ``num_classes`` must cover the labels of every source, and
            ``max_bad_share`` applies to the files of all sources together.

    Raises:
        ValueError: There are no sources; a weight, size or number of classes does not fit; or a source holds no images.
    """

    def __init__(
        self,
        sources: dict[str, dict[str, Any]],
        mix: str = "step",
        epoch_images: int | None = None,
        batch_size: int = 64,
        num_workers: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(batch_size, num_workers, **options)
        if mix not in MIXES:
            raise ValueError(f"data.mix={mix!r} is unknown; choose one of {', '.join(MIXES)}")
        if not sources:
            raise ValueError(
                "data.sources is empty; add each by a name, e.g. +data@data.sources.photos.data=folder "
                "data.sources.photos.data.train_path=/path/to/photos +data.sources.photos.weight=1"
            )
        if epoch_images is not None and epoch_images < 1:
            raise ValueError(f"data.epoch_images must be at least 1, or null, got {epoch_images}")
        self.mix = mix
        self.epoch_images = epoch_images
        self.sources: dict[str, ImageDataModule] = {}
        self.weights: dict[str, float] = {}
        for name, source in sources.items():
            self.sources[name], self.weights[name] = self._checked(name, source)

    def _checked(self, name: str, source: dict[str, Any]) -> tuple[ImageDataModule, float]:
        where = f"data.sources.{name}"
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{where}: a name is made of letters, digits, _ and -, since scores are called by it")
        if not isinstance(source, dict) or not {"data"} <= source.keys() <= {"data", "weight"}:
            raise ValueError(f"{where} must hold data, a data set, and may hold weight; got {str(source)[:80]}")
        data, weight = source["data"], source.get("weight", 1.0)
        if not isinstance(data, ImageDataModule) or isinstance(data, LatentsDataModule | MixtureDataModule):
            raise ValueError(f"{where}.data must be one data set of images, got {type(data).__name__}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(f"{where}.weight={weight} must be a number above 0")
        if data.image_size != self.image_size:
            raise ValueError(f"{where}.data.image_size={data.image_size} must be data.image_size={self.image_size}")
        if data.num_classes > self.num_classes:
            raise ValueError(
                f"{where}.data.num_classes={data.num_classes} is above data.num_classes={self.num_classes}; set "
                f"data.num_classes={data.num_classes}"
            )
        return data, float(weight)

    def train_dataset(self) -> MixtureDataset:
        """The training samples of all sources."""
        return MixtureDataset({name: source._needed("train") for name, source in self.sources.items()})

    def val_dataset(self) -> MixtureDataset | None:
        """The validation samples of all sources that have any; None if none does."""
        found = {name: source._dataset("val") for name, source in self.sources.items()}
        parts = {name: dataset for name, dataset in found.items() if dataset is not None}
        return MixtureDataset(parts) if parts else None

    def val_ranges(self) -> dict[str, range]:
        """Positions of the validation samples of each source."""
        dataset = self._dataset("val")
        if not isinstance(dataset, MixtureDataset):
            return {}
        ends = zip(dataset.offsets.tolist(), dataset.offsets[1:].tolist(), strict=False)
        return {name: range(*ends_) for name, ends_ in zip(dataset.names, ends, strict=True)}

    def _batches(self, dataset: SeededDataset, shuffle: bool, drop_last: bool) -> Any:
        assert isinstance(dataset, MixtureDataset)
        if not drop_last:
            alone = super()._batches
            return InTurn([alone(part, shuffle, drop_last) for part in dataset.parts])
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)
        lengths = [len(part) for part in dataset.parts]
        if self.mix == "sample":
            self._check_captions(dataset)
        weights = [self.weights[name] for name in dataset.names]
        mean = sum(weight * length for weight, length in zip(weights, lengths, strict=True)) / sum(weights)
        images = round(mean) if self.epoch_images is None else self.epoch_images
        sampler = MixtureBatchSampler(
            lengths,
            weights,
            self.mix,
            images,
            self.batch_size,
            self.seed,
            shuffle,
            world,
            rank,
            self._position,
            dataset.names,
        )
        if rank == 0:
            self._tell(sampler)
        return sampler

    @staticmethod
    def _check_captions(dataset: MixtureDataset) -> None:
        """Raises ValueError if batches would mix samples with and without captions."""
        told = {name: "caption" in part[0] for name, part in zip(dataset.names, dataset.parts, strict=True)}
        if len({*told.values()}) > 1:
            having, bare = (next(name for name, has in told.items() if has is wanted) for wanted in (True, False))
            raise ValueError(
                f"data.mix=sample: the images of {having} come with captions, those of {bare} without; give all sources "
                "captions, or none, or set data.mix=step"
            )

    def _tell(self, sampler: MixtureBatchSampler) -> None:
        """Logs the length and composition of an epoch."""
        size = sampler.global_batch_size if self.mix == "step" else 1
        parts = [
            f"{name} {count} {self.mix}s, {count * size / length:.3g} times its {length} images"
            for name, count, length in zip(sampler.names, sampler.counts, sampler.lengths, strict=True)
        ]
        log.info("an epoch is %d steps of %d images: %s", len(sampler), sampler.global_batch_size, "; ".join(parts))
