"""A model's samples in parts on disk: streamed, resumable, split over processes, and independent of the split."""

from __future__ import annotations

import io
import json
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lightning import Fabric
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from rae.autoencoder import RAE
from rae.generator import Generator
from rae.image import check_finite
from rae.io.describe import describe
from rae.io.errors import ConfigError
from rae.io.files import changes, read_json, write_atomically, write_json
from rae.io.parts import Parts
from rae.io.tensors import state_hash
from rae.jobs.processes import begin
from rae.jobs.wanted import hash_of

Wanted = Sequence[int] | Sequence[str]
"""Class or prompt of every sample."""
_WRITERS = 2  # threads that compress and write while sampling continues
_WAITING = 4  # parts that may wait for a writer
_MOST_INTERPOLATIONS = 1_000  # images per row


def check_interpolations(cfg: DictConfig) -> None:
    """Rejects interpolation rows without an intermediate image, before the long work that precedes them.

    Raises:
        ConfigError: ``interpolations`` is below 3, or too many for one row.
    """
    if cfg.interpolations is not None and not 3 <= cfg.interpolations <= _MOST_INTERPOLATIONS:
        raise ConfigError(
            f"interpolations={cfg.interpolations} must lie in 3…{_MOST_INTERPOLATIONS}, both ends counted, or be null"
        )


def plan_of(cfg: DictConfig, generator: Generator, labels: Wanted) -> dict[str, Any]:
    """All that samples depend on: weights (without encoder), sampler, guidance, labels or prompts, seed, precision, rounding."""
    weights = {
        key: value for key, value in generator.state_dict().items() if not key.startswith("autoencoder.encoder.")
    }
    told: dict[str, Any] = {"labels": hash_of(labels)}
    if generator.text_encoder is not None:
        told = {"prompts": hash_of(labels), "negative_prompt": generator.negative_prompt}
    return {
        "model": state_hash(weights),
        "sampler": describe(generator.sampler),
        "guidance": describe(generator.guidance),
        "shift": float(generator.flow.shift),
        "seed": cfg.seed,
        "precision": cfg.precision,
        "float32": cfg.matmul,
        "quantize": cfg.quantize,
        "samples": len(labels),
        **told,
        "image_size": generator.autoencoder.image_size,
    }


def draw(
    cfg: DictConfig,
    fabric: Fabric,
    generator: Generator,
    labels: Wanted,
    folder: Path,
    plan: dict[str, Any],
    png: Path | None = None,
    shards: Path | None = None,
    latents: Path | None = None,
) -> Parts:
    """Generates the missing samples, part by part, while threads compress and write finished parts.

    Args:
        cfg: Configuration with ``seed``, ``batch_size``, ``part_size``, ``precision`` and ``quantize``.
        fabric: The processes; each generates its share of the parts; all parts are done when this returns.
        generator: The generator.
        labels: Class or prompt of every sample.
        folder: Folder for the parts: .npy files uint8 n×H×W×3.
        plan: From :func:`plan_of`.
        png: Folder for one PNG per sample; None for none.
        shards: Folder for tar shards of PNGs with labels or prompts, one per part; None for none.
        latents: Folder for the latents, one file per part, see :func:`latent_parts`; None for none.

    Raises:
        ValueError: A sample contains NaN or infinity, or ``folder`` holds other work.
    """
    asked = {"png": png is not None, "shards": shards is not None} | ({"latents": True} if latents is not None else {})
    parts = Parts(folder, {**plan, **asked}, len(labels), cfg.part_size, ".npy")
    mine = begin(fabric, parts, png, shards, latents)
    total = sum(len(parts.items(part)) for part in mine)
    pending: deque[Future[None]] = deque()
    with (
        ThreadPoolExecutor(_WRITERS) as pool,
        tqdm(total=total, desc="sampling", unit=" image", disable=not fabric.is_global_zero) as bar,
    ):
        for part in mine:
            items = parts.items(part)
            batches = []
            kept: list[torch.Tensor] = []

            def on_latents(drawn: torch.Tensor, kept: list[torch.Tensor] = kept) -> None:
                check_finite(drawn, "samples")
                if latents is not None:
                    kept.append(drawn.cpu())

            for start in range(items.start, items.stop, cfg.batch_size):
                numbers = range(start, min(start + cfg.batch_size, items.stop))
                told: Any = [labels[number] for number in numbers]
                images = generator.draw(told, cfg.seed, numbers, cfg.precision, cfg.quantize, on_latents)
                batches.append(_to_host(images))
                bar.update(len(numbers))
            if latents is not None:
                save_part(latents / parts.path(part).name, torch.cat(kept).numpy())
            pending.append(pool.submit(_write, batches, labels, items, parts.path(part), png, shards))
            while len(pending) > _WAITING:
                pending.popleft().result()
        for written in pending:
            written.result()
    fabric.barrier()
    return parts


def _to_host(images: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Copies images to host memory asynchronously; also returns the event of their arrival, None if they are already there."""
    if images.device.type != "cuda":
        return images.cpu(), None
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    host.copy_(images, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return host, arrival


def _write(
    batches: Sequence[tuple[torch.Tensor, Any]],
    labels: Wanted,
    numbers: range,
    path: Path,
    png: Path | None,
    shards: Path | None,
) -> None:
    """Writes a part once its batches have arrived; the part's own file, which marks it as done, comes last."""
    for _, arrival in batches:
        if arrival is not None:
            arrival.synchronize()
    images = torch.cat([batch for batch, _ in batches]).permute(0, 2, 3, 1).numpy()
    encoded = [_png(image) for image in images] if png is not None or shards is not None else []
    names = [png_name(number, labels[number]) for number in numbers]
    if png is not None:
        for name, content in zip(names, encoded, strict=True):
            write_atomically(png / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    if shards is not None:

        def write_tar(file: IO[bytes]) -> None:
            with TarWriter(file, mtime=0, encoder=False) as tar:
                for number, content in zip(numbers, encoded, strict=True):
                    told = labels[number]
                    said = {"txt" if isinstance(told, str) else "cls": str(told).encode()}
                    tar.write({"__key__": f"{number:06d}", "png": content, **said})

        write_atomically(shards / f"samples-{path.stem.rpartition('-')[2]}.tar", write_tar)
    save_part(path, images)


def png_name(number: int, told: int | str) -> str:
    """Name of a sample's PNG file."""
    return f"{number:06d}.png" if isinstance(told, str) else f"{number:06d}_class{told:04d}.png"


def save_part(path: Path, values: NDArray[Any]) -> None:
    """Writes a part's .npy file."""
    write_atomically(path, lambda file: np.save(file, values))


LATENTS = "latents.json"


def describe_latents(
    folder: Path, plan: Mapping[str, Any], labels: Wanted, model: Mapping[str, Any], size: int, autoencoder: RAE
) -> None:
    """Records beside stored latents how they were generated, labels or prompts, encoder and decoder, and the part size."""
    parts = {name: model.get(name) for name in ("encoder", "decoder")}
    known = {"samples": dict(plan), "labels": list(labels), "part_size": size, "model": parts}
    if space := autoencoder.space:
        token = autoencoder.latent.class_token
        known["space"] = {**space, "class_token": None if token is None else token.tolist()}
    write_json(folder / LATENTS, known)


def latent_parts(folder: str | Path) -> tuple[Parts, dict[str, Any]]:
    """The latents float32 n×C×h×w that ``rae-sample keep_latents=true`` wrote, and their description.

    Raises:
        FileNotFoundError: There are no latents, or files are missing.
        ValueError: They are not latents of samples.
    """
    root = Path(folder).expanduser()
    if not (root / LATENTS).is_file():
        raise FileNotFoundError(
            f"latents={folder} holds no {LATENTS}: give the folder latents/ that rae-sample keep_latents=true wrote"
        )
    known = read_json(root / LATENTS)
    if not {"samples", "labels", "part_size", "model"} <= known.keys():
        raise ValueError(
            f"latents={folder} are not of samples, as {LATENTS} there says: give the folder latents/ that rae-sample "
            "keep_latents=true wrote"
        )
    parts = Parts(root, known["samples"], len(known["labels"]), known["part_size"], ".npy")
    if missing := parts.missing():
        raise FileNotFoundError(f"latents={folder} lacks {parts.path(missing[0]).name}; draw them again")
    return parts, known


def _png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def read_parts(
    parts: Parts, batch_size: int, wanted: Sequence[int] | None = None
) -> Iterator[tuple[NDArray[Any], range]]:
    """Batches of images uint8 n×H×W×3, or latents, with their indices, from all or the ``wanted`` parts; none spans two parts."""
    for part in range(len(parts)) if wanted is None else wanted:
        items = parts.items(part)
        images = np.load(parts.path(part), mmap_mode="r")
        for start in range(0, len(items), batch_size):
            yield np.array(images[start : start + batch_size]), items[start : start + batch_size]


def write_npz(path: Path, parts: Parts, labels: Wanted | None) -> Path:
    """Packs all parts into an .npz for evaluation suites, part by part: ``arr_0`` uint8 N×H×W×3, ``arr_1`` int64 N.

    Without labels, there is no ``arr_1``; prompts go to ``prompts``, N strings.
    """
    _, height, width, _ = np.load(parts.path(0), mmap_mode="r").shape

    def write(file: IO[bytes]) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": (parts.count, height, width, 3)}
                np.lib.format.write_array_header_1_0(member, header)
                for images, _ in read_parts(parts, parts.size):
                    member.write(images.tobytes())
            if labels is None:
                return
            values = np.asarray(labels)
            name = "prompts.npy" if values.dtype.kind == "U" else "arr_1.npy"
            with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values if values.dtype.kind == "U" else values.astype(np.int64))

    return write_atomically(path, write)


def pick(parts: Parts, numbers: Sequence[int]) -> torch.Tensor:
    """The samples with these indices, uint8 n×3×H×W."""
    rows = [np.load(parts.path(number // parts.size), mmap_mode="r")[number % parts.size] for number in numbers]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)


def finished(description: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder of a ``samples.json`` already holds exactly the samples of this plan.

    Raises:
        ConfigError: It holds different samples.
    """
    if not description.is_file():
        return False
    before = read_json(description)
    now = json.loads(json.dumps(plan, default=str))
    if said := changes({key: before.get(key) for key in now}, now):
        raise ConfigError(
            f"{str(description.parent)!r} holds other samples ({said}): force=true replaces them, output_dir=… writes elsewhere"
        )
    return True
