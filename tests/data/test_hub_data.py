"""Hugging Face data sets: the same samples, batches and answers as from a folder, and one clear error each for what does not go."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from huggingface_hub import errors
from PIL import Image
from pyarrow import parquet

from rae.cli.checks import check_files
from rae.cli.errors import compose
from rae.cli.schema import check_values
from rae.commands.cache_latents import cache_latents
from rae.commands.stats import stats
from rae.data import CachedLatents, ImageFolder, ImageFolderDataModule, ImageTransform, storage
from rae.data.hub import HubDataModule, HubImages
from rae.data.loader import BrokenFilesError
from rae.data.splits import files_of, find_tables
from rae.data.tables import Tables
from rae.io import hub
from rae.io.errors import ConfigError
from tests.data.test_data import Recorder, SaveEverywhere, by_key, trainer
from tests.helpers.small_images import ENCODER
from tests.training.test_kill import differences, finish, start

TRANSFORM = ImageTransform(16, "center_crop")
NAMES = ["cat", "dog", "owl"]
KINDS = ("parquet", "arrow", "saved", "feather")
ROOT = Path(__file__).parents[2]


def rows_of(folder: Path) -> list[dict]:
    paths = sorted(folder.rglob("*.png"))
    return [
        {
            "image": {"bytes": path.read_bytes(), "path": path.name},
            "label": NAMES.index(path.parent.name),
            "short": f"a {path.parent.name}",
            "long": f"a long caption of {path.stem}",
            "many": ["one", "two"],
        }
        for path in paths
    ]


def dataset_of(rows: list[dict]) -> datasets.Dataset:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=NAMES),
            "short": datasets.Value("string"),
            "long": datasets.Value("string"),
            "many": datasets.List(datasets.Value("string")),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


def write(kind: str, rows: list[dict], folder: Path, split: str = "train") -> Path:
    """Rows as a data set: two Parquet files of small row groups, two Arrow streams, what save_to_disk writes, or an Arrow file."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = dataset_of(rows)
    if kind == "saved":
        datasets.DatasetDict({split: whole}).save_to_disk(folder, num_shards={split: 2})
        return folder
    for number in range(2):
        part = whole.shard(2, number, contiguous=True).with_format("arrow")
        stem = folder / "data" / f"{split}-{number:05d}-of-00002"
        stem.parent.mkdir(exist_ok=True)
        if kind == "parquet":
            part.to_parquet(f"{stem}.parquet", batch_size=2)
        else:
            table = part[:]
            make = pa.ipc.new_stream if kind == "arrow" else pa.ipc.new_file
            with make(f"{stem}.arrow", table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes of four images."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for number in range(12):
        path = root / NAMES[number // 4] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (18, 20, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def sets(images, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    return {kind: write(kind, rows_of(images), root / kind) for kind in KINDS}


def module(path, **options) -> HubDataModule:
    return HubDataModule(
        str(path), **{"batch_size": 2, "num_workers": 0, "image_size": 16, "num_classes": 3, **options}
    )


def images_of(path, **options) -> HubImages:
    return HubImages(find_tables(str(path), "train", None, None, False), TRANSFORM, **options)


# --- the same as a folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_hold_what_the_folder_holds(kind, sets, images):
    found, folder = images_of(sets[kind], num_classes=3), ImageFolder(images, TRANSFORM)
    assert len(found) == 12
    assert found.class_names == NAMES == folder.classes
    assert [found.label(position) for position in range(12)] == folder.labels.tolist()
    assert all(torch.equal(found[position]["image"], folder[position]["image"]) for position in (11, 0, 5, 3, 6))
    assert found.name(7).endswith((":1",) if kind != "saved" else (":1", ":7"))


def test_parquet_files_have_several_groups(sets):
    """Else the tests would not show that rows of different groups are told apart."""
    for kind in ("parquet", "arrow", "feather"):
        tables = Tables(find_tables(str(sets[kind]), "train", None, None, False))
        assert [count for _, count in tables.facts] == [6, 6]
        assert len(tables._ends) == 6


def test_a_file_may_be_closed_by_another_thread_while_it_is_opened(sets):
    """Threads read several files on the network at once, of which a process keeps no more than some open."""

    class Emptied(OrderedDict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    tables = Tables(find_tables(str(sets["parquet"]), "train", None, None, False))
    expected = tables.rows(range(12), ["label"])
    tables._open = Emptied()
    assert tables.rows(range(12), ["label"]) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_order_and_augmentation_are_those_of_the_folder(kind, workers, sets, images):
    options = {"mode": "random_crop", "flip": True, "num_workers": workers}
    folder = ImageFolderDataModule(str(images), batch_size=2, image_size=16, num_classes=3, **options)
    ours, theirs = (list(data.train_dataloader()) for data in (module(sets[kind], **options), folder))
    assert len(ours) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_a_run_continues_in_the_middle_of_an_epoch(sets, images, tmp_path):
    save, whole, folder = SaveEverywhere(tmp_path), Recorder(), Recorder()
    trainer(tmp_path, [save], max_steps=10).fit(whole, datamodule=module(sets["parquet"]))
    same = ImageFolderDataModule(str(images), batch_size=2, num_workers=0, image_size=16, num_classes=3)
    trainer(tmp_path, max_steps=10).fit(folder, datamodule=same)
    assert whole.batches == folder.batches
    for _, done, path in [save.saved[number] for number in (1, 4, 8)]:
        rest = Recorder()
        again = module(sets["arrow"])  # the same rows in other files
        trainer(tmp_path, max_steps=10).fit(rest, datamodule=again, ckpt_path=path, weights_only=True)
        assert rest.batches == whole.batches[done:]


def test_every_process_takes_its_share(sets, images):
    """Order and partition are the sampler's, which sees the same number of samples."""
    ours, folder = images_of(sets["arrow"]), ImageFolder(images, TRANSFORM)
    keys = list(range(12))
    seeds = list(range(12))
    for share in (slice(0, None, 2), slice(1, None, 2)):
        one, other = (data.load_many(keys[share], seeds[share]) for data in (ours, folder))
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))


def test_captions_of_one_column_or_several(sets):
    single = by_key_captions(module(sets["parquet"], captions="short"))
    assert single[5] == "a dog"
    drawn = by_key_captions(module(sets["arrow"], captions=["short", "long"]))
    kinds = {caption.startswith("a long") for caption in drawn.values()}
    assert kinds == {True, False}
    assert drawn == by_key_captions(module(sets["parquet"], captions=["short", "long"], num_workers=2))
    assert module(sets["arrow"], captions="long").first_captions("train", 2) == [
        "a long caption of 00",
        "a long caption of 01",
    ]


def by_key_captions(data) -> dict[int, str]:
    return {
        index: caption
        for batch in data.train_dataloader()
        for index, caption in zip(batch["index"].tolist(), batch["caption"], strict=True)
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_replaced_as_in_a_folder(workers, images, tmp_path):
    rows = rows_of(images)
    rows[1]["image"]["bytes"] = b"no image"
    rows[11]["image"] = None
    data = module(write("parquet", rows, tmp_path), num_workers=workers, max_bad_share=0.2, flip=False)
    found = by_key(data.train_dataloader())
    assert torch.equal(found[0, 1], found[0, 2])
    assert torch.equal(found[0, 11], found[0, 0])
    strict = module(tmp_path, num_workers=workers)
    with pytest.raises(BrokenFilesError, match=r"of 12 files cannot be read.*data.max_bad_share=0.01"):
        by_key(strict.train_dataloader())


def test_a_damaged_row_group_breaks_its_rows_alone(sets, images, tmp_path):
    path = write("parquet", rows_of(images), tmp_path) / "data" / "train-00000-of-00002.parquet"
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    content[first : first + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(bytes(content))
    found = by_key(module(tmp_path, max_bad_share=0.3, flip=False).train_dataloader())
    whole = by_key(module(sets["parquet"], flip=False).train_dataloader())
    for (epoch, index), image in found.items():
        assert torch.equal(image, whole[epoch, 4 if index in (2, 3) else index])


def test_other_columns_and_splits(images, tmp_path):
    rows = rows_of(images)
    plain = pa.table({"jpg": [row["image"]["bytes"] for row in rows], "cls": [row["label"] for row in rows]})
    parquet.write_table(plain, tmp_path / "photos.parquet", row_group_size=5)
    data = module(tmp_path, image_column="jpg", label_column="cls")
    folder = by_key(ImageFolderDataModule(str(images), batch_size=2, num_workers=0, image_size=16).train_dataloader())
    assert all(torch.equal(image, folder[key]) for key, image in by_key(data.train_dataloader()).items())
    assert data.class_names == []
    unlabelled = module(tmp_path, image_column="jpg", unlabelled=True, num_classes=1)
    assert all((batch["label"] == 0).all() for batch in unlabelled.train_dataloader())
    both = write("saved", rows, tmp_path / "both")
    assert module(both).val_dataset() is None
    write("parquet", rows, tmp_path / "splits")
    write("parquet", rows[:5], tmp_path / "splits", "validation")
    data = module(tmp_path / "splits", val_split="validation")
    assert (data.samples("train"), data.samples("val")) == (12, 5)


# --- which files ---------------------------------------------------------------------------------------------------


def test_files_of_a_split_are_found_by_name_or_as_the_card_says():
    imagenet = [f"data/{split}-{n:05d}-of-00003.parquet" for split in ("train", "validation", "test") for n in range(3)]
    assert files_of(["README.md", *imagenet], {}, "validation", None, "x") == imagenet[3:6]
    assert files_of(["a/b.parquet", "c.arrow"], {}, "train", None, "x") == ["a/b.parquet", "c.arrow"]
    assert files_of(["x-dev.parquet", "x-training.parquet"], {}, "validation", None, "x") == ["x-dev.parquet"]
    assert files_of(["en/train.parquet", "de/train.parquet"], {}, "train", "de", "x") == ["de/train.parquet"]
    card = {
        "configs": [
            {"config_name": "small", "data_files": [{"split": "train", "path": ["s/*.parquet", "t/**/one.parquet"]}]},
            {"config_name": "large", "data_files": "l/**"},
        ]
    }
    names = ["s/a.parquet", "s/deep/a.parquet", "t/x/y/one.parquet", "t/one.parquet", "l/x/b.parquet", "l/c.txt"]
    assert files_of(names, card, "train", "small", "x") == ["s/a.parquet", "t/one.parquet", "t/x/y/one.parquet"]
    assert files_of(names, card, "train", "large", "x") == ["l/x/b.parquet"]
    with pytest.raises(FileNotFoundError, match=r"configurations small, large: choose one with data.config_name$"):
        files_of(names, card, "train", None, "x")
    with pytest.raises(FileNotFoundError, match="no split 'test'; it has train"):
        files_of(names, card, "test", "small", "x")
    with pytest.raises(FileNotFoundError, match=r"no files of split 'test'; it holds data/train"):
        files_of(imagenet[:3], {}, "test", None, "x")
    with pytest.raises(ValueError, match=r"holds 2 of the 3 files data/train-…-of-00003: get the others"):
        files_of(imagenet[:2], {}, "train", None, "x")


# --- what does not go ----------------------------------------------------------------------------------------------


def test_faults_are_named(sets, images, tmp_path):
    path = sets["parquet"]
    for options, said in (
        (
            {"label_column": "cls"},
            r"data.label_column=cls: .*has no such column; it has image, label, short, long, many",
        ),
        ({"image_column": "jpg"}, r"data.image_column=jpg: .* has no such column"),
        ({"captions": "many"}, r"data.captions=many: the column holds list<.*>.*, not captions, one text in a row"),
        ({"image_column": "label"}, r"data.image_column=label: the column holds int64.*, not image files, as bytes"),
        ({"label_column": "short"}, r"data.label_column=short: the column holds string.*, not classes"),
        ({"num_classes": 2}, r"column 'label' has 3 classes, but data.num_classes is 2; set data.num_classes=3"),
    ):
        with pytest.raises(ValueError, match=said):
            module(path, **options).setup("fit")
    with pytest.raises(ValueError, match=r"data.repo is not given; add data.repo=owner/name"):
        HubDataModule()
    with pytest.raises(FileNotFoundError, match=r"has no split 'validation'; it has train"):
        module(sets["saved"], val_split="validation").setup("fit")
    for listed in ("[]", "[3]", '{"a": 1}'):
        (tmp_path / "state.json").write_text(f'{{"_data_files": {listed}}}')
        with pytest.raises(ValueError, match=r"state\.json' is not what save_to_disk writes: it lists no _data_files"):
            module(tmp_path).setup("fit")
    (tmp_path / "state.json").unlink()
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(ValueError, match=r"the head of .*README\.md' is no YAML"):
        module(tmp_path).setup("fit")
    (tmp_path / "README.md").unlink()
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(ValueError, match=r"train.parquet' is no whole Parquet or Arrow file .*get it anew"):
        module(tmp_path).setup("fit")
    rows = rows_of(images)
    bare = pa.table({"image": [row["image"]["bytes"] for row in rows], "label": [0, 1, None, *[5] * 9]})
    parquet.write_table(bare, tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet:2 has no class: 'label' is None; set data.unlabelled=true"):
        by_key(module(tmp_path, num_workers=2).range_dataloader("train", [range(4)]))
    with pytest.raises(ValueError, match=r"is of class 5, but data.num_classes is 3; set data.num_classes=6"):
        by_key(module(tmp_path).range_dataloader("train", [range(4, 6)]))
    other = tmp_path / "other"
    other.mkdir()
    parquet.write_table(bare, other / "a.parquet")
    parquet.write_table(bare.set_column(1, "label", [pa.array(["x"] * 12)]), other / "b.parquet")
    with pytest.raises(ValueError, match=r"holds string in .*b.parquet', but int64 in .*a.parquet'"):
        module(other).setup("fit")


def hub_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    import httpx

    return kind("401", response=httpx.Response(401, request=httpx.Request("GET", "http://x")))


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (hub_error(errors.GatedRepoError), "is gated: ask for access at .*/datasets/a/b, then log in with `hf auth login`"),
        (hub_error(errors.RepositoryNotFoundError), "is neither a folder here nor a data set on the hub"),
        (hub_error(errors.RevisionNotFoundError), "has no revision 'v2': give a branch, tag or commit"),
        (OSError("no route"), r"is no folder here, .* and the hub cannot be reached \(OSError: no route\)"),
    ],
    ids=["gated", "missing", "revision", "offline"],
)  # fmt: skip
def test_what_the_hub_refuses_is_said_in_one_sentence(problem, said, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise problem

    monkeypatch.setattr(hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=rf"data.repo=a/b {said}"):
        find_tables("a/b", "train", None, "v2", False)


# --- on the network ------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as serves one data set, a/b, whose files lie in a folder, and of a gated one, a/gated."""

    def __init__(self, *arguments, folder, state):
        self.folder, self.state = folder, state
        super().__init__(*arguments)

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        self.answer(json.dumps([self.entry(self.folder / name) for name in wanted.get("paths", [])]).encode())

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        names = sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())
        if "a/gated" in path and not path.startswith("/api/datasets/a/gated/revision"):
            if path == "/api/datasets/a/gated":
                self.answer(json.dumps({"id": "a/gated", "sha": "c" * 40, "gated": "auto", "siblings": []}).encode())
            else:
                self.answer(b"", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for access"})
        elif path in ("/api/datasets/a/b", f"/api/datasets/a/b/revision/{'c' * 40}", "/api/datasets/a/b/revision/main"):
            siblings = [{"rfilename": name} for name in names]
            self.answer(json.dumps({"id": "a/b", "sha": "c" * 40, "siblings": siblings}).encode())
        elif "/tree/" in path:
            below = self.folder / path.partition("/tree/")[2].partition("/")[2]
            found = (
                below.rglob("*") if "recursive=True" in self.path or "recursive=true" in self.path else below.iterdir()
            )
            self.answer(json.dumps([self.entry(file) for file in sorted(found)]).encode())
        elif "/resolve/" in path:
            self.file(self.folder / path.partition("/resolve/")[2].partition("/")[2], body)
        else:
            self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})

    def entry(self, file):
        kind = {"type": "directory"} if file.is_dir() else {"type": "file", "size": file.stat().st_size}
        return {**kind, "path": file.relative_to(self.folder).as_posix(), "oid": "0" * 40}

    def file(self, file, body):
        content = file.read_bytes()
        tag = hashlib.sha256(content).hexdigest()
        wanted, status, headers = self.headers.get("Range"), 200, {"ETag": f'"{tag}"', "X-Repo-Commit": "c" * 40}
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        if body:
            self.state["bytes"] += len(content)
        self.answer(content, status, {**headers, "Accept-Ranges": "bytes"}, body)

    def answer(self, content, status=200, headers=(), body=True):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(sets, monkeypatch):
    """Address of the hub, and how many bytes of files it gave."""
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.01)
    state = {"bytes": 0}
    handler = functools.partial(Hub, folder=sets["parquet"], state=state)
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", state
    running.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_parquet_files_are_read_by_range_requests(workers, server, sets):
    address, state = server
    files = [f"{address}/resolve/x/data/train-{number:05d}-of-00002.parquet" for number in range(2)]
    far, near = HubImages(files, TRANSFORM), images_of(sets["parquet"])
    before = state["bytes"]
    group = parquet.ParquetFile(sets["parquet"] / "data" / "train-00000-of-00002.parquet").metadata.row_group(0)
    assert torch.equal(far[1]["image"], near[1]["image"])
    assert 0 < state["bytes"] - before <= group.total_byte_size + 2048  # one row group, and no more
    data = module("unused", num_workers=workers)
    data.train_dataset = lambda: far
    local = by_key(module(sets["parquet"], flip=False).train_dataloader())
    found = by_key(data.train_dataloader())
    data.teardown("fit")
    assert all(torch.equal(image, local[key]) for key, image in found.items())


def test_a_file_that_is_away_ends_the_run_and_is_no_broken_image(server, monkeypatch):
    address, _ = server
    files = [f"{address}/resolve/x/data/train-{number:05d}-of-00002.parquet" for number in range(2)]
    far = HubImages(files, TRANSFORM)
    far[0]
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)
    monkeypatch.setattr(Hub, "file", lambda self, *_: self.answer(b"", 503))
    with pytest.raises(storage.UnreachableError, match=r"cannot be read after 2 attempts: .*503"):
        far[4]
    with pytest.raises(storage.UnreachableError, match=r"train-00001-of-00002.parquet cannot be opened"):
        far.load_many([7, 8], [0, 0])


PROGRAM = """
import sys, torch
from rae.data.hub import HubDataModule
from rae.data.splits import find_tables
options = dict(batch_size=2, num_workers=0, image_size=16, num_classes=3)
local, far, near = (HubDataModule(repo, stream=stream, **options) for repo, stream in (
    (sys.argv[1], False), ("a/b", True), ("a/b", False)))
batches = [list(data.train_dataloader()) for data in (local, far, near)]
for one, two, three in zip(*batches, strict=True):
    assert torch.equal(one["image"], two["image"]) and torch.equal(one["image"], three["image"])
assert far.train_dataset().tables.files[0].startswith("hf://datasets/a/b@" + "c" * 40 + "/data/train-00000")
for repo in ("a/gated", "a/none"):
    try:
        find_tables(repo, "train", None, None, False)
    except FileNotFoundError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_hub_on_this_machine_gives_the_same_batches(server, sets, tmp_path):
    address, _ = server
    variables = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    variables["HF_HUB_OFFLINE"] = "0"
    command = [sys.executable, "-c", PROGRAM, str(sets["parquet"])]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    gated, missing = done.stdout.splitlines()
    assert "data.repo=a/gated is gated: ask for access" in gated
    assert "data.repo=a/none is neither a folder here nor a data set on the hub" in missing
    offline = {**variables, "HF_HUB_OFFLINE": "1"}
    again = "from rae.data.splits import find_tables; print(len(find_tables('a/b', 'train', None, None, False)))"
    done = subprocess.run([sys.executable, "-c", again], env=offline, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr[-3000:]


# --- training ------------------------------------------------------------------------------------------------------

SMALL = [
    *("experiment=digits_stage2", "data=hub", "data.num_classes=10", "data.num_workers=1", "data.batch_size=16"),
    *("trainer.max_steps=14", "callbacks.checkpoint.every_n_steps=4", "trainer.val_check_interval=7"),
    *("trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "+encoder.pretrained=false", "encoder.checkpoint=null"),
    *("decoder.width=32", "decoder.depth=1", "decoder.mlp_width=64", "latent.stats=none", "decoder_checkpoint=null"),
    *("denoiser.width=32", "denoiser.depth=1", "denoiser.head_width=64", "scheduler.warmup_steps=3", "sampler.grid.points=4"),
    *("callbacks.preview.classes=2", "callbacks.preview.per_class=2", "data.val_split=validation"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_killed_run_goes_on_bitwise(kind, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(96):
        path = tmp_path / NAMES[number % 3] / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    rows = rows_of(tmp_path)
    if kind == "saved":
        both = datasets.DatasetDict({"train": dataset_of(rows), "validation": dataset_of(rows[:20])})
        both.save_to_disk(tmp_path / "set")
    else:
        write(kind, rows, tmp_path / "set")
        write(kind, rows[:20], tmp_path / "set", "validation")
    overrides = [*SMALL, f"data.repo={tmp_path}/set"]
    finish(start([*overrides, f"output_dir={tmp_path}/whole"]), killed=False)
    killed = [*overrides, f"output_dir={tmp_path}/killed"]
    for kill in ("step:7", "save:12"):
        finish(start(killed, kill), killed=True)
    assert "continuing from step" in finish(start(killed), killed=False)
    first, second = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    for checkpoint in (first, second):
        del checkpoint["config"]
    assert first["global_step"] == 14
    assert not differences(first, second)


def test_commands_read_it_as_any_other_images(images, sets, tmp_path):
    options = [*ENCODER, "data.batch_size=4", "data.num_workers=0", "data.num_classes=3", "part_size=5"]
    kinds = {
        "folder": ["data=imagenet", f"data.train_path={images}"],
        "hub": ["data=hub", f"data.repo={sets['parquet']}"],
    }
    found = {}
    for kind, data in kinds.items():
        for command, work in (("stats", stats), ("cache_latents", cache_latents)):
            work(compose(command, [*options, *data, f"output_dir={tmp_path}/{kind}/{command}"]))
        cached = CachedLatents(tmp_path / kind / "cache_latents" / "train", flip=True)
        assert cached.index["class_names"] == NAMES
        found[kind] = [cached[number] for number in range(12)]
        found[kind, "stats"] = torch.load(tmp_path / kind / "stats" / "stat.pt", weights_only=True)
    for one, other in zip(found["folder"], found["hub"], strict=True):
        assert torch.equal(one["latent"], other["latent"])
        assert one["label"] == other["label"]
    assert all(torch.equal(value, found["hub", "stats"][key]) for key, value in found["folder", "stats"].items())


def test_a_data_set_that_is_not_named_is_asked_for():
    cfg = compose("train", ["stage=1", "data=hub_crops", "data.captions=[x,y]"])
    check_values(cfg, "train")
    with pytest.raises(ConfigError, match=r"data.repo is not given; add data.repo=owner/name"):
        check_files(cfg, "train")
