"""Damaged and hostile data: cached latents with flipped bits, tar shards cut short, labels and descriptions that lie."""

from __future__ import annotations

import io
import json
import random
import shutil
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from rae.cli import main
from rae.data import LatentsDataModule
from rae.data.latents import INDEX, checksums
from rae.data.loader import BrokenFiles, BrokenFilesError, Names
from rae.data.packing.origin import find_sources
from rae.data.packing.pack import ShardPlan, pack
from rae.data.shards import ShardsDataModule, TarShards, read_index
from rae.data.transforms import ImageTransform, open_for
from tests.helpers.small_images import COUNT, cached_latents, overrides, tar_of, write_images

TRANSFORM = ImageTransform(16, "center_crop")
IN_PYTHONS_WORDS = (
    "recursion",
    "object is not",
    "not supported between",
    "has no attribute",
    "indices must be",
    "KeyError",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seventy images of five classes."""
    return write_images(tmp_path_factory.mktemp("images"))


# --- cached latents ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached(images, tmp_path_factory):
    """Latents of 70 images in four files, with their mirrored copies."""
    return cached_latents(images, tmp_path_factory, "splits=[train]") / "train"


@pytest.fixture
def copy(cached, tmp_path):
    return shutil.copytree(cached, tmp_path / "latents")


def read_all(folder) -> None:
    """Reads every latent and its mirrored copy, as an epoch or two do."""
    for flip in (False, True):
        data = LatentsDataModule(str(folder), batch_size=10, num_workers=0, image_size=32, num_classes=5, flip=flip)
        data.setup("fit")
        latents = data.train_dataset()
        for index in range(len(latents)):
            for seed in range(8) if flip else (0,):
                latents.load(index, seed)


def flip_bit(path, draws, low=0.0):
    """Flips one bit of a file, behind a share of its bytes."""
    content = bytearray(path.read_bytes())
    place = draws.randrange(int(low * len(content)), len(content))
    content[place] ^= 1 << draws.randrange(8)
    path.write_bytes(content)
    return place


def test_whole_latents_are_read(copy):
    read_all(copy)


def test_flipped_bits_of_latents_are_refused(copy):
    draws = random.Random(0)
    for number in range(40):
        path = sorted(copy.glob("*.safetensors"))[number % 4]
        whole = path.read_bytes()
        place = flip_bit(path, draws)
        with pytest.raises(ValueError, match="damaged") as caught:
            read_all(copy)
        said = str(caught.value)
        assert path.name in said, place
        assert "rae-cache-latents again" in said
        assert not any(word in said for word in IN_PYTHONS_WORDS), said
        path.write_bytes(whole)


def test_checksums_are_those_of_zip():
    latents = torch.randn(3, 2, 4, 4).bfloat16()
    archive = latents.view(torch.uint8).numpy().reshape(3, -1)
    assert checksums(latents, torch.zeros(3, dtype=torch.int64)).tolist() == [zlib.crc32(row) for row in archive]
    assert checksums(latents[:1], torch.tensor([1])) != checksums(latents[:1], torch.tensor([2]))


def test_labels_out_of_range_are_refused(copy):
    path = sorted(copy.glob("*.safetensors"))[0]
    for label in (5, -1, 2**40):
        state = load_file(path)
        state["label"][3] = label
        for name in ("latent", "mirrored"):
            state[f"{name}_crc"] = checksums(state[name], state["label"])  # whoever made it did so on purpose
        save_file(state, path)
        with pytest.raises(ValueError, match=rf"with label {label}, but latents\.json says .* 5 classes"):
            read_all(copy)


BROKEN_INDICES = {
    "no text": lambda index: b"\xff\xfe\x00",
    "empty": lambda index: b"",
    "a list": lambda index: b"[]",
    "deep": lambda index: b'{"a":' * 100_000,
    "NaN": lambda index: json.dumps({**index, "part": float("nan")}).encode(),
    "traversal": lambda index: json.dumps({**index, "files": [{"file": "../secret", "bytes": 1}] * 4}).encode(),
    "absolute": lambda index: json.dumps({**index, "files": [{"file": "/etc/passwd", "bytes": 1}] * 4}).encode(),
    "few files": lambda index: json.dumps({**index, "files": index["files"][:2]}).encode(),
    "no part": lambda index: json.dumps({**index, "part": 0}).encode(),
    "other flips": lambda index: json.dumps({**index, "flips": "some"}).encode(),
    "files are numbers": lambda index: json.dumps({**index, "files": [1, 2, 3, 4]}).encode(),
    **{
        f"{key}={value!r}": lambda index, key=key, value=value: json.dumps({**index, key: value}).encode()
        for key in ("encoder", "files", "shape", "latents", "part", "image_size", "num_classes")
        for value in (None, [], "text", -1, 1.5)
        if not (key in ("files", "shape") and value == [])
    },
    **{
        f"without {key}": lambda index, key=key: json.dumps({k: v for k, v in index.items() if k != key}).encode()
        for key in ("files", "latents", "part", "image_size", "num_classes", "flips")
    },
}


@pytest.mark.parametrize("kind", BROKEN_INDICES)
def test_damaged_descriptions_are_refused_in_words(copy, kind):
    index = json.loads((copy / INDEX).read_text())
    (copy / INDEX).write_bytes(BROKEN_INDICES[kind](index))
    with pytest.raises(ValueError, match=r"latents\.json|of images of|of another encoder|classes") as caught:
        read_all(copy)
    assert not any(word in str(caught.value) for word in IN_PYTHONS_WORDS), caught.value


def test_latents_of_an_unknown_encoder_are_refused(copy):
    index = json.loads((copy / INDEX).read_text())
    encoder = index.pop("encoder")
    data = LatentsDataModule(str(copy), num_workers=0, image_size=32, num_classes=5)
    data.check_encoder(lambda described: "" if described == encoder else "another")
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not say of which encoder its latents are"):
        data.check_encoder(lambda described: "")


def test_latents_without_checksums_are_read_with_a_warning(copy, caplog):
    index = json.loads((copy / INDEX).read_text())
    del index["checksums"]
    (copy / INDEX).write_text(json.dumps(index))
    read_all(copy)
    assert "holds no checksums" in caplog.text


# --- tar shards --------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(images, tmp_path):
    """Seventy images in two shards, with their indices."""
    pack(ShardPlan.of(images / "train", images_per_shard=40, seed=0), tmp_path / "packed")
    return tmp_path / "packed"


def without_indices(folder):
    for path in folder.glob("shard-*.json"):
        path.unlink()
    return folder


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def test_a_shard_cut_anywhere_is_never_a_smaller_data_set(packed):
    path = without_indices(packed) / "shard-000001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        end = tar.offset
    bounds = [place + shift for m in members for place in (m.offset, m.offset_data) for shift in (0, 1, 100, 511)]
    draws = random.Random(0)
    for size in [*draws.sample([bound for bound in bounds if bound < end], 60), end, end + 511, 0, 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"shard '.*shard-000001\.tar' cannot be indexed: .*repair or remove it"):
            TarShards(str(packed), TRANSFORM)
    path.write_bytes(whole[: end + 512])  # the mark is there: nothing is missing
    assert len(TarShards(str(packed), TRANSFORM)) == COUNT


def test_headers_that_are_damaged_are_no_end(packed):
    path = without_indices(packed) / "shard-000000.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    draws = random.Random(1)
    for offset in draws.sample(offsets[1:], 20):
        content = bytearray(whole)
        content[offset + draws.randrange(100)] ^= 1 << draws.randrange(8)  # within the name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"its header at byte {offset} is damaged"):
            TarShards(str(packed), TRANSFORM)


def test_shards_that_were_joined_are_refused(packed):
    first, second = (without_indices(packed) / f"shard-00000{number}.tar" for number in range(2))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    second.unlink()
    with pytest.raises(ValueError, match=r"goes on behind its end .*packed anew"):
        TarShards(str(packed), TRANSFORM)


def test_what_a_cut_shard_lacks_counts_as_unreadable(packed, caplog):
    """With an index it is known what is missing: few images are replaced, many are an error."""
    path = packed / "shard-000001.tar"
    shards = TarShards(str(packed), TRANSFORM)
    places = shards.places[shards.shard_of == 1]
    cut(path, int(places[-3].sum()))  # without the last two
    with pytest.raises(BrokenFilesError, match=r"at least 2 of 70 files cannot be read.*shard-000001\.tar"):
        TarShards(str(packed), TRANSFORM)
    options = {"num_workers": 0, "batch_size": 10, "image_size": 16, "num_classes": 5}
    data = ShardsDataModule(str(packed), max_bad_share=0.05, **options)
    batches = list(data.train_dataloader())
    assert "2 images are missing" in caplog.text
    assert sum(len(batch["index"]) for batch in batches) == COUNT  # as many as ever
    assert len(data._broken["train"].reasons) == 2


def png(side=20):
    file = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.cls", b"1.5"),
        ("a.cls", b"-3"),
        ("a.cls", b"NaN"),
        ("a.cls", b"1e400"),
        ("a.cls", b"true"),
        ("a.cls", b"99999999999999999999"),
        ("a.cls", b'"one"'),
        ("a.cls", b"[1]"),
        ("a.cls", b"\xff\x00"),
        ("a.cls", b""),
        ("a.json", b'{"label": {}}'),
        ("a.json", b'{"a":' * 100_000),
        ("a.json", b"[" * 100_000),
    ],
)
def test_labels_that_are_none_are_named(tmp_path, name, content):
    path = tar_of(tmp_path / "a.tar", {"a.png": png(), name: content})
    with pytest.raises(ValueError, match=r"a\.tar' cannot be indexed: .*'a\.(cls|json)'") as caught:
        read_index(path)
    assert not any(word in str(caught.value) for word in IN_PYTHONS_WORDS), caught.value


def test_whole_labels_of_any_form_are_taken(tmp_path):
    files = {"a.png": png(), "a.cls": b"3", "b.png": png(), "b.cls": b"4.0", "c.png": png(), "c.json": b'{"label": 0}'}
    assert [entry.label for entry in read_index(tar_of(tmp_path / "a.tar", files))] == [3, 4, 0]


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{", b"\xff", b'{"entries": 3, "bytes": 1000000000}', b'{"entries": [[1, 2]], "bytes": 1000000000}'],
)
def test_damaged_indices_of_shards_are_named(packed, content):
    (packed / "shard-000000.json").write_bytes(content)
    if content == b"[]":  # another tool's file: the shard is searched
        assert len(TarShards(str(packed), TRANSFORM)) == COUNT
        return
    with pytest.raises(ValueError, match=r"shard-000000\.json"):
        TarShards(str(packed), TRANSFORM)


def test_cut_tars_are_not_packed(images, tmp_path):
    files = {path.name: path.read_bytes() for path in sorted((images / "train" / "c0").glob("*.png"))}
    inner = tar_of(tmp_path / "c0.tar", files).read_bytes()
    outer = tar_of(tmp_path / "train.tar", {"c0.tar": inner, "c1.tar": inner})
    assert len(find_sources(outer)[0]) == 2 * len(files)
    with tarfile.open(outer) as tar:
        second = tar.getmember("c1.tar").offset
    for size in (second, second + 100):
        cut_tar = tmp_path / "cut.tar"
        cut_tar.write_bytes(outer.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"cut\.tar' cannot be read: it is cut short"):
            find_sources(cut_tar)


# --- images ------------------------------------------------------------------------------------------------------


def test_exact_is_torchvisions_loader(tmp_path):
    """Neither EXIF orientation nor transparency is looked at, as in the original; otherwise both are."""
    from torchvision.datasets.folder import pil_loader

    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned, clear = tmp_path / "turned.jpg", tmp_path / "clear.png"
    Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(turned, exif=exif)
    Image.fromarray(rng.integers(0, 256, (30, 40, 4), dtype=np.uint8), "RGBA").save(clear)
    for path in (turned, clear):
        plain, kind = pil_loader(str(path)), ImageTransform(16, "center_crop")
        assert np.array_equal(open_for(ImageTransform(16, "center_crop", exact=True), path), plain)
        assert not np.array_equal(open_for(kind, path), plain)
    assert open_for(kind, turned).size == (30, 40)
    with pytest.raises(ValueError, match=r"data\.fast_decode=true .* choose one"):
        ImageTransform(16, exact=True, fast_decode=True)


# --- names -------------------------------------------------------------------------------------------------------


def test_names_are_a_list_in_little_memory():
    names = ["", "a/b.png", "ä/ö.png", "x" * 300, "\udcff.png"]
    kept = Names(names)
    assert list(kept) == names
    assert len(kept) == 5
    assert kept[-2:] == names[-2:]
    assert kept[-1] == names[-1]
    with pytest.raises(IndexError):
        kept[5]


# --- the commands ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_answer_damaged_data_in_one_line(images, packed, tmp_path, monkeypatch, capfd):
    """Random damage to shards through rae-stats: the right number of images, or one line that names the shard."""

    draws = random.Random(2)
    without_indices(packed)
    wholes = {path: path.read_bytes() for path in packed.glob("*.tar")}
    answers = {"right": 0, "refused": 0}
    for number in range(60):
        path = draws.choice(sorted(wholes))
        content = bytearray(wholes[path])
        if draws.random() < 0.6:
            content = content[: draws.randrange(len(content))]
        else:
            for _ in range(draws.randrange(1, 5)):
                content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        path.write_bytes(content)
        output = tmp_path / f"out{number}"
        given = overrides(images, output, "data=shards", f"data.train_path={packed}", "data.val_path=null")
        monkeypatch.setattr("sys.argv", ["rae-stats", *given])
        code = exit_code(main.stats)
        errors = capfd.readouterr().err
        if code == 0:
            assert json.loads((output / "stat.json").read_text())["images"] == COUNT
            answers["right"] += 1
        else:
            assert code == 1
            (line,) = [line for line in errors.splitlines() if line.startswith("rae-stats: error")]
            assert ".tar" in line, line
            assert not any(word in line for word in IN_PYTHONS_WORDS), line
            answers["refused"] += 1
        path.write_bytes(wholes[path])
    assert answers["refused"] > 20


def exit_code(command) -> int:
    """How a command ends."""
    try:
        command()
    except SystemExit as end:
        return end.code or 0
    return 0


def test_unreadable_files_are_counted_over_all_processes(monkeypatch):
    """Each of two processes finds two of 100: together four, more than three of 100, on both."""
    found = [{"a": "cut", "b": "cut"}, {"b": "cut", "c": "cut", "d": "cut"}]

    def all_gather_object(gathered, own):
        gathered[:] = found

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather_object)
    for own in found:
        broken = BrokenFiles(100, 0.03)
        broken.add(list(own.items()))
        with pytest.raises(BrokenFilesError, match="at least 4 of 100 files"):
            broken.gather()
        allowed = BrokenFiles(100, 0.04)
        allowed.add(list(own.items()))
        allowed.gather()
        assert set(allowed.reasons) == {"a", "b", "c", "d"}
