"""Images become bytes by floor, as they did for all published scores, or by rounding where that is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rae.cli.models import load
from rae.image import save_png, to_uint8
from rae.io.errors import ConfigError
from rae.metric import ReconstructionMetrics as ReconstructionScores
from rae.training.scores import ScoreReconstructions
from tests.helpers.digits_runs import run
from tests.helpers.small_models import make_generator
from tests.helpers.small_runs import ema_of, train


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    return make_generator().save_pretrained(tmp_path_factory.mktemp("model") / "export")


def published(images: torch.Tensor) -> torch.Tensor:
    """What the original does to decoded images before it writes or scores them."""
    return images.clamp(0, 1).mul(255).to("cpu", dtype=torch.uint8)


def test_bytes_are_those_of_the_published_scores():
    levels = torch.arange(256)
    exact = levels.float() / 255  # as images are read: bytes must come back as they were
    below, above = (torch.nextafter(exact, torch.full_like(exact, towards)) for towards in (-1.0, 2.0))
    edges = torch.tensor([-0.3, -0.0, 1.0, 1.3, torch.inf, -torch.inf, 0.5, 254.999 / 255])
    drawn = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    for images in (exact, below, above, edges, drawn):
        assert torch.equal(to_uint8(images), published(images))
    assert torch.equal(to_uint8(exact), levels.byte())
    assert torch.equal(to_uint8(exact, "round"), levels.byte())
    assert to_uint8(torch.tensor([0.9 / 255, 254.9 / 255])).tolist() == [0, 254]
    assert to_uint8(torch.tensor([0.9 / 255, 254.9 / 255]), "round").tolist() == [1, 255]
    shift = to_uint8(drawn, "round").int() - to_uint8(drawn).int()
    assert shift.unique().tolist() == [0, 1]
    assert 0.2 < shift.float().mean() < 0.6
    with pytest.raises(ValueError, match="quantize='ceil' is unknown; choose floor or round"):
        to_uint8(exact, "ceil")


def test_samples_are_floored_and_their_folder_says_so(exported, tmp_path):
    given = [f"checkpoint={exported}", "samples_per_class=2", "classes=[1,3]", "png=false", "device=cpu"]
    given += ["sampler.grid.points=3"]
    pixels, rules = {}, {}
    for rule in ("floor", "round"):
        chosen = [] if rule == "floor" else ["quantize=round"]
        run("sample", *given, *chosen, f"output_dir={tmp_path / rule}")
        pixels[rule] = torch.from_numpy(np.load(tmp_path / rule / "samples.npz")["arr_0"]).permute(0, 3, 1, 2)
        rules[rule] = json.loads((tmp_path / rule / "samples.json").read_text())["quantize"]
    assert rules == {"floor": "floor", "round": "round"}
    generator = load(exported, ["sampler=euler", "sampler.grid.points=3", "guidance=none"], encode=False)
    images = generator([1, 1, 3, 3], 0, range(4))
    assert (pixels["floor"].int() - published(images).int()).abs().max() <= 1  # packed weights round differently
    assert (pixels["floor"] != published(images)).float().mean() < 0.001
    assert (pixels["round"] != images.mul(255).round().byte()).float().mean() < 0.001
    assert 0.2 < (pixels["round"] != pixels["floor"]).float().mean() < 0.8
    with pytest.raises(ConfigError, match=r"holds other samples \(quantize was .floor. and is now .round.\)"):
        run("sample", *given, "quantize=round", f"output_dir={tmp_path / 'floor'}")


@pytest.mark.slow
def test_scores_tell_by_which_rule_they_were_made(exported, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(1))):
        save_png(image.byte(), images / f"{number}.png")
    found = {}
    for command in ("evaluate", "reconstruct"):
        for rule in ("floor", "round"):
            folder = tmp_path / command / rule
            run(command, f"checkpoint={exported}", f"images={images}", "metric=psnr", f"quantize={rule}",
                "device=cpu", f"output_dir={folder}")  # fmt: skip
            content = json.loads((folder / "scores.json").read_text())
            assert content["identity"]["samples"]["quantize"] == rule
            found[command, rule] = content["scores"]["psnr"]
    assert found["evaluate", "floor"] == pytest.approx(found["reconstruct", "floor"], rel=1e-6)
    assert found["evaluate", "round"] == pytest.approx(found["reconstruct", "round"], rel=1e-6)
    assert abs(found["evaluate", "round"] - found["evaluate", "floor"]) > 1e-4


def test_scores_while_training_follow_the_rule(tmp_path):
    seen = {}
    for rule in ("floor", "round"):
        callback = ScoreReconstructions(ReconstructionScores(), every_n_steps=1, quantize=rule)
        train(1, tmp_path / rule, steps=1, callbacks=(ema_of(1), callback))
        seen[rule] = callback.scores["eval/psnr"]
        written = json.loads((tmp_path / rule / "evaluation" / "step_00000001.json").read_text())
        assert written["identity"]["quantize"] == rule
    assert seen["floor"] != seen["round"]
    with pytest.raises(ValueError, match=r"callbacks\.evaluation: quantize='half' is unknown; choose floor or round"):
        ScoreReconstructions(ReconstructionScores(), quantize="half")
