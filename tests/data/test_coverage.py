"""Every data module deals each sample out once, in one order, over any number of processes and workers."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save_file

from rae.cli.build import build
from rae.cli.errors import compose
from rae.data import ImageFolderDataModule, LatentsDataModule, ShardsDataModule
from rae.data.hub import HubDataModule
from rae.data.packing.pack import ShardPlan, pack
from rae.io.files import write_json

COUNT, GLOBAL = 26, 6
KINDS = ["folder", "shards", "hub", "latents"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The same 26 samples of two classes as files, in shards and as latents whose values are their numbers."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = root / "folder" / f"c{2 * number // COUNT}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(path)
    pack(ShardPlan.of(root / "folder", images_per_shard=7, shuffle=False), root / "shards")
    files = sorted((root / "folder").rglob("*.png"))
    labels = [int(file.parent.name[1:]) for file in files]
    rows = pa.table({"image": [file.read_bytes() for file in files], "label": labels})
    (root / "hub").mkdir()
    for split in ("train", "val"):
        parquet.write_table(rows, root / "hub" / f"{split}.parquet", row_group_size=4)
    (root / "latents").mkdir()
    names = []
    for part in range(3):
        rows = torch.arange(part * 10, min(part * 10 + 10, COUNT))
        names.append(f"latents-{part:06d}.safetensors")
        latent = rows.float()[:, None, None, None].expand(-1, 2, 3, 3).contiguous()
        save_file({"latent": latent, "mirrored": -latent, "label": rows * 2 // COUNT}, root / "latents" / names[-1])
    listed = [{"file": name, "bytes": (root / "latents" / name).stat().st_size} for name in names]
    facts = {"latents": COUNT, "part": 10, "flips": "both", "image_size": 16, "num_classes": 2, "files": listed}
    write_json(root / "latents" / "latents.json", facts)
    return root


def module(kind, root, world, rank, workers, epoch):
    """A data module as one of several processes sees it in an epoch."""
    classes = {"folder": ImageFolderDataModule, "shards": ShardsDataModule, "latents": LatentsDataModule}
    path = str(root / kind)
    options = {
        "batch_size": GLOBAL // world,
        "num_workers": workers,
        "image_size": 16,
        "num_classes": 2,
        "seed": 3,
    }
    made = HubDataModule(path, val_split="val", **options) if kind == "hub" else classes[kind](path, path, **options)
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    made.trainer = Mock(world_size=world, global_rank=rank, current_epoch=epoch, overfit_batches=0, fit_loop=loop)
    return made


def epoch_of(kind, root, world, workers, split, epoch=0):
    """Global batches of an epoch: those of all processes joined, sample by sample."""
    loaders = []
    for rank in range(world):
        data = module(kind, root, world, rank, workers, epoch)
        loaders.append(data.train_dataloader() if split == "train" else data.val_dataloader())
    assert len({len(loader) for loader in loaders}) == 1  # no process waits for another at the end
    batches = [
        {key: torch.cat([batch[key] for batch in step]) for key in step[0]} for step in zip(*loaders, strict=True)
    ]
    for loader in loaders:
        loader.close()
    return batches


def whole(batches):
    """All samples of an epoch in their order."""
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


@pytest.fixture(scope="module")
def alone(root):
    """What one process without workers sees."""
    return {(kind, split): epoch_of(kind, root, 1, 0, split) for kind in KINDS for split in ("train", "val")}


@pytest.mark.parametrize("workers", [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 3))])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_order_and_coverage(root, alone, kind, world, workers):
    for split in ("train", "val"):
        batches = epoch_of(kind, root, world, workers, split)
        seen = torch.cat([batch["index"] for batch in batches]).tolist()
        assert len(set(seen)) == len(seen) == (COUNT // GLOBAL * GLOBAL if split == "train" else COUNT)
        if split == "train":
            assert all(len(batch["index"]) == GLOBAL for batch in batches)
        for key, expected in whole(alone[kind, split]).items():
            assert torch.equal(whole(batches)[key], expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_epochs_differ_and_together_reach_everything(root, alone, kind):
    epochs = [whole(epoch_of(kind, root, 2, 1, "train", epoch))["index"].tolist() for epoch in range(4)]
    assert epochs[0] == whole(alone[kind, "train"])["index"].tolist()
    assert all(one != other for one, other in zip(epochs, epochs[1:], strict=False))
    assert set().union(*epochs) == set(range(COUNT))


@pytest.mark.parametrize("kind", ["shards", "hub"])
def test_folder_and_others_are_the_same_data(alone, kind):
    for split in ("train", "val"):
        for one, other in zip(alone["folder", split], alone[kind, split], strict=True):
            assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_training_from_shards_of_a_folder_with_broken_files(root, tmp_path, caplog):
    """What rae-shard leaves out does not disturb; what is broken inside a shard is replaced, counted and listed."""
    folder = tmp_path / "images"
    for path in (root / "folder").rglob("*.png"):
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "c0" / "text.jpg").write_bytes(b"no image")
    (folder / "c1" / "cut.png").write_bytes((root / "folder" / "c1" / "020.png").read_bytes()[:200])
    for name, check in (("clean", True), ("unchecked", False)):
        index = pack(ShardPlan.of(folder, images_per_shard=9, check=check), tmp_path / name, max_bad_share=0.1)
        assert len(index["broken"]) == (2 if check else 0)
        paths = ["data=shards", f"data.train_path={tmp_path}/{name}", f"output_dir={tmp_path}/run-{name}"]
        options = ["data.num_workers=0", "data.batch_size=6", "data.num_classes=2", "data.max_bad_share=0.1"]
        networks = [
            "denoiser.width=32",
            "denoiser.depth=1",
            "denoiser.head_width=64",
            "decoder.width=32",
            "decoder.depth=1",
        ]
        free = ["encoder.checkpoint=null", "+encoder.pretrained=false", "latent.stats=none", "decoder_checkpoint=null"]
        off = ["callbacks=none", "logger=none", "trainer.enable_progress_bar=false", "trainer.max_steps=10"]
        parts = build(compose("train", ["experiment=digits_stage2", *paths, *options, *networks, *free, *off]))
        caplog.clear()
        parts.trainer.fit(parts.module, datamodule=parts.data)
        assert parts.trainer.global_step == 10
        assert ("2 of 28 files could not be read" in caplog.text) is not check
