"""rae-stats: exact mean and variance of an encoder's latents, whatever the batch size or order."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rae.cli.config import ConfigError, plain, save_config
from rae.cli.entry import entry

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

    from rae.encoder import Encoder
    from rae.latent import RunningMoments

log = logging.getLogger(__name__)


def latent_moments(encoder: Encoder, batches: Any, device: torch.device) -> RunningMoments:
    """Moments of the latents of all images of a loader, per channel and position, in float64."""
    import torch  # noqa: PLC0415 (slow to import)
    from tqdm import tqdm  # noqa: PLC0415

    from rae.data.transforms import to_float  # noqa: PLC0415
    from rae.latent import RunningMoments  # noqa: PLC0415

    moments = RunningMoments(encoder.latent_shape)
    with torch.no_grad():
        for batch in tqdm(batches, desc="encoding", unit="batch"):
            moments.update(encoder(to_float(batch["image"].to(device))).cpu())
    return moments


def stats(cfg: DictConfig) -> None:
    """Encodes the data set once and writes ``stat.pt`` (mean and var) with a description beside it.

    Raises:
        ConfigError: ``stat.pt`` exists and ``force`` is false.
    """
    target = Path(cfg.output_dir) / "stat.pt"
    if target.exists() and not cfg.force:
        raise ConfigError(f"{str(target)!r} exists: force=true replaces it, output_dir=… writes elsewhere")

    from rae.cli.build import make, pick_device, seed  # noqa: PLC0415 (imports torch)
    from rae.weights import save_state, write_atomically  # noqa: PLC0415

    seed(cfg)
    save_config(cfg, cfg.output_dir)
    device = pick_device(cfg.device)
    encoder = make(cfg.encoder).to(device)
    data = make(cfg.data)
    data.setup("fit")
    moments = latent_moments(encoder, data.statistics_dataloader(), device)

    save_state({"mean": moments.mean.float(), "var": moments.var.float()}, target)
    description = {
        "images": int(moments.count),
        "latent_shape": list(encoder.latent_shape),
        "encoder": {**encoder.identity, "weights": encoder.weights_hash()},
        "data": plain(cfg)["data"],
        "image_size": cfg.image_size,
        "seed": cfg.seed,
    }
    text = json.dumps(description, indent=2, default=str)
    write_atomically(target.with_suffix(".json"), lambda file: file.write(text.encode()))
    log.info("mean and variance over %d images are in %s", moments.count, target)


main = entry("stats", stats)

if __name__ == "__main__":
    main()
