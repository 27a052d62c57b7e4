"""Sampling does no more than it must (no waiting for the device, few graphs, nothing thrown away) and gives the same images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from rae import flow
from rae.autoencoder import RAE
from rae.cli.errors import compose
from rae.commands.sample import sample
from rae.decoder import ViTDecoder
from rae.denoiser import DiTDH
from rae.encoder import tiny_encoder
from rae.generator import Generator
from tests.helpers.plain_sampling import PlainDiTDH, plain_sample

GUIDANCE = {
    "none": flow.NoGuidance(),
    "cfg": flow.ClassifierFreeGuidance(1.5, (0.0, 0.7)),
    "autoguidance": flow.AutoGuidance(1.42, (0.0, 0.7)),
}
POINTS, SHIFT = 7, 2.0  # times 1, 0.91, 0.8, 0.67, 0.5, 0.29: the last three of six evaluations lie inside the interval
LABELS = [3, 0, 2]
SAMPLERS = [
    flow.EulerSampler,
    flow.HeunSampler,
    flow.Heun3Sampler,
    flow.MidpointSampler,
    flow.RK4Sampler,
    flow.EulerMaruyamaSampler,
    flow.StochasticHeunSampler,
]


def denoiser(seed: int, width: int = 32, depth: int = 1) -> DiTDH:
    torch.manual_seed(seed)
    made = DiTDH(32, 4, width, depth, 4, 48, 1, 4, num_classes=5)
    for parameter in made.parameters():  # modulations and the last layer begin at zero
        torch.nn.init.normal_(parameter, std=0.15)
    torch.nn.init.normal_(made.label_embedding.table.weight, std=4)  # so that a class makes a difference
    return made


def generator(guidance: str = "none", sampler=flow.EulerSampler) -> Generator:
    torch.manual_seed(9)
    encoder = tiny_encoder()
    decoder = ViTDecoder(32, 4, 32, 1, 4, 64, patch=8, mean=encoder.mean, std=encoder.std)
    guide = denoiser(2, 16) if guidance == "autoguidance" else None
    drawer = sampler(flow.PublishedGrid(POINTS))
    flow_matching = flow.FlowMatching(shift=SHIFT)
    return Generator(RAE(encoder, decoder), denoiser(1), flow_matching, drawer, GUIDANCE[guidance], guide).eval()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- the plain procedure -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_equals_the_plain_procedure(guidance: str):
    """The networks by an independent rendering, guidance by a doubled batch at all steps."""
    ours = generator(guidance)
    guide = PlainDiTDH(ours.guide) if ours.guide is not None else None
    rule, noise = GUIDANCE[guidance], ours.noise(7, range(3))
    times = ours.sampler.grid.times(SHIFT).tolist()
    expected = plain_sample(
        PlainDiTDH(ours.denoiser), noise, torch.tensor(LABELS), times, guidance, rule.scale, rule.interval, guide
    )
    found = ours.latents(LABELS, seed=7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = generator().latents(LABELS, seed=7)
    assert guidance == "none" or (found - plain).abs().max() > 0.01  # it acts


@pytest.mark.parametrize(("guidance", "rows"), [("none", 6 * 3), ("cfg", 6 * 3 + 3 * 3), ("autoguidance", 6 * 3)])
def test_nothing_is_computed_and_thrown_away(guidance: str, rows: int):
    ours, seen = generator(guidance), []
    ours.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    guided = []
    if ours.guide is not None:
        ours.guide.register_forward_pre_hook(lambda _, inputs: guided.append(len(inputs[0])))
    ours.latents(LABELS)
    assert sum(seen) == rows
    assert sum(guided) == (3 * 3 if guidance == "autoguidance" else 0)


# --- no step waits for the device --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["cfg", "autoguidance"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_value_is_read_back(sampler: type, guidance: str):
    """Tensors of the meta device have no values: whatever reads one to go on, fails."""
    ours = generator(guidance, sampler).to("meta")
    ours.sampler.grid.points = 3
    images = ours(LABELS)
    assert images.device.type == "meta"
    assert images.shape == (3, 3, 32, 32)


def test_a_sampler_that_reads_values_is_found_out():
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        generator(sampler=flow.AdaptiveSampler).to("meta")(LABELS)


# --- compiled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "graphs"), [("none", 2), ("cfg", 3), ("autoguidance", 3)])
@pytest.mark.slow
def test_compiled_once_for_all_steps(guidance: str, graphs: int):
    """A graph for the denoiser, one for the decoder, and one for the guide or the doubled batch; a second set adds none."""
    ours = generator(guidance)
    expected = ours(LABELS, seed=7)
    names = list(ours.state_dict())
    counter = CompileCounter()
    ours.compile(backend=counter)
    torch.testing.assert_close(ours(LABELS, seed=7), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == graphs
    ours([1, 1, 4], seed=8)
    assert counter.frame_count == graphs
    assert list(ours.state_dict()) == names


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="compile='fast' is unknown; choose true, false or one of default"):
        generator().compile(mode="fast")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [flow.EulerSampler, flow.HeunSampler])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_gives_the_same_images(mode: str, sampler: type):
    ours = generator("cfg", sampler)
    expected = ours(LABELS, seed=7)
    ours.compile(mode=mode)
    torch.testing.assert_close(ours(LABELS, seed=7), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_compiled_from_the_command_line(tmp_path: Path):
    folder = generator().save_pretrained(tmp_path / "model")
    written = []
    for name, compiled in (("plain", "false"), ("compiled", "true")):
        options = [f"checkpoint={folder}", f"compile={compiled}", f"output_dir={tmp_path / name}", "device=cpu"]
        sample(
            compose("sample", [*options, "classes=[0,1]", "samples_per_class=2", "png=false", "sampler.grid.points=3"])
        )
        written.append(tmp_path / name / "samples.npz")
    import numpy as np

    one, two = (np.load(path)["arr_0"].astype(int) for path in written)
    assert abs(one - two).max() <= 1
