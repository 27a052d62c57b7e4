"""The figures of ``rae-cost`` as text: a table of all figures, or one row of a Markdown table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from rae.report.table import columns, size

_PHASES = {"perceptual": "LPIPS", "discriminator": "discriminator", "gan": "GAN loss"}
"""Phases of stage 1, and what each adds."""


def count(value: float) -> str:
    """A count in millions: 838.4 M."""
    return f"{value / 1e6:,.1f} M"


def giga(value: float) -> str:
    """Operations in GFLOP, without the unit: 323.2."""
    return f"{value / 1e9:,.1f}" if value >= 1e10 or not value else f"{value / 1e9:.3g}"


def hours(value: float) -> str:
    """Hours, with decimals if below 100."""
    return f"{value:,.0f} h" if value >= 100 else f"{value:.2g} h" if value < 10 else f"{value:.1f} h"


def text(figures: dict[str, Any]) -> str:
    """All figures as blocks of text."""
    card, memory, found = figures["card"], figures["memory"], figures["parameters"]
    parts = ", ".join(f"{name} {giga(flops)}" for name, flops in figures["shares"].items())
    fits = "fit" if memory["total"] <= card["memory"] else "DO NOT FIT"
    blocks = [
        f"{figures['name']}: stage {figures['stage']}, {figures['image_size']} px, {figures['precision']}, "
        f"{figures['cards']} × {card['name']} at {100 * figures['mfu']:.0f} % of its peak",
        _block(
            ("parameters", "trained", "frozen"),
            *((name, count(one["trained"]), count(one["frozen"])) for name, one in found.items()),
            ("together", *(count(sum(one[kind] for one in found.values())) for kind in ("trained", "frozen"))),
        ),
        _block(
            ("GFLOP for one image", "forward", "backward", "both", "arithmetic"),
            *map(_piece, figures["pieces"]),
            ("training step", "", "", giga(figures["step_flops"]), ""),
        )
        + (f"\n  the denoiser's forward pass: {parts}" if parts else ""),
        _block(
            ("activations of one image", "kept for backward", "at the peak", "GFLOP"),
            *(
                (name, size(one["kept_per_image"]), size(one["peak_per_image"]), giga(one["flops_per_image"]))
                for name, one in memory["activations"].items()
            ),
        ),
        _block(
            ("memory of a card", ""),
            ("weights", size(memory["weights"])),
            ("gradients", size(memory["gradients"])),
            ("optimiser", size(memory["optimizer"])),
            ("moving average", size(memory["average"])),
            *([("gathered for a while", size(memory["gathered"]))] if memory["gathered"] else []),
            ("working copies", size(memory["working"])),
            (
                f"activations of {memory['batch_per_card']} images",
                size(memory["batch_per_card"] * memory["peak_per_image"]),
            ),
            ("together", size(memory["total"])),
        )
        + f"\n  {memory['batch_per_card']} images {fits} on {card['name']}; at most {memory['largest_batch']} would, "
        "apart from what the allocator and the libraries need",
        _training(figures["training"], figures["cards"]),
    ]
    if "sampling" in figures:
        blocks.append(_sampling(figures["sampling"]))
    return "\n\n".join(blocks)


def _block(*rows: Sequence[str]) -> str:
    return textwrap.indent(columns(rows, right=True), "  ")


def row(figures: dict[str, Any]) -> dict[str, str]:
    """One row of a Markdown table; its GFLOP are per image and training step, in stage 1 with all losses active."""
    training, all_in = figures["training"], figures["training"]["card_hours_all_in"]
    trained, frozen = (sum(one[kind] for one in figures["parameters"].values()) for kind in ("trained", "frozen"))
    return {
        "name": figures["name"],
        "trained": f"{trained / 1e6:,.0f} M",
        "frozen": f"{frozen / 1e6:,.0f} M",
        "GFLOP an image": f"{figures['step_flops'] / 1e9:,.{0 if figures['step_flops'] > 1e10 else 3}f}",
        "training": f"{training['flops']:.2e} FLOP",
        "memory of a card": size(figures["memory"]["total"]),
        "card-hours": hours(training["card_hours"]),
        "all in tf32": hours(all_in["tf32"]),
        "all in bf16": hours(all_in["bf16"]),
    }


def _piece(piece: dict[str, Any]) -> tuple[str, ...]:
    phase = f" (phase {_PHASES[piece['phase']]})" if piece["phase"] else ""
    forward, backward = piece["forward_flops"], piece["backward_flops"]
    return piece["name"] + phase, giga(forward), giga(backward), giga(forward + backward), piece["arithmetic"]


def _training(training: dict[str, Any], cards: int) -> str:
    phases = [
        (
            f"{100 * phase['share']:.0f} % of it with "
            + ", ".join(["L1", *(label for name, label in _PHASES.items() if phase[name])]),
            f"{giga(phase['flops_per_image'])} GFLOP an image",
        )
        for phase in training["phases"]
    ]
    return _block(
        ("training", ""),
        ("images of an epoch", f"{training['images_per_epoch']:,}"),
        ("images of a step", f"{training['batch']:,}"),
        ("steps", f"{training['steps']:,}"),
        ("epochs", "" if training["epochs"] is None else f"{training['epochs']:,}"),
        *phases,
        ("operations", f"{training['flops']:.3e} FLOP"),
        ("card-hours as configured", hours(training["card_hours"])),
        (f"hours on {cards} card(s)", hours(training["hours"])),
        *((f"card-hours if all were in {kind}", hours(value)) for kind, value in training["card_hours_all_in"].items()),
    )


def _sampling(sampling: dict[str, Any]) -> str:
    if "unknown" in sampling:
        return _block(("sampling", ""), ("unknown", sampling["unknown"]))
    calls = ", ".join(f"{number} × {name}" for name, number in sampling["calls"].items() if number)
    return _block(
        ("sampling", ""),
        (f"{sampling['sampler']}, {sampling['guidance']}", f"{calls}, 1 × decoder"),
        ("GFLOP for one image", giga(sampling["flops_per_image"])),
        (f"card-hours for {sampling['samples']:,} images", hours(sampling["card_hours"])),
    )
