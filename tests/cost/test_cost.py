"""What rae-cost says against the steps that training really takes, against real memory, and by the command."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rae.cli.errors import compose
from rae.commands.cost import estimate
from rae.cost import Card, Memory, Plan, optimizer_ratio, shares, static_memory, to_meta, training_step
from rae.decoder import ViTDecoder
from rae.denoiser import DiTDH
from rae.flow import (
    AdaptiveSampler,
    AutoGuidance,
    ClassifierFreeGuidance,
    EulerSampler,
    FlowMatching,
    HeunSampler,
    NoGuidance,
    PublishedGrid,
    evaluations,
)
from rae.io.errors import ConfigError
from rae.loss import Phases, Stage1Loss
from rae.report.cost import row, text
from rae.training.muon import MuonAdamW
from tests.helpers.small_runs import denoiser_step, train

# --- the steps that training takes -------------------------------------------------------------------------------


class Counting(TorchDispatchMode, L.Callback):
    """Operations of every training step, by PyTorch's formulas, of whatever is really run."""

    def __init__(self):
        super().__init__()
        self.flops, self.steps = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = func._overloadpacket
        if kind not in flop_registry:
            with self:  # in inference mode, convolutions and attention come in one piece
                pieces = func.decompose(*args, **(kwargs or {}))
            if pieces is not NotImplemented:
                return pieces
        out = func(*args, **(kwargs or {}))
        if kind in flop_registry:
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=out)
        return out

    def on_train_batch_start(self, *args):
        self.flops = 0

    def on_train_batch_end(self, *args):
        self.steps.append(self.flops)


@pytest.mark.slow
def test_stage_1_is_counted_as_it_is_trained(tmp_path):
    counting = Counting()
    with counting:
        _, module = train(1, tmp_path, batch=4, steps=3, callbacks=(counting,))
    step = training_step(to_meta(module), 16)
    phases = [module.loss.phases(number, 10) for number in range(3)]
    assert [(phase.discriminator, phase.gan) for phase in phases] == [(False, False), (True, False), (True, True)]
    assert [4 * step.flops(None, phase) for phase in phases] == counting.steps


@pytest.mark.slow
def test_stage_1_with_several_micro_batches_is_counted_as_it_is_trained(tmp_path):
    counting = Counting()
    with counting:
        _, module = train(1, tmp_path, batch=4, accumulate=2, steps=3, callbacks=(counting,))
    step = training_step(to_meta(module), 16)
    assert 8 * step.flops() == sum(counting.steps[-2:])


@pytest.mark.slow
def test_stage_2_is_counted_as_it_is_trained(tmp_path):
    counting = Counting()
    with counting:
        _, module = train(2, tmp_path, batch=4, steps=2, callbacks=(counting,))
    step = training_step(to_meta(module), 16)
    assert [4 * step.flops()] * 2 == counting.steps
    cached = training_step(module, 16, cached=True)
    assert step.flops() - cached.flops() == step.flops("encoder") > 0


@pytest.mark.slow
def test_checkpointing_computes_the_blocks_again():
    with torch.device("meta"):
        network = to_meta(DiTDH(16, 4, 32, 3, 2, 48, 1, 2, num_classes=4))
    works = denoiser_step(network).works
    parts = shares(network, lambda: network(torch.randn(1, 16, 4, 4), torch.rand(1), torch.zeros(1, dtype=torch.int64)))
    assert works[True].backward - works[False].backward == parts["backbone"] + parts["head"]
    assert works[True].kept < works[False].kept / 2


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_kept_is_what_autograd_saves():
    network = DiTDH(16, 4, 32, 3, 2, 48, 1, 2, num_classes=4)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    weights |= {buffer.untyped_storage().data_ptr() for buffer in network.buffers()}
    saved: dict[int, int] = {}

    def pack(value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return value

    sizes = []
    for batch in (1, 2):
        saved.clear()
        draws = torch.randn(2, batch, 16, 4, 4)
        label = torch.zeros(batch, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            loss = FlowMatching().loss(network, draws[0], draws[1], torch.rand(batch), label=label).mean()
        sizes.append(sum(saved.values()))
        del loss
    to_meta(network)
    # Alive beside what is saved: the data, the noise and the target, and condition and latents that others views are of.
    assert denoiser_step(network).work.kept == pytest.approx(sizes[1] - sizes[0], rel=0.05)


PROCESS = """
import sys
sys.path.insert(0, "tests/benchmarks")
import torch
from side_by_side import peak_memory
from tests.helpers.small_runs import denoiser_step
from rae.cost import to_meta
from rae.denoiser import DiTDH
from rae.flow import FlowMatching
network, flow = DiTDH(768, 16, 384, 4, 6, 1024, 2, 16, 1000, checkpointing=bool(int(sys.argv[1]))), FlowMatching()
for parameter in network.parameters():
    parameter.grad = torch.zeros_like(parameter)
peaks = []
for batch in (4, 12):
    def work():
        data, noise = (torch.randn(batch, 768, 16, 16) for _ in range(2))
        flow.loss(network, data, noise, torch.rand(batch), label=torch.zeros(batch, dtype=torch.int64)).mean().backward()
    peaks.append(peak_memory(work))
print((peaks[1] - peaks[0]) / 8, denoiser_step(to_meta(network)).work.peak / 1e6)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_peak_is_that_of_a_process(checkpointing):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, str(checkpointing)],
        cwd=root,
        env={"PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    measured, said = map(float, done.stdout.split())
    assert said == pytest.approx(measured, rel=0.15)


def test_nothing_of_size_is_made():
    with torch.device("meta"):
        network = to_meta(ViTDecoder(64, 4, 64, 2, 4, 128))
    gc.collect()
    assert all(isinstance(value, torch._subclasses.FakeTensor) for value in network.parameters())


# --- the length of a training ------------------------------------------------------------------------------------


def test_length_of_a_training():
    plan = Plan(images=1000, batch=64, epochs=20)
    assert (plan.steps_per_epoch, plan.total_steps, plan.total_images) == (16, 320, 20_000)
    assert Plan(1000, 64, epochs=20, steps=100).total_images == 6400
    assert Plan(1000, 64, steps=7).total_steps == 7
    with pytest.raises(ValueError, match=r"no end: give trainer\.max_epochs"):
        _ = Plan(1000, 64).total_steps


def test_phases_share_the_training():
    loss = Stage1Loss(None, discriminator_start=6, gan_start=8)
    shares_of = Plan(512_000, 512, epochs=16).phases(loss)
    assert [share for share, _ in shares_of] == [6 / 16, 2 / 16, 8 / 16]
    assert shares_of[1][1] == Phases(perceptual=False, discriminator=True, gan=False)
    late = Stage1Loss(None, discriminator_start=100, gan_start=200, unit="steps")
    assert Plan(640, 64, epochs=5).phases(late) == [(1.0, Phases(False, False, False))]


def test_a_card_can_do_something():
    with pytest.raises(ValueError, match=r"card\.bf16=-1 must be above 0"):
        Card("card", fp32=1e12, tf32=2e12, bf16=-1, memory=1e9)


def test_hours_of_a_card():
    card = Card("card", fp32=1e12, tf32=2e12, bf16=4e12, memory=1e9)
    assert card.seconds({"fp32": 1e12, "bf16": 2e12}, mfu=0.5) == pytest.approx(2 + 1)
    with pytest.raises(ValueError, match=r"mfu=40 must lie in \(0, 1\]"):
        card.seconds({"fp32": 1.0}, mfu=40)


def test_state_of_optimisers():
    assert optimizer_ratio(torch.optim.AdamW) == 2
    assert optimizer_ratio(lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9)) == 1
    assert optimizer_ratio(lambda weights: torch.optim.SGD(weights, lr=0.1)) == 0
    assert optimizer_ratio(MuonAdamW) == 1
    assert optimizer_ratio(partial(MuonAdamW, exclude=["weight"])) == 2


@pytest.mark.parametrize(
    ("sampler", "guidance", "denoiser", "guide"),
    [
        (EulerSampler(PublishedGrid(50)), NoGuidance(), 49, 0),
        (EulerSampler(PublishedGrid(50)), AutoGuidance(1.5), 49, 49),
        (EulerSampler(PublishedGrid(50)), ClassifierFreeGuidance(1.5), 98, 0),
        (EulerSampler(PublishedGrid(50)), ClassifierFreeGuidance(1.0), 49, 0),
        (HeunSampler(PublishedGrid(11)), NoGuidance(), 20, 0),
    ],
)
def test_evaluations_of_a_sample(sampler, guidance, denoiser, guide):
    assert evaluations(sampler, guidance) == {"denoiser": denoiser, "base": 0, "guide": guide}


def test_guidance_outside_its_interval_costs_nothing():
    sampler = EulerSampler(PublishedGrid(50))
    inside = sum(0.25 <= time <= 0.75 for time in sampler.grid.times(1.0).tolist()[:-1])
    found = evaluations(sampler, ClassifierFreeGuidance(1.5, (0.25, 0.75)))
    assert found["denoiser"] == 49 + inside
    assert 0 < inside < 49


def test_adaptive_samplers_have_no_number():
    with pytest.raises(ValueError, match="adaptive"):
        evaluations(AdaptiveSampler(PublishedGrid(50)), NoGuidance())


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment",
    ["digits_encoder", *(pytest.param(f"digits_stage{stage}", marks=pytest.mark.slow) for stage in (1, 2))],
)
def test_figures_of_an_experiment(experiment):
    cfg = compose("cost", [f"experiment={experiment}", "images=1000"])
    figures = estimate(cfg)
    training, memory = figures["training"], figures["memory"]
    assert json.loads(json.dumps(figures)) == figures
    trained = sum(one["trained"] for one in figures["parameters"].values())
    assert (memory["gradients"], memory["optimizer"]) == (4 * trained, 8 * trained)
    assert memory["total"] == memory["static"] + memory["working"] + memory["batch_per_card"] * memory["peak_per_image"]
    assert training["card_hours"] == pytest.approx(training["flops"] / (67e12 * 0.4) / 3600)
    assert training["flops"] <= training["images"] * figures["step_flops"]
    assert figures["name"] in text(figures)
    assert row(figures)["name"] == experiment


def test_a_shared_network_is_divided_and_gathered_block_by_block():
    wide = torch.nn.Linear(10, 10, bias=False).requires_grad_(False)  # 400 bytes on every card
    denoiser = DiTDH(8, 4, width=32, depth=3, heads=2, head_width=48, head_depth=2, head_heads=2, num_classes=5)
    total = sum(p.numel() for p in denoiser.parameters()) * 4
    bodies = [*denoiser.backbone, *denoiser.head]
    sizes = [4 * sum(p.numel() for p in block.parameters()) for block in bodies]
    alone = static_memory([wide, denoiser], denoiser, 2.0, denoiser, cards=1)
    assert alone == static_memory([wide, denoiser], denoiser, 2.0) == Memory(400 + total, total, 2 * total, total, 0)
    share = math.ceil(total / 4)
    found = static_memory([wide, denoiser], denoiser, 2.0, denoiser, cards=4)
    assert found == Memory(400 + share, share, 2 * share, share, 2 * (total - sum(sizes) + 2 * max(sizes)))


@pytest.mark.slow
def test_a_sharding_strategy_takes_less_memory():
    def memory(*overrides):
        return estimate(compose("cost", ["experiment=digits_stage2", "cards=4", *overrides]))["memory"]

    whole, shared = memory(), memory("trainer=fsdp")
    assert shared["optimizer"] * 4 == pytest.approx(whole["optimizer"], abs=8)
    assert whole["gathered"] == 0 < shared["gathered"]
    assert shared["static"] < whole["static"]


@pytest.mark.slow
def test_precision_chooses_the_arithmetic():
    def arithmetic(*overrides):
        return estimate(compose("cost", ["experiment=digits_stage2", *overrides]))

    assert arithmetic("trainer.precision=bf16-mixed")["arithmetic"] == {"trained": "bf16", "encoder": "fp32"}
    with pytest.raises(ValueError, match="bf16-mixed keeps the weights in float32; choose one of 32-true, bf16-mixed"):
        arithmetic("trainer.precision=bf16-true")
    whole = arithmetic("matmul=tf32", "card=a100")
    assert whole["arithmetic"] == {"trained": "tf32", "encoder": "tf32"}
    assert whole["card"]["name"].startswith("A100")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.precision=64-true"], r"trainer\.precision=64-true cannot be trained in; choose one of 32-true"),
        (["mfu=40"], r"mfu=40 must lie in \(0, 1\]"),
    ],
)
def test_faults_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        estimate(compose("cost", ["experiment=digits_encoder", *overrides]))


def test_unknown_card():
    with pytest.raises(
        ConfigError, match=r"card=h10: there is no such choice; did you mean 'h100'\? choose one of a100"
    ):
        compose("cost", ["card=h10"])


@pytest.mark.slow
def test_command_needs_neither_data_nor_weights(tmp_path):
    command = [sys.executable, "-m", "rae", "cost", "-m", "experiment=digits_stage1,digits_stage2", "print=row"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1].strip() for line in done.stdout.splitlines()] == [
        "name",
        "---",
        "digits_stage1",
        "digits_stage2",
    ]
    written = sorted(tmp_path.rglob("cost.json"))
    assert [json.loads(path.read_text())["stage"] for path in written] == [1, 2]
