"""rae-shard: what is packed is what was there; resumed, verified, and exact in every reader."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from scipy.io import loadmat, savemat

from rae.data import ImageFolder, ImageTransform, TarShards
from rae.data.packing.origin import find_sources
from rae.data.packing.pack import ShardPlan, pack, verify
from tests.helpers.small_images import tar_of

TRANSFORM = ImageTransform(16, "center_crop", exact=True)


def picture(seed, size=(24, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def images(tmp_path):
    """Twenty JPEGs and PNGs of four classes."""
    for number in range(20):
        path = tmp_path / "images" / f"n{number % 4:08d}" / f"{number:03d}.{'png' if number % 5 == 0 else 'JPEG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "images"


def content(folder):
    """All files of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_hold_every_file_to_the_last_byte(images, tmp_path, workers):
    index = pack(ShardPlan.of(images, images_per_shard=6), tmp_path / "out", num_workers=workers)
    assert (index["images"], len(index["shards"]), index["broken"]) == (20, 4, [])
    assert index["classes"] == [f"n{number:08d}" for number in range(4)]
    assert index["images_per_class"] == [5, 5, 5, 5]
    assert index["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    originals = sorted((path.read_bytes(), int(path.parent.name[1:])) for path in images.rglob("*.*"))
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    read = webdataset.WebDataset(urls, shardshuffle=False)  # as any other reader sees them
    assert sorted((sample.get("jpg", sample.get("png")), int(sample["cls"])) for sample in read) == originals
    assert verify(tmp_path / "out") == json.loads((tmp_path / "out" / "index.json").read_text())


def test_shards_are_read_by_their_indices_and_without(images, tmp_path):
    pack(ShardPlan.of(images, images_per_shard=6, shuffle=False), tmp_path / "out")
    folder, shards = ImageFolder(images, TRANSFORM), TarShards(str(tmp_path / "out"), TRANSFORM)
    assert shards.labels.tolist() == folder.labels.tolist()
    assert all(torch.equal(shards[index]["image"], folder[index]["image"]) for index in range(20))
    for path in (tmp_path / "out").glob("shard-*.json"):
        path.unlink()
    searched = TarShards(str(tmp_path / "out"), TRANSFORM)
    assert searched.names_hash == shards.names_hash
    assert (searched.places == shards.places).all()


def test_shuffled_shards_mix_the_classes_and_repeat(images, tmp_path):
    for name in ("one", "two"):
        pack(ShardPlan.of(images, images_per_shard=10, seed=3), tmp_path / name)
    pack(ShardPlan.of(images, images_per_shard=10, seed=4), tmp_path / "other")
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert content(tmp_path / "one")["shard-000000.tar"] != content(tmp_path / "other")["shard-000000.tar"]
    assert len(set(TarShards(str(tmp_path / "one" / "shard-000000.tar"), TRANSFORM).labels.tolist())) == 4


def test_a_run_that_stopped_goes_on(images, tmp_path):
    plan = ShardPlan.of(images, images_per_shard=6)
    pack(plan, tmp_path / "whole")
    pack(plan, tmp_path / "half")
    before = content(tmp_path / "half")
    half = tmp_path / "half"
    (half / "index.json").unlink()
    (half / "shard-000001.json").unlink()  # killed between shard and index
    (half / "shard-000002.tar").unlink()
    (half / ".shard-000002.tar.x1.tmp").write_bytes(b"half")
    kept = (half / "shard-000000.tar").stat().st_mtime_ns
    pack(plan, half)
    assert content(half) == before == content(tmp_path / "whole")
    assert (half / "shard-000000.tar").stat().st_mtime_ns == kept


def test_shards_stay_in_their_folder(images, tmp_path):
    for prefix in ("../../etc", "a/b", "", ".hidden"):
        with pytest.raises(ValueError, match=r"prefix=.* must be the beginning of a file's name"):
            pack(ShardPlan.of(images), tmp_path / "shards", prefix)
    assert not (tmp_path / "shards").exists()


def test_another_plan_or_foreign_files_are_refused(images, tmp_path):
    pack(ShardPlan.of(images, images_per_shard=6), tmp_path / "out")
    with pytest.raises(ValueError, match=r"work of another plan: images_per_shard was 6 and is now 7"):
        pack(ShardPlan.of(images, images_per_shard=7), tmp_path / "out")
    (images / "n00000000" / "new.png").write_bytes((images / "n00000000" / "000.png").read_bytes())
    with pytest.raises(ValueError, match=r"another plan: files was 20 and is now 21"):
        pack(ShardPlan.of(images, images_per_shard=6), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.tar").touch()
    with pytest.raises(ValueError, match="tar files that rae-shard did not write"):
        pack(ShardPlan.of(images), tmp_path / "mine")


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_are_left_out_and_listed(images, tmp_path, caplog, workers):
    (images / "n00000001" / "bad.jpg").write_bytes(b"no image")
    truncated = (images / "n00000002" / "002.JPEG").read_bytes()[:300]
    (images / "n00000002" / "cut.jpg").write_bytes(truncated)
    plan = ShardPlan.of(images, images_per_shard=6)
    with pytest.raises(RuntimeError, match=r"of 22 files cannot be read, more than max_bad_share=0\.01 allows"):
        pack(plan, tmp_path / "out", num_workers=workers)
    with pytest.raises(RuntimeError, match="cannot be read, more than max_bad_share"):
        pack(plan, tmp_path / "out", num_workers=workers)
    index = pack(plan, tmp_path / "out", num_workers=workers, max_bad_share=0.1)
    assert sorted(name for name, _ in index["broken"]) == ["n00000001/bad.jpg", "n00000002/cut.jpg"]
    assert (index["images"], index["images_per_class"]) == (20, [5, 5, 5, 5])
    assert "2 of 22 files could not be read" in caplog.text
    pack(plan, tmp_path / "again", max_bad_share=0.1)  # what is written of broken files is the same in every run, too
    assert content(tmp_path / "again") == content(tmp_path / "out")
    assert len(TarShards(str(tmp_path / "out"), TRANSFORM)) == 20


def test_without_the_check_files_are_only_copied(images, tmp_path):
    (images / "n00000001" / "bad.jpg").write_bytes(b"no image")
    index = pack(ShardPlan.of(images, check=False), tmp_path / "out")
    assert (index["images"], index["broken"]) == (21, [])


def test_large_images_are_reduced_and_odd_formats_stored_as_png(tmp_path):
    (tmp_path / "images").mkdir()
    picture(0, (90, 60)).save(tmp_path / "images" / "a.jpg", quality=95)
    picture(1, (30, 20)).save(tmp_path / "images" / "b.jpg")
    picture(2, (90, 60)).save(tmp_path / "images" / "c.bmp")
    index = pack(ShardPlan.of(tmp_path / "images", resize=24, shuffle=False), tmp_path / "out")
    assert index["plan"]["resize"] == 24
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False))
    assert samples[1]["jpg"] == (tmp_path / "images" / "b.jpg").read_bytes()
    reduced = Image.open(io.BytesIO(samples[0]["jpg"]))
    assert reduced.size == (36, 24)
    png = Image.open(io.BytesIO(samples[2]["png"]))
    expected = picture(2, (90, 60)).resize((36, 24), Image.Resampling.BICUBIC)
    assert np.array_equal(png, expected)


def test_verify_names_every_damaged_shard(images, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="does not exist; give the folder that rae-shard wrote"):
        verify(out)
    out.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no index\.json: there are no shards, or packing was not finished"):
        verify(out)
    plan = ShardPlan.of(images, images_per_shard=5)
    pack(plan, out)
    before = content(out)
    spoiled = bytearray(before["shard-000001.tar"])
    spoiled[600] ^= 1
    (out / "shard-000001.tar").write_bytes(spoiled)
    (out / "shard-000002.tar").write_bytes(before["shard-000002.tar"][:-5])
    (out / "shard-000003.tar").unlink()
    with pytest.raises(
        ValueError,
        match=r"3 of 4 shards .*-000001\.tar has other content .*-000002\.tar has \d+ bytes .*-000003\.tar is missing",
    ):
        verify(out)
    for number in (1, 2):
        (out / f"shard-00000{number}.tar").unlink()
    pack(plan, out)
    assert content(out) == before
    verify(out)
    (out / "index.json").write_text('{"shards": 4}')
    with pytest.raises(ValueError, match=r"index\.json' is no index of shards; remove it and pack again"):
        verify(out)
    for damaged in ("{}", '{"broken": 3}'):
        (out / "shard-000002.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"shard-000002\.json' is no index of a shard; remove it"):
            pack(plan, out)
    (out / "shard-000002.json").unlink()
    pack(plan, out)
    assert content(out) == before


# --- where images come from --------------------------------------------------------------------------------------


def test_imagenets_training_tar_is_read_in_place(images, tmp_path):
    classes = sorted(folder for folder in images.iterdir())
    inner = {}
    for folder in classes:
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        inner[f"{folder.name}.tar"] = tar_of(tmp_path / "inner.tar", files).read_bytes()
    tar_of(tmp_path / "ILSVRC2012_img_train.tar", inner)
    from_tar, names = find_sources(tmp_path / "ILSVRC2012_img_train.tar")
    from_folder, same = find_sources(images)
    assert names == same == [folder.name for folder in classes]
    assert sorted((s.label, s.read()) for s in from_tar) == sorted((s.label, s.read()) for s in from_folder)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_validation_images_with_a_list_of_synsets(tmp_path, kind, monkeypatch):
    files = {}
    for number in range(6):
        file = io.BytesIO()
        picture(number).save(file, format="JPEG")
        files[f"ILSVRC2012_val_{number + 1:08d}.JPEG"] = file.getvalue()
    flat = tmp_path / "val.tar"
    if kind == "tar":
        tar_of(flat, files)
    else:
        flat = tmp_path / "val"
        flat.mkdir()
        for name, data in files.items():
            (flat / name).write_bytes(data)
    names = ["n02", "n01", "n02", "n03", "n01", "n02"]
    (tmp_path / "synsets.txt").write_text("\n".join(names))
    sources, classes = find_sources(flat, tmp_path / "synsets.txt")
    assert classes == ["n01", "n02", "n03"]
    assert {s.name: classes[s.label] for s in sources} == dict(zip(sorted(files), names, strict=True))
    assert {s.name: s.read() for s in sources} == files
    # The devkit numbers its classes otherwise, and says how in meta.mat.
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    rows = np.array([(1, "n03"), (2, "n01"), (3, "n02")], dtype=[("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    savemat(devkit / "meta.mat", {"synsets": rows})
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n2\n3\n1\n2\n3\n")
    reads = []
    monkeypatch.setattr(
        "rae.data.packing.origin.loadmat", lambda *a, **options: reads.append(a) or loadmat(*a, **options)
    )
    assert find_sources(flat, devkit.parent) == (sources, classes)
    assert len(reads) == 1  # a twentieth of a second: not for each of 50,000 images
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("3\n2\n3\n1\n2\n4\n")
    with pytest.raises(ValueError, match=r"lists class number 4, of which the devkit's meta\.mat knows no name"):
        find_sources(flat, devkit.parent)
    unlabelled, none = find_sources(flat)
    assert none == []
    assert {source.label for source in unlabelled} == {-1}


def test_bad_sources_are_named(images, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; give a folder of images"):
        find_sources(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        find_sources(tmp_path / "empty")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"cannot be read: .* uncompressed tar file, complete"):
        find_sources(tmp_path / "bad.tar")
    (tmp_path / "list.txt").write_text("a b c")
    with pytest.raises(ValueError, match="for images without class folders"):
        find_sources(images, tmp_path / "list.txt")
    with pytest.raises(ValueError, match="lists 3 labels, but there are 5 images"):
        find_sources(images / "n00000000", tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("1 2 3 1 2")
    with pytest.raises(FileNotFoundError, match=r"meta\.mat, which says their names"):
        find_sources(images / "n00000000", tmp_path / "list.txt")
    with pytest.raises(FileNotFoundError, match="holds no list"):
        find_sources(images / "n00000000", tmp_path / "empty")
    (tmp_path / "devkit.tar.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(ValueError, match=r"devkit\.tar\.gz' is no text file; give the list .* unpacked"):
        find_sources(images / "n00000000", tmp_path / "devkit.tar.gz")
    for option, message in {
        ("quality", 0): "quality=0 must lie in 1",
        ("images_per_shard", "many"): "images_per_shard=many must be a whole number",
        ("resize", 0.5): r"resize=0\.5 must be a whole number",
    }.items():
        with pytest.raises(ValueError, match=message):
            ShardPlan.of(images, **dict([option]))
    for wrong in ({"max_bad_share": 2}, {"num_workers": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            pack(ShardPlan.of(images), tmp_path / "out", **wrong)
