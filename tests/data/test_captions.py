"""Captions in folders and shards: which one, in which order, on the network, packed, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae.data import ImageFolderDataModule, PicturesDataModule, ShardsDataModule
from rae.data.captions import caption_line, read_captions
from rae.data.loader import BrokenFilesError
from rae.data.packing import ShardPlan, pack
from rae.data.pictures import BACKGROUNDS, Scene, draw_scene, read_caption, things
from tests.helpers.small_images import tar_of

TEXTS = {f"{number}.png": [f"picture {number}", f"number {number}"] for number in range(12)}


def draw(number: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), 10 * number, np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    for number, name in enumerate(TEXTS):
        draw(number).save(path / name)
    lines = [json.dumps({"file_name": name, "text": texts}) for name, texts in TEXTS.items()]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def module(path: Path, **options) -> ImageFolderDataModule:
    defaults = {"batch_size": 4, "num_workers": 0, "image_size": 8, "num_classes": 1, "flip": False}
    kind = ShardsDataModule if options.get("captions") in ("txt", "text", "caption") else ImageFolderDataModule
    if kind is ShardsDataModule:
        defaults["unlabelled"] = True
    return kind(str(path), **{**defaults, "captions": "metadata.jsonl", **options})


def pairs(data) -> list[tuple[int, str]]:
    """Number of each picture, by its colour, and its caption."""
    data.setup("fit")
    found = []
    for batch in data.train_dataloader():
        found += zip((batch["image"][:, 0, 0, 0] // 10).tolist(), batch["caption"], strict=True)
    return found


def test_every_picture_comes_with_one_of_its_captions_drawn_by_the_seed(folder: Path):
    found = pairs(module(folder))
    assert sorted(number for number, _ in found) == list(range(12))
    assert all(caption in TEXTS[f"{number}.png"] for number, caption in found)
    assert found == pairs(module(folder))
    assert dict(found) == dict(pairs(module(folder, batch_size=3, num_workers=2)))
    drawn = Counter()
    for seed in range(20):
        drawn.update(caption.split()[0] for _, caption in pairs(module(folder, seed=seed)))
    assert abs(drawn["picture"] - 120) < 40  # of 240, with a standard deviation of 8


def test_a_csv_file_says_the_same(folder: Path):
    with open(folder / "captions.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "says"])
        rows.writerows([name, text] for name, texts in TEXTS.items() for text in texts)
    assert read_captions(folder / "captions.csv", "says") == TEXTS
    assert pairs(module(folder, captions="captions.csv", caption_key="says")) == pairs(module(folder))


def test_captions_may_hold_what_some_take_for_the_end_of_a_line(tmp_path: Path):
    texts = {"a.png": ["one\u2028two\x85three"], "b.png": ["four\nfive"]}
    lines = [caption_line(name, text) for name, (text,) in texts.items()]  # as rae-sample writes them
    (tmp_path / "lines.jsonl").write_text("\n\n".join(lines), "utf-8")
    assert read_captions(tmp_path / "lines.jsonl") == texts
    (tmp_path / "lines.jsonl").write_text("\n\n".join([*lines, "{"]), "utf-8")
    with pytest.raises(ValueError, match=r"lines\.jsonl, line 5' is no usable JSON"):
        read_captions(tmp_path / "lines.jsonl")
    (tmp_path / "sheet.csv").write_text("file_name,text\na.png,für\n", "utf-8-sig")  # as spreadsheets save it
    assert read_captions(tmp_path / "sheet.csv") == {"a.png": ["für"]}
    (tmp_path / "sheet.csv").write_text("file_name,text\na.png,für\n", "latin-1")
    with pytest.raises(ValueError, match=r"sheet\.csv' is no text in UTF-8"):
        read_captions(tmp_path / "sheet.csv")


def test_of_several_captions_blank_ones_are_left_out(folder: Path, tmp_path: Path):
    lines = [json.dumps({"file_name": name, "text": [" ", texts[0], ""]}) for name, texts in TEXTS.items()]
    (folder / "blank.jsonl").write_text("\n".join(lines))
    found = pairs(module(folder, captions="blank.jsonl"))
    assert sorted(found) == [(number, f"picture {number}") for number in range(12)]
    plan = ShardPlan.of(folder, captions=folder / "blank.jsonl")
    assert plan.captions == "txt"


def test_shards_from_the_shell_hold_the_captions(folder: Path, tmp_path: Path):
    plan = ShardPlan.of(folder, captions=folder / "metadata.jsonl", shuffle=False, images_per_shard=5)
    assert plan.captions == "text"
    pack(plan, tmp_path / "shards")
    found = pairs(module(tmp_path / "shards", captions="text"))
    assert dict(found) == dict(pairs(module(folder)))
    one = folder / "one.jsonl"
    one.write_text("\n".join(json.dumps({"file_name": name, "text": texts[0]}) for name, texts in TEXTS.items()))
    plan = ShardPlan.of(folder, captions=one, shuffle=False, images_per_shard=5)
    assert plan.captions == "txt"
    pack(plan, tmp_path / "txt")
    with tarfile.open(tmp_path / "txt" / "shard-000000.tar") as tar:
        assert tar.extractfile("00000000.txt").read() == b"picture 0"
    found = pairs(module(tmp_path / "txt", captions="txt"))
    assert sorted(found) == [(number, f"picture {number}") for number in range(12)]
    # The index beside a shard is of txt files: asked for another layout, the shards are searched, and hold none.
    with pytest.raises(ValueError, match=r"00000000 has no caption: data.captions=text wants a .json file"):
        pairs(module(tmp_path / "txt", captions="text"))
    for index in (tmp_path / "txt").glob("*.json"):
        index.unlink()
    assert pairs(module(tmp_path / "txt", captions="txt", index_folder=str(tmp_path / "kept"))) == found
    assert pairs(module(tmp_path / "txt", captions="txt", index_folder=str(tmp_path / "kept"))) == found


def png(number: int) -> bytes:
    file = io.BytesIO()
    draw(number).save(file, format="PNG")
    return file.getvalue()


def test_pictures_without_caption_are_refused(folder: Path, tmp_path: Path):
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in list(TEXTS)[1:]]
    (folder / "short.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"1 of 12 images have no caption in .*'0.png' for one"):
        pairs(module(folder, captions="short.jsonl"))
    with pytest.raises(ValueError, match=r"1 of 12 images have no caption"):
        ShardPlan.of(folder, captions=folder / "short.jsonl")
    with pytest.raises(FileNotFoundError, match=r"data.captions: .*no.jsonl' does not exist"):
        pairs(module(folder, captions="no.jsonl"))
    (folder / "odd.jsonl").write_text('{"file_name": "0.png", "says": "x"}')
    with pytest.raises(ValueError, match=r"row 1 needs 'file_name' and 'text'"):
        pairs(module(folder, captions="odd.jsonl"))
    # One that is there and empty counts as an unreadable file: the next one takes its place, or there are too many.
    shards = tmp_path / "made"
    shards.mkdir()
    files = {f"{n:02d}.{kind}": png(n) if kind == "png" else b"a text" for n in range(8) for kind in ("png", "txt")}
    tar_of(shards / "a.tar", {**files, "03.txt": b" "})
    found = pairs(module(shards, captions="txt", max_bad_share=0.2))
    assert sorted(number for number, _ in found) == [0, 1, 2, 4, 4, 5, 6, 7]
    with pytest.raises(BrokenFilesError, match=r"at least 1 of 8 files cannot be read.*a.tar:03"):
        pairs(module(shards, captions="txt"))


def test_json_files_of_elsewhere(tmp_path: Path):
    shards = tmp_path / "made"
    shards.mkdir()
    said = [{"caption": f"picture {n}", "label": 7} if n else {"caption": ["picture 0"]} for n in range(4)]
    files = {f"{n:02d}.png": png(n) for n in range(4)} | {
        f"{n:02d}.json": json.dumps(said[n]).encode() for n in range(4)
    }
    tar_of(shards / "a.tar", files)
    found = pairs(module(shards, captions="caption"))
    assert sorted(found) == [(number, f"picture {number}") for number in range(4)]


def test_a_run_that_is_continued_sees_the_captions_it_had_not_seen(folder: Path):
    data = module(folder)
    data.setup("fit")
    whole = [batch["caption"] for batch in data.train_dataloader()]
    again = module(folder)
    again.setup("fit")
    loader = again.train_dataloader()
    again._train_batches.position = lambda: (0, 1)
    assert [batch["caption"] for batch in loader] == whole[1:]


# --- scenes of pictograms -----------------------------------------------------------------------------------------


def test_captions_of_scenes_say_what_is_drawn():
    assert len(things()) >= 60
    scene = Scene("tiger", "to the left of", "umbrella", "blue")
    assert scene.caption == "a tiger to the left of an umbrella on a blue background"
    assert read_caption(scene.caption) == scene
    assert scene.swapped.caption == "an umbrella to the left of a tiger on a blue background"
    for name in things():
        other = Scene(name, "above", "tiger" if name != "tiger" else "owl", "gray")
        assert read_caption(other.caption) == other
    with pytest.raises(ValueError, match="'a tiger' is no scene of two pictograms"):
        read_caption("a tiger")
    with pytest.raises(ValueError, match="is no scene"):
        read_caption("a dragon above an owl on a blue background")


def test_swapped_things_swap_the_picture():
    scene = Scene("tiger", "to the left of", "umbrella", "blue")
    left, right = np.split(draw_scene(scene, 48), 2, axis=1)
    other_left, other_right = np.split(draw_scene(scene.swapped, 48), 2, axis=1)
    assert (left == other_right).all()
    assert (right == other_left).all()
    assert (draw_scene(scene, 48)[0, 0] == BACKGROUNDS["blue"]).all()


def test_held_out_triples_are_never_trained_on():
    data = PicturesDataModule(batch_size=50, train_images=600, val_images=200, image_size=16)
    data.setup("fit")

    def triples(loader) -> set[tuple[str, ...]]:
        return {read_caption(caption)[:3] for batch in loader for caption in batch["caption"]}

    trained, held_out = triples(data.train_dataloader()), triples(data.val_dataloader())
    assert len(trained) > 550
    assert len(held_out) > 150
    assert not trained & held_out
    pairs_ = [(a, b) for a in list(things())[:20] for b in list(things())[:20] if a != b]
    share = np.mean([Scene(a, relation, b, "").held_out for a, b in pairs_ for relation in ("above", "to the left of")])
    assert abs(share - 0.1) < 0.04  # of 760, with a standard deviation of 0.011
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["image"], next(iter(data.train_dataloader()))["image"])
