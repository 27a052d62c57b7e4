"""Muon and AdamW as one optimiser: against torch's own, properties, state, shares of processes, bad input."""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard

from rae.training.module import TrainingModule
from rae.training.muon import MuonAdamW, orthogonalize
from rae.training.schedule import WarmupDecay
from rae.training.strategy import full_tensor


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 4), nn.LayerNorm(4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(batch)[:, 0].mean().backward()
        optimizer.step()


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_singular_values_become_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix)
    values = torch.linalg.svdvals(result)
    assert 0.7 < values.min() <= values.max() < 1.2
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (left @ right).flatten(), dim=0) > 0.99
    torch.testing.assert_close(orthogonalize(7 * matrix), result, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonalize(matrix.mT).mT, result)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonalize(matrix), result)
    half = orthogonalize(matrix, dtype=torch.bfloat16).float()
    assert (half - result).norm() < 0.05 * result.norm()


def test_the_quintic_is_torchs_muon_beside_torchs_adamw():
    ours, peer = network(), network()
    optimizer = MuonAdamW(ours.parameters(), 1e-2, weight_decay=0.1, coefficients="quintic")
    matrices = [p for p in peer.parameters() if p.ndim == 2]
    others = [p for p in peer.parameters() if p.ndim != 2]
    peers = [
        torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    ]
    for step in range(4):
        train(ours, optimizer, range(step, step + 1))
        for other in peers:
            other.zero_grad()
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        peer(batch)[:, 0].mean().backward()
        for other in peers:
            other.step()
    for first, second in zip(ours.parameters(), peer.parameters(), strict=True):
        assert torch.equal(first, second)


def test_an_update_has_adamws_size_and_excluded_matrices_are_adamws():
    model = network()
    before = copy.deepcopy(model)
    optimizer = MuonAdamW(model.named_parameters(), 1e-2, exclude=["2.weight"])
    assert [[len(p.shape) for p in group["params"]] for group in optimizer.param_groups] == [[2], [1, 2, 1, 1, 1]]
    train(model, optimizer, range(1))
    size = (model[0].weight - before[0].weight).square().mean().sqrt().item()
    assert size == pytest.approx(1e-2 * 0.2 * (6 / 6) ** 0.5, rel=0.2)
    step = (model[2].weight - before[2].weight).abs()
    torch.testing.assert_close(step, torch.full_like(step, 1e-2), rtol=1e-3, atol=0)  # the first step of Adam


@pytest.mark.parametrize("coefficients", ["polar_express", "quintic"])
def test_saved_and_restored_it_goes_on_bitwise(coefficients):
    def make(model: nn.Module) -> tuple[MuonAdamW, WarmupDecay]:
        optimizer = MuonAdamW(model.parameters(), 1e-2, coefficients=coefficients)
        return optimizer, WarmupDecay(optimizer, kind="linear", warmup_steps=2, decay_end_steps=8, final_lr=1e-4)

    def run(model: nn.Module, optimizer: MuonAdamW, schedule: WarmupDecay, steps: range) -> None:
        for step in steps:
            train(model, optimizer, range(step, step + 1))
            schedule.step()

    through, first = network(), network()
    run(through, *make(through), range(6))
    optimizer, schedule = make(first)
    run(first, optimizer, schedule, range(3))
    second = network(1)
    second.load_state_dict(first.state_dict())
    restored, course = make(second)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    course.load_state_dict(schedule.state_dict())
    run(second, restored, course, range(3, 6))
    assert len({group["lr"] for group in restored.param_groups}) == 1
    for one, other in zip(through.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_zero_gradient_moves_nothing_and_a_missing_one_is_passed_over():
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = MuonAdamW(model.parameters(), 1e-2)
    for parameter in model[0].parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert optimizer.step(lambda: 3) == 3
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_step_stays_on_its_device():
    with FakeTensorMode():
        weights = [nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((6, 4), (6,))]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizer = MuonAdamW(weights, 1e-2)
        optimizer.step()
        assert optimizer.state[weights[0]]["momentum_buffer"].device.type == "cuda"


def test_the_training_module_gives_it_names():
    class Module(TrainingModule):
        def networks(self) -> list[nn.Module]:
            return [network()]

    (optimizer,) = Module(partial(MuonAdamW, exclude=["0."])).configure_optimizers()
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coefficients": "cubic"}, "coefficients='cubic' is unknown; choose polar_express or quintic"),
        ({"dtype": "float16"}, "dtype='float16' is unknown; choose float32 or bfloat16"),
        ({"lr": -1.0}, r"lr=-1.0 must lie in \[0, inf\)"),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\)"),
        ({"weight_decay": -0.1}, r"weight_decay=-0.1"),
        ({"exclude": ["table"]}, r"exclude=\['table'\] needs names"),
    ],
)
def test_bad_input_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        MuonAdamW(network().parameters(), **options)
    with pytest.raises(ValueError, match="no weights to train"):
        MuonAdamW([])


def _share(rank: int, folder: str) -> None:
    """One of two processes that share out the weights and see half of each batch."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = network()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = MuonAdamW(model.parameters(), 1e-2, weight_decay=0.1)
    for step in range(4):
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).chunk(2)[rank]
        optimizer.zero_grad()
        model(batch)[:, 0].mean().backward()
        optimizer.step()
    weights = {name: full_tensor(value.detach()) for name, value in model.named_parameters()}
    if rank == 0:
        torch.save(weights, f"{folder}/weights.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_weights_shared_out_over_two_processes_train_as_one(tmp_path: Path):
    mp.spawn(_share, (str(tmp_path),), nprocs=2)
    model = network()
    train(model, MuonAdamW(model.parameters(), 1e-2, weight_decay=0.1), range(4))
    shared = torch.load(tmp_path / "weights.pt")
    for name, value in model.named_parameters():
        torch.testing.assert_close(shared[name], value.detach(), rtol=1e-4, atol=1e-5)  # of steps of 2e-3
