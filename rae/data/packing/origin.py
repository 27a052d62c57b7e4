"""Sources of the images to pack: folders, ImageNet's tar files, flat folders with a list of labels."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scipy.io import loadmat

from rae.data.captions import captions_of
from rae.data.folder import files_by_class
from rae.data.storage import whole_tar
from rae.image import IMAGE_ENDINGS

_LISTS = ("ILSVRC2012_validation_ground_truth.txt", "imagenet_2012_validation_synset_labels.txt")


@dataclass(frozen=True)
class Source:
    """One image's bytes: a file, or a byte range of a tar file."""

    name: str  # path relative to the folder or within the tar file
    label: int  # class; -1 for none
    file: str  # the file that holds it
    first: int = 0  # offset of the first byte within the file
    size: int | None = None  # number of bytes; None for the whole file
    captions: tuple[str, ...] = ()

    def read(self) -> bytes:
        """The image file's content."""
        with open(self.file, "rb") as file:
            file.seek(self.first)
            return file.read(-1 if self.size is None else self.size)


def with_captions(sources: Sequence[Source], file: str | Path, column: str = "text") -> list[Source]:
    """Adds captions from a file to the images, see :func:`~rae.data.captions.captions_of`."""
    found = captions_of([source.name for source in sources], Path(file).expanduser(), column)
    return [replace(source, captions=tuple(texts)) for source, texts in zip(sources, found, strict=True)]


def find_sources(path: str | Path, synsets: str | Path | None = None) -> tuple[list[Source], list[str]]:
    """All images of a folder or tar file, sorted by class and name, and the names of the classes.

    Args:
        path: A folder with one subfolder per class; a flat folder; a tar file of images; or a tar file that holds one tar file
            per class, such as ``ILSVRC2012_img_train.tar``.
        synsets: Labels of a flat folder or tar file, in the order of the images' names: a text file with one class name per
            image, or the folder of ImageNet's devkit. Without it, a flat folder has no classes, and all labels are -1.

    Raises:
        FileNotFoundError: The folder or file does not exist.
        ValueError: There are no images, a class is empty, or the numbers of labels and images differ.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        by_class = files_by_class(root).items()
        named: Named = [
            (name or None, Source(file, -1, str(root / file))) for name, files in by_class for file in files
        ]
    elif root.is_file():
        named = _in_tar(root)
    else:
        raise FileNotFoundError(
            f"images={str(path)!r} does not exist; give a folder of images or one of ImageNet's tar files"
        )
    if not named:
        raise ValueError(f"{str(root)!r} holds no image; known endings are {', '.join(IMAGE_ENDINGS)}")
    flat = all(name is None for name, _ in named)
    if synsets is not None:
        if not flat:
            raise ValueError(
                f"synsets={str(synsets)!r} is for images without class folders, but {str(root)!r} has some"
            )
        named = _labelled([source for _, source in named], Path(synsets).expanduser())
        flat = False
    classes = [] if flat else sorted({str(name) for name, _ in named})
    number = {name: label for label, name in enumerate(classes)}
    found = [replace(source, label=-1 if flat else number[str(name)]) for name, source in named]
    return sorted(found, key=lambda source: (source.label, source.name)), classes


Named = list[tuple[str | None, Source]]
"""Images with the names of their classes."""


def _in_tar(path: Path) -> Named:
    """Images of a tar file and of the tar files inside it, each named after its class."""
    found: Named = []
    try:
        with open(path, "rb") as file, whole_tar(file) as outer:
            for member in outer:
                if not member.isfile():
                    continue
                if not member.name.lower().endswith(".tar"):
                    found += [(_folder_of(member.name), source) for source in _images([member], path, 0)]
                    continue
                inner = outer.extractfile(member)
                assert inner is not None
                with whole_tar(inner) as tar:
                    sources = list(_images(tar, path, member.offset_data))
                if not sources:
                    raise ValueError(f"{member.name} within {str(path)!r} holds no image")
                found += [(Path(member.name).stem, source) for source in sources]
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be read: {error}; it must be an uncompressed tar file, complete"
        ) from error
    return found


def _images(members: tarfile.TarFile | list[tarfile.TarInfo], path: Path, offset: int) -> Iterator[Source]:
    for member in members:
        if member.isfile() and os.path.splitext(member.name)[1].lower() in IMAGE_ENDINGS:
            yield Source(os.path.normpath(member.name), -1, str(path), offset + member.offset_data, member.size)


def _folder_of(name: str) -> str | None:
    folder = Path(os.path.normpath(name)).parent.as_posix()
    return None if folder in (".", "val") else folder


def _labelled(sources: Sequence[Source], synsets: Path) -> Named:
    """Images with classes from a list in the order of the images' names."""
    file = (
        next((synsets / name for name in _LISTS if (synsets / name).is_file()), None) if synsets.is_dir() else synsets
    )
    if synsets.is_dir() and file is None and (synsets / "data").is_dir():
        return _labelled(sources, synsets / "data")
    if file is None or not file.is_file():
        raise FileNotFoundError(
            f"synsets={str(synsets)!r} holds no list; give a text file or the devkit's folder ({_LISTS[0]})"
        )
    try:
        names = file.read_text().split()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"synsets={str(file)!r} is no text file; give the list of class names, or the devkit's folder, unpacked"
        ) from error
    if len(names) != len(sources):
        raise ValueError(f"{str(file)!r} lists {len(names)} labels, but there are {len(sources)} images")
    if all(name.isdigit() for name in names):
        known = _devkit_names(file)
        if unknown := next((name for name in names if int(name) not in known), None):
            raise ValueError(
                f"{str(file)!r} lists class number {unknown}, of which the devkit's meta.mat knows no name"
            )
        names = [known[int(name)] for name in names]
    in_order = sorted(sources, key=lambda source: source.name)
    return list(zip(names, in_order, strict=True))


def _devkit_names(file: Path) -> dict[int, str]:
    """WordNet ids by the devkit's own class numbers, which do not follow the order of the ids."""
    meta = file.parent / "meta.mat"
    if not meta.is_file():
        raise FileNotFoundError(
            f"{str(file)!r} holds class numbers; the devkit's meta.mat, which says their names, must stand beside it"
        )
    rows = loadmat(str(meta), squeeze_me=True)["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
