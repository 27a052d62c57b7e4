"""rae-cost: estimates the cost of training and sampling from a configuration's networks, without data or weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rae.cli.build import build_module, make
from rae.cost import Card, Plan, Step, optimizer_ratio, parameters, shares, static_memory, to_meta, training_step
from rae.cost.steps import decoding, denoising, evaluate_once
from rae.flow import FlowMatching, evaluations
from rae.io.files import write_json
from rae.report.cost import row, text
from rae.report.table import markdown
from rae.training.precision import check_precision
from rae.training.teacher import Teacher

_NOT_LOADED = {"pretrained": False, "checkpoint": None, "stats": "none", "compile": False}


def without_weights(cfg: DictConfig) -> DictConfig:
    """The configuration without compilation or anything that loads a file; a frozen text encoder is not counted."""
    bare = cfg.copy()
    OmegaConf.set_struct(bare, False)
    for key in ("decoder_checkpoint", "discriminator_checkpoint", "init_checkpoint", "teacher_checkpoint"):
        bare[key] = None
    if bare.get("denoiser") is not None and bare.get("text_encoder") is not None:
        bare.condition = OmegaConf.to_container(bare.condition, resolve=True)  # it refers to the text encoder
        bare.text_encoder = None
    for group in ("encoder", "text_encoder", "discriminator", "latent", "loss.perceptual", "training"):
        node = OmegaConf.select(bare, group)
        for key, value in _NOT_LOADED.items() if node is not None and "_target_" in node else ():
            if key in list(node) or (key == "pretrained" and group == "encoder"):  # list(node) includes ???
                node[key] = value
    return bare


def cost(cfg: DictConfig) -> None:
    """Prints the figures and writes ``cost.json``."""
    figures = estimate(cfg)
    if cfg.print == "row":
        job = HydraConfig.get().job
        is_first = OmegaConf.is_missing(job, "num") or job.num == 0
        lines = markdown([row(figures)]).splitlines()
        print("\n".join(lines if is_first else lines[2:]))  # one heading for the whole sweep
    else:
        print(text(figures))
    write_json(Path(cfg.output_dir) / "cost.json", figures)


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """All figures, as in ``cost.json``: operations in FLOPs, memory in bytes, times in hours.

    Raises:
        ConfigError: A value is missing or not allowed.
        ValueError: The precision does not support training.
    """
    check_precision(cfg.trainer.precision)
    autocast = torch.bfloat16 if cfg.trainer.precision == "bf16-mixed" else None
    encoder_halved = cfg.encoder.get("dtype") in ("bfloat16", "float16")
    arithmetic = {"trained": "bf16" if autocast else cfg.matmul, "encoder": "bf16" if encoder_halved else cfg.matmul}

    with torch.device("meta"):
        module: Any = build_module(without_weights(cfg))
        if cfg.get("teacher_checkpoint") is not None:  # counted as a network of the denoiser's size
            module.teacher = Teacher(make(cfg.denoiser), FlowMatching())
        module = to_meta(module)
    networks = _networks(module)
    cached = str(cfg.data["_target_"]).endswith("LatentsDataModule")
    step = training_step(module, int(cfg.image_size), autocast, cached)
    card: Card = make(cfg.card)
    cards = cfg.cards or _count(cfg.trainer.devices) * int(cfg.trainer.num_nodes)
    figures: dict[str, Any] = {
        "name": cfg.name,
        "stage": cfg.stage,
        "image_size": cfg.image_size,
        "precision": str(cfg.trainer.precision),
        "arithmetic": arithmetic,
        "card": asdict(card),
        "cards": cards,
        "mfu": cfg.mfu,
        "parameters": {
            name: {kind: parameters(network)[kind] for kind in ("trained", "frozen")}
            for name, network in networks.items()
        },
        "pieces": [
            {
                "name": piece.name,
                "forward_flops": piece.forward,
                "backward_flops": piece.backward,
                "arithmetic": arithmetic[piece.network],
                "phase": piece.phase,
            }
            for piece in step.pieces
        ],
        "step_flops": step.flops(),
        "shares": {},
        "memory": _memory(cfg, networks, step, card, cards),
        "training": _training(cfg, getattr(module, "loss", None), step, card, cards, arithmetic),
    }
    if cfg.stage == 2:
        figures["shares"] = shares(module.denoiser, lambda: evaluate_once(module.denoiser, 1))
        figures["sampling"] = _sampling(cfg, module, autocast, card, arithmetic["trained"])
    return figures


def _networks(module: Any) -> dict[str, Any]:
    """The networks of a training module by name."""
    if not hasattr(module, "autoencoder"):
        return {"classifier": module}
    found = {
        "encoder": module.autoencoder.encoder,
        "decoder": module.autoencoder.decoder,
        "discriminator": getattr(module, "discriminator", None),
        "denoiser": getattr(module, "denoiser", None),
        "alignment": getattr(module, "alignment", None),
        "LPIPS": getattr(getattr(module, "loss", None), "perceptual", None),
    }
    return {name: network for name, network in found.items() if network is not None}


def _count(devices: Any) -> int:
    """Device count from a Trainer argument; 1 if it depends on the machine."""
    if OmegaConf.is_list(devices):
        return len(devices)
    return max(1, int(devices)) if str(devices).lstrip("-").isdigit() else 1


def _memory(cfg: DictConfig, networks: dict[str, Any], step: Step, card: Card, cards: int) -> dict[str, Any]:
    ema = OmegaConf.select(cfg, "callbacks.ema")
    on_card = ema is not None and ema.get("device") is None
    averaged = networks.get({1: "decoder", 2: "denoiser"}.get(cfg.stage, "")) if on_card else None
    sharded = str(OmegaConf.select(cfg, "strategy._target_")).endswith("FullyShardedStrategy")
    shared = networks.get("denoiser") if sharded else None
    memory = static_memory(networks.values(), averaged, optimizer_ratio(make(cfg.optimizer)), shared, cards)
    batch, work = int(cfg.data.batch_size), step.work
    free = card.memory - memory.total - work.fixed
    return {
        **asdict(memory),
        "static": memory.total,
        "working": work.fixed,
        "activations": {
            "checkpointing" if checkpointing else "plain": {
                "kept_per_image": one.kept,
                "peak_per_image": one.peak,
                "flops_per_image": one.flops,
            }
            for checkpointing, one in step.works.items()
        },
        "peak_per_image": work.peak,
        "batch_per_card": batch,
        "total": memory.total + work.fixed + batch * work.peak,
        "largest_batch": max(0, int(free // max(1, work.peak))),
    }


def _training(
    cfg: DictConfig, loss: Any, step: Step, card: Card, cards: int, arithmetic: dict[str, str]
) -> dict[str, Any]:
    steps, epochs = (
        None if value in (None, -1) else int(value) for value in (cfg.trainer.max_steps, cfg.trainer.max_epochs)
    )
    accumulate = cfg.training.get("accumulate") or 1 if cfg.stage == 1 else cfg.trainer.accumulate_grad_batches
    plan = Plan(int(cfg.images), int(cfg.data.batch_size) * cards * int(accumulate), epochs, steps)
    flops: dict[str, float] = {}
    for network, number in plan.flops(step, loss).items():
        flops[arithmetic[network]] = flops.get(arithmetic[network], 0) + number
    total, hours = sum(flops.values()), card.seconds(flops, cfg.mfu) / 3600
    phases = [] if loss is None else plan.phases(loss)
    return {
        "images_per_epoch": plan.images,
        "batch": plan.batch,
        "epochs": plan.epochs,
        "steps": plan.total_steps,
        "images": plan.total_images,
        "phases": [{"share": share, "flops_per_image": step.flops(None, on), **asdict(on)} for share, on in phases],
        "flops": total,
        "card_hours": hours,
        "hours": hours / cards,
        "card_hours_all_in": {kind: card.seconds({kind: total}, cfg.mfu) / 3600 for kind in ("fp32", "tf32", "bf16")},
    }


def _sampling(
    cfg: DictConfig, module: Any, autocast: torch.dtype | None, card: Card, arithmetic: str
) -> dict[str, Any]:
    sampler, guidance = make(cfg.sampler), make(cfg.guidance)
    try:
        calls = evaluations(sampler, guidance, module.flow.shift)
    except ValueError as error:  # an adaptive sampler
        return {"unknown": str(error)}
    flops = {"decoder": decoding(module.autoencoder, autocast).forward}
    flops["denoiser"] = (calls["denoiser"] - calls["base"]) * denoising(module.denoiser, autocast).forward
    if calls["base"]:
        flops["denoiser"] += calls["base"] * denoising(module.denoiser, autocast, base=True).forward
    if calls["guide"]:
        with torch.device("meta"):
            guide: Any = to_meta(make(cfg.guide))
        flops["guide"] = calls["guide"] * denoising(guide, autocast).forward
    total = sum(flops.values())
    return {
        "sampler": type(sampler).__name__,
        "guidance": type(guidance).__name__,
        "calls": calls,
        "flops": flops,
        "flops_per_image": total,
        "samples": int(cfg.samples),
        "card_hours": card.seconds({arithmetic: total * cfg.samples}, cfg.mfu) / 3600,
    }
