"""The demo on handwritten digits: its commands, its table, and the small model of the notebooks."""

from __future__ import annotations

import contextlib
import io
from functools import partial
from importlib import import_module
from pathlib import Path

from rae.cli.errors import compose
from rae.demo.tables import rae_command, read_json, whole_run

FOLDER, GUIDANCE = "demo", 1.5
NOTE = "LPIPS needs VGG weights, which are a download: the demo trains its decoder without it, with L1 and the GAN."
PICTURES = ("reconstructions", "samples", "samples_cfg")


def commands(folder: Path, guidance: float) -> dict[str, list[str]]:
    """The demo as ordinary commands by title; each can be copied and run on its own; all results go to ``folder``."""
    encoder = f"encoder.checkpoint={folder}/encoder/encoder.safetensors"
    parts = [encoder, f"decoder_checkpoint={folder}/stage1", f"latent.stats={folder}/stats/stat.pt"]
    drawn = [f"checkpoint={folder}/stage2", "samples_per_class=36", "force=true"]
    command = partial(rae_command, folder)
    guided = ["guidance=cfg", f"guidance.scale={guidance}"]

    def scored(samples: str, to: str) -> list[str]:
        return command("evaluate", f"samples={folder}/{samples}/samples.npz", "metric=digits", "force=true", to=to)

    return {
        "0. A representation encoder of our own: a tiny ViT learns to classify digits": command(
            "train", "experiment=digits_encoder", to="encoder"
        ),
        "1. Stage 1: a ViT decoder learns to draw images from the frozen encoder's tokens": command(
            "train", "experiment=digits_stage1", encoder, to="stage1"
        ),
        "   Reconstructions of held-out digits": command(
            "reconstruct", f"checkpoint={folder}/stage1", "force=true", to="reconstructions"
        ),
        "2. Mean and variance of the latents over the training digits": command(
            "stats", "experiment=digits_stats", encoder, "force=true", to="stats"
        ),
        "3. Stage 2: a DiT-DH learns to draw latents from noise and a class": command(
            "train", "experiment=digits_stage2", *parts, to="stage2"
        ),
        "4. Samples: 36 of each class, the classes as rows of one picture": command("sample", *drawn, to="samples"),
        "   The same with classifier-free guidance": command("sample", *drawn, *guided, to="samples_cfg"),
        "5. Scores, by a classifier that saw real training digits only": scored("samples", "scores"),
        "   Scores with guidance": scored("samples_cfg", "scores_cfg"),
    }


def small_model(folder: str | Path = "outputs/small") -> Path:
    """A small digits model, trained silently in this process in about a minute, for notebooks and first steps.

    Existing parts are not trained again, so all notebooks in a folder share one model. Returns the stage-2 run's folder, for
    ``rae.load``; the stage-1 run is ``stage1`` beside it.
    """
    folder = Path(folder).resolve()
    encoder = f"encoder.checkpoint={folder}/encoder/encoder.safetensors"
    given = [encoder, f"decoder_checkpoint={folder}/stage1", f"latent.stats={folder}/stats/stat.pt"]
    plan = [
        ("train", "encoder", [], "summary.json"),
        ("train", "stage1", [encoder], "summary.json"),
        ("stats", "stats", [encoder], "stat.pt"),
        ("train", "stage2", given, "summary.json"),
    ]
    for command, name, overrides, result in plan:
        if (folder / name / result).exists():
            continue
        cfg = compose(command, [f"experiment=digits_small_{name}", *overrides, f"output_dir={folder / name}"])
        task = getattr(import_module(f"rae.commands.{command}"), command)
        with contextlib.redirect_stderr(io.StringIO()):  # hides progress bars; errors are still raised
            task(cfg)
    return folder / "stage2"


def table(folder: Path, wall: float, cpu: float) -> list[tuple[str, str, str]]:
    """Rows (what, measured, target) from the files that the commands wrote, and from the seconds that they took."""
    encoder, stage1, stage2 = (read_json(folder / run / "summary.json") for run in ("encoder", "stage1", "stage2"))
    plain, guided, reconstruction = (
        read_json(folder / run / "scores.json") for run in ("scores", "scores_cfg", "reconstructions")
    )

    def rows_of(name: str, scores: dict[str, float], floor: str) -> list[tuple[str, str, str]]:
        real, worst = f"{floor}; judge on real {scores['judge_accuracy']:.1%}", f"{scores['accuracy_worst_class']:.1%}"
        yardstick = f"≤ 3 × {scores['frechet_real']:.2f} (real against real)"
        held_out = f"held-out digits {scores['nearest_train_held_out']:.1f}"
        nearer = f"{scores['share_nearer_than_any_held_out']:.1%}"
        return [
            (f"{name}: label accuracy", f"{scores['accuracy']:.1%}", real),
            (f"{name}: worst class", worst, ""),
            (f"{name}: Fréchet distance", f"{scores['frechet']:.2f}", yardstick),
            (f"{name}: nearest training digit", f"{scores['nearest_train_samples']:.1f}", held_out),
            (f"{name}: nearer than any held-out digit is", nearer, "0 % = no copies"),
            (f"{name}: spread within a class", f"{scores['spread_samples']:.1f}", f"real {scores['spread_real']:.1f}"),
        ]

    return [
        ("encoder: held-out accuracy", f"{encoder['val/accuracy']:.1%}", "≥ 95 %"),
        ("encoder: time per step", f"{encoder['seconds_per_step'] * 1000:.0f} ms", ""),
        ("stage 1: held-out PSNR", f"{reconstruction['psnr']:.1f} dB", "≥ 22 dB"),
        ("stage 1: time per step", f"{stage1['seconds_per_step'] * 1000:.0f} ms", ""),
        ("stage 2: time per step", f"{stage2['seconds_per_step'] * 1000:.0f} ms", ""),
        *rows_of("samples", plain, "≥ 90 %"),
        *rows_of("samples with CFG", guided, "≥ 95 %"),
        *whole_run(wall, cpu, 10),
    ]
