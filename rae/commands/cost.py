"""rae-cost: what a training and its samples cost, reckoned up from the networks of a configuration, without data or weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rae.autoencoder import RAE
from rae.cli.build import build_module, make
from rae.cost import (
    Card,
    Memory,
    Plan,
    Step,
    Work,
    evaluations,
    on_paper,
    optimizer_ratio,
    parameters,
    shares,
    stage0_step,
    stage1_step,
    stage2_step,
    static_memory,
)
from rae.cost.steps import decoding, denoiser_forward
from rae.io.errors import ConfigError
from rae.io.files import write_json
from rae.report.cost import heading, row, text
from rae.training.precision import check_precision

_ARITHMETIC = {"float32": "float32", "bfloat16": "bf16", "float16": "bf16"}
_CHOICES = {"print": ("table", "row"), "float32": ("fp32", "tf32")}


class Networks:
    """The networks of a configuration, made without values, and what the configuration says of their precision.

    Args:
        cfg: A configuration of ``cost``.

    Raises:
        ValueError: A precision that cannot be trained in.
    """

    def __init__(self, cfg: DictConfig) -> None:

        check_precision(cfg.trainer.precision)
        self.autocast: torch.dtype | None = torch.bfloat16 if cfg.trainer.precision == "bf16-mixed" else None
        bare = without_weights(cfg)
        self.loss = make(bare.get("loss"))
        self.flow = make(bare.get("flow"))
        with torch.device("meta"):
            made = {name: make(bare.get(name)) for name in ("encoder", "decoder", "discriminator", "denoiser", "guide")}
            if cfg.stage == 0:
                made = {"classifier": build_module(bare)}
        self.autoencoder = None
        if cfg.stage != 0:
            if cfg.stage == 2:
                made["decoder"].requires_grad_(False)
            self.autoencoder = RAE(made["encoder"], made["decoder"], make(bare.get("latent")))
        if self.loss is not None and self.loss.perceptual is not None:
            made["LPIPS"] = self.loss.perceptual
        self.all = {name: on_paper(network) for name, network in made.items() if network is not None}
        if self.autoencoder is not None:
            on_paper(self.autoencoder.latent)
        self.guide = self.all.pop("guide", None)
        if self.guide is not None:
            self.guide.requires_grad_(False)
        trained = "float32" if self.autocast is None else "bfloat16"
        kinds = {"trained": trained, "encoder": str(cfg.encoder.get("dtype") or "float32")}
        self.arithmetic = {
            network: str(cfg.float32) if _ARITHMETIC[kind] == "float32" else _ARITHMETIC[kind]
            for network, kind in kinds.items()
        }


def without_weights(cfg: DictConfig) -> DictConfig:
    """The configuration with all that loads a file taken out of it."""
    bare = cfg.copy()
    OmegaConf.set_struct(bare, False)
    for group in ("encoder", "discriminator", "latent", "loss.perceptual"):
        node = OmegaConf.select(bare, group)
        for key, value in (("pretrained", False), ("checkpoint", None), ("stats", "none")):
            if node is None or "_target_" not in node:
                continue
            if key in list(node) or (key == "pretrained" and group == "encoder"):  # ??? is among the former
                node[key] = value
    return bare


def cost(cfg: DictConfig) -> None:
    """Prints the figures and writes ``cost.json``."""
    figures = estimate(cfg)
    if cfg.print == "row" and _number_in_sweep() == 0:
        print(heading())  # once in a sweep
    print(row(figures) if cfg.print == "row" else text(figures))
    write_json(Path(cfg.output_dir) / "cost.json", figures)


def _number_in_sweep() -> int:
    """Which job of a sweep this is; 0 where there is no sweep."""
    job = HydraConfig.get().job
    return 0 if OmegaConf.is_missing(job, "num") else int(job.num)


def estimate(cfg: DictConfig) -> dict[str, Any]:
    """All figures, as ``cost.json`` holds them: operations are FLOPs, memory is bytes, times are hours.

    Raises:
        ConfigError: A value that is missing or not allowed.
    """
    for key, allowed in _CHOICES.items():
        if cfg[key] not in allowed:
            raise ConfigError(f"{key}={cfg[key]} is unknown; choose {' or '.join(allowed)}")

    networks = Networks(cfg)
    card: Card = make(cfg.card)
    cards = cfg.cards or _count(cfg.trainer.devices) * int(cfg.trainer.num_nodes)
    plan = _plan(cfg, cards)
    step, variants = _steps(cfg, networks)
    averaged = {0: None, 1: "decoder", 2: "denoiser"}[cfg.stage]
    ema = OmegaConf.select(cfg, "callbacks.ema")
    average = networks.all[averaged] if averaged and ema is not None and ema.get("device") is None else None
    sharded = str(OmegaConf.select(cfg, "strategy._target_")).endswith("FullyShardedStrategy")
    shared = networks.all.get("denoiser") if sharded else None
    memory = static_memory(networks.all.values(), average, optimizer_ratio(make(cfg.optimizer)), shared, cards)
    figures: dict[str, Any] = {
        "name": cfg.name,
        "stage": cfg.stage,
        "image_size": cfg.image_size,
        "precision": str(cfg.trainer.precision),
        "arithmetic": networks.arithmetic,
        "card": asdict(card),
        "cards": cards,
        "mfu": cfg.mfu,
        "parameters": {name: _counts(parameters(network)) for name, network in networks.all.items()},
        "pieces": [
            {
                "name": piece.name,
                "forward_flops": piece.work.forward,
                "backward_flops": piece.work.backward,
                "arithmetic": networks.arithmetic[piece.network],
                "phase": piece.phase,
            }
            for piece in step.pieces
        ],
        "step_flops": step.flops(),
        "shares": _shares(networks),
        "memory": _memory(memory, step, variants, cfg, card),
        "training": _training(plan, step, networks, card, cfg, cards),
    }
    if cfg.stage == 2:
        try:
            calls = evaluations(make(cfg.sampler), make(cfg.guidance), networks.flow)
            figures["sampling"] = _sampling(calls, networks, card, cfg)
        except ValueError as error:
            if OmegaConf.select(cfg, "sampler._target_", default="").endswith("AdaptiveSampler"):
                figures["sampling"] = {"unknown": str(error)}
            else:
                raise
    return figures


def _counts(found: dict[str, int]) -> dict[str, int]:
    return {key: found[key] for key in ("trained", "frozen")}


def _count(devices: Any) -> int:
    """Devices of a Trainer's argument; one where only the machine knows."""
    if isinstance(devices, int):
        return max(1, devices)
    if OmegaConf.is_list(devices):
        return len(devices)
    return int(devices) if str(devices).isdigit() else 1


def _accumulate(cfg: DictConfig) -> int:
    return int(cfg.training.get("accumulate") or 1) if cfg.stage == 1 else int(cfg.trainer.accumulate_grad_batches)


def _plan(cfg: DictConfig, cards: int) -> Plan:
    steps, epochs = (
        None if value in (None, -1) else int(value) for value in (cfg.trainer.max_steps, cfg.trainer.max_epochs)
    )
    batch = int(cfg.data.batch_size) * cards * _accumulate(cfg)
    return Plan(int(cfg.images), batch, epochs, steps)


def _steps(cfg: DictConfig, networks: Networks) -> tuple[Step, dict[bool, Step]]:
    """The step as configured, and the steps without and with checkpointing."""
    autoencoder, precision = networks.autoencoder, networks.autocast
    if cfg.stage == 0 or autoencoder is None:
        step = stage0_step(networks.all["classifier"], int(cfg.image_size), precision)
        return step, {}
    trained: Any = networks.all["decoder" if cfg.stage == 1 else "denoiser"]
    configured, variants = trained.checkpointing, {}
    for checkpointing in (False, True):
        trained.checkpointing = checkpointing
        if cfg.stage == 1:
            judge: Any = networks.all.get("discriminator")
            variants[checkpointing] = stage1_step(autoencoder, networks.loss, judge, precision, _accumulate(cfg))
        else:
            cached = str(cfg.data["_target_"]).endswith("LatentsDataModule")
            variants[checkpointing] = stage2_step(
                autoencoder, trained, networks.flow, int(cfg.image_size), precision, cached
            )
    trained.checkpointing = configured
    return variants[configured], variants


def _shares(networks: Networks) -> dict[str, int]:
    """Operations of the denoiser's parts in a forward pass: backbone and head."""
    denoiser: Any = networks.all.get("denoiser")
    if denoiser is None:
        return {}
    dtype = next(denoiser.parameters()).dtype

    def work() -> Any:
        noise = torch.randn(1, *denoiser.latent_shape, dtype=dtype)
        return denoiser(noise, torch.rand(1), torch.zeros(1, dtype=torch.int64))

    return shares(denoiser, work)


def _memory(memory: Memory, step: Step, variants: dict[bool, Step], cfg: DictConfig, card: Card) -> dict[str, Any]:
    batch = int(cfg.data.batch_size)
    activations = {
        name: {"kept_per_image": one.kept, "peak_per_image": one.peak, "flops_per_image": one.flops()}
        for name, one in (("plain", variants.get(False, step)), ("checkpointing", variants.get(True)))
        if one is not None
    }
    total = memory.total + step.fixed + batch * step.peak
    free = card.memory - memory.total - step.fixed
    return {
        **asdict(memory),
        "static": memory.total,
        "working": step.fixed,
        "activations": activations,
        "peak_per_image": step.peak,
        "batch_per_card": batch,
        "total": total,
        "largest_batch": max(0, int(free // max(1, step.peak))),
    }


def _training(plan: Plan, step: Step, networks: Networks, card: Card, cfg: DictConfig, cards: int) -> dict[str, Any]:
    by_network = plan.flops(step, networks.loss)
    flops = sum(by_network.values())
    by_arithmetic: dict[str, float] = {}
    for network, count in by_network.items():
        kind = networks.arithmetic[network]
        by_arithmetic[kind] = by_arithmetic.get(kind, 0) + count
    hours = card.seconds(by_arithmetic, cfg.mfu) / 3600
    phases = [
        {"share": share, "flops_per_image": step.flops(None, phase), **asdict(phase)}
        for share, phase in plan.phases(networks.loss)
    ]
    return {
        "images_per_epoch": plan.images,
        "batch": plan.batch,
        "epochs": plan.epochs,
        "steps": plan.total_steps,
        "images": plan.total_images,
        "phases": phases if networks.loss is not None else [],
        "flops": flops,
        "card_hours": hours,
        "hours": hours / cards,
        "card_hours_all_in": {kind: card.seconds({kind: flops}, cfg.mfu) / 3600 for kind in ("fp32", "tf32", "bf16")},
    }


def _sampling(calls: dict[str, int], networks: Networks, card: Card, cfg: DictConfig) -> dict[str, Any]:
    assert networks.autoencoder is not None
    once: dict[str, Work] = {"decoder": decoding(networks.autoencoder, networks.autocast)}
    for name, network in (("denoiser", networks.all["denoiser"]), ("guide", networks.guide)):
        if calls[name]:
            once[name] = denoiser_forward(network, networks.autocast)  # type: ignore[arg-type]
    flops = {name: work.forward * calls.get(name, 1) for name, work in once.items()}
    total = sum(flops.values())
    hours = card.seconds({networks.arithmetic["trained"]: total * cfg.samples}, cfg.mfu) / 3600
    return {
        "sampler": str(cfg.sampler["_target_"]).rpartition(".")[2],
        "guidance": str(cfg.guidance["_target_"]).rpartition(".")[2],
        "calls": calls,
        "flops": flops,
        "flops_per_image": total,
        "samples": int(cfg.samples),
        "card_hours": hours,
    }
