"""Tar shards: the same samples, batches and answers as from a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from rae.data import ImageFolder, ImageTransform, ShardsDataModule, TarShards

TRANSFORM = ImageTransform(16, "center_crop")


@pytest.fixture
def data(tmp_path):
    """Nine images, in a folder of classes and in shards of four."""
    rng = np.random.default_rng(0)
    (tmp_path / "shards").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "shards" / "train-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(9):
            path = tmp_path / "folder" / str(number // 3) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(path)
            writer.write({"__key__": f"{number:04d}", "png": path.read_bytes(), "cls": number // 3})
    return tmp_path


@pytest.mark.parametrize("path", ["shards", "shards/train-{0000..0002}.tar", "shards/train-*.tar"])
def test_shards_hold_what_the_folder_holds(data, path):
    shards, folder = TarShards(str(data / path), TRANSFORM), ImageFolder(data / "folder", TRANSFORM)
    assert len(shards.shards) == 3
    assert shards.labels == folder.labels
    assert all(torch.equal(shards[index]["image"], folder[index]["image"]) for index in range(9))


@pytest.mark.parametrize("workers", [0, 2])
def test_module_sees_every_image_once(data, workers):
    module = ShardsDataModule(
        str(data / "shards"), str(data / "shards"), batch_size=2, num_workers=workers, image_size=16, num_classes=3
    )
    for loader, count in ((module.train_dataloader(), 8), (module.val_dataloader(), 9)):
        batches = list(loader)
        seen = torch.cat([batch["index"] for batch in batches]).tolist()
        assert len(set(seen)) == len(seen) == count
        assert torch.equal(torch.cat([batch["label"] for batch in batches]), torch.tensor(seen) // 3)


def test_index_is_kept_until_the_shards_change(data):
    index = data / "index.json"
    first = TarShards(str(data / "shards"), TRANSFORM, index_path=index)
    written = index.stat().st_mtime_ns
    assert TarShards(str(data / "shards"), TRANSFORM, index_path=index).entries == first.entries
    assert index.stat().st_mtime_ns == written
    (data / "shards" / "train-0002.tar").unlink()
    assert len(TarShards(str(data / "shards"), TRANSFORM, index_path=index)) == 8


def test_faults_are_named(data):
    with pytest.raises(FileNotFoundError, match=r"no shard .*train-0003\.tar"):
        TarShards(str(data / "shards" / "train-{0000..0003}.tar"), TRANSFORM)
    with pytest.raises(FileNotFoundError, match="give a folder of .tar files"):  # noqa: RUF043
        TarShards(str(data / "folder"), TRANSFORM)
    with pytest.raises(ValueError, match=r"local files, got 'https://x/y\.tar'"):
        TarShards("https://x/y.tar", TRANSFORM)
    with pytest.raises(ValueError, match=r"data\.train_path=.*\.tar"):
        ShardsDataModule()
    with pytest.raises(ValueError, match=r"holds label 2, but data.num_classes is 2; set data.num_classes=3"):
        ShardsDataModule(str(data / "shards"), num_workers=0, num_classes=2).setup("fit")
    with webdataset.TarWriter(str(data / "plain.tar")) as writer:
        writer.write({"__key__": "a", "png": (data / "folder" / "0" / "0.png").read_bytes()})
    with pytest.raises(ValueError, match=r"plain\.tar:a has no label .* data\.unlabelled=true"):
        TarShards(str(data / "plain.tar"), TRANSFORM)
    assert TarShards(str(data / "plain.tar"), TRANSFORM, unlabelled=True).labels == [0]
    (data / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"bad\.tar' cannot be indexed"):
        TarShards(str(data / "bad.tar"), TRANSFORM)
