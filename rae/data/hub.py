"""Hugging Face image data sets: Parquet and Arrow files, local or on the hub, read by row (``pip install 'rae[hub]'``)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
from pyarrow import types

from rae.data.folder import ImageFolderDataModule
from rae.data.loader import ImageFiles, Sample
from rae.data.splits import find_tables
from rae.data.storage import size_of
from rae.data.tables import Row, Tables
from rae.data.transforms import ImageTransform
from rae.io.errors import no_train_path


class HubImages(ImageFiles):
    """Images in the rows of Parquet and Arrow files, as bytes of image files.

    Args:
        files: The files; see :class:`~rae.data.tables.Tables`.
        transform: Crops the images to squares.
        image_column: Name of the column with the images: bytes, or ``bytes`` within it, as Hugging Face's ``Image`` stores them.
        label_column: Name of the column with the classes; None gives all images label 0.
        captions: Names of the caption columns; a sample gets one of its captions that are not null, drawn by its seed.
        num_classes: Maximum number of classes; None for any.
        max_bad_share: Maximum fraction of unreadable images.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: There are no images; a column is missing or has the wrong type; or there are too many classes.
    """

    def __init__(
        self,
        files: Sequence[str],
        transform: ImageTransform,
        image_column: str = "image",
        label_column: str | None = "label",
        captions: Sequence[str] = (),
        num_classes: int | None = None,
        max_bad_share: float = 0.01,
    ) -> None:
        self._image, self._label, self._captions = image_column, label_column, list(captions)
        named = {"data.image_column": [image_column], "data.captions": self._captions}
        named |= {} if label_column is None else {"data.label_column": [label_column]}
        self.tables = Tables(files)
        for option, columns in named.items():
            for column in columns:
                self._check_column(option, column)
        self.columns = list(dict.fromkeys(column for columns in named.values() for column in columns))
        if not len(self.tables):
            raise ValueError(f"{self.tables.files[0]!r} holds no row")
        self.class_names = [] if label_column is None else self.tables.class_names(label_column)
        self.num_classes = num_classes
        if num_classes is not None and len(self.class_names) > num_classes:
            raise ValueError(
                f"column {label_column!r} has {len(self.class_names)} classes, but data.num_classes is {num_classes}; set "
                f"data.num_classes={len(self.class_names)}, or data.unlabelled=true to take all images as one class"
            )
        super().__init__(np.broadcast_to(np.int64(0), len(self.tables)), transform, max_bad_share)
        self.captioned = bool(self._captions)
        self._rows: dict[int, Row] = {}

    def _check_column(self, option: str, column: str) -> None:
        """Raises ValueError if a column is missing in a file or has a type that the option does not accept."""
        kind = self.tables.type_of(column, option)
        if option == "data.image_column":
            inner = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
            good, wanted = types.is_binary(inner) or types.is_large_binary(inner), "image files, as bytes"
        elif option == "data.label_column":
            good, wanted = types.is_integer(kind), "classes, whole numbers"
        else:
            good, wanted = types.is_string(kind) or types.is_large_string(kind), "captions, one text in a row"
        if not good:
            raise ValueError(
                f"{option}={column}: the column holds {kind} in {self.tables.files[0]!r}, not {wanted}; name another one"
            )

    @property
    def names_hash(self) -> str:
        """SHA-256 of the files' names, row counts and sizes, and of the columns read."""
        sizes = [size_of(file) for file in self.tables.files]
        return hashlib.sha256(repr([self.tables.facts, sizes, self.columns]).encode()).hexdigest()

    def name(self, position: int) -> str:
        """File and row."""
        return self.tables.name(position)

    def file(self, position: int) -> IO[bytes]:
        """The content of the image file; raises ValueError if the row holds none."""
        value = self._row(position)[self._image]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise ValueError("the row holds no bytes of an image")
        return io.BytesIO(content)

    def label(self, position: int) -> int:
        """The class; raises ValueError if it is null, negative or too large."""
        if self._label is None:
            return 0
        value = self._row(position)[self._label]
        if value is None or value < 0:
            raise ValueError(
                f"{self.name(position)} has no class: {self._label!r} is {value}; set data.unlabelled=true to take all images "
                "as one class"
            )
        if self.num_classes is not None and value >= self.num_classes:
            raise ValueError(
                f"{self.name(position)} is of class {value}, but data.num_classes is {self.num_classes}; set "
                f"data.num_classes={value + 1}, at least"
            )
        return int(value)

    def captions(self, position: int) -> Sequence[str]:
        """See :meth:`ImageFiles.captions`."""
        row = self._row(position)
        return [row[column] for column in self._captions if row[column] is not None]

    def load_many(self, indices: Sequence[int], seeds: Sequence[int]) -> list[Sample]:
        """The samples of a batch; reads each row group once."""
        self._rows = self.tables.rows(indices, self.columns)
        try:
            return super().load_many(indices, seeds)
        finally:
            self._rows = {}

    def _row(self, position: int) -> Row:
        row = self._rows.get(position)
        return self.tables.row(position, self.columns) if row is None else row


class HubDataModule(ImageFolderDataModule):
    """Images of a Hugging Face data set: Parquet and Arrow files in a folder or on the hub.

    Rows are read in any order, so batches, sharding over processes and resumed runs are as exact as with folders. In Parquet,
    reading one image reads its whole row group. The ``options`` are those of :class:`~rae.data.folder.ImageFolderDataModule`.

    Args:
        repo: A folder, or the name of a data set on the hub (``owner/name``).
        train_split: Name of the training split.
        val_split: Name of the validation split; None for none.
        config_name: Which of several data sets in one repository; None for the default one.
        revision: Branch, tag or commit on the hub; None for the newest.
        stream: Whether to read Parquet files on the hub by range requests instead of downloading them first.
        image_column: Name of the column with the images.
        label_column: Name of the column with the classes.
        captions: Name of the caption column, or of several, one of which is drawn per sample; None for none.
        unlabelled: Whether all images have label 0.
        options: Further arguments.

    Raises:
        ConfigError: ``repo`` is not given.
    """

    def __init__(
        self,
        repo: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        config_name: str | None = None,
        revision: str | None = None,
        stream: bool = False,
        image_column: str = "image",
        label_column: str = "label",
        captions: str | list[str] | None = None,
        unlabelled: bool = False,
        **options: Any,
    ) -> None:
        if repo is None:
            raise no_train_path(type(self).__name__)
        super().__init__(train_split, val_split, unlabelled=unlabelled, **options)
        self.repo = repo
        self.config_name = config_name
        self.revision = revision
        self.stream = stream
        self.image_column = image_column
        self.label_column = None if unlabelled else label_column
        self.caption_columns = [captions] if isinstance(captions, str) else list(captions or ())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, if the files give them; known once a split is opened."""
        opened = [images for images in self._datasets.values() if isinstance(images, HubImages)]
        return opened[0].class_names if opened else []

    def at(self, path: str, train: bool) -> HubImages:
        """The images of a split; raises ValueError if its classes differ from those of the split opened before."""
        images = HubImages(
            find_tables(self.repo, path, self.config_name, self.revision, self.stream),
            self.train_transform if train else self.val_transform,
            self.image_column,
            self.label_column,
            self.caption_columns,
            self.num_classes,
            self.max_bad_share,
        )
        if self.class_names and images.class_names and self.class_names != images.class_names:
            raise ValueError(
                f"the classes of data.train_split={self.train_path} and data.val_split={self.val_path} have other names or another "
                "order: both must be of one data set"
            )
        return images
