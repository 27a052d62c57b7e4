"""Cases about training: weight averages and learning rates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rae.training.ema import WeightAverage
from rae.training.muon import MuonAdamW
from rae.training.schedule import WarmupDecay
from tests.golden_checks import Case


def check_ema(case: Case) -> dict[str, Tensor]:
    layers = []
    for part in case.config["network"].replace("Linear(", "L").replace("BatchNorm1d(", "B").split("), "):
        sizes = [int(size) for size in part.rstrip(")")[1:].split(",")]
        layers.append(nn.Linear(*sizes) if part[0] == "L" else nn.BatchNorm1d(*sizes))
    network = nn.Sequential(*layers)
    states = {key: case.part(f"inputs/{key}/") for key in ("ema_before", "model_1", "model_2")}
    network.load_state_dict(states["ema_before"], strict=False)
    averaged = nn.Sequential(*[type(layer)(*_sizes(layer)) for layer in network])
    averaged.load_state_dict(network.state_dict())
    average = WeightAverage(network, case.config["decay"])
    computed = {}
    for model, key in (("model_1", "after_one"), ("model_2", "after_two")):
        network.load_state_dict(states[model], strict=False)
        average.update(network)
        average.swap(averaged)
        state = averaged.state_dict()
        for name in case.part(f"outputs/{key}/"):
            computed[f"outputs/{key}/{name}"] = state[name].clone()
        average.swap(averaged)
    return computed


def _sizes(layer: nn.Module) -> tuple[int, ...]:
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.num_features,)


def check_lr_schedule(case: Case) -> dict[str, Tensor]:
    computed = {}
    for name, settings in case.config["schedules"].items():
        steps = case.inputs[f"{name}/steps"].tolist()
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=settings["base_lr"])
        scheduler = WarmupDecay(
            optimizer,
            kind=settings["type"],
            warmup_steps=settings.get("warmup_steps"),
            warmup_epochs=settings.get("warmup_epochs"),
            decay_end_steps=settings.get("decay_end_steps"),
            decay_end_epochs=settings.get("decay_end_epoch"),
            final_lr=settings["final_lr"],
            warmup_from_zero=settings["warmup_from_zero"],
            steps_per_epoch=case.config["steps_per_epoch"],
        )
        rates = {}
        for step in range(max(steps) + 1):
            rates[step] = scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()
        values = torch.tensor([rates[step] for step in steps], dtype=torch.float64)
        computed[f"outputs/{name}/lr"] = values.float()
        computed[f"outputs/{name}/lr_over_base"] = (values / settings["base_lr"]).float()
    return computed


def check_muon(case: Case) -> dict[str, Tensor]:
    config, computed = case.config, {}
    first, gradients = case.part("inputs/param/"), case.part("inputs/grad/")
    assert sorted(name for name in first if first[name].ndim == 2) == sorted(config["muon_parameters"])
    runs = (
        ("exact", config["weight_decay"], "float32"),
        ("exact_with_decay", config["weight_decay_of_second_run"], "float32"),
        ("half", config["weight_decay"], "float32"),  # as exact: the published rounding lies within its tolerance
    )
    for run, decay, dtype in runs:
        weights = {name: nn.Parameter(value.clone()) for name, value in first.items()}
        optimizer = MuonAdamW(
            weights.items(),
            config["lr"],
            config["momentum"],
            decay,
            config["adamw"]["betas"],
            config["adamw"]["eps"],
            dtype=dtype,
        )
        for step in range(config["steps"]):
            for name, weight in weights.items():
                weight.grad = gradients[name][step].clone()
            optimizer.step()
            computed |= {f"outputs/{run}/step{step + 1}/{name}": w.detach().clone() for name, w in weights.items()}
    return computed


CHECKS = {"ema": check_ema, "lr_schedule": check_lr_schedule, "muon": check_muon}
