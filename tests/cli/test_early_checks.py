"""What can be refused is refused before a weight is looked for or an image drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rae.cli.checks import check_files
from rae.cli.errors import compose
from rae.commands import sample, sources
from rae.flow import EulerSampler, FullGrid
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.metric import CallableDetector, MetricSet, ReferenceBuilder, write_reference
from rae.metric import GenerationMetrics as GenerationScores
from rae.metric import ReconstructionMetrics as ReconstructionScores
from rae.training.preview import SamplePreview
from rae.training.scores import ScoreReconstructions, ScoreSamples
from tests.helpers.digits_runs import run
from tests.helpers.small_models import make_generator
from tests.helpers.small_runs import ema_of, train

TINY = {"_target_": "rae.encoder.tiny_encoder", "input_size": 32, "channels": 32, "stride": 8}
DETECTOR = {"_target_": "rae.metric.EncoderDetector", "name": "tiny", "encoder": TINY}


def pooled(name: str = "pooled", shift: float = 0.0) -> CallableDetector:
    layer = torch.nn.Conv2d(3, 4, 4, stride=4, bias=False)
    torch.nn.init.constant_(layer.weight, 0.1 + shift)
    network = torch.nn.Sequential(layer, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return CallableDetector(network, 4, name)


def reference_of(path: Path, detector=None, kind: str = "training", side: int = 32, kept: int = 0) -> Path:
    builder = ReferenceBuilder(detector or pooled(), kind, total=12, kept=kept)
    rng = torch.Generator().manual_seed(0)
    builder.update(torch.randint(0, 256, (12, 3, side, side), generator=rng).byte())
    return write_reference(path, builder.compute())


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return make_generator().save_pretrained(tmp_path_factory.mktemp("model") / "export")


@pytest.fixture(autouse=True)
def _nothing_is_drawn(monkeypatch):
    """Whoever draws or reconstructs fails the test."""

    def draws(*_, **__):
        raise AssertionError("images are made before the checks")

    for name in ("draw", "forward"):
        monkeypatch.setattr(Generator, name, draws)
    for command in (sources, sample):
        monkeypatch.setattr(command, "draw", draws)
    monkeypatch.setattr("rae.autoencoder.RAE.forward", draws)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([], ConfigError, "give one of them, samples=… .*, checkpoint=…"),
        (["checkpoint=tests"], ValueError, r"fid, sfid, precision, recall need a reference: give metric\.reference="),
        (["checkpoint=tests", "metric=all"], ValueError, r"fid, sfid, precision, recall need a reference"),
        (
            ["checkpoint=tests", "metric.reference=absent.npz"],
            FileNotFoundError,
            r"metric\.reference=absent.npz does not exist",
        ),
        (["samples=tests", "metric=reconstruction"], ConfigError, "add originals="),
        (["samples=absent.npz", "metric.metrics=[inception_score]"], FileNotFoundError, "samples=absent.npz does not"),
        (
            ["samples=tests", "originals=absent", "metric=reconstruction"],
            FileNotFoundError,
            "originals=absent does not",
        ),
    ],
)
def test_what_is_missing_is_said_before_weights_are_looked_for(given, kind, message, tmp_path):
    """Inception's weights are not here: looking for them would be another error."""
    with pytest.raises(kind, match=message):
        run("evaluate", *given, f"output_dir={tmp_path}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", ["download model=dit_dh_xl_256", "cost stage=2 teacher_checkpoint=models/absent"])
def test_commands_that_read_no_weights_ask_for_none(given, tmp_path, monkeypatch):
    """Where a folder of that name is here, what lies below it is no hub id."""
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    command, *overrides = given.split()
    check_files(compose(command, overrides), command)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["fid", "precision"]}, r"features of detector 'tiny' are needed, but reference .* holds moments alone"),
        ({"detector": {**DETECTOR, "encoder": {**TINY, "seed": 1}}},
         r"holds numbers of other weights of it \(hash [0-9a-f]{12}…, here [0-9a-f]{12}…\) and no images"),
        ({"detector": {**DETECTOR, "name": "other"}}, r"holds numbers of detector 'tiny' \(hash"),
        ({"samples": 50}, "50 samples are claimed, but 8 were given"),
        ({"balanced": True, "num_classes": 3}, "class 2 has 0 and class 0 has 4"),
        ({"reference": "small"}, r"images are 32×32, but reference .* is of images of 16×16"),
    ],
)  # fmt: skip
def test_samples_are_not_drawn_for_a_metric_that_refuses_them(changes, message, exported, tmp_path):
    from omegaconf import OmegaConf

    from rae.cli.build import make

    side = 16 if changes.get("reference") == "small" else 32
    detector = make(OmegaConf.create({**DETECTOR, "encoder": {**TINY, "input_size": 32}}))
    path = reference_of(tmp_path / "reference.npz", detector, side=side)
    node = {"_target_": "rae.metric.GenerationMetrics", "detector": DETECTOR, "metrics": ["fid"], **changes}
    sets = {"_target_": "rae.metric.MetricSet", "one": {**node, "reference": str(path)}}
    given = [f"checkpoint={exported}", "classes=[0,1]", "samples_per_class=4", "device=cpu"]
    for metric in (sets["one"], sets):
        with pytest.raises(ValueError, match=message):
            run("evaluate", *given, f"output_dir={tmp_path}/scores", replaced={"metric": metric})


def test_reconstructions_are_not_made_for_a_metric_that_refuses_them(exported, tmp_path):
    path = reference_of(tmp_path / "reference.npz", kind="validation", side=24)
    node = {"_target_": "rae.metric.ReconstructionMetrics", "detector": DETECTOR, "reference": str(path)}
    (tmp_path / "images").mkdir()
    from rae.image import save_png

    save_png(torch.zeros(3, 32, 32).byte(), tmp_path / "images" / "a.png")
    given = [f"checkpoint={exported}", f"images={tmp_path}/images", "device=cpu", f"output_dir={tmp_path}/scores"]
    for command in ("evaluate", "reconstruct"):
        with pytest.raises(ValueError, match=r"images are 32×32, but reference .* is of images of 24×24"):
            run(command, *given, replaced={"metric": node})
    with pytest.raises(ConfigError, match=r"interpolations=5 are between two images; raise grid_pairs=32 or count"):
        run("reconstruct", *given, "interpolations=5")


def test_training_does_not_begin_with_an_evaluation_that_must_fail(tmp_path):
    path = reference_of(tmp_path / "reference.npz", side=16)
    cases = [
        (GenerationScores(pooled(), path, ["fid", "precision"]), r"features of detector 'pooled' are needed"),
        (MetricSet(one=GenerationScores(pooled(shift=0.1), path, ["fid"])), "holds numbers of other weights of it"),
        (GenerationScores(pooled(), path, ["fid"], samples=7), "7 samples are claimed, but 8 were given"),
    ]
    for scores, message in cases:
        callback = ScoreSamples(scores, EulerSampler(FullGrid(3)), samples_per_class=2, every_n_steps=1)
        with pytest.raises(ValueError, match=message):
            train(2, tmp_path, steps=1, callbacks=(ema_of(2), callback))
    scores = GenerationScores(pooled(), reference_of(tmp_path / "fitting.npz", side=16), ["fid"])
    for callback in (
        ScoreSamples(scores, EulerSampler(FullGrid(3)), classes=[3, 4]),
        SamplePreview(EulerSampler(FullGrid(3)), classes=[3, 4]),
    ):
        with pytest.raises(ValueError, match=r"classes must lie in \[0, 3\] \(denoiser\.num_classes=4\), got \[4\]"):
            train(2, tmp_path, steps=1, callbacks=(ema_of(2), callback))
    validation = reference_of(tmp_path / "validation.npz", kind="validation", side=24)
    for scores, count, message in (
        (ReconstructionScores(pooled(), reference=validation), None, "images are 16×16, but reference .* of 24×24"),
        (ReconstructionScores(), 9, "count=9, but the data has 8 validation images"),
    ):
        callback = ScoreReconstructions(scores, count=count, every_n_steps=1)
        with pytest.raises(ValueError, match=message):
            train(1, tmp_path, steps=1, callbacks=(ema_of(1), callback))
