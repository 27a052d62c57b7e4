"""Scores of generated images: independent implementations, any batch size, any number of processes, refusals."""

from __future__ import annotations

import os
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchmetrics.image.fid import FrechetInceptionDistance

from rae.metric import (
    CallableDetector,
    EncoderDetector,
    GenerationMetrics,
    InceptionDetector,
    InceptionScore,
    LabelCounts,
    ManifoldMetrics,
    ReferenceBuilder,
)
from rae.metric.features import Detector, Features
from rae.metric.functional import density_coverage, inception_score, kernel_distance, precision_recall
from rae.metric.inception import INCEPTION_URL, find_weights

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


def images_of(count: int, seed: int = 0, low: int = 0, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(low, 256, (count, 3, 2, 2), generator=generator).float()
    return nn.functional.interpolate(coarse, side).byte()


def reference_of(images: torch.Tensor, detector: Detector, kind: str = "training"):
    builder = ReferenceBuilder(detector, kind, crop="center", total=len(images))
    for batch in images.split(50):
        builder.update(batch)
    return builder.compute()


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
    assert scores["precision_toy"], scores["recall_toy"] == precision_recall(b.pool, a.pool, 3)
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
    with pytest.raises(ValueError, match=r"fid, sfid, precision, recall need a reference"):
        GenerationMetrics(detector)
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


# --- detectors ---------------------------------------------------------------------------------------------------


def test_detectors_are_frozen_copies_in_float32():
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout(0.5))
    detector = CallableDetector(network, 4, "mine").train()
    images = images_of(5)
    with torch.autocast("cpu", torch.bfloat16):
        first = detector(images).pool
    assert torch.equal(first, detector(images).pool)
    assert first.dtype == torch.float32
    assert not any(p.requires_grad for p in detector.parameters())
    assert all(p.requires_grad for p in network.parameters())
    assert network.training
    other = CallableDetector(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 4, "mine")
    assert detector.hash != other.hash
    with pytest.raises(ValueError, match=r"must be of shape \(5, 4\), got \(5, 192\)"):
        CallableDetector(nn.Flatten(), 4)(images)
    with pytest.raises(ValueError, match=r"must be float32, got torch.float16 weights"):
        CallableDetector(network.half(), 4)


def test_encoders_are_detectors():
    class Encoder(nn.Conv2d):
        channels = 6

    encoder = Encoder(3, 6, 4, 4)
    detector = EncoderDetector(encoder, "tiny")
    images = images_of(5)
    expected = encoder(images / 255).mean((2, 3))
    torch.testing.assert_close(detector(images).pool, expected)
    real = images_of(100, 3)
    metric = GenerationMetrics(detector, reference_of(real, detector), ["fid", "precision"])
    metric.update(images_of(50, 4))
    assert set(metric.compute()) == {"fd_tiny", "precision_tiny", "samples"}


def test_weights_of_the_detector_are_not_saved(real):
    detector = Toy()
    module = nn.Module()
    module.metric = GenerationMetrics(detector, reference_of(real, detector))
    assert not module.state_dict()
    assert not list(module.parameters())


# --- Inception ---------------------------------------------------------------------------------------------------


def test_missing_inception_weights_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(FileNotFoundError, match=r"neither in .*no network.*metric.detector.checkpoint="):
        InceptionDetector()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        InceptionDetector(str(tmp_path / "none.pth"))
    cached = tmp_path / "checkpoints" / INCEPTION_URL.rsplit("/", 1)[1]
    cached.write_bytes(b"")
    assert find_weights() == cached
    torch.save({"fc.bias": torch.zeros(3)}, cached)
    with pytest.raises(ValueError, match="does not fit InceptionV3"):
        InceptionDetector()


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A detector of random weights, and the file that they are in."""
    torch.manual_seed(1)
    drawn = InceptionDetector(pretrained=False)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(drawn.network.state_dict(), file)
    return InceptionDetector(str(file)), file


@pytest.mark.slow
def test_inception_equals_torch_fidelity(inception):
    detector, file = inception
    images = torch.randint(0, 256, (3, 3, 40, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    pool, logits = theirs(images)
    ours = detector(images)
    torch.testing.assert_close(ours.pool, pool, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    seen = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: seen.append(output))
    theirs(images)
    grid = ours.spatial.view(3, 17, 17, 7)
    torch.testing.assert_close(grid, seen[0][:, :7].permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
    assert ours.spatial.shape == (3, 2023)
    assert not detector.published
    one_by_one = torch.cat([detector(image[None]).pool for image in images])
    torch.testing.assert_close(one_by_one, ours.pool, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_fid_equals_torchmetrics_with_the_same_inception(inception):
    detector, file = inception
    real, fake = images_of(12, 1, side=32), images_of(10, 2, low=100, side=32)
    # Its default resizes with antialiasing, which the graph of 2015 and every published FID do without.
    theirs = FrechetInceptionDistance(2048, antialias=False, feature_extractor_weights_path=str(file))
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    metric = GenerationMetrics(detector, reference_of(real, detector), ["fid", "sfid", "inception_score"])
    metric.update(fake[:4])
    metric.update(fake[4:])
    with pytest.warns(UserWarning, match="fid of 10 samples"):
        scores = metric.compute()
    assert scores["fid"] == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert scores["sfid"] > 0
    assert 1 <= scores["inception_score"] < 20
