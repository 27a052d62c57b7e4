"""rae-app: a local web page that reconstructs uploaded images and generates samples."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from starlette.middleware import Middleware

from rae.app.guard import UPLOAD, Guard
from rae.app.page import Limits, build_page, look
from rae.app.space import read_space, write_space
from rae.app.viewer import Viewer
from rae.autoencoder import RAE
from rae.cli.config import remove_empty
from rae.cli.models import open_model
from rae.io.errors import ConfigError
from rae.io.hub import cached_file
from rae.jobs.processes import pick_device, set_matmul
from rae.loss.perceptual import VGG_URL, PerceptualLoss

log = logging.getLogger(__name__)


def app(cfg: DictConfig) -> None:
    """Opens the model and serves the page until Ctrl-C, or writes a Space that serves it.

    Raises:
        ConfigError: See :func:`open_viewer`, :func:`serve` and :func:`rae.app.space.write_space`.
    """
    if cfg.space_dir is not None:
        print(f"written: {write_space(cfg)}")
        remove_empty(cfg)
        return
    viewer, about = open_viewer(cfg)
    start = limits_of(cfg)
    with tempfile.TemporaryDirectory(prefix="rae-app-") as folder:
        serve(cfg, viewer, about, start, folder)


def open_space(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The page (Gradio ``Blocks``) in a folder that ``space_dir`` wrote, and the arguments to launch it with."""
    cfg = read_space(folder)
    viewer, _ = open_viewer(cfg)
    return build_page(viewer, folder.resolve().name, limits_of(cfg)), launch_options(cfg, viewer)


def limits_of(cfg: DictConfig) -> Limits:
    """The page's initial values and upper limits."""
    return Limits(cfg.count, cfg.max_count, cfg.max_steps, cfg.max_scale, cfg.seed)


def launch_options(cfg: DictConfig, viewer: Viewer) -> dict[str, Any]:
    """Arguments of ``launch``: address, access and appearance."""
    names = [*cfg.names, ".gradio.live"] if cfg.share else list(cfg.names)
    return {
        "server_name": cfg.host,
        "server_port": cfg.port,
        "share": bool(cfg.share),
        "max_file_size": UPLOAD,
        "app_kwargs": {"middleware": [Middleware(Guard, names=names)]},
        **look(viewer),
    }


def open_viewer(cfg: DictConfig) -> tuple[Viewer, str]:
    """The model behind the page, and a line that describes it.

    Raises:
        ConfigError: The page would have nothing to show.
    """
    device = pick_device(cfg.device)
    set_matmul(cfg)
    model, _ = open_model(cfg, cfg.encode, keep_guide=True)  # keeps the guide, so the page can offer autoguidance
    if isinstance(model, RAE) and not cfg.encode:
        raise ConfigError(
            f"checkpoint={cfg.checkpoint} is an autoencoder, which only reconstructs: leave out encode=false"
        )
    perceptual = open_perceptual(cfg.vgg_checkpoint) if cfg.encode else None
    viewer = Viewer(model.to(device), perceptual, cfg.precision, cfg.batch_size)
    path = Path(cfg.checkpoint)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else cfg.checkpoint
    return viewer, f"{shown} on {device}"


def open_perceptual(vgg_checkpoint: str | None) -> PerceptualLoss | None:
    """LPIPS if its VGG-16 weights are available in a file or in torch's hub cache, else None; downloads nothing."""
    if vgg_checkpoint is None and not cached_file(VGG_URL).is_file():
        log.info("no LPIPS: VGG-16 is not in %s; vgg_checkpoint=… names another file", cached_file(VGG_URL))
        return None
    return PerceptualLoss(vgg_checkpoint)


def serve(cfg: DictConfig, viewer: Viewer, about: str, limits: Limits, folder: str) -> None:
    """Serves the page until Ctrl-C or SIGTERM; until then, ``folder`` holds uploaded and generated images.

    Raises:
        ConfigError: The server cannot listen on the address or port.
    """
    os.environ["GRADIO_TEMP_DIR"] = folder
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Gradio polls its own server
    page = build_page(viewer, about, limits)
    try:
        _, url, public = page.launch(prevent_thread_lock=True, **launch_options(cfg, viewer))
    except OSError as error:
        raise ConfigError(
            f"host={cfg.host} port={cfg.port} cannot be listened on; choose another port, or port=null for the first free one"
        ) from error
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)
    print(f"The page is at {public or url} until Ctrl-C.", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)
