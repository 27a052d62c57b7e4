"""Scores of generated images: independent implementations, any batch size, any number of processes, refusals."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from rae.metric import (
    CallableDetector,
    GenerationMetrics,
    InceptionScore,
    LabelCounts,
    ManifoldMetrics,
    ReferenceBuilder,
)
from rae.metric.features import Detector, Features
from rae.metric.functional import density_coverage, inception_score, kernel_distance, precision_recall
from tests.helpers.small_images import images_of, reference_of

WIDTH, CLASSES = 12, 5
EVERY = ["fid", "sfid", "inception_score", "precision", "recall", "density", "coverage", "kid"]


class Toy(Detector):
    """A detector with all three outputs."""

    def __init__(self, batch_size: int = 64, broken: bool = False) -> None:
        super().__init__("toy", WIDTH, spatial_width=6, classes=CLASSES, batch_size=batch_size)
        self.broken = broken
        self.classify = nn.Linear(WIDTH, CLASSES)
        with torch.no_grad():
            self.classify.bias.zero_()
            self.classify.weight.copy_(torch.linspace(-9, 9, WIDTH * CLASSES).reshape(CLASSES, WIDTH).sin() * 20)
        self.freeze()

    def extract(self, images: torch.Tensor) -> Features:
        x = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        if self.broken:
            x = x * torch.nan
        return Features(x, x[:, :6] ** 2, self.classify(x).softmax(1))


# --- one pass ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    return images_of(300, seed=1)


@pytest.fixture(scope="module")
def fake():
    return images_of(200, seed=2, low=60)


def scored(metric: GenerationMetrics, images: torch.Tensor, order=None, batch: int = 64) -> dict[str, float]:
    index = torch.arange(len(images)) if order is None else order
    for part in index.split(batch):
        metric.update(images[part], index=part)
    return metric.compute()


def test_all_scores_in_one_pass(real, fake):
    detector = Toy()
    scores = scored(GenerationMetrics(detector, reference_of(real, detector), EVERY), fake)
    a, b = detector(real), detector(fake)
    assert scores["samples"] == 200
    assert scores["fd_toy"] > 0
    assert (scores["precision_toy"], scores["recall_toy"]) == pytest.approx(precision_recall(b.pool, a.pool, 3))
    assert scores["kid_toy"] == pytest.approx(kernel_distance(b.pool, a.pool).item(), rel=1e-6)
    assert scores["inception_score_toy"] == pytest.approx(inception_score(b.probabilities)[0].item(), rel=1e-6)
    assert (scores["density_toy"], scores["coverage_toy"]) == pytest.approx(density_coverage(b.pool, a.pool, 5))
    assert list(scores)[:8] == [f"{name}_toy" if name != "fid" else "fd_toy" for name in EVERY]


def test_scores_do_not_depend_on_batches_or_order(real, fake):
    detector = Toy()
    reference = reference_of(real, detector)
    options = {"metrics": EVERY, "split_size": 64}
    whole = scored(GenerationMetrics(detector, reference, **options), fake, batch=200)
    for batch, order in ((7, None), (64, torch.arange(200).flip(0))):
        found = scored(GenerationMetrics(Toy(batch_size=3), reference, **options), fake, order, batch)
        assert found == pytest.approx(whole, rel=1e-5)


def test_parts_of_two_processes_equal_the_whole(real, fake):
    detector = Toy()
    reference = reference_of(real, detector)
    whole = scored(GenerationMetrics(detector, reference, EVERY, split_size=64), fake)
    parts = [GenerationMetrics(detector, reference, EVERY, split_size=64) for _ in range(2)]
    for rank, part in enumerate(parts):
        for index in torch.arange(rank, 200, 2).split(30):
            part.update(fake[index], index=index)
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == pytest.approx(whole, rel=1e-6)
    parts[0].reset()
    assert scored(parts[0], fake) == pytest.approx(whole, rel=1e-6)
    with pytest.raises(ValueError, match="of the same metrics can be merged"):
        parts[0].merge_state(GenerationMetrics(detector, metrics=["inception_score"]))


def _process(rank: int, world: int, folder: str, images: torch.Tensor, real: torch.Tensor) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    detector = Toy()
    builder = ReferenceBuilder(detector, "training", total=len(real), kept=100)
    for index in torch.arange(rank, len(real), world).split(50):
        builder.update(real[index], index)
    reference = builder.compute()
    metric = GenerationMetrics(detector, reference, EVERY, split_size=64)
    mine = torch.arange(0, 150) if rank == 0 else torch.arange(150, len(images))  # unequal shares
    for index in mine.split(40):
        metric.update(images[index], index=index)
    torch.save((metric.compute(), reference.info.hash, reference.statistics.features), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(real, fake, tmp_path):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.multiprocessing.spawn(_process, (2, str(tmp_path), fake, real), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    detector = Toy()
    builder = ReferenceBuilder(detector, "training", total=len(real), kept=100)
    builder.update(real)
    reference = builder.compute()
    whole = scored(GenerationMetrics(detector, reference, EVERY, split_size=64), fake)
    for scores, _, features in results:
        assert scores == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(features, reference.statistics.features)


def test_weights_of_the_detector_are_not_saved(real):
    detector = Toy()
    module = nn.Module()
    module.metric = GenerationMetrics(detector, reference_of(real, detector))
    assert not module.state_dict()
    assert not list(module.parameters())


# --- refusals ----------------------------------------------------------------------------------------------------


def test_bad_samples_are_named(real, fake):
    detector = Toy()
    reference = reference_of(real, detector)
    metric = GenerationMetrics(detector, reference, samples=10, num_classes=2, balanced=True)
    with pytest.raises(ValueError, match=r"images must be bytes .* got torch.float32"):
        metric.update(fake / 255)
    with pytest.raises(ValueError, match="empty"):
        metric.update(fake[:0])
    with pytest.raises(ValueError, match=r"images are 4×4, but reference in memory is of images of 8×8"):
        metric.update(fake[:, :, :4, :4])
    with pytest.raises(ValueError, match="needs the labels"):
        metric.update(fake[:4])
    with pytest.raises(ValueError, match=r"labels must lie in 0…1, got 0…5"):
        metric.update(fake[:2], torch.tensor([0, 5]))
    metric.reset()
    metric.update(fake[:4], torch.tensor([0, 1, 0, 0]))
    with pytest.raises(ValueError, match="10 samples are claimed, but 4 were given"):
        metric.compute()
    metric.samples = None
    with pytest.raises(ValueError, match="class 1 has 1 and class 0 has 3"):
        metric.compute()


def test_bad_options_are_named(real):
    detector = Toy()
    reference = reference_of(real[:30], detector, kind="validation")
    with pytest.raises(ValueError, match=r"is of kind 'validation' .* needs kind 'training'"):
        GenerationMetrics(detector, reference)
    assert GenerationMetrics(detector, reference, reference_kind="validation").reference is reference
    for nothing in (None, {}, {"adm": None}):
        with pytest.raises(ValueError, match=r"fid, sfid, precision, recall need a reference"):
            GenerationMetrics(detector, nothing)
    with pytest.raises(ValueError, match=r"one or more of fid, sfid"):
        GenerationMetrics(detector, reference, ["fidd"])
    plain = CallableDetector(lambda x: x.mean((2, 3)), 3)
    with pytest.raises(ValueError, match="sfid cannot be had of detector 'features'"):
        GenerationMetrics(plain, reference)
    with pytest.raises(TypeError, match="must be a Detector"):
        GenerationMetrics(lambda x: x, reference)
    with pytest.raises(ValueError, match="balanced=true needs num_classes"):
        GenerationMetrics(detector, reference, reference_kind="validation", balanced=True)
    with pytest.raises(ValueError, match="precision='half' is unknown"):
        GenerationMetrics(detector, reference, reference_kind="validation", distance_precision="half")


def test_few_samples_are_mentioned(real, fake):
    detector = Toy()
    metric = GenerationMetrics(detector, reference_of(real, detector), ["fid"])
    metric.update(fake[:12])
    with pytest.warns(UserWarning, match="fid of 12 samples: the covariance of 12 features needs at least 13"):
        metric.compute()


def test_broken_features_are_refused(real, fake):
    detector = Toy()
    reference = reference_of(real, detector)
    metric = GenerationMetrics(Toy(broken=True), reference)
    metric.update(fake)
    with pytest.raises(ValueError, match="features of 200 samples hold NaN"):
        metric.compute()


def test_samples_counted_twice_are_refused():
    metrics = [InceptionScore(2, split_size=4) for _ in range(2)]
    for metric in metrics:
        metric.update(torch.full((3, 2), 0.5))
    metrics[0].merge_state(metrics[1])
    with pytest.raises(ValueError, match=r"holds 6 samples, more than split_size=4"):
        metrics[0].compute()
    with pytest.raises(ValueError, match="raise splits"):
        metrics[0].update(torch.full((1, 2), 0.5), torch.tensor([4 * 256]))
    counts = LabelCounts(2)
    counts.update(torch.tensor([0, 1, 1, 0]))
    counts.check_balance()


def test_manifold_metrics_need_a_reference():
    metric = ManifoldMetrics(3, ["precision"])
    metric.update(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="call set_reference first"):
        metric.compute()
    with pytest.raises(ValueError, match="B×3"):
        metric.update(torch.zeros(5, 4))


def test_samples_are_counted_anew_after_a_reset():
    """The last split holds five samples: numbers that went on would fill it, and divide the same samples otherwise."""
    torch.manual_seed(0)
    probabilities = torch.randn(3 * 8 * 8, 4)
    detector = CallableDetector(
        lambda images: (images.flatten(1)[:, :6], (images.flatten(1) @ probabilities).softmax(1)), 6, classes=4
    )
    metric = GenerationMetrics(detector, None, ["inception_score"], split_size=10, split_rule="ordered")
    images = torch.randint(0, 256, (95, 3, 8, 8), dtype=torch.uint8)
    metric.update(images)
    first = metric.compute()
    metric.reset()
    metric.update(images)
    assert metric.compute() == first
