"""The demo's judge: what it says of real digits, of copies and of noise."""

from __future__ import annotations

import pytest
import torch

from rae.data.digits import DigitsDataset
from rae.demo.scores import DigitsScores


@pytest.fixture(scope="module")
def scores() -> DigitsScores:
    return DigitsScores()


@pytest.fixture(autouse=True)
def _empty(scores: DigitsScores) -> None:
    scores._images.clear()
    scores._labels.clear()


@pytest.mark.slow
def test_held_out_digits_are_perfect_samples(scores: DigitsScores):
    real = DigitsDataset("held_out", 32)
    for start in (0, 100):  # in two batches
        end = start + 100 if start == 0 else None
        scores.update(real.images[start:end], torch.tensor(real.labels[start:end]))
    result = scores.compute()
    assert result["accuracy"] == result["judge_accuracy"] > 0.97
    assert result["frechet"] == pytest.approx(0, abs=1e-6)
    assert 0 < result["frechet_real"] < 1
    assert result["spread_samples"] == pytest.approx(result["spread_real"])
    assert result["nearest_train_samples"] == pytest.approx(result["nearest_train_held_out"])
    assert result["share_nearer_than_any_held_out"] == 0


def test_copies_of_training_digits_are_found_out(scores: DigitsScores):
    train = DigitsDataset("train", 32)
    scores.update(train.images[:100], torch.tensor(train.labels[:100]))
    result = scores.compute()
    assert result["nearest_train_samples"] == pytest.approx(0, abs=1e-6)
    assert result["share_nearer_than_any_held_out"] == 1


def test_noise_and_wrong_labels_score_badly(scores: DigitsScores):
    real = DigitsDataset("held_out", 32)
    scores.update(real.images[:100], (torch.tensor(real.labels[:100]) + 1) % 10)
    assert scores.compute()["accuracy"] < 0.03
    scores._images.clear()
    scores._labels.clear()
    noise = torch.randint(0, 256, (100, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    scores.update(noise, torch.arange(100) % 10)
    result = scores.compute()
    assert result["frechet"] > 10 * result["frechet_real"]


def test_bad_input_is_refused_in_words(scores: DigitsScores):
    with pytest.raises(ValueError, match="call update first"):
        scores.compute()
    with pytest.raises(ValueError, match="without labels"):
        scores.update(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), None)
    with pytest.raises(ValueError, match=r"B×3×32×32.*\(1, 3, 28, 28\)"):
        scores.update(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"labels must be digits, 0 to 9, got \[10, 11\]"):
        scores.update(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([11, 3, 10]))


def test_there_may_be_more_samples_of_a_digit_than_real_ones(scores: DigitsScores):
    noise = torch.randint(0, 256, (400, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    scores.update(noise, torch.arange(400) % 2)
    assert 0 < scores.compute()["frechet_real"] < float("inf")
