"""Data sets: folders of images and their faults, digits, synthetic images."""

from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rae.data import DigitsDataModule, ImageFolder, ImageFolderDataModule, ImageTransform, SyntheticDataModule
from rae.data.digits import load_split
from rae.data.loader import BrokenFilesError
from rae.data.packing.origin import find_sources
from rae.metric.images import folder_files
from tests.data.test_data import Recorder, by_key, trainer

# --- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three classes of four images."""
    rng = np.random.default_rng(0)
    for name in ("b", "a", "c"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{number}.png")
    return tmp_path / "train"


def folder_module(path, **arguments):
    arguments = {"batch_size": 2, "num_workers": 0, "image_size": 16, "num_classes": 3, **arguments}
    return ImageFolderDataModule(str(path), **arguments)


def test_subfolders_are_classes_sorted_by_name(folder):
    images = ImageFolder(folder, ImageTransform(16, "center_crop"))
    assert images.classes == ["a", "b", "c"]
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images[5]["label"] == 1
    assert images[5]["image"].shape == (3, 16, 16)
    with pytest.raises(IndexError, match="index 12"):
        images[12]


def test_hidden_files_and_folders_are_no_images(folder):
    picture = (folder / "a" / "0.png").read_bytes()
    for hidden in (".thumbnails/0.png", "a/.thumbnails/0.png", "a/._0.png"):
        (folder / hidden).parent.mkdir(exist_ok=True)
        (folder / hidden).write_bytes(picture)
    images = ImageFolder(folder, ImageTransform(16, "center_crop"))
    assert (images.classes, len(images)) == (["a", "b", "c"], 12)
    assert len(ImageFolder(folder, ImageTransform(16), unlabelled=True)) == 12
    assert len(folder_files(folder)) == 12
    sources, classes = find_sources(folder)
    assert (classes, len(sources)) == (["a", "b", "c"], 12)


def test_flat_and_unlabelled_folders_have_one_class(folder):
    flat = ImageFolder(folder / "a", ImageTransform(16))
    assert flat.unlabelled
    assert flat.labels.tolist() == [0] * 4
    assert ImageFolder(folder, ImageTransform(16), unlabelled=True).labels.tolist() == [0] * 12


def test_missing_paths_are_named(tmp_path, folder):
    with pytest.raises(ValueError, match=r"data.train_path is not given; add data.train_path=/path/to/imagenet/train"):
        ImageFolderDataModule()
    with pytest.raises(ValueError, match=r"data.train_path is not given"):
        ImageFolderDataModule(val_path=str(folder)).setup("fit")
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        folder_module(tmp_path / "nowhere").setup("fit")
    with pytest.raises(ValueError, match=r"data.val_path=/path"):
        folder_module(folder).val_dataloader()
    with pytest.raises(ValueError, match=r"3 class folders, but data.num_classes is 2; set data.num_classes=3"):
        folder_module(folder, num_classes=2).setup("fit")
    (folder / "bb").mkdir()
    with pytest.raises(ValueError, match="bb' holds no image"):
        folder_module(folder, num_classes=4).setup("fit")


def test_training_without_validation_images(tmp_path, folder):
    recorder = Recorder()
    trainer(tmp_path, max_epochs=1).fit(recorder, datamodule=folder_module(folder))
    assert len(recorder.batches) == 6
    assert not recorder.val_batches


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_replaced_counted_and_listed(folder, caplog, workers):
    (folder / "a" / "1.png").write_bytes(b"no image")
    whole = (folder / "c" / "3.png").read_bytes()
    (folder / "c" / "3.png").write_bytes(whole[: len(whole) // 2])
    module = folder_module(folder, num_workers=workers, max_bad_share=0.2, mode="center_crop", flip=False)
    with caplog.at_level(logging.WARNING, logger="rae.data.loader"):
        for _ in range(2):
            images = by_key(module.train_dataloader())
        assert len(caplog.records) == 2
        module.teardown("fit")
    assert len(images) == 12
    assert torch.equal(images[0, 1], images[0, 2])
    assert torch.equal(images[0, 11], images[0, 0])  # after the last comes the first
    last = caplog.records[-1].getMessage()
    assert last.startswith("2 of 12 files could not be read:")
    assert "a/1.png" in last
    assert "c/3.png" in last


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_files_end_the_run(folder, workers):
    for number in range(4):
        (folder / "b" / f"{number}.png").write_bytes(b"no image")
    # The message alone, in whatever process the file was met.
    with pytest.raises(
        BrokenFilesError, match=r"^at least . of 12 files cannot be read, more than data.max_bad_share=0.2 allows"
    ):
        by_key(folder_module(folder, num_workers=workers, max_bad_share=0.2).train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_stand_in_for_broken_ones_can_be_left_out(folder, workers):
    for name in ("a/1", "b/0", "b/1"):
        (folder / f"{name}.png").write_bytes(b"no image")
    module = folder_module(folder, num_workers=workers, max_bad_share=0.3)
    kept = [batch["index"].tolist() for batch in module.range_dataloader("train", [range(8)], replace=False)]
    assert kept == [[0], [2, 3], [], [6, 7]]
    assert [len(batch["index"]) for batch in module.range_dataloader("train", [range(8)])] == [2, 2, 2, 2]


def test_classes_that_would_be_numbered_otherwise_in_validation_are_refused(folder, tmp_path):
    for name in ("a", "c"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes((folder / name / "0.png").read_bytes())
    module = folder_module(folder, val_path=str(tmp_path / "val"))
    with pytest.raises(
        ValueError, match=r"class 'c' is number 1 in data\.val_path=.*, but number 2 in data\.train_path"
    ):
        module.setup("fit")
    folder_module(folder, val_path=str(tmp_path / "val"), unlabelled=True).setup("fit")
    (tmp_path / "val" / "c").rename(tmp_path / "val" / "b")
    folder_module(folder, val_path=str(tmp_path / "val")).setup("fit")  # the last classes may be missing


# --- the other data sets -----------------------------------------------------------------------------------------


def test_digits_split_is_fixed_and_stratified():
    train, held = load_split("train"), load_split("held_out")
    assert train[0].shape == (1437, 64)
    assert held[0].shape == (360, 64)
    assert (train[0].min(), train[0].max()) == (0, 16)
    assert np.abs(np.bincount(held[1]) - 36).max() <= 1
    together = {row.tobytes() for row in train[0]} | {row.tobytes() for row in held[0]}
    assert len(together) == 1797  # no digit is in both
    with pytest.raises(ValueError, match="split 'test' is unknown"):
        load_split("test")


def test_digits_are_grey_images_that_show_the_pixels():
    batch = next(iter(DigitsDataModule(batch_size=360).val_dataloader()))
    assert batch["image"].shape == (360, 3, 32, 32)
    assert torch.equal(batch["image"][:, 0], batch["image"][:, 2])
    small = torch.nn.functional.adaptive_avg_pool2d(batch["image"][:, 0].float(), 8).flatten(1) / 255 * 16
    pixels, labels = load_split("held_out")
    assert torch.equal(batch["label"], torch.as_tensor(labels))
    assert np.corrcoef(small.flatten().numpy(), pixels.ravel())[0, 1] > 0.98


def test_digits_without_scikit_learn(monkeypatch):
    load_split.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'rae\[demo\]'"):
        load_split("train")


def test_synthetic_images_repeat_and_differ():
    arguments = {"batch_size": 4, "image_size": 20, "num_classes": 3, "train_images": 8, "val_images": 6}
    first, again = (by_key(SyntheticDataModule(**arguments).train_dataloader()) for _ in range(2))
    assert all(torch.equal(image, again[key]) for key, image in first.items())
    assert len({image.numpy().tobytes() for image in first.values()}) == 8
    assert first[0, 0].shape == (3, 20, 20)
    assert len(by_key(SyntheticDataModule(**arguments).val_dataloader())) == 6
    assert SyntheticDataModule(**{**arguments, "val_images": 0}).val_dataset() is None
    with pytest.raises(ValueError, match=r"data.train_images must be at least 1"):
        SyntheticDataModule(train_images=0)
