"""Base data module of all data sets: loaders, sharding over processes, and the position within an epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from rae.data.loader import Batches, BatchLoader, BrokenFiles, SeededDataset
from rae.data.sampler import Position, RangeBatchSampler, ShardedBatchSampler
from rae.io.describe import Buildable
from rae.io.errors import no_train_path


class ImageDataModule(Buildable, L.LightningDataModule, ABC):
    """Batches ``{"image": uint8 B×3×H×W, "label", "index", "epoch": int64 B}`` that depend only on the run's seed.

    Order and augmentation are the same for any number of workers, and for any number of processes with the same global
    batch (``batch_size`` × processes). The data are sharded here: Lightning's ``Trainer(use_distributed_sampler=…)`` has no
    effect. A run resumed from a checkpoint in the middle of an epoch sees exactly the batches it had not seen.

    Subclasses define the samples: :meth:`train_dataset` and :meth:`val_dataset`.

    Args:
        batch_size: Samples per process and step.
        num_workers: Loader processes; 0 loads in the training process.
        seed: The run's seed, for order and augmentation.
        image_size: Side of the images, in pixels.
        num_classes: Number of classes.
        pin_memory: Whether to use page-locked memory, if there is a CUDA device.
        max_bad_share: Maximum fraction of unreadable files.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 42,
        image_size: int = 256,
        num_classes: int = 1000,
        pin_memory: bool = True,
        max_bad_share: float = 0.01,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("image_size", image_size, 1),
            ("num_classes", num_classes, 1),
        ):
            if value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}")
        if not 0 <= max_bad_share < 1:
            raise ValueError(f"data.max_bad_share must be in [0, 1), got {max_bad_share}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.image_size = image_size
        self.num_classes = num_classes
        self.pin_memory = pin_memory
        self.max_bad_share = max_bad_share
        self._datasets: dict[str, SeededDataset | None] = {}
        self._broken: dict[str, BrokenFiles] = {}
        self._loaders: WeakSet[BatchLoader] = WeakSet()  # weak: a cycle would leave their workers to the collector
        self._train_batches: Any = None
        self._begun: tuple[int, int, int] | None = None  # epoch, start and Lightning's batch count of the iteration
        self._resumed: dict[str, Any] | None = None

    @abstractmethod
    def train_dataset(self) -> SeededDataset:
        """The training samples."""

    @abstractmethod
    def val_dataset(self) -> SeededDataset | None:
        """The validation samples; None if there are none."""

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0, 1, …; empty if unknown."""
        return []

    # --- loaders ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Finds the files needed by a stage (``fit``, ``validate``)."""
        if stage == "fit":
            self._resumed = self._begun = None  # left by an earlier fit; Lightning restores checkpoints after this
            self._dataset("train")
        self._dataset("val")

    def train_dataloader(self) -> BatchLoader:
        """This process's shuffled batches; without a Trainer, always those of epoch 0."""
        dataset = self._needed("train")
        # Overfitting uses the same few batches in every epoch.
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        self._train_batches = self._batches(dataset, shuffle=not overfit, drop_last=True)
        return self._loader("train", dataset, self._train_batches)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """This process's batches in order, each sample exactly once over all processes.

        Without validation samples, returns no loader if there is a Trainer, else raises ValueError.
        """
        if self._dataset("val") is None and self.trainer is not None:
            return []
        dataset = self._needed("val")
        return self._loader("val", dataset, self._batches(dataset, shuffle=False, drop_last=False))

    def range_dataloader(self, split: str, ranges: Sequence[range], replace: bool = True) -> BatchLoader:
        """Batches of ranges of ``train`` or ``val`` in order, none crossing the end of a range, augmented as in epoch 0.

        An unreadable image is replaced by another; ``replace=False`` drops both. Raises ValueError for a split without
        samples.
        """
        dataset = self._needed(split)
        return self._loader(split, dataset, RangeBatchSampler(ranges, self.batch_size), replace)

    def samples(self, split: str) -> int:
        """Number of samples in ``train`` or ``val``; 0 if there are none."""
        dataset = self._dataset(split)
        return 0 if dataset is None else len(dataset)

    def val_ranges(self) -> dict[str, range]:
        """Positions of each source's validation samples, if there are several sources; else empty."""
        return {}

    def first_captions(self, split: str, count: int) -> list[str]:
        """Captions of the first samples of ``train`` or ``val``, at most ``count``."""
        dataset = self._dataset(split)
        found = (
            [] if dataset is None else [dataset[number].get("caption") for number in range(min(count, len(dataset)))]
        )
        return [caption for caption in found if caption is not None]

    def names_hash(self, split: str) -> str | None:
        """SHA-256 of the files of ``train`` or ``val``: their names, labels and order; None if the data are not files."""
        dataset = self._dataset(split)
        return getattr(dataset, "names_hash", None)

    def gather_broken(self, split: str) -> None:
        """Counts the unreadable files of ``train`` or ``val`` over all processes; every process must call this."""
        if split in self._broken:
            self._broken[split].gather()

    def teardown(self, stage: str) -> None:
        """Stops the workers and logs the unreadable files."""
        self._close()
        for broken in self._broken.values():
            broken.summarise()
        self._broken.clear()

    def on_exception(self, exception: BaseException) -> None:
        """Stops the workers."""
        self._close()

    # --- position within an epoch ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Current epoch and number of its global batches trained on so far."""
        if self._begun is None or self._train_batches is None or self.trainer is None:
            return {}
        epoch, batches = self._seen(*self._begun)
        if batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        trained = self._trained_batches()
        return {"epoch": epoch, "batches": batches, "trained_batches": trained, **self._train_batches.facts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the position of a checkpoint, for a fit resumed from it."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._resumed = dict(state_dict)
            self._begun = None  # sharded strategies restore after the first iterator was made

    def _position(self) -> Position:
        """Start position of the iteration that now begins.

        While restoring a checkpoint, Lightning creates the first iterator before its epoch counter is complete, so the
        checkpoint's position takes precedence. When resuming from certain epoch ends, it takes a batch from that iterator,
        drops it and asks for another of the same epoch: batches already seen are not repeated then either.
        """
        if self.trainer is None or self._train_batches is None:
            return 0, 0
        epoch, start = int(self.trainer.current_epoch), 0
        if self._begun is not None and self._begun[0] == epoch:
            epoch, start = self._seen(*self._begun)
        elif self._resumed is not None and self._resumed["epoch"] >= epoch:
            epoch, start = self._resumed["epoch"], self._resumed["batches"]
            if start:
                self._check_same_order(self._resumed, self._train_batches.facts)
        # Lightning may call this before it has restored its count.
        restored = 0 if self._resumed is None else self._resumed["trained_batches"]
        self._begun = epoch, start, max(self._trained_batches(), restored)
        return epoch, start

    def _trained_batches(self) -> int:
        """Batches trained on in all epochs; unlike the count within the epoch, this only grows."""
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def _seen(self, epoch: int, start: int, trained_before: int) -> Position:
        """Current position of an iteration that began at ``start`` after ``trained_before`` trained batches."""
        return epoch, start + max(0, self._trained_batches() - trained_before)

    @staticmethod
    def _check_same_order(old: dict[str, Any], new: dict[str, Any]) -> None:
        for name, value in new.items():
            if old.get(name) != value:
                raise ValueError(
                    f"the checkpoint is of the middle of an epoch with {name}={old.get(name)}, but it is now {value}, "
                    "so that seen and unseen batches cannot be told apart; continue with the same seed, data set and "
                    "global batch (data.batch_size × processes), or from a checkpoint of the end of an epoch"
                )

    # --- helpers ---------------------------------------------------------------------------------------------------

    def _dataset(self, split: str) -> SeededDataset | None:
        if split not in self._datasets:
            self._datasets[split] = self.train_dataset() if split == "train" else self.val_dataset()
        return self._datasets[split]

    def _needed(self, split: str) -> SeededDataset:
        dataset = self._dataset(split)
        if dataset is None:
            name = {"train": "training", "val": "validation"}[split]
            raise ValueError(f"the data set has no {name} samples; add data.{split}_path=/path/to/images")
        return dataset

    def _batches(self, dataset: SeededDataset, shuffle: bool, drop_last: bool) -> ShardedBatchSampler:
        return ShardedBatchSampler(
            len(dataset),
            self.batch_size,
            seed=self.seed,
            shuffle=shuffle,
            num_replicas=self.trainer.world_size if self.trainer is not None else 1,
            rank=self.trainer.global_rank if self.trainer is not None else 0,
            drop_last=drop_last,
            position=self._position if drop_last else lambda: (0, 0),
        )

    def _loader(self, split: str, dataset: SeededDataset, batches: Batches, replace: bool = True) -> BatchLoader:
        broken = self._broken.setdefault(split, BrokenFiles(len(dataset), self.max_bad_share))
        loader = BatchLoader(dataset, batches, self.seed, self.num_workers, self.pin_memory, broken, replace)
        self._loaders.add(loader)
        return loader

    def _close(self) -> None:
        for loader in self._loaders:
            loader.close()


class StoredDataModule(ImageDataModule):
    """Samples in files: training samples at ``train_path`` and, if given, validation samples at ``val_path``.

    The ``options`` are the other arguments of :class:`ImageDataModule`. Subclasses define :meth:`at`.
    """

    def __init__(
        self, train_path: str | None, val_path: str | None, batch_size: int = 64, num_workers: int = 8, **options: Any
    ) -> None:
        super().__init__(batch_size, num_workers, **options)
        self.train_path = train_path
        self.val_path = val_path
        if val_path is None:
            self._given_train_path()

    def _given_train_path(self) -> str:
        if self.train_path is None:
            raise no_train_path(type(self).__name__)
        return self.train_path

    @abstractmethod
    def at(self, path: str, train: bool) -> SeededDataset:
        """The samples at a path, for training or validation."""

    def train_dataset(self) -> SeededDataset:
        """The samples of ``train_path``."""
        return self.at(self._given_train_path(), train=True)

    def val_dataset(self) -> SeededDataset | None:
        """The samples of ``val_path``, if given."""
        return None if self.val_path is None else self.at(self.val_path, train=False)
