"""Writes samples of prompts in the layouts that benchmarks and data sets read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from rae.data.captions import CAPTIONS, caption_line
from rae.image import save_png
from rae.io.files import write_text
from rae.io.parts import Parts
from rae.jobs.samples import pick, png_name
from rae.jobs.wanted import Prompt


def write_captions(folder: Path, prompts: Sequence[str]) -> Path:
    """Writes ``metadata.jsonl`` beside samples' PNG files, as ``data=folder data.captions=metadata.jsonl`` reads it."""
    lines = [caption_line(png_name(number, prompt), prompt) for number, prompt in enumerate(prompts)]
    return write_text(folder / CAPTIONS, "\n".join(lines) + "\n")


def write_geneval(folder: Path, parts: Parts, prompts: Sequence[Prompt], per_prompt: int) -> None:
    """Writes samples as GenEval reads them: ``00000/metadata.jsonl`` with the prompt's own line, ``00000/samples/00000.png`` ….

    Args:
        folder: Output folder.
        parts: The samples, prompt by prompt.
        prompts: The prompts, with their original lines.
        per_prompt: Samples per prompt.
    """
    for number, prompt in enumerate(prompts):
        place = folder / f"{number:05d}"
        for sample in range(per_prompt):
            save_png(pick(parts, [number * per_prompt + sample])[0], place / "samples" / f"{sample:05d}.png")
        write_text(place / CAPTIONS, json.dumps(dict(prompt.said or {}), ensure_ascii=False))


def write_dpg(folder: Path, parts: Parts, prompts: Sequence[Prompt], per_prompt: int) -> None:
    """Writes samples as DPG-Bench reads them: one picture per prompt, named after its file, with four samples two by two.

    Args:
        folder: Output folder.
        parts: The samples, prompt by prompt.
        prompts: The prompts, with their file names.
        per_prompt: Samples per prompt: 4.
    """
    for number, prompt in enumerate(prompts):
        images = pick(parts, range(number * per_prompt, (number + 1) * per_prompt))
        rows = [torch.cat(list(images[start : start + 2]), dim=2) for start in range(0, per_prompt, 2)]
        save_png(torch.cat(rows, dim=1), folder / f"{prompt.name}.png")


WRITERS = {"geneval": write_geneval, "dpg": write_dpg}
"""Writers by ``layout``."""
