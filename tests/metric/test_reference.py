"""References: what is written is read, what does not fit is refused; images of archives and folders, batch by batch."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from rae.metric import (
    CallableDetector,
    GenerationMetrics,
    ReferenceBuilder,
    iterate_folder,
    iterate_npz,
    npz_shape,
    read_reference,
    write_reference,
)
from rae.metric.functional import moments
from rae.metric.reference import Reference, ReferenceInfo, Statistics

WIDTH = 12


def colours(images: torch.Tensor) -> torch.Tensor:
    return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


DETECTOR = CallableDetector(colours, WIDTH, "colours")
OTHER = CallableDetector(lambda images: colours(images)[:, :5], 5, "other")


def images_of(count: int, seed: int = 0, side: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def pixels(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def built(images: torch.Tensor, kind: str = "training", kept: int = 10) -> Reference:
    builder = ReferenceBuilder(DETECTOR, kind, crop="center", total=len(images), kept=kept)
    for batch in images.split(9):
        builder.update(batch)
    return builder.compute()


# --- writing and reading -----------------------------------------------------------------------------------------


def test_a_reference_is_read_as_it_was_written(tmp_path):
    images = images_of(40)
    reference = built(images)
    path = write_reference(tmp_path / "reference.npz", reference, pixels(images))
    found = read_reference(path)
    assert found.info == reference.info
    assert found.info.image_size == (6, 6)
    assert (found.info.kind, found.info.crop, found.info.count) == ("training", "center", 40)
    assert found.info.detector_hash == DETECTOR.hash
    assert found.hash == reference.hash
    expected = moments(colours(images / 255))
    torch.testing.assert_close(found.statistics.moments.mean, expected.mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.statistics.moments.covariance, expected.covariance, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.statistics.features, colours(images / 255)[3::4])
    with np.load(path) as file:  # ADM's names
        assert {"mu", "sigma", "arr_0", "features", "metadata"} == set(file.files)
        assert json.loads(str(file["metadata"]))["kind"] == "training"


def test_kept_features_do_not_depend_on_batches_and_order():
    images = images_of(57)
    whole = built(images)
    builder = ReferenceBuilder(DETECTOR, "training", crop="center", total=57, kept=10)
    for index in torch.randperm(57, generator=torch.Generator().manual_seed(1)).split(5):
        builder.update(images[index], index)
    found = builder.compute()
    assert len(found.statistics.features) == 10
    torch.testing.assert_close(found.statistics.features, whole.statistics.features)
    parts = [ReferenceBuilder(DETECTOR, "training", crop="center", total=57, kept=10) for _ in range(2)]
    for rank, part in enumerate(parts):
        part.update(images[rank::2], torch.arange(rank, 57, 2))
    parts[0].merge_state(parts[1])
    assert parts[0].compute().info.image_size == (6, 6)
    torch.testing.assert_close(parts[0].compute().statistics.features, whole.statistics.features)


def test_files_of_adm(tmp_path):
    images = images_of(30)
    own = moments(colours(images / 255))
    path = tmp_path / "VIRTUAL_tiny.npz"
    np.savez(path, arr_0=pixels(images), mu=own.mean.numpy() + 1, sigma=own.covariance.numpy())
    reference = read_reference(path)
    assert reference.info.kind == "training"
    assert reference.info.image_size == (6, 6)
    assert len(reference.hash) == 64
    with pytest.warns(UserWarning, match="does not say which detector made it"):
        found = reference.for_detector(DETECTOR, ["moments", "features"])
    torch.testing.assert_close(found.moments.mean, own.mean + 1)  # the stored moments, of more images
    torch.testing.assert_close(found.features, colours(images / 255))  # the stored images
    other = reference.for_detector(OTHER, ["moments"])
    torch.testing.assert_close(other.moments.mean, colours(images / 255)[:, :5].double().mean(0), rtol=1e-6, atol=0)


def test_images_alone_make_a_reference(tmp_path):
    real, fake = images_of(60), images_of(50, 1)
    np.savez(tmp_path / "real.npz", pixels(real))
    scores = []
    for reference in (read_reference(tmp_path / "real.npz", "training"), built(real, kept=60)):
        metric = GenerationMetrics(DETECTOR, reference, ["fid", "precision", "recall", "kid"])
        metric.update(fake)
        scores.append(metric.compute())
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    with pytest.raises(ValueError, match=r"of the training set .* or of validation images"):
        GenerationMetrics(DETECTOR, tmp_path / "real.npz", ["fid"])
    metric = GenerationMetrics(DETECTOR, tmp_path / "real.npz", ["fid"], assume_kind="training")
    assert len(metric.identity["reference"]["hash"]) == 64
    assert metric.identity["reference"]["image_size"] == (6, 6)


def test_statistics_of_another_detector_are_not_used(tmp_path):
    images = images_of(40)
    path = write_reference(tmp_path / "plain.npz", built(images, kept=0))
    with pytest.raises(ValueError, match=r"moments of detector 'other' are needed.*no images.*build a reference"):
        read_reference(path).for_detector(OTHER, ["moments"])
    with pytest.raises(ValueError, match="features of detector 'colours' are needed"):
        read_reference(path).for_detector(DETECTOR, ["moments", "features"])
    path = write_reference(tmp_path / "images.npz", built(images), pixels(images[:20]))
    with pytest.warns(UserWarning, match="made with another detector than 'other'"):
        found = read_reference(path).for_detector(OTHER, ["moments"])
    assert found.moments.samples == 20


# --- refusals ----------------------------------------------------------------------------------------------------


def test_kinds_and_sizes_are_compared(tmp_path):
    reference = built(images_of(20), "validation")
    with pytest.raises(ValueError, match=r"'validation' .*needs kind 'training'.*1.9 instead of an rFID of 0.57"):
        reference.check_kind("training")
    with pytest.raises(ValueError, match="reference_kind='test' is unknown"):
        reference.check_kind("test")
    with pytest.raises(ValueError, match="images are 7×6, but reference in memory is of images of 6×6"):
        reference.check_size(7, 6)
    path = write_reference(tmp_path / "r.npz", reference)
    with pytest.raises(ValueError, match="is of kind 'validation', not 'training'"):
        read_reference(path, "training")
    with pytest.raises(ValueError, match="kind='train' of a reference is unknown"):
        ReferenceInfo("train")


def test_damaged_files_are_named(tmp_path):
    images = images_of(20)
    path = write_reference(tmp_path / "good.npz", built(images), pixels(images))
    content = path.read_bytes()
    short = tmp_path / "short.npz"
    short.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"short.npz.* is no .npz archive or is truncated"):
        read_reference(short)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_reference(tmp_path / "none.npz")
    np.savez(tmp_path / "empty.npz", something=np.zeros(3))
    with pytest.raises(ValueError, match=r"holds neither moments .* nor images .*, only something"):
        read_reference(tmp_path / "empty.npz")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["mu"] = arrays["mu"] + 1e-3
    np.savez(tmp_path / "edited.npz", **arrays)
    with pytest.raises(ValueError, match="was changed after it was written"):
        read_reference(tmp_path / "edited.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(ValueError, match="NaN or infinite"):
        read_reference(tmp_path / "nan.npz", "training")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(ValueError, match=r"must be \[D\] and \[D, D\], got \(3,\) and \(4, 4\)"):
        read_reference(tmp_path / "odd.npz", "training")


def test_bad_references_are_not_written(tmp_path):
    reference = built(images_of(20))
    with pytest.raises(ValueError, match=r"is an .npz file"):
        write_reference(tmp_path / "x.pt", reference)
    with pytest.raises(ValueError, match="uint8 N×H×W×3, got float32"):
        write_reference(tmp_path / "x.npz", reference, np.zeros((2, 6, 6, 3), np.float32))
    with pytest.raises(ValueError, match="images are 7×7"):
        write_reference(tmp_path / "x.npz", reference, np.zeros((2, 7, 7, 3), np.uint8))
    with pytest.raises(ValueError, match="says nothing"):
        write_reference(tmp_path / "x.npz", Reference(ReferenceInfo("training"), Statistics()))
    assert not list(tmp_path.iterdir())


def test_bad_images_of_a_reference_are_named():
    with pytest.raises(ValueError, match="give total, or set kept=0"):
        ReferenceBuilder(DETECTOR, "training")
    builder = ReferenceBuilder(DETECTOR, "training", total=10)
    with pytest.raises(ValueError, match=r"index must lie in 0…9, got 8…12"):
        builder.update(images_of(5), torch.arange(8, 13))
    builder.update(images_of(5))
    with pytest.raises(ValueError, match=r"one size: got \(8, 8\) after \(6, 6\)"):
        builder.update(images_of(5, side=8))
    with pytest.raises(ValueError, match="total=10 images are announced, but 5 were given"):
        builder.compute()


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_archives_are_read_batch_by_batch(tmp_path, save):
    images, labels = images_of(23), np.arange(23, dtype=np.int32)
    save(tmp_path / "x.npz", pixels(images), labels)
    assert npz_shape(tmp_path / "x.npz") == (23, 6, 6)
    batches = list(iterate_npz(tmp_path / "x.npz", 10))
    assert [len(batch.images) for batch in batches] == [10, 10, 3]
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), torch.arange(23))
    save(tmp_path / "y.npz", arr_0=pixels(images))
    assert next(iter(iterate_npz(tmp_path / "y.npz"))).labels is None


def test_bad_archives_are_named(tmp_path):
    images = pixels(images_of(8))
    cases = {
        "other": ({"images": images}, "has no arr_0 .* it holds images"),
        "float": ({"arr_0": images / 255.0}, "must be uint8 .* got float64 .* float images are refused"),
        "chw": ({"arr_0": images.transpose(0, 3, 1, 2)}, "uint8 N×H×W×3"),
        "none": ({"arr_0": images[:0]}, "is empty"),
        "fortran": ({"arr_0": np.asfortranarray(images)}, "in Fortran order"),
        "labels": ({"arr_0": images, "arr_1": np.arange(7)}, "must hold 8 labels"),
        "words": ({"arr_0": images, "arr_1": np.array(["a"] * 8)}, "integer labels"),
    }
    for name, (arrays, message) in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            list(iterate_npz(tmp_path / f"{name}.npz"))
    np.save(tmp_path / "plain.npy", images)
    with pytest.raises(ValueError, match=r"no .npz archive"):
        list(iterate_npz(tmp_path / "plain.npy"))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        list(iterate_npz(tmp_path / "labels.npz", 0))


def test_damage_inside_an_archive_is_named(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, pixels(images_of(50)))
    content = bytearray(path.read_bytes())
    content[3000] ^= 255  # a pixel: the checksum no longer fits
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged after image .* of 50"):
        list(iterate_npz(path, 10))


def test_folders_are_read_batch_by_batch(tmp_path):
    images = images_of(7)
    for number, image in enumerate(pixels(images)):
        folder = tmp_path / ("a" if number < 4 else "b")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    batches = list(iterate_folder(tmp_path, 3))
    assert [len(batch.images) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no image"):
        next(iterate_folder(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        next(iterate_folder(tmp_path / "none"))
    Image.new("RGB", (6, 6)).save(tmp_path / "a.png")
    Image.new("RGB", (6, 7)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"one size: .*b.png.* is \(7, 6\)"):
        list(iterate_folder(tmp_path))
    Image.fromarray(np.zeros((6, 6), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png.* has mode I;16"):
        list(iterate_folder(tmp_path))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"b.png.* is no readable image"):
        list(iterate_folder(tmp_path))
    Image.new("RGB", (6, 6)).save(tmp_path / "b.png", format="EPS")  # for which Pillow would start a program
    with pytest.raises(ValueError, match=r"b.png.* is no readable image: cannot identify"):
        list(iterate_folder(tmp_path))
