"""The web page of rae-app in Gradio: two tabs around a :class:`~rae.app.viewer.Viewer`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before importing gradio, so that it contacts nobody

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rae.app.viewer import GUIDANCES, Viewer, checked_integer, within
from rae.cli.errors import describe, is_expected
from rae.flow import AdaptiveSampler
from rae.report.table import markdown

P = ParamSpec("P")
R = TypeVar("R")

_CSS = """
.gradio-container main { width: 100%; max-width: 1100px; margin: 0 auto; }
.picture .image-frame, .picture img { width: 100%; height: 100%; }
.picture .image-container, #samples .grid-wrap { padding-top: 34px; }
.picture img, #samples .grid-wrap img { object-fit: contain; }
"""
_CSS_OF_SMALL = ".picture img, #samples img { image-rendering: pixelated; }"
_SMALL = 128  # pixels: smaller images are shown pixelated, larger ones smoothed

_BUTTONS: Any = ["download", "fullscreen"]  # no "share", which would send images to the hub
_NAMES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS"}
_DIGITS = {"psnr": 2, "ssim": 4, "lpips": 4}


@dataclass(frozen=True)
class Limits:
    """The page's initial values and upper limits."""

    count: int = 8
    max_count: int = 64
    max_steps: int = 250
    max_scale: float = 5.0
    seed: int = 0


def look(viewer: Viewer) -> dict[str, Any]:
    """Arguments of ``launch`` that set the page's appearance and keep it free of outside services."""
    return {
        # System fonts: Gradio would load its own from Google.
        "theme": gr.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        "css": _CSS + (_CSS_OF_SMALL if viewer.autoencoder.image_size < _SMALL else ""),
        "footer_links": [],
        "run_history": False,
        "show_error": True,
        "quiet": True,
        "ssr_mode": False,
        "enable_monitoring": False,
    }


def build_page(viewer: Viewer, about: str, limits: Limits | None = None) -> gr.Blocks:
    """Builds the page, ready to launch; ``about`` is a line that describes the model."""
    with gr.Blocks(title="rae", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# Representation autoencoder\n{about}: {_facts(viewer)}")
        with gr.Tabs():
            if viewer.encodes:
                with gr.Tab("Reconstruction"):
                    _reconstruction(viewer)
            if viewer.generator is not None:
                with gr.Tab("Samples"):
                    _samples(viewer, limits or Limits())
        if viewer.generator is None:
            gr.Markdown(
                "This model is an autoencoder alone: it reconstructs, but has no denoiser that could draw samples. "
                "For samples start `rae-app` with a run of stage 2 or an exported generator."
            )
        if not viewer.encodes:
            gr.Markdown("The model was opened with `encode=false`, so images cannot be reconstructed.")
    return page


def _facts(viewer: Viewer) -> str:
    side = viewer.autoencoder.image_size
    channels, height, width = viewer.autoencoder.latent_shape
    facts = [f"images of {side}×{side} pixels", f"latents of {channels}×{height}×{width}"]
    if viewer.generator is not None:
        facts.append("told a text" if viewer.takes_text else f"{viewer.generator.num_classes} classes")
    return ", ".join(facts)


def in_words(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator that shows user errors as a message on the page instead of a traceback in the log.

    Raises:
        gradio.Error: The function, when called, raised a user error.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not is_expected(error):
                raise
            raise gr.Error(describe(error), print_exception=False) from error

    return wrapped


def pixels(image: Tensor) -> NDArray[np.uint8]:
    """Converts uint8 3×H×W to H×W×3, as Gradio expects."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


# --- reconstruction ------------------------------------------------------------------------------------------------


def _reconstruction(viewer: Viewer) -> None:
    side = viewer.autoencoder.image_size
    with gr.Row():
        # Unprocessed: Gradio's conversion would lose orientation and transparency.
        upload = gr.Image(
            label="Your image", sources=["upload", "clipboard"], image_mode=None, height=340, elem_id="upload"
        )
        style: dict[str, Any] = {"format": "png", "interactive": False, "height": 340, "buttons": _BUTTONS}
        style["elem_classes"] = "picture"
        original = gr.Image(label=f"As the model receives it, {side}×{side}", elem_id="original", **style)
        picture = gr.Image(label="Reconstruction", elem_id="reconstruction", **style)
    scores = gr.Markdown(elem_id="scores")

    @in_words
    def reconstruct(payload: dict[str, Any] | None) -> tuple[Any, Any, str]:
        if payload is None:
            return None, None, ""
        found = viewer.reconstruct(uploaded(payload, upload.GRADIO_CACHE), payload.get("orig_name"))
        return pixels(found.original), pixels(found.picture), score_table(found.scores, viewer.perceptual is not None)

    upload.change(reconstruct, upload, [original, picture, scores], preprocess=False, api_visibility="private")


def uploaded(payload: dict[str, Any], folder: str) -> Path:
    """The path of an uploaded file; the browser's claim is accepted only inside the upload folder.

    Raises:
        ValueError: The path is elsewhere.
    """
    path = Path(str(payload.get("path"))).resolve()
    if not path.is_relative_to(Path(folder).resolve()):
        raise ValueError("only an image that was uploaded can be reconstructed")
    return path


def score_table(scores: dict[str, float], has_lpips: bool) -> str:
    """Scores by name as a Markdown table; if LPIPS is unavailable, adds the reason."""
    table = markdown([{_NAMES[name]: f"{value:.{_DIGITS[name]}f}" for name, value in scores.items()}])
    return table if has_lpips else f"{table}\n\nNo LPIPS: the weights of its VGG-16 are not on this machine."


# --- samples -------------------------------------------------------------------------------------------------------


def _samples(viewer: Viewer, limits: Limits) -> None:
    generator = viewer.generator
    assert generator is not None
    own = next((name for name, kind in GUIDANCES.items() if type(generator.guidance) is kind), "none")
    adaptive = isinstance(generator.sampler, AdaptiveSampler)
    has_guide = "autoguidance" in viewer.guidances
    note = None if has_guide else "autoguidance needs a guide: start with guidance=autoguidance guide_checkpoint=…"
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            told: gr.Textbox | gr.Number
            if viewer.takes_text:
                told = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
            else:
                told = gr.Number(0, label=f"Class, 0 … {generator.num_classes - 1}", precision=0, elem_id="class")
            away = gr.Textbox(label="Negative prompt", lines=1, visible=viewer.takes_text, elem_id="negative")
            guidance = gr.Radio(viewer.guidances, value=own, label="Guidance", info=note, elem_id="guidance")
            strength = generator.guidance.scale
            strongest = max(limits.max_scale, strength)
            scale = gr.Slider(min(1, strength), strongest, strength, step=0.05, label="Guidance scale", elem_id="scale")
            points = generator.sampler.grid.steps
            most = max(limits.max_steps, points)
            steps = gr.Slider(
                1, most, points, step=1, label="Sampler steps", visible=not adaptive, elem_id="steps"
            )  # an adaptive sampler chooses its own steps
            count = gr.Slider(1, limits.max_count, limits.count, step=1, label="Samples", elem_id="count")
            seed = gr.Number(limits.seed, label="Seed", precision=0, elem_id="seed")
            button = gr.Button("Draw samples", variant="primary", elem_id="draw")
        with gr.Column(scale=3):
            gallery = gr.Gallery(
                label="Samples",
                format="png",
                columns=4,
                object_fit="contain",
                height=560,
                interactive=False,
                buttons=_BUTTONS,
                elem_id="samples",
            )

    @in_words
    def sample(
        told: int | str,
        away: str,
        guidance: str,
        scale: float,
        steps: int,
        count: int,
        seed: int,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio recognises this default)
    ) -> gr.Gallery:
        def on_progress(done: int, total: int, doing: str) -> None:
            progress((done, total), desc=doing, unit="steps")

        checked_integer("count", count, 1, limits.max_count)  # requests may bypass the sliders
        chosen = None if adaptive else checked_integer("steps", steps, 1, most)
        within("guidance scale", scale, min(1, strength), strongest)
        images = viewer.sample(told, guidance, scale, chosen, seed, count, on_progress, away or None)
        guided = "" if guidance == "none" else f", {guidance} {scale:g}"
        what = viewer.title_of(told) if viewer.takes_text else f"Class {viewer.title_of(told)}"
        title = f"{what}, samples 0 to {len(images) - 1} of seed {seed}{guided}"
        return gr.Gallery([pixels(image) for image in images], label=title)

    settings = [told, away, guidance, scale, steps, count, seed]
    # Unprocessed: the checks above show a message, while Gradio's own would log a traceback.
    button.click(sample, settings, gallery, preprocess=False, api_visibility="private")
