"""rae-sample: generates images of given classes or prompts, as PNG files, .npz or shards, with a labelled grid."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig
from tqdm import tqdm

from rae.cli.config import plain, save_config
from rae.cli.models import open_generator
from rae.generator import Generator
from rae.image import grid_scale, label_rows, make_grid, save_png, to_uint8
from rae.io.files import remove, write_json
from rae.io.parts import Parts
from rae.jobs.layouts import WRITERS, write_captions
from rae.jobs.processes import first, start
from rae.jobs.samples import Wanted, check_interpolations, describe_latents, draw, finished, pick, plan_of, write_npz
from rae.jobs.wanted import check_layout, how_sampled, prompt_list, wanted

log = logging.getLogger(__name__)


def sample(cfg: DictConfig) -> None:
    """Rebuilds the model, generates the missing samples and writes the results.

    Raises:
        ConfigError: The model has no denoiser, the labels or prompts are invalid, or the folder holds other samples.
    """
    check_interpolations(cfg)
    prompts = prompt_list(cfg)
    check_layout(cfg, prompts)
    folder = Path(cfg.output_dir)
    fabric = start(cfg)
    generator, run = open_generator(cfg, fabric.device)
    if cfg.compile:
        generator.compile(mode=None if cfg.compile is True else str(cfg.compile))
    labels = wanted(cfg, generator, prompts)
    plan = plan_of(cfg, generator, labels)
    description = folder / "samples.json"
    asked = {
        "samples.npz": cfg.npz,
        "images": cfg.png,
        "shards": cfg.shards,
        "sheets": cfg.sheets,
        "latents": cfg.keep_latents,
        str(cfg.layout): cfg.layout is not None,
        "interpolations.png": cfg.interpolations is not None,
    }
    with first(fabric) as is_first:
        if is_first and cfg.force:
            for name in ("samples.json", *asked, "parts"):
                remove(folder / name)
    there = fabric.broadcast(finished(description, plan) if fabric.is_global_zero else None)
    missing = [name for name, one in asked.items() if one and not (folder / name).exists()]
    if there and missing in ([], ["interpolations.png"]):
        with first(fabric) as is_first:
            if is_first and missing:
                write_interpolations(cfg, generator, labels, folder)
        log.info("these %d samples are in %s already", len(labels), folder)
        return

    png, shards, latents = (folder / name if asked[name] else None for name in ("images", "shards", "latents"))
    parts = draw(cfg, fabric, generator, labels, folder / "parts", plan, png, shards, latents)
    with first(fabric) as is_first:
        if not is_first:
            return
        save_config(run, folder)
        if latents is not None:
            told = {**plan, **how_sampled(cfg.labels, generator)}
            describe_latents(latents, told, labels, plain(run), parts.size, generator.autoencoder)
        if cfg.npz:
            write_npz(folder / "samples.npz", parts, labels)
        if png is not None and generator.text_encoder is not None:
            write_captions(png, [str(told) for told in labels])
        if cfg.layout is not None:
            WRITERS[cfg.layout](folder / cfg.layout, parts, prompts, cfg.samples_per_prompt)
        write_sheets(cfg, parts, labels, folder)
        if cfg.interpolations:
            write_interpolations(cfg, generator, labels, folder)
        write_json(description, {**plan, **how_sampled(cfg.labels, generator)})
        parts.remove()
        made = {"grid.png": True, **asked}
        log.info("%d images: %s are in %s", len(labels), ", ".join(name for name, one in made.items() if one), folder)


def write_sheets(cfg: DictConfig, parts: Parts, labels: Wanted, folder: Path) -> None:
    """Writes ``grid.png``, one class or prompt per row, and with ``sheets`` a sheet of all samples for each."""
    by_class: dict[int | str, list[int]] = {}
    told: list[int | str] = [*labels]
    for number, label in enumerate(told):
        by_class.setdefault(label, []).append(number)
    columns = min(cfg.grid_columns, max(map(len, by_class.values())))
    rows = [(label, numbers[:columns]) for label, numbers in list(by_class.items())[: cfg.grid_rows]]
    pictures = [pick(parts, numbers) for _, numbers in rows]
    scale = grid_scale(pictures[0].shape[-1])
    save_png(label_rows(pictures, [str(label) for label, _ in rows], columns, scale), folder / "grid.png")
    for row, (label, numbers) in enumerate(by_class.items() if cfg.sheets else ()):
        width = max(1, round(len(numbers) ** 0.5))
        name = f"prompt{row:04d}.png" if isinstance(label, str) else f"class{label:04d}.png"
        save_png(make_grid(pick(parts, numbers), width, scale=scale), folder / "sheets" / name)


def write_interpolations(cfg: DictConfig, generator: Generator, labels: Wanted, folder: Path) -> None:
    """Writes ``interpolations.png``: two samples of a class or prompt and, between them, samples from interpolated noise.

    One row for each of the first ``grid_rows`` classes or prompts.
    """
    classes = list(dict.fromkeys(labels))[: cfg.grid_rows]
    rows = []
    for row, label in enumerate(tqdm(classes, desc="interpolations", delay=2)):
        images = generator.interpolate(label, (2 * row, 2 * row + 1), cfg.interpolations, cfg.seed)
        rows.append(to_uint8(images, cfg.quantize).cpu())
    scale = grid_scale(rows[0].shape[-1])
    save_png(
        label_rows(rows, [str(label) for label in classes], cfg.interpolations, scale), folder / "interpolations.png"
    )
