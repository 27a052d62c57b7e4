"""Pictures and tables to look at: what ends a sweep, nearest images, captions."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from rae.image import make_grid
from rae.metric import CallableDetector, GenerationMetrics, MetricSet, ReferenceBuilder
from rae.report.neighbours import Nearest, feature_function
from rae.report.sweep import Job, list_jobs, plot, summarise, swept
from rae.report.table import markdown, table


def test_the_end_of_a_sweep(tmp_path):
    jobs = []
    for sampler in ("euler", "heun"):
        for scale in ("1", "1.42"):
            folder = tmp_path / f"{sampler}{scale}"
            folder.mkdir()
            content = {"scores": {"fid": float(scale) + len(sampler), "samples": 8.0}, "identity": {}}
            (folder / "scores.json").write_text(json.dumps(content))
            jobs.append(Job(["checkpoint=x", f"guidance.scale={scale}", f"sampler={sampler}"], folder, failed=False))
    jobs.append(Job(["checkpoint=x", "guidance.scale=9", "sampler=heun"], tmp_path / "none", failed=True))
    assert swept(jobs)[1] == {"guidance.scale": 1.42, "sampler": "euler"}
    summarise(jobs)
    with (tmp_path / "sweep.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["guidance.scale"], row["sampler"], row["fid"]) for row in rows][1] == ("1.42", "euler", "6.42")
    assert len(rows) == 4
    with Image.open(tmp_path / "sweep.png") as picture:
        assert (
            len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20
        )  # axes, two colours of lines
    assert markdown([{"a": 1.0, "b": "x"}]).splitlines() == ["| a | b |", "| --- | --- |", "| 1 | x |"]
    plot([{"sampler": "euler", "fid": 1.0}, {"sampler": "heun", "fid": 2.0}], ["sampler"], tmp_path / "names.png")
    assert (tmp_path / "names.png").is_file()


def test_a_sweep_ends_in_a_row_for_every_job(capsys, tmp_path):
    jobs = [Job([f"optimizer.lr={lr}", "name=x"], tmp_path / lr, lr == "3") for lr in ("1e-4", "3")]
    list_jobs(jobs)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| optimizer.lr | result | folder |"
    assert rows[2:] == [f"| 0.0001 | finished | {tmp_path}/1e-4 |", f"| 3 | failed | {tmp_path}/3 |"]


def test_nearest_images_are_those_of_brute_force():
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 4, 4), generator=rng, dtype=torch.uint8)
    queries = torch.randint(0, 256, (6, 3, 4, 4), generator=rng, dtype=torch.uint8)
    queries[2] = images[31]
    nearest = Nearest(lambda batch: batch.flatten(1).float(), queries, count=4)
    for batch in images.split(7):
        nearest.update(batch)
    distances = torch.cdist(queries.flatten(1).double(), images.flatten(1).double())
    expected = distances.argsort(1)[:, :4]
    assert torch.equal(nearest.images, images[expected])
    torch.testing.assert_close(nearest.distances, distances.gather(1, expected))
    assert nearest.distances[2, 0] == 0
    with pytest.raises(ValueError, match=r"images of \(5, 4\), but the samples are of \(4, 4\)"):
        nearest.update(torch.zeros(1, 3, 5, 4, dtype=torch.uint8))


def test_captions_stand_under_their_images():
    images = torch.zeros(5, 3, 40, 40, dtype=torch.uint8)
    picture = make_grid(images, 3, captions=["12", "", "3", "4", "5"])
    assert picture.shape == (3, 2 * (40 + 2 + 14) + 2, 3 * 42 + 2)
    strip = picture[0, 42:56]
    assert strip[:, 2:42].min() < 128
    assert strip[:, 44:84].min() == 255  # an empty caption
    with pytest.raises(ValueError, match="5 images, 1 captions"):
        make_grid(images, 3, captions=["1"])


def test_a_sweep_over_metrics_has_a_panel_for_every_score(tmp_path, capsys):
    """Jobs with other metrics have other scores: none is left out, and none is missed."""
    jobs = []
    for metric, scores in {"psnr": {"psnr": 20.0, "ssim": 0.9}, "fd_clip": {"fd_clip": 3.0, "samples": 8.0}}.items():
        (tmp_path / metric).mkdir()
        (tmp_path / metric / "scores.json").write_text(json.dumps({"scores": scores, "identity": {}}))
        jobs.append(Job([f"metric={metric}"], tmp_path / metric, failed=False))
    summarise(jobs)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| metric | psnr | ssim | fd_clip | samples |"
    assert rows[2:] == ["| psnr | 20 | 0.9 |  |  |", "| fd_clip |  |  | 3 | 8 |"]
    assert (tmp_path / "sweep.png").is_file()


def test_a_job_without_scores_is_named_for_what_it_is(tmp_path, caplog):
    jobs = [Job([f"seed={seed}"], tmp_path / seed, failed=seed == "1") for seed in ("1", "2")]
    summarise(jobs)
    assert [record.message for record in caplog.records] == [
        f"left out of the table, since it failed: {tmp_path}/1",
        f"left out of the table, since it holds no scores.json: {tmp_path}/2",
    ]


def test_neighbours_are_sought_where_the_metric_is():
    """A set of metrics has no device of its own; that of its first metric holds the detector."""
    places = []

    class Watched(CallableDetector):
        def to(self, device):
            places.append(torch.device(device))
            return super().to(device)

    detector = Watched(lambda images: images.mean((2, 3)), 3, name="colours")
    reference = ReferenceBuilder(detector, "training", kept=0)
    reference.update(torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8))
    together = MetricSet(one=GenerationMetrics(detector, reference.compute(), ["fid"])).to("meta")
    places.clear()
    _, name = feature_function(together)
    assert (places, name) == ([torch.device("meta")], "colours features")


def test_numbers_of_images_are_whole():
    assert table({"psnr": 20.0, "images": 360.0, "kind": "x"}).splitlines() == [
        "psnr    20.0000",
        "images  360",
        "kind    x",
    ]
