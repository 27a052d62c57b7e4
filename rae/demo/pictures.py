"""The demo on pictures and sentences: scenes of two OpenMoji pictograms, generated from captions; its commands and table."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rae.data.pictures import PicturesDataset, Scene
from rae.demo.tables import rae_command, read_json, whole_run
from rae.io.files import write_text

FOLDER, GUIDANCE = "demo_text", 2.0
NOTE = (
    "Pictograms: OpenMoji (https://openmoji.org), CC BY-SA 4.0. A tenth of all triples (thing, relation, thing) is held out: no "
    "training step sees them."
)
PICTURES = ("reconstructions", "samples", "samples_cfg")
_PROMPTS = 200  # of each kind
_SHOWN = 5  # held-out prompts in the picture, each followed by the same with its things swapped
_UNSEEN = 10**6  # number of a scene far beyond those in training


def scenes(held_out: bool, count: int) -> list[Scene]:
    """Distinct scenes, whose triples are either all held out or all trained on."""
    data = PicturesDataset(2 * _UNSEEN, 48, held_out, 0)
    found: dict[Scene, None] = {}
    number = _UNSEEN
    while len(found) < count:
        found[data.scene(number)] = None
        number += 1
    return list(found)


def write_prompts(folder: Path) -> None:
    """Writes ``held_out.txt``, ``trained.txt``, ``swapped.txt`` (the held-out ones with their things swapped) and ``shown.txt``."""
    unseen = scenes(True, _PROMPTS)
    shown = [scene for pair in ((scene, scene.swapped) for scene in unseen[:_SHOWN]) for scene in pair]
    lists = {
        "held_out": unseen,
        "trained": scenes(False, _PROMPTS),
        "swapped": [scene.swapped for scene in unseen],
        "shown": shown,
    }
    for name, listed in lists.items():
        text = "".join(f"{scene.caption}\n" for scene in listed)
        write_text(folder / f"{name}.txt", text)


def commands(folder: Path, guidance: float) -> dict[str, list[str]]:
    """The demo as ordinary commands by title; each can be copied and run on its own; all results go to ``folder``."""
    write_prompts(folder)
    encoder = f"encoder.checkpoint={folder}/encoder/encoder.safetensors"
    text = f"text_encoder.checkpoint={folder}/encoder/text_encoder.safetensors"
    latents = ["data=latents", f"data.train_path={folder}/latents/train", f"data.val_path={folder}/latents/val"]
    latents += ["data.num_workers=0", "data.num_classes=1", "data.flip=false"]
    parts = [encoder, text, f"decoder_checkpoint={folder}/stage1", f"latent.stats={folder}/stats/stat.pt"]
    command = partial(rae_command, folder)
    guided = ["guidance=cfg", f"guidance.scale={guidance}"]
    drawn = [f"checkpoint={folder}/stage2", "force=true"]

    def scored(prompts: str, *overrides: str, to: str) -> list[str]:
        given = [f"prompts={folder}/{prompts}.txt", "metric=pictures", *overrides]
        return command("evaluate", *drawn, *given, to=to)

    return {
        "0. Encoders of our own: a tiny ViT and a tiny text encoder learn which caption belongs to which picture": command(
            "train", "experiment=pictures_encoder", to="encoder"
        ),
        "1. Stage 1: a ViT decoder learns to draw scenes from the frozen encoder's tokens": command(
            "train", "experiment=pictures_stage1", encoder, to="stage1"
        ),
        "   Reconstructions of scenes that are held out": command(
            "reconstruct", f"checkpoint={folder}/stage1", "force=true", to="reconstructions"
        ),
        "2. Mean and variance of the latents": command(
            "stats", "experiment=pictures_stats", encoder, "force=true", to="stats"
        ),
        "   Latents and features of the captions, encoded once": command(
            "cache-latents", "experiment=pictures_latents", encoder, text, to="latents"
        ),
        "3. Stage 2: a denoiser learns to draw latents from noise and a sentence": command(
            "train", "experiment=pictures_stage2", *parts, *latents, to="stage2"
        ),
        "4. Samples: sentences that were never trained on, each followed by the same with its things swapped": command(
            "sample", *drawn, f"prompts={folder}/shown.txt", to="samples"
        ),
        "   The same with classifier-free guidance": command(
            "sample", *drawn, f"prompts={folder}/shown.txt", *guided, to="samples_cfg"
        ),
        "5. Held-out triples, judged by rendered pictograms": scored("held_out", to="scores_held_out"),
        "   The same with their things swapped": scored("swapped", to="scores_swapped"),
        "   Triples that were trained on": scored("trained", to="scores_trained"),
        "   Held-out triples with guidance": scored("held_out", *guided, to="scores_cfg"),
    }


def table(folder: Path, wall: float, cpu: float) -> list[tuple[str, str, str]]:
    """Rows (what, measured, target) from the files that the commands wrote, and from the seconds that they took."""
    encoder, stage1, stage2 = (read_json(folder / run / "summary.json") for run in ("encoder", "stage1", "stage2"))
    held_out, swapped, trained, guided = (
        read_json(folder / f"scores_{name}" / "scores.json") for name in ("held_out", "swapped", "trained", "cfg")
    )
    reconstruction = read_json(folder / "reconstructions" / "scores.json")
    return [
        ("encoders: held-out pictures that find their caption", f"{encoder['val/accuracy']:.1%}", ""),
        ("stage 1: held-out PSNR", f"{reconstruction['psnr']:.1f} dB", "≥ 22 dB"),
        ("judge: real scenes that it reads right", f"{held_out['judge']:.1%}", ""),
        ("held-out triples: both things right, in their places", f"{held_out['right']:.1%}", "≥ 80 %"),
        ("held-out triples with CFG", f"{guided['right']:.1%}", ""),
        ("held-out triples: both things right, wherever", f"{held_out['things']:.1%}", ""),
        ("the same with things swapped: right", f"{swapped['right']:.1%}", "≥ 80 %"),
        ("trained triples: both things right, in their places", f"{trained['right']:.1%}", "≥ 90 %"),
        ("background right", f"{held_out['background']:.1%}", "≥ 95 %"),
        *(
            (f"{name}: time per step", f"{run['seconds_per_step'] * 1000:.0f} ms", "")
            for name, run in (("stage 0", encoder), ("stage 1", stage1), ("stage 2", stage2))
        ),
        *whole_run(wall, cpu, 25),
    ]
