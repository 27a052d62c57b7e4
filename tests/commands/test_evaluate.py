"""Sampling, scoring and references by the commands: the same images and numbers however the work is divided."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from rae.autoencoder import RAE
from rae.commands.reconstruct import score_parts
from rae.data.shards import read_index
from rae.decoder import ViTDecoder
from rae.denoiser import DiTDH
from rae.encoder import tiny_encoder
from rae.flow import EulerSampler, FlowMatching, PublishedGrid
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.io.parts import Parts
from rae.jobs.images import open_images, open_pairs
from rae.jobs.samples import latent_parts
from rae.jobs.wanted import label_list
from rae.metric import read_reference
from tests.helpers.digits_runs import run

CLASSES, EACH = 4, 16
TINY = {"_target_": "rae.encoder.tiny_encoder", "input_size": 32, "channels": 32, "stride": 8}
DETECTOR = {"_target_": "rae.metric.EncoderDetector", "name": "tiny", "encoder": TINY}


def metric(reference: object = None, **options: object) -> dict[str, object]:
    """A node for ``metric``: all scores that a small encoder's features allow."""
    names = ["fid", "kid", "precision", "recall", "density", "coverage"]
    return {
        "_target_": "rae.metric.GenerationMetrics",
        "detector": DETECTOR,
        "reference": None if reference is None else str(reference),
        "metrics": names,
        **options,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A small generator with weights that make every sample another."""
    torch.manual_seed(5)
    encoder = tiny_encoder(input_size=32, channels=32, stride=8)
    decoder = ViTDecoder(32, 4, 48, 1, 4, 96, patch=8, mean=encoder.mean, std=encoder.std)
    denoiser = DiTDH(32, 4, 32, 1, 4, 48, 1, 4, CLASSES)
    for network in (decoder, denoiser):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    generator = Generator(RAE(encoder, decoder), denoiser, FlowMatching(), EulerSampler(PublishedGrid(5)))
    return generator.save_pretrained(tmp_path_factory.mktemp("model") / "export")


def options_of(exported: Path, output: Path, *more: str) -> list[str]:
    common = ["sampler.grid.points=5", f"samples_per_class={EACH}", "device=cpu"]
    return [f"checkpoint={exported}", *common, f"output_dir={output}", *more]


@pytest.fixture(scope="module")
def samples(exported, tmp_path_factory) -> Path:
    """64 samples as .npz, PNG files and shards, in parts of 16, from batches of 64 at most."""
    folder = tmp_path_factory.mktemp("samples")
    run("sample", *options_of(exported, folder, "shards=true", "sheets=true", "interpolations=5"))
    return folder


@pytest.fixture(scope="module")
def reference(samples, tmp_path_factory) -> Path:
    """A training-set reference of other images of the same size, with images."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("reference")
    images = np.load(samples / "samples.npz")["arr_0"]
    noise = rng.integers(-40, 40, (96, *images.shape[1:]))
    real = np.clip(images[rng.integers(0, len(images), 96)].astype(int) + noise, 0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", arr_0=real)
    return folder / "images.npz"


def scores_of(folder: Path) -> dict[str, float]:
    return json.loads((folder / "scores.json").read_text())["scores"]


# --- sampling ----------------------------------------------------------------------------------------------------


def pixels(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


def test_samples_in_every_form_are_the_same_images(samples):
    images = torch.from_numpy(pixels(samples)).permute(0, 3, 1, 2)
    assert images.shape == (64, 3, 32, 32)
    assert len(images.flatten(1).unique(dim=0)) == 64
    for given in ("samples.npz", "images", "shards"):
        counts = [open_images("samples", str(samples / given), 10, rank, 3)[0] for rank in range(3)]
        assert counts == [10 + 10 + 4, 20, 20]  # of seven batches, the first three times
        count, batches = open_images("samples", str(samples / given), 10)
        read = list(batches)
        assert count == 64
        assert torch.equal(torch.cat([batch for batch, _, _ in read]), images)
        assert torch.cat([numbers for _, _, numbers in read]).tolist() == list(range(64))
    labels = np.load(samples / "samples.npz")["arr_1"]
    assert labels.tolist() == [label for label in range(CLASSES) for _ in range(EACH)]
    assert not (samples / "parts").exists()
    assert len(list((samples / "sheets").iterdir())) == CLASSES
    assert json.loads((samples / "samples.json").read_text())["samples"] == 64


@pytest.mark.parametrize(
    "divided",
    [
        ["batch_size=7", "part_size=9"],
        *(pytest.param([one], marks=pytest.mark.slow) for one in ("batch_size=7", "part_size=1")),
    ],
)
def test_batches_and_parts_leave_the_samples_alone(exported, samples, tmp_path, divided):
    run("sample", *options_of(exported, tmp_path, "png=false", *divided))
    assert np.abs(pixels(tmp_path).astype(int) - pixels(samples)).max() <= 1


def test_equal_shapes_give_equal_samples_in_any_order(exported, samples, tmp_path):
    generator = Generator.from_pretrained(exported, encoder=False)
    numbers = [63, 0, 17, 40]
    labels = [number // EACH for number in numbers]
    ordered = generator.draw(labels, 0, numbers)
    order = [2, 0, 3, 1]
    again = generator.draw([labels[i] for i in order], 0, [numbers[i] for i in order])
    assert torch.equal(again, ordered[order])
    stored = torch.from_numpy(pixels(samples)[numbers]).permute(0, 3, 1, 2)
    assert (ordered.int() - stored.int()).abs().max() <= 1


@pytest.mark.parametrize("command", ["sample", "reconstruct"])
def test_rows_without_a_middle_are_refused_at_once(command, exported, tmp_path):
    with pytest.raises(ConfigError, match=r"interpolations=2 must lie in 3…1000, both ends counted, or be null"):
        run(command, f"checkpoint={exported}", "interpolations=2", f"output_dir={tmp_path}")
    assert not list(tmp_path.iterdir())


class Counted:
    """A metric with what docs/config.md asks for and no more; it counts pairs."""

    takes_originals = True
    identity: ClassVar = {"name": "counted"}

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.pairs = 0

    def update(self, images: torch.Tensor, originals: torch.Tensor) -> None:
        assert images.shape == originals.shape
        self.pairs += len(images)

    def compute(self) -> dict[str, float]:
        return {"pairs": float(self.pairs)}


@pytest.mark.parametrize(("command", "file"), [("reconstruct", "scores.json"), ("probe", "probe.json")])
def test_pairs_are_scored_by_any_class_with_the_methods_of_a_metric(command, file, exported, samples, tmp_path):
    given = [f"checkpoint={exported}", f"images={samples}/images", "count=3", "device=cpu", f"output_dir={tmp_path}"]
    run(command, *given, replaced={"metric": {"_target_": f"{__name__}.Counted"}})
    found = json.loads((tmp_path / file).read_text())
    assert (found["scores"] if command == "reconstruct" else found["noise"][0])["pairs"] == 3


def test_fewer_reconstructions_take_the_place_of_more(exported, samples, tmp_path):
    given = [f"checkpoint={exported}", f"images={samples}/images", "png=true", "device=cpu", f"output_dir={tmp_path}"]
    for count in (3, 2):
        run("reconstruct", *given, f"count={count}", "force=true")
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["000000.png", "000001.png"]


def test_the_images_of_a_published_reference_are_found_by_its_name(samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "references").mkdir()
    np.savez(tmp_path / "references" / "val256.npz", arr_0=pixels(samples))
    run("reference", "source=val256", "images=true", "name=again", "device=cpu", f"output_dir={tmp_path}")
    assert np.array_equal(np.load(tmp_path / "again.npz")["arr_0"], pixels(samples))


def test_a_process_may_have_no_pairs(tmp_path, monkeypatch):
    """Of one image, the second of two processes has none."""

    def gather(shares: list, own: list) -> None:
        shares[:] = [[7], own]

    monkeypatch.setattr("rae.commands.reconstruct.distributed.all_gather_object", gather)
    second = SimpleNamespace(world_size=2, global_rank=1)
    data = SimpleNamespace(range_dataloader=lambda split, ranges: iter(()))
    parts = Parts(tmp_path, {}, 1, 4, ".npy")
    _, labels = score_parts(SimpleNamespace(grid_pairs=8), second, Counted(), data, parts)
    assert labels == [7]


def test_samples_that_are_there_are_kept_and_others_refused(exported, samples, tmp_path):
    small = ["classes=[1]", "png=false"]
    run("sample", *options_of(exported, tmp_path, *small))
    written = (tmp_path / "samples.npz").stat().st_mtime_ns
    run("sample", *options_of(exported, tmp_path, *small, "batch_size=5", "interpolations=3"))
    assert (tmp_path / "samples.npz").stat().st_mtime_ns == written
    assert Image.open(tmp_path / "interpolations.png").width > 3 * 32  # which was not asked for before
    with pytest.raises(ConfigError, match=r"holds other samples \(seed was 0 and is now 3\): force=true replaces"):
        run("sample", *options_of(exported, tmp_path, *small, "seed=3"))
    run("sample", *options_of(exported, tmp_path, *small, "seed=3", "force=true"))
    assert not np.array_equal(pixels(tmp_path), pixels(samples)[EACH : 2 * EACH])


def test_labels_may_be_random_or_listed(tmp_path):
    from rae.cli.errors import compose

    cfg = compose("sample", ["checkpoint=unused", "labels=random", "count=2000"])
    labels = label_list(cfg, 10)
    assert labels == label_list(cfg, 10)
    assert labels[:500] == label_list(compose("sample", ["checkpoint=unused", "labels=random", "count=500"]), 10)
    counts = np.bincount(labels, minlength=10)
    assert counts.sum() == 2000
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared of 9 degrees of freedom: 1 in 1000
    for name, write in (
        ("list.txt", lambda file: file.write_text("3 1\n2")),
        ("list.npy", lambda f: np.save(f, [3, 1, 2])),
    ):
        write(tmp_path / name)
        cfg = compose("sample", ["checkpoint=unused", f"labels={tmp_path / name}"])
        assert label_list(cfg, 4) == [3, 1, 2]
        with pytest.raises(ConfigError, match=r"must hold labels in 0 … 2, got \[3\]"):
            label_list(cfg, 3)
    for bad in ([1.5, 2], [float("inf")], ["one"]):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(ConfigError, match=r"bad\.npy' holds no list of labels: "):
            label_list(compose("sample", ["checkpoint=unused", f"labels={tmp_path}/bad.npy"]), 10)
    with pytest.raises(ConfigError, match="labels=random needs count="):
        label_list(compose("sample", ["checkpoint=unused", "labels=random"]), 10)


def test_interpolation_begins_and_ends_with_the_samples(exported):
    generator = Generator.from_pretrained(exported, encoder=False)
    row = generator.interpolate(2, (4, 5), 5, seed=0)
    ends = generator([2, 2], 0, [4, 5])
    torch.testing.assert_close(row[[0, -1]], ends, atol=1e-5, rtol=0)
    steps = (row[1:] - row[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < 3 * steps.min()  # no jump
    with pytest.raises(ValueError, match="count must be at least 2"):
        generator.interpolate(2, (4, 5), 1)


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_are_those_of_the_images_wherever_they_lie(exported, samples, reference, tmp_path, monkeypatch):
    bars = []

    class Bar(tqdm):
        def close(self):
            bars.append((self.n, self.total))
            super().close()

    monkeypatch.setattr("rae.commands.evaluate.tqdm", Bar)
    node = metric(reference, assume_kind="training", num_classes=CLASSES, balanced=True)
    sources = {
        "npz": [f"samples={samples}/samples.npz", "batch_size=9"],
        "shards": [f"samples={samples}/shards"],
        "model": options_of(exported, tmp_path / "model", "keep_samples=true"),
    }
    for name, options in sources.items():
        run("evaluate", *options, f"output_dir={tmp_path / name}", replaced={"metric": node})
    npz, shards, model = (scores_of(tmp_path / name) for name in sources)
    assert npz == pytest.approx(shards, rel=1e-5, abs=1e-7)
    assert npz == pytest.approx(model, rel=1e-5, abs=1e-7)
    assert npz["samples"] == 64
    assert npz["fd_tiny"] > 0
    assert np.array_equal(pixels(tmp_path / "model"), pixels(samples))
    content = json.loads((tmp_path / "model" / "scores.json").read_text())
    assert content["identity"]["samples"]["seed"] == 0
    assert content["identity"]["samples"]["sampler"]["grid"]["points"] == 5
    assert content["identity"]["metric"]["reference"]["kind"] == "training"
    assert len(content["identity"]["metric"]["detector"]["hash"]) == 64
    assert "torch" in content["identity"]["versions"]
    with (tmp_path / "npz" / "scores.csv").open() as lines:
        (row,) = csv.DictReader(lines)
    assert float(row["fd_tiny"]) == npz["fd_tiny"]
    assert row["samples.seed"] == "0"  # from samples.json beside the .npz
    folder = {"metric": {**node, "num_classes": None, "balanced": False}}
    run("evaluate", f"samples={samples}/images", f"output_dir={tmp_path / 'png'}", replaced=folder)
    assert scores_of(tmp_path / "png") == pytest.approx(npz, rel=1e-5, abs=1e-7)
    assert set(bars) == {(64, 64)}, "the bar knows how many images there are"


@pytest.mark.slow
def test_kept_latents_go_through_several_decoders(exported, samples, reference, tmp_path):
    run("sample", *options_of(exported, tmp_path / "drawn", "png=false", "keep_latents=true", "part_size=10"))
    other = RAE.from_pretrained(exported)
    for parameter in other.decoder.parameters():
        parameter.data *= 0.9
    other.save_pretrained(tmp_path / "other")
    node = metric(reference, assume_kind="training", metrics=["fid"], protocol="raev2")
    options = [f"latents={tmp_path}/drawn/latents", f"decoders=[{exported},{tmp_path}/other]", "batch_size=7"]
    run("evaluate", *options, f"output_dir={tmp_path / 'both'}", replaced={"metric": node})
    run(
        "evaluate", f"samples={tmp_path}/drawn/samples.npz", f"output_dir={tmp_path / 'one'}", replaced={"metric": node}
    )
    with (tmp_path / "both" / "decoders.csv").open() as lines:
        first, second = csv.DictReader(lines)
    assert float(first["fd_tiny"]) == pytest.approx(scores_of(tmp_path / "one")["fd_tiny"], rel=1e-5)
    assert abs(float(second["fd_tiny"]) - float(first["fd_tiny"])) > 1e-3
    rules = json.loads((tmp_path / "both" / "decoder_0" / "scores.json").read_text())["identity"]["protocol"]
    assert (rules["labels"], rules["evaluations"]["denoiser"], rules["protocol"]) == ("balanced", 4, "raev2")
    assert len(rules["differences"]) == 1  # the reference

    tiny = tiny_encoder(input_size=16, channels=32, stride=8, seed=0)
    RAE(tiny, ViTDecoder(32, 2, 48, 1, 4, 96, patch=8)).save_pretrained(tmp_path / "smaller")
    for decoders, kind, message in (
        (
            f"[{tmp_path}/smaller]",
            ConfigError,
            r"takes latents of 32×2×2, those of latents=.* are 32×4×4|another encoder",
        ),
        (f"[{tmp_path}/none]", FileNotFoundError, "does not exist|there is no"),
    ):
        with pytest.raises(kind, match=message):
            run(
                "evaluate",
                options[0],
                f"decoders={decoders}",
                f"output_dir={tmp_path / 'x'}",
                replaced={"metric": node},
            )
    with pytest.raises(FileNotFoundError, match=r"holds no latents.json"):
        run("evaluate", f"latents={tmp_path}", options[1], f"output_dir={tmp_path / 'x'}", replaced={"metric": node})
    with pytest.raises(ConfigError, match="go together"):
        run("evaluate", options[0], f"output_dir={tmp_path / 'x'}", replaced={"metric": node})


def test_latents_of_rae_cache_latents_are_no_samples(tmp_path):
    (tmp_path / "latents.json").write_text('{"latents": 70, "part": 20}')
    with pytest.raises(ValueError, match=r"are not of samples, as latents\.json there says: give the folder latents/"):
        latent_parts(tmp_path)


def test_several_metrics_in_one_pass(samples, reference, tmp_path):
    first = metric(reference, assume_kind="training", metrics=["fid"])
    other = {**DETECTOR, "name": "other", "encoder": {**TINY, "seed": 1}}
    node = {"_target_": "rae.metric.MetricSet", "tiny": first, "other": {**first, "detector": other}}
    run("evaluate", f"samples={samples}/samples.npz", f"output_dir={tmp_path}", replaced={"metric": node})
    assert scores_of(tmp_path).keys() == {"fd_tiny", "fd_other", "samples"}
    alone = {"metric": node["other"]}
    run("evaluate", f"samples={samples}/samples.npz", f"output_dir={tmp_path / 'alone'}", replaced=alone)
    assert scores_of(tmp_path / "alone")["fd_other"] == scores_of(tmp_path)["fd_other"]


@pytest.mark.slow
def test_reconstructions_in_files_and_by_the_model_score_alike(exported, samples, tmp_path):
    pairs = {"_target_": "rae.metric.ReconstructionMetrics", "detector": DETECTOR}
    images = f"images={samples}/images"
    run("reconstruct", f"checkpoint={exported}", images, "npz=true", "part_size=10", f"output_dir={tmp_path}/made")
    files = [f"samples={tmp_path}/made/reconstructions.npz", f"originals={samples}/images", "batch_size=7"]
    run("evaluate", *files, f"output_dir={tmp_path}/files", replaced={"metric": pairs})
    run("evaluate", f"checkpoint={exported}", images, f"output_dir={tmp_path}/model", replaced={"metric": pairs})
    files, model, made = (scores_of(tmp_path / name) for name in ("files", "model", "made"))
    assert files == pytest.approx(model, rel=1e-6)
    assert files["psnr"] == pytest.approx(made["psnr"], rel=1e-6)
    assert files["images"] == 64
    assert (tmp_path / "made" / "grid.png").is_file()
    assert not (tmp_path / "made" / "parts").exists()


@pytest.fixture
def bad(samples, tmp_path) -> Path:
    """Files with one thing wrong with each."""
    images = pixels(samples)
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name, side in (("a", 32), ("b", 40)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / "mixed" / f"{name}.png")
    np.savez(tmp_path / "floats.npz", arr_0=images / 255.0)
    np.savez(tmp_path / "nameless.npz", images=images)
    np.savez(tmp_path / "unbalanced.npz", arr_0=images[:10], arr_1=np.array([0] * 7 + [1] * 3))
    np.savez(tmp_path / "few.npz", arr_0=images[:10])
    np.savez(tmp_path / "small.npz", arr_0=images[:, :16, :16])
    whole = (samples / "samples.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    return tmp_path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("empty", "holds no image"),
        ("mixed", r"images must be of one size: .*b\.png' is \(40, 40\)"),
        ("floats.npz", "float images are refused"),
        ("nameless.npz", r"has no arr_0 \(images uint8 N×H×W×3\); it holds images"),
        ("truncated.npz", "no .npz archive or is truncated"),
        ("absent.npz", "does not exist: give an .npz file, a folder of images or of tar shards"),
        ("small.npz", r"16.*32|32.*16"),
        ("few.npz", "64 samples are claimed, but 10 were given"),
        ("unbalanced.npz", "class 2 has 0 and class 0 has 7"),
    ],
)
def test_bad_samples_are_answered_in_words(bad, reference, given, message):
    node = metric(reference, assume_kind="training")
    node |= {"samples": 64} if given == "few.npz" else {}
    node |= {"balanced": True, "num_classes": CLASSES} if given == "unbalanced.npz" else {}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run("evaluate", f"samples={bad / given}", f"output_dir={bad}/scores", replaced={"metric": node})
    assert not (bad / "scores" / "scores.json").exists()


def test_a_gfid_reference_is_refused_for_reconstructions(exported, samples, reference, tmp_path):
    node = {
        "_target_": "rae.metric.ReconstructionMetrics",
        "detector": DETECTOR,
        "reference": str(reference),
        "assume_kind": "training",
    }
    with pytest.raises(ValueError, match=r"training.*validation|validation.*training") as caught:
        run(
            "evaluate",
            f"checkpoint={exported}",
            f"images={samples}/images",
            f"output_dir={tmp_path}",
            replaced={"metric": node},
        )
    assert "gFID" in str(caught.value)
    with pytest.raises(ValueError, match="validation"):
        run("evaluate", f"samples={samples}/samples.npz", f"output_dir={tmp_path}",
            replaced={"metric": metric(reference, assume_kind="validation")})  # fmt: skip


def test_shards_are_indexed_once(samples, tmp_path, monkeypatch):
    searched = []
    monkeypatch.setattr("rae.jobs.images.read_index", lambda *a: searched.append(a[0].name) or read_index(*a))
    node = metric(samples / "samples.npz", assume_kind="training")
    run("evaluate", f"samples={samples}/shards", f"output_dir={tmp_path}", replaced={"metric": node})
    assert searched == sorted(shard.name for shard in (samples / "shards").glob("*.tar"))


def test_what_is_scored_must_be_said_once(exported, samples, tmp_path):
    node = {"metric": metric(samples / "samples.npz", assume_kind="training")}
    for given in ([], [f"samples={samples}/samples.npz", f"checkpoint={exported}"]):
        with pytest.raises(ConfigError, match="give one of them"):
            run("evaluate", *given, f"output_dir={tmp_path}", replaced=node)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a trained run: give it as checkpoint="):
        run("evaluate", f"samples={tmp_path}/run", f"output_dir={tmp_path}/scores", replaced=node)
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        run("evaluate", f"samples={samples}/shards", "batch_size=0", f"output_dir={tmp_path}/scores", replaced=node)


def test_pairs_must_be_as_many(samples, bad):
    for first, second, word in (
        ("few.npz", samples / "samples.npz", "more"),
        (samples / "samples.npz", "few.npz", "fewer"),
    ):
        with pytest.raises(ValueError, match=f"holds {word} images"):
            list(open_pairs(str(bad / first), str(bad / second), 4))


# --- references --------------------------------------------------------------------------------------------------


def test_a_reference_of_a_data_set_is_that_of_its_images(samples, tmp_path):
    folders = [
        f"data.val_path={samples}/images",
        "data.train_path=null",
        "data=folder",
        "image_size=32",
        "data.num_workers=0",
    ]
    made = [*folders, "kept=20", "images=true", "data.batch_size=9", "device=cpu"]
    run("reference", *made, "name=val", f"output_dir={tmp_path}", replaced={"detector": DETECTOR})
    built = read_reference(tmp_path / "val.npz")
    assert (built.info.kind, built.info.count, built.info.image_size, built.info.crop) == (
        "validation",
        64,
        (32, 32),
        "center_crop",
    )
    kept = np.load(tmp_path / "val.npz")["arr_0"]
    assert np.array_equal(
        kept, pixels(samples)[[number for number in range(64) if (number + 1) * 20 // 64 > number * 20 // 64]]
    )
    alike = metric(tmp_path / "val.npz", reference_kind="validation", metrics=["fid"])
    run("evaluate", f"samples={samples}/samples.npz", f"output_dir={tmp_path}/scores", replaced={"metric": alike})
    assert scores_of(tmp_path / "scores")["fd_tiny"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ConfigError, match="force=true replaces it"):
        run("reference", *made, "name=val", f"output_dir={tmp_path}", replaced={"detector": DETECTOR})


def test_a_reference_is_read_and_given_its_kind(reference, tmp_path):
    with pytest.raises(ValueError, match="kind='training' or kind='validation'"):
        run("reference", f"source={reference}", f"output_dir={tmp_path}", "device=cpu")
    run("reference", f"source={reference}", "kind=training", "images=true", f"output_dir={tmp_path}", "device=cpu")
    read = read_reference(tmp_path / "reference.npz")
    assert read.info.kind == "training"
    assert read.has_images


# --- looking -----------------------------------------------------------------------------------------------------


def test_neighbours_of_samples(samples, reference, tmp_path):
    given = [f"samples={samples}/samples.npz", "neighbours=3", f"output_dir={tmp_path}"]
    node = {"metric": metric(reference, assume_kind="training", metrics=["fid"])}
    run("evaluate", *given, f"neighbours_of={reference}", replaced=node)
    with Image.open(tmp_path / "neighbours.png") as picture:
        assert picture.height == 3 * (64 + 2) + 2
    with pytest.raises(ConfigError, match="does not name training images: add neighbours_of="):
        run("evaluate", *given, "force=true", replaced=node)
