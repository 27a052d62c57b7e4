"""rae-train: trains an encoder, a decoder or a denoiser, whichever the stage says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from rae.cli.config import check_same_run, save_config
from rae.cli.entry import Interrupted, entry

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from rae.cli.build import Parts

log = logging.getLogger(__name__)


def resume_from(cfg: DictConfig) -> str | None:
    """The checkpoint that the run continues from; None to start anew.

    Raises:
        FileNotFoundError: ``resume`` names a file that does not exist.
        ValueError: The folder holds a run of another configuration, or holds a run although ``resume`` is false.
    """
    from rae.checkpoint.run import LAST, find_checkpoint, read_config  # noqa: PLC0415 (imports torch)

    if isinstance(cfg.resume, str):
        return str(find_checkpoint(cfg.resume))
    last = Path(cfg.output_dir) / LAST
    if not last.exists():
        return None
    if not cfg.resume:
        raise ValueError(f"resume=false, but {str(last)!r} exists: choose another name=… or output_dir=…, or remove it")
    check_same_run(cfg, read_config(last), cfg.output_dir)
    return str(last)


def fit(parts: Parts, checkpoint: str | None) -> None:
    """Trains; Ctrl-C becomes :class:`~rae.cli.entry.Interrupted` with a word on the last checkpoint."""
    trainer = parts.trainer
    try:
        trainer.fit(parts.module, datamodule=parts.data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C
        if not trainer.interrupted:
            raise
        last = getattr(trainer.checkpoint_callback, "last_model_path", "") or checkpoint
        where = f"the same command continues from {last}" if last else "there is no checkpoint yet"
        raise Interrupted(f"interrupted at step {trainer.global_step}; {where}") from stop


def train(cfg: DictConfig) -> None:
    """Builds data, module and trainer from the configuration, and trains."""
    from rae.cli.build import build  # noqa: PLC0415 (imports Lightning)

    checkpoint = resume_from(cfg)
    parts = build(cfg)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # what it has to say is said below
    if parts.trainer.is_global_zero:
        save_config(cfg, cfg.output_dir)
    trainer = parts.trainer
    device, precision = trainer.strategy.root_device.type, trainer.precision
    log.info("stage %s on %s, %d process(es), %s", cfg.stage, device, trainer.world_size, precision)
    if checkpoint is not None:
        log.info("continuing from %s", checkpoint)
    fit(parts, checkpoint)
    log.info("finished at step %d; everything is in %s", trainer.global_step, cfg.output_dir)


main = entry("train", train)

if __name__ == "__main__":
    main()
