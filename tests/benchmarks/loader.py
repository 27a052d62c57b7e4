"""Images per second of our data pipelines and of torchvision's ImageFolder + DataLoader with the original's transforms.

Run with ``python tests/benchmarks/loader.py [--images 1000] [--workers 2] [--repeats 3] [--json FILE]``. JPEGs of 500×375 are
generated, packed with ``rae-shard``'s function too, and all pipelines take turns, so that the ratios hold for one machine and one
moment. Pixels are compared in the same run.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from side_by_side import versions
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from rae.data import ImageFolderDataModule, ImageTransform, ShardsDataModule
from rae.data.hub import HubDataModule
from rae.data.loader import BatchLoader
from rae.data.packing.pack import ShardPlan, pack
from rae.data.transforms import open_for
from rae.image import center_crop

BATCH = 64
SIZE = 256
COPIES = 64


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Colours of several scales and some noise: a JPEG of it has the size of a photograph's."""
    pixels = rng.normal(size=(height, width, 3)) * 4 + 128
    for cells, contrast in ((6, 70), (25, 35), (94, 16)):
        coarse = (rng.normal(size=(cells, cells * width // height, 3)) * contrast).astype(np.float32)
        layers = [Image.fromarray(coarse[..., colour]).resize((width, height), 3) for colour in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], -1)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def generate(folder: Path, images: int) -> None:
    """JPEGs of 500×375 in ten classes."""
    rng = np.random.default_rng(0)
    for number in range(images):
        path = folder / f"class{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(rng, 500, 375).save(path, quality=92)


def write_tables(folder: Path, target: Path) -> None:
    """The images as a Hugging Face data set: Parquet with row groups of 100, as of ImageNet on the hub, and an Arrow stream.

    Each file has further names, so that hardly two images of a batch lie in one row group, as in a large data set.
    """
    files = sorted(folder.rglob("*.jpg"))
    rows = pa.table(
        {"image": [path.read_bytes() for path in files], "label": [int(path.parent.name[5:]) for path in files]}
    )
    for kind in ("parquet", "arrow"):
        (target / kind).mkdir(parents=True)
    parquet.write_table(rows, target / "parquet" / "0.parquet", row_group_size=100)
    with pa.ipc.new_stream(str(target / "arrow" / "0.arrow"), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=100)
    for kind in ("parquet", "arrow"):
        for number in range(1, COPIES):
            (target / kind / f"{number}.{kind}").hardlink_to(target / kind / f"0.{kind}")


def originals(stage: int) -> transforms.Compose:
    """The original's transforms: of stage 1, resize to 384 and a random crop; of stage 2, ADM's centre crop and a flip."""
    if stage == 1:
        first = [transforms.Resize(384, transforms.InterpolationMode.BICUBIC), transforms.RandomCrop(SIZE)]
    else:
        first = [transforms.Lambda(lambda image: center_crop(image, SIZE)), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*first, transforms.ToTensor()])


def pipelines(folder: Path, shards: Path, tables: Path, stage: int, workers: int) -> dict[str, object]:
    """Loaders by name; each iteration is one epoch, of the larger data sets the end of one, as long as the others'."""
    mode = {"mode": "random_crop", "flip": False} if stage == 1 else {"mode": "center_crop", "flip": True}
    common = {"batch_size": BATCH, "num_workers": workers, "image_size": SIZE, "num_classes": 10, **mode}
    peer = ImageFolder(str(folder), originals(stage))

    def end_of_epoch(loader: BatchLoader) -> BatchLoader:
        batches = loader.batches
        batches.position = lambda: (0, len(batches) - len(peer) // BATCH)
        return loader

    return {
        "torchvision": DataLoader(
            peer, BATCH, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
        ),
        "folder": ImageFolderDataModule(str(folder), **common).train_dataloader(),
        "shards": ShardsDataModule(str(shards), **common).train_dataloader(),
        "hub, Arrow": end_of_epoch(HubDataModule(str(tables / "arrow"), **common).train_dataloader()),
        "hub, Parquet": end_of_epoch(HubDataModule(str(tables / "parquet"), **common).train_dataloader()),
        "folder, exact": ImageFolderDataModule(str(folder), exact=True, **common).train_dataloader(),
        "folder, fast_decode": ImageFolderDataModule(str(folder), fast_decode=True, **common).train_dataloader(),
    }


def speed(loader: object) -> float:
    """Images per second of one epoch, from the second batch on: the first waits for the workers to start."""
    seen, start = 0, 0.0
    for batch in loader:  # type: ignore[attr-defined]
        if not seen:
            start = time.perf_counter()
        seen += len(batch["image"]) if isinstance(batch, dict) else len(batch[0])
    return (seen - BATCH) / (time.perf_counter() - start)


def differences(folder: Path) -> dict[str, float]:
    """Grey levels by which pixels differ from the original's, over 100 images: the largest, and the mean."""
    found: dict[str, list[torch.Tensor]] = {}
    for path in sorted(folder.rglob("*.jpg"))[:100]:
        for mode in ("random_crop", "center_crop"):
            exact, fast = (ImageTransform(SIZE, mode, exact=exact) for exact in (True, False))
            difference = (exact(open_for(exact, path), 1).int() - fast(open_for(fast, path), 1).int()).abs()
            found.setdefault(mode, []).append(difference)
    large = io.BytesIO()
    photograph(np.random.default_rng(1), 2000, 1500).save(large, format="JPEG", quality=92)
    whole, reduced = (ImageTransform(SIZE, "center_crop", fast_decode=fast) for fast in (False, True))
    one, two = (transform(open_for(transform, io.BytesIO(large.getvalue())), 1).int() for transform in (whole, reduced))
    found["fast_decode of 2000×1500"] = [(one - two).abs()]
    return {
        f"{name}, {what}": round(float(value), 3)
        for name, all_of in found.items()
        for what, value in (
            ("largest", torch.stack(all_of).max()),
            ("mean", torch.stack(all_of).double().mean()),
        )
    }


def decode_speeds() -> dict[str, float]:
    """Milliseconds to open and crop a JPEG of 2000×1500, whole and with fast_decode."""
    file = io.BytesIO()
    photograph(np.random.default_rng(1), 2000, 1500).save(file, format="JPEG", quality=92)
    times = {}
    for fast in (False, True):
        transform = ImageTransform(SIZE, "center_crop", fast_decode=fast)
        laps = []
        for _ in range(7):
            start = time.perf_counter()
            transform(open_for(transform, io.BytesIO(file.getvalue())), 0)
            laps.append(time.perf_counter() - start)
        times["fast_decode" if fast else "whole"] = round(1e3 * statistics.median(laps), 1)
    return times


def main() -> None:
    """Generates the images, lets all pipelines take turns and prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {**versions(), "images": options.images, "workers": options.workers}
    with tempfile.TemporaryDirectory() as name:
        folder, shards = Path(name) / "jpeg", Path(name) / "shards"
        generate(folder, options.images)
        pack(ShardPlan.of(folder, images_per_shard=250), shards, num_workers=options.workers)
        write_tables(folder, Path(name) / "tables")
        for stage in (1, 2):
            loaders = pipelines(folder, shards, Path(name) / "tables", stage, options.workers)
            laps: dict[str, list[float]] = {kind: [] for kind in loaders}
            for _ in range(options.repeats + 1):
                for kind, loader in loaders.items():
                    laps[kind].append(speed(loader))
            speeds = {kind: statistics.median(values[1:]) for kind, values in laps.items()}  # the first warms up
            results[f"stage {stage}"] = speeds
            for kind, value in speeds.items():
                print(f"stage {stage}  {kind:<20} {value:7.0f} images/s  × {value / speeds['torchvision']:.2f}")
            for loader in loaders.values():
                if hasattr(loader, "close"):
                    loader.close()
        results["grey levels"] = differences(folder)
    results["ms for a JPEG of 2000×1500"] = decode_speeds()
    for key in ("grey levels", "ms for a JPEG of 2000×1500"):
        print(f"{key}: {results[key]}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
