"""APG, CFG-Zero* and compositions: diffusers' guiders, formulas by hand, what a sample depends on, exports and commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import guiders
from torch import Tensor

import rae
from rae import flow
from rae.cli.build import make
from rae.cli.checks import check_denoiser
from rae.cli.errors import compose
from rae.commands.sample import sample
from rae.flow import AdaptiveProjectedGuidance as Projected
from rae.flow import AutoGuidance, ComposedGuidance, InternalGuidance, NoGuidance, evaluations
from rae.flow import ClassifierFreeGuidance as Plain
from rae.flow import ClassifierFreeZeroStarGuidance as ZeroStar
from rae.flow.path import like
from rae.generator import Generator
from rae.io.describe import describe, rebuild
from rae.io.errors import ConfigError
from tests.helpers.small_models import make_generator
from tests.helpers.text_runs import make_text_generator

TOLD, NULL = {"label": torch.zeros(3)}, {"label": torch.ones(3)}
GUIDE_WEIGHT = 0.3


class Network:
    """A denoiser with a base head whose values are those of a formula, row by row; it counts rows."""

    def __init__(self, weight: float = 1.0) -> None:
        self.weight, self.rows = weight, 0

    def head(self, x: Tensor, t: Tensor, label: Tensor, depth: float = 1.0) -> Tensor:
        given = like(label, x)
        return torch.sin(self.weight * x * (2 - given) + depth + like(t, x)) * (1 + given)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor, base: bool = False):
        self.rows += len(x)
        full = self.head(x, t, label)
        return (full, self.head(x, t, label, 0.5)) if base else full


def steerable() -> Generator:
    """A model for which a class makes a difference of grey levels."""
    model = make_generator()
    for parameter in model.denoiser.parameters():
        parameter.data *= 4
    torch.nn.init.normal_(
        model.denoiser.label_embedding.table.weight, std=5, generator=torch.Generator().manual_seed(0)
    )
    model.sampler = flow.EulerSampler(flow.PublishedGrid(5))
    return model


def states(seed: int = 0, count: int = 3) -> Tensor:
    return torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(seed))


def both(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Predictions for the condition and for the null condition."""
    times = torch.full((len(x),), t)
    return tuple(Network().head(x, times, told["label"][: len(x)]) for told in (TOLD, NULL))


# --- the guiders of diffusers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "momentum", "limit", "eta"),
    [(1.5, 0.0, None, 1.0), (4.0, 0.0, None, 0.0), (4.0, 0.0, 3.0, 0.3), (7.5, -0.75, 3.0, 0.0), (0.5, 0.5, None, 0.6)],
)
def test_apg_equals_diffusers_over_several_steps(scale, momentum, limit, eta):
    """Diffusers' adds guidance_scale · update to the prediction for the condition; ours is w − 1 of it, on data estimates."""
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=scale - 1,
        adaptive_projected_guidance_momentum=momentum,
        adaptive_projected_guidance_rescale=limit or 0.0,
        eta=eta,
        use_original_formulation=True,
    )
    velocity, limited = Projected(scale, (0.0, 1.0), momentum, limit, eta)(Network(), TOLD, NULL), 0
    for step, t in enumerate((1.0, 0.7, 0.2, 0.01)):
        guider.set_state(step, 4, torch.tensor(t))
        guider.prepare_inputs({})
        x = states(step)
        conditional, unconditional = (x - t * prediction for prediction in both(x, t))
        expected = guider.forward(conditional, unconditional).pred
        torch.testing.assert_close(x - t * velocity(x, t), expected, rtol=1e-5, atol=1e-5)
        limited += sum((conditional - unconditional).flatten(1).norm(dim=1) > (limit or torch.inf))
    assert limit is None or 0 < limited < 12  # some samples are, some are not


@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("original", [False, True])
def test_cfg_zero_equals_diffusers(scale, original):
    guider = guiders.ClassifierFreeZeroStarGuidance(
        guidance_scale=scale - 1 if original else scale, zero_init_steps=1, use_original_formulation=original
    )
    velocity = ZeroStar(scale)(Network(), TOLD, NULL)
    for step, t in enumerate((1.0, 0.7, 0.0)):
        guider.set_state(step, 3, torch.tensor(t))
        x = states(step)
        torch.testing.assert_close(velocity(x, t), guider.forward(*both(x, t)).pred, rtol=1e-5, atol=1e-5)
        assert velocity(x, t).any() == (step > 0)


# --- closed forms -------------------------------------------------------------------------------------------------


def test_apg_without_its_parts_is_classifier_free_guidance():
    x = states()
    for t in (1.0, 0.5, 0.007):
        found = Projected(3.0, momentum=0.0, eta=1.0)(Network(), TOLD, NULL)(x, t)
        torch.testing.assert_close(found, Plain(3.0)(Network(), TOLD, NULL)(x, t), rtol=1e-4, atol=1e-5)


def test_the_update_of_apg_is_orthogonal_to_the_estimate_and_no_longer_than_the_limit():
    x, t, scale, limit = states().double(), 0.6, 4.0, 2.5
    conditional, unconditional = (x - t * prediction for prediction in both(x, t))
    guided = x - t * Projected(scale, momentum=0.0, norm_limit=limit)(Network(), TOLD, NULL)(x, t)
    update = (guided - conditional).flatten(1) / (scale - 1)
    assert ((update * conditional.flatten(1)).sum(1).abs() < 1e-6).all()
    assert (update.norm(dim=1) <= limit).all()
    difference = (conditional - unconditional).flatten(1)
    assert (difference.norm(dim=1) > limit).any()
    kept = x - t * Projected(scale, momentum=0.0, norm_limit=limit, eta=0.5)(Network(), TOLD, NULL)(x, t)
    parallel = (kept - guided).flatten(1) / (scale - 1)  # half of it
    shortened = difference * (limit / difference.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(update + 2 * parallel, shortened, rtol=1e-6, atol=1e-6)


def test_momentum_adds_the_differences_before():
    t, beta = 0.5, -0.4
    velocity = Projected(3.0, (0.0, 0.6), beta, eta=1.0)(Network(), TOLD, NULL)
    velocity(states(9), 0.9)  # outside the interval: no difference is made
    total = torch.zeros(3, 4, 3, 3)
    for seed in range(3):
        x = states(seed)
        conditional, unconditional = both(x, t)
        total = (conditional - unconditional) + beta * total
        torch.testing.assert_close(velocity(x, t), conditional + 2 * total, rtol=1e-4, atol=1e-4)


def test_apg_leaves_the_end_alone():
    x, network = states(), Network()
    velocity = Projected(3.0)(network, TOLD, NULL)
    velocity(x, 1e-6)
    assert torch.equal(velocity(x, 0.0), both(x, 0.0)[0])
    assert network.rows == 6 + 3
    sampler = flow.HeunSampler(flow.FullGrid(4))  # which asks for the velocity at 0
    assert sampler.sample(velocity, x).isfinite().all()


def test_predictions_that_are_zero():
    zero = torch.zeros(3, 4, 3, 3)
    for rule in (Projected(3.0, norm_limit=1.0), ZeroStar(3.0)):
        assert torch.equal(rule(lambda x, t, label: torch.zeros_like(x), TOLD, NULL)(zero, 0.5), zero)


RULES = {
    "apg": Projected(1.0),
    "cfg_zero": ZeroStar(1.0),
    "composed": ComposedGuidance([InternalGuidance(1.0), Projected(1.0), AutoGuidance(1.0)]),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_scale_of_1_is_the_plain_prediction(rule):
    x, network, guide = states(), Network(), Network()
    assert "null" not in rule.needs
    for t in (1.0, 0.5, 0.0):
        assert torch.equal(rule(network, TOLD, guide=guide)(x, t), both(x, t)[0])
    assert (network.rows, guide.rows) == (9, 0)


# --- composition --------------------------------------------------------------------------------------------------


def by_hand(x: Tensor, t: float, internal: float = 1.0, cfg: float = 1.0, auto: float = 1.0) -> Tensor:
    """Internal guidance of both predictions, classifier-free guidance of these, autoguidance of that."""
    times, network = torch.full((3,), t), Network()
    heads = [(network.head(x, times, one["label"]), network.head(x, times, one["label"], 0.5)) for one in (TOLD, NULL)]
    c, u = (base + internal * (full - base) for full, base in heads)
    weak = Network(GUIDE_WEIGHT).head(x, times, TOLD["label"])
    return weak + auto * (u + cfg * (c - u) - weak)


@pytest.mark.parametrize(
    ("parts", "scales"),
    [
        ([InternalGuidance(1.8), Plain(2.5)], (1.8, 2.5, 1.0)),
        ([Plain(2.5), AutoGuidance(1.4)], (1.0, 2.5, 1.4)),
        ([InternalGuidance(1.8), AutoGuidance(1.4)], (1.8, 1.0, 1.4)),
        ([InternalGuidance(1.8), Plain(2.5), AutoGuidance(1.4)], (1.8, 2.5, 1.4)),
        ([InternalGuidance(1.8), ComposedGuidance([Plain(2.5), NoGuidance()]), AutoGuidance(1.4)], (1.8, 2.5, 1.4)),
        ([InternalGuidance(1.8), Projected(2.5, momentum=0, eta=1), AutoGuidance(1.4)], (1.8, 2.5, 1.4)),
    ],
)
def test_compositions_by_hand(parts, scales):
    x = states()
    velocity = ComposedGuidance(parts)(Network(), TOLD, NULL, Network(GUIDE_WEIGHT))
    torch.testing.assert_close(velocity(x, 0.5), by_hand(x, 0.5, *scales), rtol=1e-4, atol=1e-5)


def test_the_order_is_that_of_the_list():
    """Autoguidance inside classifier-free guidance steers both predictions away from the guide's."""
    x, t = states(), 0.5
    guide = Network(GUIDE_WEIGHT)
    weak = [guide.head(x, torch.full((3,), t), one["label"]) for one in (TOLD, NULL)]
    c, u = (away + 1.4 * (own - away) for own, away in zip(both(x, t), weak, strict=True))
    found = ComposedGuidance([AutoGuidance(1.4), Plain(2.5)])(Network(), TOLD, NULL, guide)(x, t)
    torch.testing.assert_close(found, u + 2.5 * (c - u), rtol=1e-5, atol=1e-5)


def test_internal_and_classifier_free_guidance_composed_are_internal_guidance_with_it():
    alone = InternalGuidance(1.8, (0.1, 0.9), cfg_scale=2.5, cfg_interval=(0.2, 1.0))
    composed = ComposedGuidance([InternalGuidance(1.8, (0.1, 0.9)), Plain(2.5, (0.2, 1.0))])
    x = states()
    for t in (0.05, 0.15, 0.5, 0.95):  # none, the first, both, the second
        networks = Network(), Network()
        one, two = (rule(net, TOLD, NULL)(x, t) for rule, net in zip((alone, composed), networks, strict=True))
        assert torch.equal(one, two)
        assert networks[0].rows == networks[1].rows
    sampler = flow.EulerSampler(flow.PublishedGrid(9))
    assert evaluations(sampler, alone) == evaluations(sampler, composed)


def test_each_part_has_its_interval_and_a_part_that_stands_still_stops_all():
    parts = [ZeroStar(2.5, zero_from=0.9), AutoGuidance(1.4, (0.3, 0.6))]
    x, alone = states(), ZeroStar(2.5)(Network(), TOLD, NULL)
    weak = Network(GUIDE_WEIGHT).head(x, torch.full((3,), 0.5), TOLD["label"])
    network, guide = Network(), Network(GUIDE_WEIGHT)
    velocity = ComposedGuidance(parts)(network, TOLD, NULL, guide)
    assert not velocity(x, 0.95).any()
    assert network.rows == guide.rows == 0
    assert torch.equal(velocity(x, 0.8), alone(x, 0.8))
    torch.testing.assert_close(velocity(x, 0.5), weak + 1.4 * (alone(x, 0.5) - weak), rtol=1e-5, atol=1e-5)
    assert (network.rows, guide.rows) == (12, 3)


def test_evaluations():
    sampler = flow.EulerSampler(flow.FullGrid(10))
    count = {
        "apg": (Projected(2.0), 20, 0, 0),
        "cfg_zero": (ZeroStar(2.0), 18, 0, 0),
        "zero from": (ZeroStar(2.0, zero_from=0.75), 14, 0, 0),  # at 1, 0.9 and 0.8 nothing runs
        "outside": (ZeroStar(2.0, (0.0, 0.55)), 15, 0, 0),  # where it does not act it does not stop
        "composed": (ComposedGuidance([InternalGuidance(2.0, (0, 1)), Plain(2.0), AutoGuidance(2.0, (0.65, 1))]), 20, 20, 4),
    }  # fmt: skip
    for name, (rule, *expected) in count.items():
        assert [*evaluations(sampler, rule).values()] == expected, name


def test_the_scale_of_a_composition_is_that_of_its_last_part():
    rule = ComposedGuidance([Plain(2.5), AutoGuidance(1.4, (0.1, 0.9))])
    assert rule.scale == 1.4
    assert repr(rule.with_scale(3)) == (
        "ComposedGuidance(ClassifierFreeGuidance(scale=2.5, interval=[0.0, 1.0]), AutoGuidance(scale=3, interval=[0.1, 0.9]))"
    )
    assert (
        Projected(2.0, momentum=0.1).with_scale(4).momentum,
        ZeroStar(2.0, zero_from=0.3).with_scale(4).zero_from,
    ) == (
        0.1,
        0.3,
    )


# --- what a sample depends on -------------------------------------------------------------------------------------

STATEFUL = [
    Projected(4.0, (0.0, 0.8), -0.5, 2.5, 0.2),
    ComposedGuidance([InternalGuidance(1.8), Projected(4.0, (0.0, 0.8), -0.5), AutoGuidance(1.4)]),
]


@pytest.mark.parametrize("rule", [*STATEFUL, ZeroStar(4.0, zero_from=0.9)])
def test_a_sample_does_not_depend_on_its_batch(rule):
    def velocity(rows):
        one = slice(rows.start, rows.stop)
        told, null = ({"label": which["label"][one]} for which in (TOLD, NULL))
        return rule(Network(), told, null, Network(GUIDE_WEIGHT))

    together, apart = velocity(range(3)), [velocity(range(i, i + 1)) for i in range(3)]
    for step, t in enumerate((1.0, 0.7, 0.5, 0.3)):
        x = states(step)
        torch.testing.assert_close(together(x, t), torch.cat([one(x[i : i + 1], t) for i, one in enumerate(apart)]))


@pytest.mark.parametrize("rule", [*STATEFUL, ZeroStar(4.0, zero_from=0.9)])
def test_every_sample_may_have_its_own_time(rule):
    """Momentum follows each sample, whether its neighbours are guided or not."""
    together = rule(Network(), TOLD, NULL, Network(GUIDE_WEIGHT))
    one = {"label": TOLD["label"][:1]}, {"label": NULL["label"][:1]}
    apart = [rule(Network(), *one, Network(GUIDE_WEIGHT)) for _ in range(3)]
    for step, times in enumerate(([1.0, 0.7, 0.85], [0.75, 0.5, 0.8], [0.7, 0.0, 0.4], [0.6, 0.3, 0.2])):
        x = states(step)
        expected = torch.cat(
            [velocity(x[i : i + 1], t) for i, (velocity, t) in enumerate(zip(apart, times, strict=True))]
        )
        torch.testing.assert_close(together(x, torch.tensor(times)), expected, rtol=1e-4, atol=1e-5)


def test_a_generator_forgets_the_batch_before():
    model = steerable()
    model.guidance = Projected(2.0, momentum=-0.9)
    first = model.latents([1, 7, 7], seed=3)
    assert torch.equal(first, model.latents([1, 7, 7], seed=3))
    alone = model.latents([7], seed=3, indices=[2])
    assert (alone - first[2:]).abs().max() < 1e-4 * first.std()
    model.guidance = Projected(2.0, momentum=0.0)
    assert (model.latents([1, 7, 7], seed=3) - first).abs().max() > 0.01 * first.std()  # momentum acts
    assert not [
        name for name, value in vars(model.guidance).items() if isinstance(value, Tensor | dict) and name != "arguments"
    ]


@pytest.mark.parametrize("parts", [[InternalGuidance(1.8), Plain(2.5)], [InternalGuidance(1.8), Projected(2.5)]])
def test_prompts_are_steered_by_compositions(parts):
    rule = ComposedGuidance(parts)
    model = make_text_generator(guidance=rule, negative_prompt="a dog")
    plain = make_text_generator(guidance=rule)
    prompts = ["a tiger above an owl", "an owl"]
    assert not torch.allclose(model.latents(prompts), plain.latents(prompts), atol=1e-4)


# --- exports and commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[Generator, Path]:
    """A generator with a guide and a composition, and its export."""
    model = steerable()
    model.guidance = ComposedGuidance([Projected(4.0, (0.0, 0.9), -0.3, 20.0, 0.1), AutoGuidance(1.4)])
    return model, model.save_pretrained(tmp_path_factory.mktemp("model") / "export")


def drawing_with(model: Generator, rule: flow.Guidance, points: int = 4) -> Generator:
    """The same networks with another guidance and Euler's sampler."""
    sampler = flow.EulerSampler(flow.PublishedGrid(points))
    return Generator(model.autoencoder, model.denoiser, model.flow, sampler, rule, model.guide).eval()


def test_a_composition_is_exported_and_loaded(exported):
    original, folder = exported
    model = rae.load(folder, encode=False)
    assert isinstance(model.guidance, ComposedGuidance)
    assert describe(model.guidance) == describe(rebuild(describe(model.guidance)))
    assert repr(model.guidance.parts[1]) == "AutoGuidance(scale=1.4, interval=[0.0, 1.0])"
    assert model.guidance.parts[0].arguments == {
        "scale": 4.0, "interval": [0.0, 0.9], "momentum": -0.3, "norm_limit": 20.0, "eta": 0.1
    }  # fmt: skip
    assert model.guide is not None  # a part asks for it
    assert torch.equal(model([1, 7]), original([1, 7]))
    assert torch.equal(Generator.from_pretrained(folder, encoder=False)([1, 7]), original([1, 7]))
    assert rae.load(folder, ["guidance=apg"], encode=False).guide is None


def drawn(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as file:
        return file["arr_0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chosen", "rule"),
    [
        (["guidance=apg", "guidance.scale=6"], Projected(6.0)),
        (["guidance=cfg_zero", "guidance.scale=6", "guidance.zero_from=0.8"], ZeroStar(6.0, zero_from=0.8)),
        (["guidance=composed", "guidance.parts.0.scale=6"], ComposedGuidance([Plain(6.0), AutoGuidance(1.42)])),
        (
            ["guidance=composed", "guidance.parts=[{_target_:rae.flow.AdaptiveProjectedGuidance,eta:0.5}]"],
            ComposedGuidance([Projected(eta=0.5)]),
        ),
    ],
)
def test_the_command_draws_with_them(exported, tmp_path, chosen, rule):
    original, export = exported
    given = [f"checkpoint={export}", "classes=[1,7]", "samples_per_class=2", "png=false", "device=cpu"]
    sample(compose("sample", [*given, "sampler.grid.points=4", *chosen, f"output_dir={tmp_path}"]))
    found, expected = drawn(tmp_path).astype(int), drawing_with(original, rule).draw([1, 1, 7, 7], 0)
    assert abs(found - expected.permute(0, 2, 3, 1).numpy()).max() <= 1
    plain = drawing_with(original, NoGuidance()).draw([1, 1, 7, 7], 0)
    assert abs(found - plain.permute(0, 2, 3, 1).numpy()).max() > 1  # it acts


@pytest.mark.slow
def test_a_sweep_over_guidances(exported, tmp_path):
    kinds = ["none", "cfg", "apg", "cfg_zero", "composed"]
    given = [f"checkpoint={exported[1]}", "classes=[1]", "samples_per_class=2", "device=cpu", f"output_dir={tmp_path}"]
    command = [
        sys.executable,
        "-m",
        "rae",
        "sample",
        *given,
        "sampler.grid.points=4",
        "-m",
        f"guidance={','.join(kinds)}",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_dir()) == sorted(
        f"guidance_{kind}" for kind in kinds
    )
    images = [drawn(tmp_path / f"guidance_{kind}") for kind in kinds]
    assert len({image.tobytes() for image in images}) == len(kinds)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Projected(2, norm_limit=-1.0), r"guidance\.norm_limit=-1\.0 must be above 0; null for none"),
        (lambda: Projected(2, eta=1.5), r"guidance\.eta=1\.5 must lie in \[0, 1\]"),
        (lambda: Projected(2, momentum=-1.0), r"guidance\.momentum=-1\.0 must lie in \(-1, 1\)"),
        (lambda: Projected(2, (0.9, 0.1)), r"guidance\.interval=\(0\.9, 0\.1\)"),
        (lambda: ZeroStar(2, zero_from=0.0), r"guidance\.zero_from=0\.0 must lie in \(0, 1\]; null for never"),
        (lambda: ComposedGuidance([]), r"guidance\.parts is empty"),
        (lambda: ComposedGuidance([Plain(2), {"scale": 2}]), r"guidance\.parts\.1=\{'scale': 2\} is no guidance"),
        (
            lambda: ComposedGuidance([Plain(2), InternalGuidance()]),
            "InternalGuidance takes the denoiser's own base head",
        ),
        (
            lambda: ComposedGuidance([InternalGuidance(cfg_scale=2), Projected()]),
            "InternalGuidance and AdaptiveProjectedGuidance steer away from the null condition: keep one",
        ),
        (lambda: ComposedGuidance([Projected(2)])(Network(), TOLD), "classifier-free guidance needs null"),
        (lambda: ComposedGuidance([Plain(2), AutoGuidance(2)])(Network(), TOLD, NULL), "autoguidance needs a guide"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_generator_refuses_what_its_model_lacks():
    model = make_generator()
    parts = {"autoencoder": model.autoencoder, "denoiser": model.denoiser, "sampler": model.sampler}
    curved = flow.FlowMatching(flow.GVPPath())
    with pytest.raises(ValueError, match="autoguidance needs a guide"):
        Generator(**parts, flow=model.flow, guidance=ComposedGuidance([Plain(2.0), AutoGuidance(1.4)]))
    with pytest.raises(ValueError, match="internal guidance needs a denoiser with a base head; this DiTDH has none"):
        Generator(**parts, flow=model.flow, guidance=ComposedGuidance([InternalGuidance(), Plain(2.0)]))
    with pytest.raises(ValueError, match=r"needs the linear path, but flow\.path is a GVPPath"):
        Generator(**parts, flow=curved, guidance=ComposedGuidance([Projected(2.0)]))
    Generator(**parts, flow=curved, guidance=ZeroStar(2.0))
    with pytest.raises(
        ValueError, match=r"has momentum, which needs a sampler with one evaluation a step, got HeunSampler"
    ):
        Generator(**parts, flow=model.flow, guidance=ComposedGuidance([Projected(2.0), NoGuidance()]))
    Generator(**parts, flow=model.flow, guidance=Projected(2.0, momentum=0))
    with pytest.raises(ValueError, match="has momentum"):
        Generator(**parts, flow=model.flow, guidance=Projected(1.0)).configured(guidance_scale=2)
    with pytest.raises(ValueError, match="negative_prompt='a dog' needs a model that is told a text, and guidance=cfg"):
        make_text_generator(guidance=ComposedGuidance([InternalGuidance()]), negative_prompt="a dog")


def test_what_a_configuration_lacks_is_said_before_anything_is_built(exported, tmp_path):
    internal = "guidance.parts.0._target_=rae.flow.InternalGuidance"
    with pytest.raises(ConfigError, match="internal guidance needs a base head, which rae"):
        check_denoiser(compose("train", ["stage=2", "guidance=composed", internal]))
    with pytest.raises(ConfigError, match=r"guide_checkpoint=.* does not exist"):
        rae.load("dit_dh_xl_256", [f"collection={tmp_path}", "guidance=composed"])
    plain = make_generator()
    plain.guide, plain.guidance = None, Plain(2.0)
    folder = plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="autoguidance needs guide_checkpoint="):
        rae.load(folder, ["guidance=composed"], encode=False)
    assert rae.load(folder, ["guidance=composed", f"guide_checkpoint={exported[1]}"], encode=False).guide is not None


def test_a_wrong_part_is_named():
    node = compose("sample", ["checkpoint=x", "guidance=composed", "guidance.parts.0.interval=[0.9,0.1]"]).guidance
    with pytest.raises(Exception, match=r"guidance\.interval=\(0\.9, 0\.1\)"):
        make(node)
