"""Reference statistics to compare samples with, and checks that reject unsuitable ones.

A reference is an .npz with any of ADM's entries ``mu``, ``sigma`` (moments of the pool features), ``mu_s``, ``sigma_s``
(of the spatial features) and ``arr_0`` (images uint8 N×H×W×3), and of ours: ``features`` (pool features N×D for precision
and recall) and ``metadata`` (JSON: kind, image size, crop, count, detector, hashes).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from rae.io.files import file_hash, parse_json, write_atomically
from rae.io.references import PUBLISHED, reference_file
from rae.io.tensors import state_hash
from rae.metric.features import Detector
from rae.metric.frechet import FeatureMoments
from rae.metric.functional.frechet import Moments
from rae.metric.images import BROKEN, iterate_npz, npz_shape, open_npz

KINDS = {
    "training": "the training set, which generated samples are compared with (gFID)",
    "validation": "held-out images, which their reconstructions are compared with (rFID)",
}

ENTRIES = {"mu", "sigma", "mu_s", "sigma_s", "ref_mu", "ref_sigma", "features", "metadata"}
"""Entries that are read immediately; ``arr_0`` is read when needed, batch by batch."""

ADM_PREFIX = "VIRTUAL_"
"""Prefix of the file names of ADM's references; all of them describe training sets."""


@dataclass(frozen=True)
class ReferenceInfo:
    """A reference's metadata: which images it describes, and which detector extracted their features."""

    kind: str  # training or validation
    image_size: tuple[int, int] | None = None  # height and width
    crop: str | None = None  # e.g. center
    count: int | None = None  # number of images behind the moments
    detector: dict[str, Any] | None = None  # its identity
    detector_hash: str | None = None  # None for ADM's files, made with the published Inception
    hash: str | None = None  # of the statistics

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} of a reference is unknown; choose {' or '.join(KINDS)}")


class Statistics(NamedTuple):
    """Statistics for one detector; None for those that a reference lacks."""

    moments: Moments | None = None
    spatial: Moments | None = None
    features: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether there are no statistics at all."""
        return all(part is None for part in self)


@dataclass
class Reference:
    """Statistics and images to compare with."""

    info: ReferenceInfo
    statistics: Statistics
    path: Path | None = None  # its file, if any
    published: str | None = None  # its name, if it is a published one
    has_images: bool = False  # whether the file holds images, from which other detectors' statistics can be computed
    _computed: dict[str, Statistics] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The reference's name in messages."""
        return repr(str(self.path)) if self.path is not None else "in memory"

    @property
    def hash(self) -> str:
        """Hash of the statistics, or of the file if it holds only images."""
        stated = self.info.hash or statistics_hash(self.statistics)
        if stated is None and self.path is None:
            raise ValueError("a reference without statistics and file has no hash")
        return stated or file_hash(str(self.path))

    @property
    def identity(self) -> dict[str, Any]:
        """What identifies the reference, for the record."""
        known = {name: getattr(self.info, name) for name in ("kind", "image_size", "crop", "count")}
        named = {} if self.published is None else {"name": self.published}
        return {**named, "path": None if self.path is None else str(self.path), "hash": self.hash, **known}

    def check_kind(self, wanted: str) -> None:
        """Raises ValueError unless the reference is of the wanted kind."""
        if wanted not in KINDS:
            raise ValueError(f"reference_kind={wanted!r} is unknown; choose {' or '.join(KINDS)}")
        if self.info.kind != wanted:
            raise ValueError(
                f"reference {self.name} is of kind {self.info.kind!r} ({KINDS[self.info.kind]}), but this run needs kind "
                f"{wanted!r} ({KINDS[wanted]}); the two give different numbers (on ImageNet 1.9 instead of an rFID of 0.57): "
                f"give a reference of kind {wanted!r}"
            )

    def check_size(self, height: int, width: int) -> None:
        """Raises ValueError if the reference's images have a different size."""
        size = self.info.image_size
        if size is not None and tuple(size) != (height, width):
            raise ValueError(
                f"images are {height}×{width}, but reference {self.name} is of images of {size[0]}×{size[1]}: give a "
                f"reference of {height}×{width} images, or sample at {size[0]}×{size[1]}"
            )

    def for_detector(
        self, detector: Detector, needs: Collection[str], device: torch.device | str = "cpu"
    ) -> Statistics:
        """Statistics for one detector: those stored, plus those in ``needs``, computed from the stored images if missing.

        Raises:
            ValueError: Needed statistics are missing or of another detector, and there are no images to compute them from.
        """
        space = PUBLISHED[self.published].detector if self.published is not None else None
        if space not in (None, detector.name):
            raise ValueError(
                f"reference {self.published} holds features of {space!r}, but this metric's detector is {detector.name!r}; "
                f"choose a reference of {detector.name!r}"
            )
        stored = self._stored(detector)
        missing = [need for need in needs if getattr(stored, need) is None]
        if missing:
            if not self.has_images:
                raise ValueError(
                    f"{', '.join(missing)} of detector {detector.name!r} are needed, but reference {self.name} "
                    f"{self._held_instead(detector)} and no images (arr_0) to compute them from: build a reference with this "
                    f"detector, or leave out the metrics that need {' and '.join(missing)}"
                )
            if detector.hash not in self._computed:
                self._computed[detector.hash] = self._extract(detector, device)
            computed = self._computed[detector.hash]
            stored = stored._replace(**{need: getattr(computed, need) for need in missing})
        return stored

    def _held_instead(self, detector: Detector) -> str:
        """Describes what the reference holds, if it lacks some of a detector's statistics."""
        info, stored = self.info, self.statistics
        if not stored.empty and info.detector_hash not in (None, detector.hash):
            name = (info.detector or {}).get("name")
            other = "other weights of it" if name == detector.name else f"detector {name!r}"
            return f"holds numbers of {other} (hash {info.detector_hash[:12]}…, here {detector.hash[:12]}…)"
        held = [name for name, value in stored._asdict().items() if value is not None]
        return f"holds {' and '.join(held) or 'no numbers'} {'' if self._stored(detector).empty else 'alone '}".rstrip()

    def _stored(self, detector: Detector) -> Statistics:
        """The stored statistics if they are this detector's, else empty ones."""
        stored = self.statistics
        made_by = self.info.detector_hash
        if stored.empty:
            return stored
        if made_by is not None and made_by != detector.hash:
            if self.has_images:
                rank_zero_warn(
                    f"reference {self.name} was made with another detector than {detector.name!r} (hash {made_by[:12]}…, here "
                    f"{detector.hash[:12]}…); its numbers are computed anew from the images that it holds, which may be fewer"
                )
            return Statistics()
        widths = [(stored.moments, detector.width), (stored.spatial, detector.spatial_width)]
        if any(moments is not None and moments.mean.numel() != width for moments, width in widths if width is not None):
            return Statistics()
        if made_by is None and not detector.published:
            rank_zero_warn(
                f"reference {self.name} does not say which detector made it; it is taken for that of {detector.name!r}, "
                "which is not the published Inception"
            )
        return stored

    def _extract(self, detector: Detector, device: torch.device | str) -> Statistics:
        """Runs the detector on the stored images."""
        assert self.path is not None
        detector = detector.to(device)
        pool = FeatureMoments(detector.width).to(device)
        spatial = None if detector.spatial_width is None else FeatureMoments(detector.spatial_width).to(device)
        kept = []
        for batch in iterate_npz(self.path, detector.batch_size):
            seen = detector(batch.images.to(device))
            pool.update(seen.pool)
            if spatial is not None:
                spatial.update(seen.spatial)
            kept.append(seen.pool.cpu())
        return Statistics(pool.compute(), None if spatial is None else spatial.compute(), torch.cat(kept))


def statistics_hash(statistics: Statistics) -> str | None:
    """SHA-256 of all statistics; None if there are none."""
    held = {key: torch.from_numpy(value) for key, value in _arrays(statistics).items()}
    return state_hash(held) if held else None


def _arrays(statistics: Statistics) -> dict[str, np.ndarray]:
    """The file's entries, by name."""
    arrays = {}
    for moments, suffix in ((statistics.moments, ""), (statistics.spatial, "_s")):
        if moments is not None:
            arrays[f"mu{suffix}"] = moments.mean.cpu().double().numpy()
            arrays[f"sigma{suffix}"] = moments.covariance.cpu().double().numpy()
    if statistics.features is not None:
        arrays["features"] = statistics.features.cpu().float().numpy()
    return arrays


def write_reference(path: str | Path, reference: Reference, images: np.ndarray | None = None) -> Path:
    """Writes a reference as .npz, atomically, with images uint8 N×H×W×3 (possibly memory-mapped) as ``arr_0``.

    ADM's evaluator can read it if it has images.

    Raises:
        ValueError: The suffix is not .npz, or the images have a wrong type, shape or size.
    """
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise ValueError(f"a reference is an .npz file, got {str(path)!r}")
    arrays = _arrays(reference.statistics)
    info = asdict(reference.info) | {"hash": statistics_hash(reference.statistics)}
    if images is not None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images must be uint8 N×H×W×3, got {images.dtype} {images.shape}")
        reference.check_size(*images.shape[1:3])
        arrays["arr_0"] = images
    if not arrays:
        raise ValueError("a reference without statistics and images says nothing: give at least one of them")
    arrays["metadata"] = np.array(json.dumps(info))
    save: Callable[..., None] = np.savez  # np.savez's type confuses array names with its own arguments
    return write_atomically(path, lambda file: save(file, **arrays))


def open_reference(reference: Reference | str | Path, wanted: str, assumed: str | None) -> Reference:
    """A reference, read from disk if given as a file or published name; raises ValueError unless it is of the wanted kind."""
    opened = reference if isinstance(reference, Reference) else read_reference(reference, assumed)
    opened.check_kind(wanted)
    return opened


def _compare_hash(reference: Reference) -> None:
    """Records a published reference's hash beside its file on first use, and compares it afterwards."""
    assert reference.path is not None
    record = reference.path.with_name(f"{reference.path.name}.hash")
    if not record.is_file():
        write_atomically(record, lambda stream: stream.write(f"{reference.hash}\n".encode()))
    elif record.read_text().strip() != reference.hash:
        raise ValueError(
            f"reference {reference.published} ({reference.path}) has another hash than at its first use, which {record.name} "
            "beside it holds: the file was changed; fetch it again, or remove the record where the change is meant"
        )


def read_reference(path: str | Path, kind: str | None = None) -> Reference:
    """Reads a reference: a published one by name, ours, ADM's, or any .npz with images or moments.

    ``kind``, ``training`` or ``validation``, is for files that do not state it; ADM's (VIRTUAL_….npz) describe training sets.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not an archive, is truncated, has neither moments nor ``arr_0``, has mismatched or non-finite
            moments, was changed after it was written or since its first use, or its kind is unknown.
    """
    file, published = reference_file(path)
    if published is None:
        return _read(file, kind)
    found = _read(file, published.kind)
    found.published = str(path)
    if found.info.image_size is None:
        found.info = replace(found.info, image_size=(published.image_size, published.image_size))
    _compare_hash(found)
    return found


def _read(path: Path, kind: str | None) -> Reference:
    """The reference in a file."""
    with open_npz(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    if not names & {"mu", "ref_mu", "arr_0"}:
        raise ValueError(
            f"reference {str(path)!r} holds neither moments (mu, sigma) nor images (arr_0), only "
            f"{', '.join(sorted(names)) or 'nothing'}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            held: dict[str, np.ndarray] = {key.removeprefix("ref_"): file[key] for key in sorted(names & ENTRIES)}
        known = parse_json(str(held.pop("metadata")).encode(), str(path)) if "metadata" in held else {}
    except (*BROKEN, KeyError) as error:
        raise ValueError(f"reference {str(path)!r} cannot be read ({error}); it may be truncated") from error
    shape = npz_shape(path) if "arr_0" in names else None
    info = _info(path, known, kind, None if shape is None else (shape.height, shape.width))
    count = info.count or 0
    features = torch.from_numpy(held["features"]) if "features" in held else None
    statistics = Statistics(_moments(path, held, "", count), _moments(path, held, "_s", count), features)
    if info.hash is not None and info.hash != statistics_hash(statistics):
        raise ValueError(
            f"reference {str(path)!r} was changed after it was written: its hash does not fit; build it again"
        )
    return Reference(info, statistics, path, has_images=shape is not None)


def _info(path: Path, known: dict[str, Any], kind: str | None, size: tuple[int, int] | None) -> ReferenceInfo:
    stated = known.get("kind") or ("training" if path.name.startswith(ADM_PREFIX) else None)
    if stated is None and kind is None:
        raise ValueError(
            f"reference {str(path)!r} does not say whether it is of the training set (for gFID) or of validation images (for "
            "rFID): say so with kind='training' or kind='validation'"
        )
    if stated is not None and kind is not None and stated != kind:
        raise ValueError(f"reference {str(path)!r} is of kind {stated!r}, not {kind!r}")
    fields = {key: known[key] for key in ReferenceInfo.__dataclass_fields__ if key in known}
    said = None if fields.get("image_size") is None else tuple(fields["image_size"])
    if said is not None and size is not None and said != size:
        raise ValueError(f"reference {str(path)!r} says {said}, but its images are {size}; build it again")
    return ReferenceInfo(**{**fields, "kind": stated or kind, "image_size": said or size})


def _moments(path: Path, held: dict[str, np.ndarray], suffix: str, count: int) -> Moments | None:
    mean, covariance = held.get(f"mu{suffix}"), held.get(f"sigma{suffix}")
    if mean is None and covariance is None:
        return None
    if mean is None or covariance is None or mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        shapes = [None if x is None else x.shape for x in (mean, covariance)]
        raise ValueError(
            f"mu{suffix} and sigma{suffix} of {str(path)!r} must be [D] and [D, D], got {shapes[0]} and {shapes[1]}"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"mu{suffix} or sigma{suffix} of {str(path)!r} hold NaN or infinite values; build it again")
    return Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double(), count)
