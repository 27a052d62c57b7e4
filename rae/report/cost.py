"""The figures of ``rae-cost`` as text: a table of all, or one row of a Markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

_PHASES = {"perceptual": "LPIPS", "discriminator": "discriminator", "gan": "GAN loss"}
"""Of stage 1, and what comes on in each."""

COLUMNS = (
    "name",
    "trained",
    "frozen",
    "GFLOP an image",
    "training",
    "memory of a card",
    "card-hours",
    "all in tf32",
    "all in bf16",
)
"""Of the Markdown table; GFLOP are those of a training step with all phases on."""


def count(value: float) -> str:
    """A number of things: 838.4 M."""
    return f"{value / 1e6:,.1f} M"


def giga(value: float) -> str:
    """Operations: 323.2 GFLOP."""
    return f"{value / 1e9:,.1f}" if value >= 1e10 or not value else f"{value / 1e9:.3g}"


def size(value: float) -> str:
    """Bytes: 16.77 GB, or MB below one."""
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"


def hours(value: float) -> str:
    """Hours, with decimals where they are few."""
    return f"{value:,.0f} h" if value >= 100 else f"{value:.2g} h" if value < 10 else f"{value:.1f} h"


def lines(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows in columns, the first to the left and the others to the right."""
    table = [list(map(str, one)) for one in rows]
    widths = [max(len(one[column]) for one in table) for column in range(len(table[0]))]
    return [
        "  "
        + "  ".join(
            [one[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(one[1:], widths[1:], strict=True))]
        )
        for one in table
    ]


def text(figures: dict[str, Any]) -> str:
    """All figures."""
    card, memory = figures["card"], figures["memory"]
    out = [
        f"{figures['name']}: stage {figures['stage']}, {figures['image_size']} px, {figures['precision']}, "
        f"{figures['cards']} × {card['name']} at {100 * figures['mfu']:.0f} % of its peak",
        "",
        *lines([("parameters", "trained", "frozen"), *_parameters(figures)]),
        "",
        *lines([("GFLOP for one image", "forward", "backward", "both", "arithmetic"), *_pieces(figures)]),
    ]
    if figures["shares"]:
        parts = ", ".join(f"{name} {giga(flops)}" for name, flops in figures["shares"].items())
        out.append(f"  the denoiser's forward pass: {parts}")
    out += [
        "",
        *lines([("activations of one image", "kept for backward", "at the peak", "GFLOP"), *_activations(memory)]),
    ]
    out += ["", *lines([("memory of a card", ""), *_memory(figures)])]
    fits = "fit" if memory["total"] <= card["memory"] else "DO NOT FIT"
    out.append(
        f"  {memory['batch_per_card']} images {fits} on {card['name']}; at most {memory['largest_batch']} would, "
        "apart from what the allocator and the libraries need"
    )
    out += ["", *lines([("training", ""), *_training(figures)])]
    if "sampling" in figures:
        out += ["", *lines([("sampling", ""), *_sampling(figures["sampling"], card)])]
    return "\n".join(out)


def heading() -> str:
    """The head of the Markdown table."""
    return f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def row(figures: dict[str, Any]) -> str:
    """One row of a Markdown table; the columns are :data:`COLUMNS`."""
    training = figures["training"]
    trained, frozen = (sum(one[kind] for one in figures["parameters"].values()) for kind in ("trained", "frozen"))
    cells = (
        figures["name"],
        f"{trained / 1e6:,.0f} M",
        f"{frozen / 1e6:,.0f} M",
        f"{figures['step_flops'] / 1e9:,.{0 if figures['step_flops'] > 1e10 else 3}f}",
        f"{training['flops']:.2e} FLOP",
        size(figures["memory"]["total"]),
        *(
            hours(value)
            for value in (training["card_hours"], *(training["card_hours_all_in"][kind] for kind in ("tf32", "bf16")))
        ),
    )
    return f"| {' | '.join(cells)} |"


def _parameters(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    found = figures["parameters"]
    rows = [(name, count(one["trained"]), count(one["frozen"])) for name, one in found.items()]
    return [*rows, ("together", *(count(sum(one[kind] for one in found.values())) for kind in ("trained", "frozen")))]


def _pieces(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for piece in figures["pieces"]:
        phase = f" (phase {_PHASES[piece['phase']]})" if piece["phase"] else ""
        forward, backward = piece["forward_flops"], piece["backward_flops"]
        rows.append(
            (piece["name"] + phase, giga(forward), giga(backward), giga(forward + backward), piece["arithmetic"])
        )
    return [*rows, ("training step", "", "", giga(figures["step_flops"]), "")]


def _activations(memory: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (name, size(one["kept_per_image"]), size(one["peak_per_image"]), giga(one["flops_per_image"]))
        for name, one in memory["activations"].items()
    ]


def _memory(figures: dict[str, Any]) -> list[tuple[str, str]]:
    memory = figures["memory"]
    return [
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
    ]


def _training(figures: dict[str, Any]) -> list[tuple[str, str]]:
    training = figures["training"]
    rows = [
        ("images of an epoch", f"{training['images_per_epoch']:,}"),
        ("images of a step", f"{training['batch']:,}"),
        ("steps", f"{training['steps']:,}"),
        ("epochs", "" if training["epochs"] is None else f"{training['epochs']:,}"),
    ]
    for phase in training["phases"]:
        on = ", ".join(["L1", *(label for name, label in _PHASES.items() if phase[name])])
        rows.append(
            (f"{100 * phase['share']:.0f} % of it with {on}", f"{giga(phase['flops_per_image'])} GFLOP an image")
        )
    rows += [
        ("operations", f"{training['flops']:.3e} FLOP"),
        ("card-hours as configured", hours(training["card_hours"])),
        (f"hours on {figures['cards']} card(s)", hours(training["hours"])),
    ]
    for kind, value in training["card_hours_all_in"].items():
        rows.append((f"card-hours, were all in {kind}", hours(value)))
    return rows


def _sampling(sampling: dict[str, Any], card: dict[str, Any]) -> list[tuple[str, str]]:
    if "unknown" in sampling:
        return [("unknown", sampling["unknown"])]
    calls = ", ".join(f"{number} × {name}" for name, number in sampling["calls"].items() if number)
    return [
        (f"{sampling['sampler']}, {sampling['guidance']}", f"{calls}, 1 × decoder"),
        ("GFLOP for one image", giga(sampling["flops_per_image"])),
        (f"card-hours for {sampling['samples']:,} images", hours(sampling["card_hours"])),
    ]
