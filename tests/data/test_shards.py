"""Tar shards: the same samples, batches and answers as from a folder."""

from __future__ import annotations

import functools
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from rae.data import ImageFolder, ImageTransform, ShardsDataModule, TarShards, storage
from rae.data.packing.pack import ShardPlan, pack

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
    assert shards.labels.tolist() == folder.labels.tolist()
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
    assert (TarShards(str(data / "shards"), TRANSFORM, index_path=index).places == first.places).all()
    assert index.stat().st_mtime_ns == written
    whole = index.read_bytes()
    index.write_text(json.dumps({**json.loads(whole), "index": None}))  # damaged
    assert len(TarShards(str(data / "shards"), TRANSFORM, index_path=index)) == 9
    assert index.read_bytes() == whole
    (data / "shards" / "train-0002.tar").unlink()
    assert len(TarShards(str(data / "shards"), TRANSFORM, index_path=index)) == 8


def test_faults_are_named(data):
    with pytest.raises(FileNotFoundError, match=r"no shard .*train-0003\.tar"):
        TarShards(str(data / "shards" / "train-{0000..0003}.tar"), TRANSFORM)
    with pytest.raises(FileNotFoundError, match="give a folder of .tar files"):  # noqa: RUF043
        TarShards(str(data / "folder"), TRANSFORM)
    with pytest.raises(ValueError, match=r"'gopher://x/y\.json' cannot be opened: Protocol not known"):
        TarShards("gopher://x/y.tar", TRANSFORM)
    with pytest.raises(ValueError, match=r"data\.train_path=.*\.tar"):
        ShardsDataModule()
    with pytest.raises(ValueError, match=r"holds label 2, but data.num_classes is 2; set data.num_classes=3"):
        ShardsDataModule(str(data / "shards"), num_workers=0, num_classes=2).setup("fit")
    with webdataset.TarWriter(str(data / "plain.tar")) as writer:
        writer.write({"__key__": "a", "png": (data / "folder" / "0" / "0.png").read_bytes()})
    with pytest.raises(ValueError, match=r"plain\.tar:a has no label .* data\.unlabelled=true"):
        TarShards(str(data / "plain.tar"), TRANSFORM)
    assert TarShards(str(data / "plain.tar"), TRANSFORM, unlabelled=True).labels.tolist() == [0]
    (data / "bad.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"bad\.tar' cannot be indexed"):
        TarShards(str(data / "bad.tar"), TRANSFORM)


def test_classes_that_were_packed_under_other_numbers_are_refused(data):
    (data / "part" / "1").mkdir(parents=True)
    (data / "part" / "1" / "3.png").write_bytes((data / "folder" / "1" / "3.png").read_bytes())
    for name in ("folder", "part"):
        pack(ShardPlan.of(data / name), data / f"packed-{name}")
    paths = [str(data / "packed-folder"), str(data / "packed-part")]
    with pytest.raises(
        ValueError, match=r"class '1' is number 0 in data\.val_path=.*, but number 1 in data\.train_path"
    ):
        ShardsDataModule(*paths, batch_size=2, num_workers=0, num_classes=3).setup("fit")
    ShardsDataModule(paths[0], str(data / "shards"), batch_size=2, num_workers=0, num_classes=3).setup("fit")


# --- on the network ----------------------------------------------------------------------------------------------


class RangeServer(BaseHTTPRequestHandler):
    """Serves a folder's files with byte ranges, as object stores do; fails where it is told to."""

    def __init__(self, *arguments, folder, state):
        self.folder, self.state = folder, state
        super().__init__(*arguments)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.folder / self.path.lstrip("/")
        wanted = self.headers.get("Range")
        if self.state["failures"] and wanted:
            self.state["failures"] -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if wanted and self.state["ranges"]:
            start, end = wanted.removeprefix("bytes=").split("-")
            first, last = int(start), min(int(end or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if body:
            self.state["bytes"].append(last - first + 1)  # before the reader has them: it may look at once
            self.wfile.write(content[first : last + 1])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(data, monkeypatch):
    """Address of the data's folder, and what the server does and did."""
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.01)
    state = {"failures": 0, "bytes": [], "ranges": True}
    handler = functools.partial(RangeServer, folder=data, state=state)
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", state
    running.shutdown()


def batches_of(path, workers=0, **options):
    module = ShardsDataModule(path, batch_size=4, num_workers=workers, image_size=16, num_classes=3, **options)
    return list(module.train_dataloader())


def same(batches, others):
    return all(torch.equal(a[key], b[key]) for a, b in zip(batches, others, strict=True) for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_on_a_server_give_the_same_batches(data, server, workers):
    address, _ = server
    local = batches_of(str(data / "shards"))
    assert same(batches_of(f"{address}/shards/train-{{0000..0002}}.tar", workers), local)
    pack(ShardPlan.of(data / "folder", images_per_shard=4, shuffle=False), data / "packed")
    assert same(batches_of(f"{address}/packed", workers), local)


def test_of_shards_on_a_server_only_what_is_needed_is_read(data, server):
    address, state = server
    pack(ShardPlan.of(data / "folder", images_per_shard=4), data / "packed")
    shards = TarShards(f"{address}/packed", TRANSFORM)
    before = sum(state["bytes"])
    shards.load_many([3, 0, 7], [0, 0, 0])
    assert sum(state["bytes"]) - before == shards.places[[3, 0, 7], 1].sum()


@pytest.mark.slow
def test_a_server_that_fails_now_and_then_is_asked_again(data, server):
    address, state = server
    shards = TarShards(f"{address}/shards/train-0000.tar", TRANSFORM)
    expected = TarShards(str(data / "shards" / "train-0000.tar"), TRANSFORM)[2]["image"]
    state["failures"] = 3
    assert torch.equal(shards[2]["image"], expected)
    assert state["failures"] == 0
    state["failures"] = 100
    with pytest.raises(storage.UnreachableError, match=r"train-0000\.tar cannot be read after 10 attempts: .*503"):
        shards[2]  # an outage is no broken image: no other one takes its place


def test_servers_without_ranges_or_lists_are_named(data, server):
    address, state = server
    shards = TarShards(f"{address}/shards/train-0000.tar", TRANSFORM)
    state["ranges"] = False
    with pytest.raises(storage.UnreachableError, match="the server must know range requests"):
        shards[2]
    with pytest.raises(FileNotFoundError, match=r"no index\.json at .*/shards', by which rae-shard lists"):
        TarShards(f"{address}/shards", TRANSFORM)
    with pytest.raises(FileNotFoundError, match=r"/train-0009\.tar cannot be found: check the address"):
        TarShards(f"{address}/shards/train-0009.tar", TRANSFORM)
    for other in ("[]", "{}", '{"shards": [3]}'):
        (data / "shards" / "index.json").write_text(other)
        with pytest.raises(ValueError, match=r"/shards/index\.json' lists no shards as rae-shard does; name them"):
            TarShards(f"{address}/shards", TRANSFORM)


@pytest.mark.slow
def test_shards_in_s3(data, monkeypatch):
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    running = ThreadedMotoServer(port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        for key, value in {
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setitem(os.environ, key, value)
        S3FileSystem.clear_instance_cache()
        pack(ShardPlan.of(data / "folder", images_per_shard=4, shuffle=False), data / "packed")
        bucket = S3FileSystem()
        bucket.mkdir("images")
        bucket.put(str(data / "packed"), "images/", recursive=True)
        local = batches_of(str(data / "shards"))
        for workers in (0, 2):
            assert same(batches_of("s3://images/packed", workers), local)
            assert same(batches_of("s3://images/packed/shard-{000000..000002}.tar", workers), local)
    finally:
        S3FileSystem.clear_instance_cache()
        running.stop()
