"""What the field reports: references by name, several at once, FDr6 and MIND, rules that move scores and where they are said."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from scipy.special import rel_entr

from rae.cli.build import make
from rae.cli.errors import compose
from rae.flow import ClassifierFreeGuidance, ComposedGuidance, InternalGuidance, NoGuidance
from rae.io.describe import describe
from rae.metric import FDr6, GenerationMetrics, TimmDetector, read_reference
from rae.metric.functional import mind, permuted_inception_score
from rae.metric.protocol import differences, in_words, protocol_of
from rae.metric.several import NORMALISERS, fdr
from tests.helpers.small_images import images_of, reference_of
from tests.metric.test_generation import Toy, scored

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def real():
    return images_of(120, seed=1)


@pytest.fixture(scope="module")
def fake():
    return images_of(120, seed=2, low=60)


# --- references --------------------------------------------------------------------------------------------------


def test_two_references_in_one_pass_give_the_scores_of_two_passes(real, fake):
    detector = Toy()
    first, second = reference_of(real, detector), reference_of(images_of(90, seed=5), detector)
    names = ["fid", "sfid", "precision", "inception_score"]
    both = scored(GenerationMetrics(detector, {"adm": first, "jit": second}, names), fake)
    alone = [scored(GenerationMetrics(detector, reference, names), fake) for reference in (first, second)]
    assert both == {
        "fd_toy_adm": alone[0]["fd_toy"],
        "fd_toy_jit": alone[1]["fd_toy"],
        "sfid_toy_adm": alone[0]["sfid_toy"],
        "precision_toy_adm": alone[0]["precision_toy"],
        "inception_score_toy": alone[0]["inception_score_toy"],
        "inception_score_std_toy": alone[0]["inception_score_std_toy"],
        "samples": 120.0,
    }
    left = scored(GenerationMetrics(detector, {"adm": None, "jit": second}, names), fake)  # as ~ leaves one out
    assert left["fd_toy_jit"] == alone[1]["fd_toy"]
    assert left["precision_toy_jit"] == alone[1]["precision_toy"]


def test_a_published_reference_is_known_by_its_name_and_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "references" / "imagenet_256_fid_stats.npz"
    with pytest.raises(
        FileNotFoundError, match=r"jit_imagenet256 is references/imagenet_256_fid_stats.npz, .*nanogen-evals"
    ):
        read_reference("jit_imagenet256")
    file.parent.mkdir()
    np.savez(file, ref_mu=np.zeros(3), ref_sigma=np.eye(3))
    found = read_reference("jit_imagenet256")
    assert (found.info.kind, found.info.image_size) == ("training", (256, 256))
    assert found.identity["name"] == "jit_imagenet256"
    with pytest.raises(ValueError, match=r"jit_imagenet256 holds features of 'inception', .* detector is 'toy'"):
        read_reference("jit_imagenet256").for_detector(Toy(), ["moments"])
    np.savez(file, mu=np.ones(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"another hash than at its first use.*the file was changed"):
        read_reference("jit_imagenet256")
    with pytest.raises(FileNotFoundError, match=r"neither a file nor one of adm_imagenet256, adm_imagenet512"):
        read_reference("adm_imagenet265")


# --- FDr6, MIND and the Inception Score --------------------------------------------------------------------------


def named(name: str) -> Toy:
    detector = Toy()
    detector.name = name
    return detector


def test_ratios_stand_beside_the_distances_they_are_of(real, fake):
    spaces = {name: named(name) for name in NORMALISERS}
    metrics = {name: GenerationMetrics(one, reference_of(real, one), ["fid"]) for name, one in spaces.items()}
    scores = scored(FDr6(**metrics), fake)
    distance = scores["fid"]
    assert scores["fd_mae_cls"] == distance
    assert scores["fdr_mae_cls"] == pytest.approx(distance / 0.04)
    assert scores["fdr6"] == pytest.approx(np.mean([distance / value for value in NORMALISERS.values()]))
    assert "fdr6" not in fdr({"inception": 2.0})
    first, second = (reference_of(images, spaces["mae_cls"]) for images in (real, images_of(90, seed=5)))
    several = FDr6(mae_cls=GenerationMetrics(spaces["mae_cls"], {"a": first, "b": second}, ["fid"]))
    found = scored(several, fake)
    assert found["fdr_mae_cls"] == pytest.approx(found["fd_mae_cls_a"] / 0.04)  # the first reference counts
    with pytest.raises(ValueError, match=r"FDr6 has no space 'toy'"):
        FDr6(toy=metrics["mae_cls"])
    with pytest.raises(ValueError, match=r"metric.clip_cls has detector 'mae_cls'"):
        FDr6(clip_cls=metrics["mae_cls"])


def test_mind_is_of_as_many_samples_as_features(real, fake):
    detector = Toy()
    metric = GenerationMetrics(detector, reference_of(real, detector), ["mind"])
    order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(3))
    expected = mind(detector(fake).pool, detector(real).pool).item()
    assert scored(metric, fake, order, batch=50)["mind_toy"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match=r"60 samples, 120 features; draw 120 samples, or build .* kept=60"):
        metric.prepare(fake.shape[-1], 60)


def test_splits_may_be_of_a_permutation(fake):
    detector = Toy()
    order = torch.arange(len(fake)).flip(0)
    found = scored(
        GenerationMetrics(detector, metrics=["inception_score"], protocol="raev2"), fake[:117], order[3:], 40
    )
    probabilities = detector(fake[:117]).probabilities.double().numpy()
    shuffled = probabilities[np.random.RandomState(0).permutation(117)]
    splits = [shuffled[11 * part : 11 * part + 11] for part in range(10)]
    divergences = [rel_entr(one, one.mean(0)).sum(1).mean() for one in splits]
    assert found["inception_score_toy"] == pytest.approx(np.exp(divergences).mean(), rel=1e-6)
    assert found["inception_score_std_toy"] == pytest.approx(np.exp(divergences).std(), rel=1e-5)
    with pytest.raises(ValueError, match="at least 10 samples, got 9"):
        permuted_inception_score(torch.rand(9, 4))


@pytest.mark.parametrize(
    ("model", "side", "pool", "arguments"),
    [
        ("vit_tiny_patch16_224", 32, "class", SMALL),
        ("vit_tiny_patch16_224", 38, "class", {**SMALL, "dynamic_img_size": True, "dynamic_img_pad": True}),
        ("vit_base_patch16_siglip_224", 32, "attention", SMALL),
        ("convnextv2_atto", 64, "mean", {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}),
    ],
)
def test_features_are_those_of_the_network(model, side, pool, arguments):
    detector = TimmDetector(model, "small", side, pool, [0.5] * 3, [0.25] * 3, pretrained=False, arguments=arguments)
    network = timm.create_model(model, **arguments).eval()
    network.load_state_dict(detector.network.state_dict())
    images = images_of(3, seed=4)
    pixels = F.interpolate(images.float(), (side, side), mode="bicubic", antialias=True) / 255
    with torch.no_grad():
        tokens = network.forward_features((pixels - 0.5) / 0.25)
        if pool == "mean":
            expected = tokens.mean((2, 3))
        else:
            expected = network.pool(tokens, "map" if pool == "attention" else "token")
    assert detector(images).pool.shape == (3, detector.width)
    torch.testing.assert_close(detector(images).pool, expected)


def test_detectors_that_cannot_be_had_are_refused():
    with pytest.raises(ValueError, match=r"detector.pool='max' is unknown"):
        TimmDetector("vit_tiny_patch16_224", "x", 32, "max", [0.5] * 3, [0.5] * 3, pretrained=False)
    with pytest.raises(ValueError, match=r"does not pool its tokens by attention"):
        TimmDetector(
            "vit_tiny_patch16_224", "x", 32, "attention", [0.5] * 3, [0.5] * 3, pretrained=False, arguments=SMALL
        )


# --- what is said of them ----------------------------------------------------------------------------------------


def test_differences_from_the_protocol_are_named(real):
    detector = Toy()
    metric = GenerationMetrics(detector, reference_of(real, detector), ["fid"], protocol="raev2", split_rule="ordered")
    samples = {"label_rule": "random", "quantize": "floor", "precision": "bf16-mixed"}
    rules = protocol_of({"samples": samples, "metric": metric.identity})
    assert (rules["labels"], rules["bytes"], rules["split_rule"], rules["detector"]) == (
        "random",
        "floor",
        "ordered",
        "toy",
    )
    assert rules["sampler"] == "unknown"
    assert in_words(rules) == "rules: labels random, bytes floor, precision bf16-mixed, split_rule ordered"
    guided = {
        "guidance": {"_target_": "rae.flow.ClassifierFreeGuidance", "scale": 1.5},
        "evaluations": {"denoiser": 98},
    }
    said = in_words(protocol_of({"samples": {**samples, **guided}, "metric": {}}))
    assert said == "rules: labels random, bytes floor, precision bf16-mixed, ClassifierFreeGuidance 1.5, 98 evaluations"
    parts = [InternalGuidance(1.8), ClassifierFreeGuidance(1.5), NoGuidance()]
    composed = {"guidance": describe(ComposedGuidance(parts))}
    said = in_words(protocol_of({"samples": {**samples, **composed}, "metric": {}}))
    assert said.endswith("bf16-mixed, InternalGuidance 1.8 + ClassifierFreeGuidance 1.5 + NoGuidance")
    assert differences(rules) == [
        "labels: random where raev2 has balanced",
        "split_rule: ordered where raev2 has permuted",
        "reference: None where raev2 has jit_imagenet256",
    ]
    of_a_set = protocol_of({"samples": samples, "metric": {"one": metric.identity}})
    assert "one: labels: random where raev2 has balanced" in differences(of_a_set)
    known = GenerationMetrics(detector, reference_of(real, detector), ["density"], density_neighbours=4).identity
    assert known["density_neighbours"] == 4  # which moves the score
    assert "density_neighbours" not in metric.identity
    with pytest.raises(ValueError, match=r"protocol='jit' is unknown; choose one of adm, raev2, ours"):
        GenerationMetrics(detector, metrics=["inception_score"], protocol="jit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width"),
    [("convnext", 1024), ("dinov2_cls", 1024), ("mae_cls", 1024), ("siglip_cls", 1152), ("clip_cls", 1024)],
)
def test_networks_of_fdr6_give_the_features_of_their_table(name, width):
    node = compose("evaluate", ["metric=fdr6"]).metric[name].detector
    node.pretrained = False
    with torch.device("meta"):
        detector = make(node)
        assert (detector.name, detector.autocast) == (name, None if name == "convnext" else torch.bfloat16)
        detector.autocast = None  # which that device does not know
        assert detector.extract(torch.empty(2, 3, 256, 256, dtype=torch.uint8)).pool.shape == (2, width)
