"""Mixtures of data sets: exact shares, sources that stay as they are alone, continued runs, scores of each source."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

from rae.autoencoder import RAE
from rae.cli.build import make
from rae.cli.checks import check_files
from rae.cli.config import absolute_paths
from rae.cli.errors import compose
from rae.cli.schema import check_values
from rae.commands import sources
from rae.data import ImageFolderDataModule, MixtureDataModule, ShardedBatchSampler, SyntheticDataModule
from rae.data.mixture_sampler import MixtureBatchSampler, deal, shares
from rae.decoder import ViTDecoder
from rae.encoder import tiny_encoder
from rae.io.errors import ConfigError
from rae.metric import ReconstructionMetrics
from rae.report.table import by_source
from rae.training.scores import reconstructions
from tests.data.test_data import Recorder, SaveEverywhere, trainer
from tests.helpers.digits_runs import run
from tests.training.test_kill import differences, finish, start

SIZES = {"photos": 23, "text": 40, "faces": 9}
WEIGHTS = {"photos": 1, "text": 2, "faces": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Three folders of images for training and two for validation; those of a source are of one colour channel."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for channel, (name, size) in enumerate(SIZES.items()):
        for split, count in (("train", size), ("val", 0 if name == "faces" else 5 + channel)):
            for number in range(count):
                pixels = np.zeros((20, 18, 3), np.uint8)
                pixels[..., channel] = rng.integers(1, 256, (20, 18))
                path = root / name / split / f"{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
    return root


def source(root, name, **options) -> ImageFolderDataModule:
    val = root / name / "val"
    modes = {"photos": {"mode": "random_crop"}, "text": {"flip": False}, "faces": {}}[name]
    options = {"batch_size": 4, "num_workers": 0, "image_size": 16, "num_classes": 1, **modes, **options}
    return ImageFolderDataModule(str(root / name / "train"), str(val) if val.is_dir() else None, **options)


def mixture(root, **options) -> MixtureDataModule:
    sources = {name: {"data": source(root, name), "weight": weight} for name, weight in WEIGHTS.items()}
    options = {"batch_size": 4, "num_workers": 0, "image_size": 16, "num_classes": 1, **options}
    return MixtureDataModule(**{"sources": sources, **options})


def as_process(data, world=1, rank=0, epoch=0):
    """The module as one of several processes sees it in an epoch."""
    progress = SimpleNamespace(total=SimpleNamespace(processed=0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = Mock(world_size=world, global_rank=rank, current_epoch=epoch, overfit_batches=0, fit_loop=loop)
    return data


def sampler(mix="step", images=60, batch=4, **options) -> MixtureBatchSampler:
    return MixtureBatchSampler([*SIZES.values()], [*WEIGHTS.values()], mix, images, batch, 7, **options)


def epochs_of(count, **options) -> list[list[tuple[int, int]]]:
    """The batches of so many epochs."""
    return list(chain.from_iterable(sampler(position=lambda e=epoch: (e, 0), **options) for epoch in range(count)))


def source_of(index) -> int:
    return int(np.searchsorted(np.cumsum([*SIZES.values()]), index, side="right"))


# --- shares --------------------------------------------------------------------------------------------------------


def test_shares_are_exact():
    assert shares([1, 1, 1, 1], 12) == [3, 3, 3, 3]
    assert shares([1, 1, 1], 10) == [4, 3, 3]
    assert shares([0.5, 0.3, 0.2], 10) == [5, 3, 2]
    assert shares([0.1] * 10, 30) == [3] * 10
    assert shares([3, 1], 5) == [4, 1]
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights, units = rng.random(rng.integers(1, 7)).tolist(), int(rng.integers(1, 1000))
        counts = shares(weights, units)
        assert sum(counts) == units
        assert all(
            abs(count - weight * units / sum(weights)) < 1 for count, weight in zip(counts, weights, strict=True)
        )


def test_sources_are_dealt_evenly_and_anew_in_every_epoch():
    counts = [30, 60, 10]
    orders = [deal(counts, 3, epoch) for epoch in (0, 1)]
    for order in orders:
        assert np.bincount(order).tolist() == counts
        for number, count in enumerate(counts):
            seen = np.cumsum(order == number)
            # Of a source one falls into each of its stretches, so it is never two ahead or behind; the rest moves by others' luck.
            assert np.abs(seen - count * np.arange(1, 101) / 100).max() < 4
    assert (orders[0] != orders[1]).any()
    assert (orders[0] == deal(counts, 3, 0)).all()
    assert (deal(counts, 4, 0) != orders[0]).any()


@pytest.mark.parametrize("mix", ["step", "sample"])
def test_an_epoch_has_each_source_in_exactly_its_share(mix):
    for epoch in range(3):
        batches = list(sampler(mix, images=64, position=lambda epoch=epoch: (epoch, 0)))
        assert len(batches) == 16
        counts = Counter(source_of(index) for batch in batches for _, index in batch)
        assert [counts[number] for number in range(3)] == [16, 32, 16]
        kinds = [{source_of(index) for _, index in batch} for batch in batches]
        if mix == "step":
            assert all(len(kind) == 1 for kind in kinds)
        else:
            assert max(map(len, kinds)) > 1


# --- each source as it is alone ------------------------------------------------------------------------------------


def test_a_source_has_the_batches_that_it_has_alone():
    batches, offset = epochs_of(4), 0
    for number, size in enumerate(SIZES.values()):
        own = [[(e, i - offset) for e, i in batch] for batch in batches if source_of(batch[0][1]) == number]
        last = max(epoch for batch in own for epoch, _ in batch)
        alone = chain.from_iterable(
            ShardedBatchSampler(size, 4, 7, position=lambda e=e: (e, 0)) for e in range(last + 1)
        )
        assert own == list(alone)[: len(own)]
        assert len(own) == {0: 16, 1: 28, 2: 16}[number]
        offset += size


def test_samples_of_a_source_go_through_its_permutations():
    samples, offset = list(chain.from_iterable(epochs_of(4, mix="sample"))), 0
    for number, size in enumerate(SIZES.values()):
        own = [(epoch, index - offset) for epoch, index in samples if source_of(index) == number]
        orders = [ShardedBatchSampler(size, 1, 7).permutation(epoch) for epoch in range(len(own) // size + 1)]
        assert own == [(e, index) for e, order in enumerate(orders) for index in order][: len(own)]
        offset += size


@pytest.mark.parametrize("mix", ["step", "sample"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_out(mix, world):
    whole = list(sampler(mix))
    parts = [list(sampler(mix, batch=4 // world, num_replicas=world, rank=rank)) for rank in range(world)]
    assert [list(chain(*batch)) for batch in zip(*parts, strict=True)] == whole
    later = list(sampler(mix, position=lambda: (0, 9)))
    assert later == whole[9:]


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["step", "sample"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_those_of_the_source_alone(root, mix, workers):
    """Also in a later epoch of the source, where augmentation is another."""
    found, offset = {}, dict(zip(SIZES, np.cumsum([0, *SIZES.values()]).tolist(), strict=False))
    for epoch in range(2):
        data = as_process(mixture(root, mix=mix, num_workers=workers, epoch_images=64), epoch=epoch)
        for batch in data.train_dataloader():
            keys = zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True)
            found.update(zip(keys, batch["image"], strict=True))
        data._close()
    assert max(epoch for epoch, _ in found) >= 2
    for name, size in SIZES.items():
        for epoch in range(4):
            alone = as_process(source(root, name, batch_size=1), epoch=epoch).train_dataloader()
            for batch in alone:
                key = epoch, offset[name] + int(batch["index"])
                if key in found:
                    assert torch.equal(found.pop(key), batch["image"][0])
        assert size
    assert not found


def test_a_continued_run_sees_exactly_what_was_not_seen(root, tmp_path):
    for mix in ("step", "sample"):
        save, whole = SaveEverywhere(tmp_path), Recorder()
        options = {"max_epochs": 2, "limit_val_batches": 0}
        trainer(tmp_path, [save], **options).fit(whole, datamodule=mixture(root, mix=mix))
        for _, done, path in save.saved[::3]:
            rest = Recorder()
            trainer(tmp_path, **options).fit(rest, datamodule=mixture(root, mix=mix), ckpt_path=path, weights_only=True)
            assert rest.batches == whole.batches[done:]
    path = save.saved[2][2]
    other = mixture(root, mix="step")
    with pytest.raises(ValueError, match="middle of an epoch with mix=sample, but it is now step"):
        trainer(tmp_path, **options).fit(Recorder(), datamodule=other, ckpt_path=path, weights_only=True)
    other = mixture(root, mix="sample")
    other.weights["text"] = 3.0
    with pytest.raises(ValueError, match="middle of an epoch with "):
        trainer(tmp_path, **options).fit(Recorder(), datamodule=other, ckpt_path=path, weights_only=True)


def test_the_length_of_an_epoch_is_said(root, caplog):
    with caplog.at_level(logging.INFO, logger="rae.data.mixture"):
        loader = mixture(root).train_dataloader()
    assert len(loader) == 7  # (23 + 2 · 40 + 9) / 4 = 28 images
    assert "an epoch is 7 steps of 4 images: photos 2 steps, 0.348 times its 23 images; text 3 steps" in caplog.text
    assert len(mixture(root, epoch_images=41).train_dataloader()) == 10


# --- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_validation_goes_through_one_source_after_the_other(root, world):
    data = mixture(root)
    assert data.val_ranges() == {"photos": range(5), "text": range(5, 11)}
    assert data.samples("val") == 11
    loaders = [as_process(mixture(root), world, rank).val_dataloader() for rank in range(world)]
    seen = []
    for batches in zip(*loaders, strict=True):
        joined = torch.cat([batch["index"] for batch in batches]).tolist()
        assert len({index < 5 for index in joined}) == 1
        seen += joined
        for batch in batches:
            assert all(
                image[0 if index < 5 else 1].any() for image, index in zip(batch["image"], batch["index"], strict=True)
            )
    assert seen == list(range(11))


class Logger(Recorder):
    """Logs the mean value of the validation images as the stages log their scores."""

    from rae.training.module import TrainingModule

    log_validation = TrainingModule.log_validation

    def validation_step(self, batch, batch_idx):
        self.log_validation("brightness", batch["image"].float().mean(), batch)


def test_each_source_has_its_own_scores_and_all_together_one(root, tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    data = mixture(root)
    run.fit(Logger(), datamodule=data)
    scores = run.callback_metrics
    means = {}
    for name in ("photos", "text"):
        images = torch.cat([batch["image"] for batch in source(root, name).val_dataloader()])
        means[name] = images.float().mean(), len(images)
        torch.testing.assert_close(scores[f"val/brightness/{name}"], means[name][0])
    together = sum(mean * count for mean, count in means.values()) / sum(count for _, count in means.values())
    torch.testing.assert_close(scores["val/brightness"], together)
    table = by_source(scores, data.val_ranges())
    assert table.splitlines() == [
        "        val/brightness",
        f"photos  {means['photos'][0]:.4f}",
        f"text    {means['text'][0]:.4f}",
    ]
    assert by_source(scores, ()) == ""


def test_rae_evaluate_scores_all_sources_together_and_each(root, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    encoder = tiny_encoder(input_size=16)
    model = RAE(encoder, ViTDecoder(32, 2, 16, 1, 2, 16, patch=8, mean=encoder.mean, std=encoder.std)).eval()
    monkeypatch.setattr(sources, "open_autoencoder", lambda cfg, device: (model, cfg))
    monkeypatch.setattr(sources, "open_data", lambda run, side: mixture(root))
    there = [f"checkpoint={root}", f"images={root}", f"output_dir={tmp_path}"]  # what these hold is said above
    run("evaluate", *there, "metric=psnr", "device=cpu", "count=9")
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert {name: scores[f"images{name}"] for name in ("", "/photos", "/text")} == {"": 9, "/photos": 5, "/text": 4}
    for name, count in (("photos", 5), ("text", 4)):
        metric = ReconstructionMetrics()
        for pair in reconstructions(
            model, source(root, name).range_dataloader("val", [range(count)]), torch.device("cpu")
        ):
            metric.update(*pair)
        assert {key: scores[f"{key}/{name}"] for key in ("psnr", "ssim")} == pytest.approx(
            {key: metric.compute()[key] for key in ("psnr", "ssim")}, rel=1e-6
        )
    assert scores["psnr"] == pytest.approx((5 * scores["psnr/photos"] + 4 * scores["psnr/text"]) / 9, rel=1e-6)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["psnr", f"{scores['psnr']:.4f}"] in printed
    assert ["text", *(f"{scores[f'{key}/text']:.4f}" for key in ("psnr", "ssim", "images"))] in printed


def test_without_validation_images_there_are_no_scores(root):
    data = mixture(root, sources={"faces": {"data": source(root, "faces")}})
    assert data.val_dataset() is None
    assert data.val_ranges() == {}


# --- what does not go ----------------------------------------------------------------------------------------------


def test_faults_are_named(root):
    def bad(said, **options):
        with pytest.raises(ValueError, match=said):
            mixture(root, **options).train_dataloader()

    photos = source(root, "photos")
    bad(r"data.sources is empty; add each by a name", sources={})
    bad(r"data.mix='batch' is unknown; choose one of step, sample", mix="batch")
    bad(r"data.epoch_images must be at least 1, or null, got 0", epoch_images=0)
    for weight in (0, -1.0, float("nan"), "much", True):
        bad(r"data.sources.a.weight=.* must be a number above 0", sources={"a": {"data": photos, "weight": weight}})
    bad(r"data.sources.a must hold data", sources={"a": {"weight": 1}})
    bad(r"data.sources.a/b: a name is made of letters", sources={"a/b": {"data": photos}})
    bad(
        r"data.sources.a.data must be one data set of images, got MixtureDataModule",
        sources={"a": {"data": mixture(root)}},
    )
    bad(r"data.sources.a.data.image_size=16 must be data.image_size=32", sources={"a": {"data": photos}}, image_size=32)
    many = SyntheticDataModule(image_size=16, num_classes=5)
    bad(r"data.sources.a.data.num_classes=5 is above data.num_classes=1; set", sources={"a": {"data": many}})
    bad(
        r"data.sources.faces holds 9 images, fewer than a batch of 10; .* or data.mix=sample",
        batch_size=10,
        epoch_images=400,
    )
    bad(
        r"data.sources.photos gets none of the steps of an epoch of data.epoch_images=5 in batches of 4", epoch_images=5
    )


def test_captions_are_mixed_with_captions_alone(root, tmp_path):
    lines = [
        json.dumps({"file_name": f"{number:02d}.png", "text": f"photo {number}"}) for number in range(SIZES["photos"])
    ]
    (root / "photos" / "train" / "metadata.jsonl").write_text("\n".join(lines))
    told = ImageFolderDataModule(
        str(root / "photos" / "train"),
        batch_size=4,
        num_workers=0,
        image_size=16,
        num_classes=1,
        captions="metadata.jsonl",
    )
    sources = {"photos": {"data": told}, "faces": {"data": source(root, "faces")}}
    with pytest.raises(ValueError, match="the images of photos come with captions, those of faces without; give all"):
        mixture(root, sources=sources, mix="sample").train_dataloader()
    for batch in mixture(root, sources=sources).train_dataloader():
        expected = [f"photo {index}" for index in batch["index"].tolist()]
        assert ("caption" in batch) == (int(batch["index"][0]) < SIZES["photos"])
        assert batch.get("caption", expected) == expected


# --- configuration -------------------------------------------------------------------------------------------------


def overrides_for(root: Path) -> list[str]:
    found = ["data=mixture", "data.num_classes=1", "data.batch_size=4", "data.num_workers=1"]
    for name, weight in WEIGHTS.items():
        where = f"data.sources.{name}"
        found += [
            f"+data@{where}.data=folder",
            f"{where}.data.train_path={root}/{name}/train",
            f"+{where}.weight={weight}",
        ]
        found += [] if name == "faces" else [f"{where}.data.val_path={root}/{name}/val"]
    return found


def test_sources_are_added_on_the_command_line(root, monkeypatch):
    cfg = compose("train", ["stage=1", "image_size=16", *overrides_for(root)])
    check_values(cfg, "train")
    check_files(cfg, "train")
    data = make(cfg.data)
    assert data.weights == {"photos": 1.0, "text": 2.0, "faces": 1.0}
    assert data.samples("train") == sum(SIZES.values())
    cfg.data.sources.text.data.train_path = None
    with pytest.raises(ConfigError, match=r"data.sources.text.data.train_path is not given"):
        check_files(cfg, "train")
    cfg.data.sources.text.data.train_path = "absent"
    with pytest.raises(ConfigError, match=r"data.sources.text.data.train_path=absent does not exist"):
        check_files(cfg, "train")
    monkeypatch.chdir(root)
    cfg.data.sources.text.data.train_path = "text/train"
    absolute_paths(cfg)
    assert cfg.data.sources.text.data.train_path == str((root / "text/train").resolve())


# --- training ------------------------------------------------------------------------------------------------------

SMALL = [
    *("experiment=digits_stage1", "+encoder.pretrained=false", "encoder.checkpoint=null", "trainer.max_steps=14"),
    *("decoder.width=32", "decoder.depth=1", "decoder.mlp_width=64", "callbacks.checkpoint.every_n_steps=4"),
    *("trainer.log_every_n_steps=1", "trainer.val_check_interval=6", "trainer.enable_progress_bar=false"),
    *("discriminator.pretrained=false", "discriminator.checkpoint=null", "loss.discriminator_start=2", "loss.gan_start=3"),
    *("scheduler.warmup_steps=3", "data.epoch_images=44"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["step", "sample"])
def test_a_killed_run_goes_on_bitwise(root, mix, tmp_path):
    score = [
        "evaluation=reconstruction",
        "metric@callbacks.evaluation.metric=psnr",
        "callbacks.evaluation.every_n_epochs=1",
    ]
    overrides = [*SMALL, *overrides_for(root), f"data.mix={mix}", *score]
    said = finish(start([*overrides, f"output_dir={tmp_path}/whole"]), killed=False)
    assert "an epoch is 11 steps of 4 images" in said
    assert "val/psnr" in said.partition("scores of each source")[2]
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
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for name in ("photos", "text"):
        assert {f"val/psnr/{name}", f"val/l1/{name}", f"eval/psnr/{name}"} <= summary.keys()


@pytest.mark.slow
def test_scores_do_not_depend_on_the_number_of_processes(root, tmp_path):
    """Also where a source's images cannot be shared out evenly: Lightning's own mean over processes is wrong then."""
    found = []
    for name, more in (("one", []), ("two", ["data.batch_size=2", "trainer.devices=2", "strategy=ddp"])):
        options = ["trainer.max_steps=3", "data.epoch_images=20", "trainer.val_check_interval=3"]
        finish(start([*SMALL, *overrides_for(root), *options, *more, f"output_dir={tmp_path}/{name}"]), killed=False)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        found.append({key: value for key, value in summary.items() if key.startswith("val/")})
    assert found[0].keys() == found[1].keys() >= {"val/psnr", "val/psnr/photos", "val/l1/text"}
    assert found[1] == pytest.approx(found[0], rel=1e-4)
