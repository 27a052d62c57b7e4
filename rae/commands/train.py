"""rae-train: trains an encoder, a decoder or a denoiser, depending on the stage."""

from __future__ import annotations

import logging
import signal
import warnings
from functools import cache
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from rae.cli.build import Run, build, with_decoder_of
from rae.cli.config import check_same_run, save_config
from rae.cli.main import Interrupted
from rae.cpu import keep_freed_memory
from rae.data.module import ImageDataModule
from rae.formats import read
from rae.formats.run import LAST, check_whole, find_checkpoint, read_config, read_step
from rae.report.table import by_source
from rae.training.resume import AgreeOnResume

log = logging.getLogger(__name__)

_KNOWN_WARNINGS = (
    ".*LeafSpec.* is deprecated",  # internal to Lightning
    ".*module\\(s\\) in eval mode",  # the frozen networks
    ".*smaller than the logging interval",  # steps are counted over epochs
    ".*overridden `(on_before_batch_transfer|transfer_batch_to_device)`",  # labels are inspected, keys stay on the CPU
    ".*Trying to infer the `batch_size`",  # captions are lists; logging passes the size explicitly
    ".*Total length of .* across ranks is zero",  # a run without validation images
)


def resume_from(cfg: DictConfig) -> str | None:
    """The checkpoint to resume from; None to start from scratch.

    Raises:
        FileNotFoundError: ``resume`` names a file that does not exist.
        ValueError: The folder holds a run with a different configuration, or any run while ``resume`` is false.
    """
    if isinstance(cfg.resume, str):
        return str(readable(find_checkpoint(cfg.resume)))
    last = Path(cfg.output_dir) / LAST
    if not last.exists() and not last.is_symlink():
        return None
    if not cfg.resume:
        raise ValueError(f"resume=false, but {str(last)!r} exists: choose another name=… or output_dir=…, or remove it")
    check_same_run(cfg, read_config(readable(last)), cfg.output_dir)
    return str(last)


def readable(checkpoint: Path) -> Path:
    """Returns the checkpoint, which must be intact and from a training run.

    Raises:
        ValueError: It is not; names the newest one beside it that is.
    """
    try:
        read_step(checkpoint)
        check_whole(checkpoint)
        return checkpoint
    except (ValueError, OSError) as error:
        for other in sorted(checkpoint.parent.glob("step_*.ckpt"), reverse=True):
            try:
                step = read_step(other)
                read_config(other)
                check_whole(other)
            except (ValueError, OSError):
                continue
            raise ValueError(f"{error}. The one before, of step {step}, can be read: resume={other}") from error
        raise ValueError(
            f"{error}. There is no other one to continue from: choose another name=… or output_dir=…"
        ) from error


def fit(run: Run, checkpoint: str | None) -> None:
    """Trains from a checkpoint or from scratch; Ctrl-C raises :class:`~rae.cli.main.Interrupted`, which names the last checkpoint.

    Raises:
        ValueError: The processes would not resume from the same checkpoint.
        Interrupted: Ctrl-C, or a signal that ends the run.
    """
    trainer = run.trainer
    trainer.callbacks.insert(0, AgreeOnResume(checkpoint))  # type: ignore[attr-defined]
    try:
        trainer.fit(run.module, datamodule=run.data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C
        if not trainer.interrupted:
            raise
        last = getattr(trainer.checkpoint_callback, "last_model_path", "") or checkpoint
        where = f"the same command continues from {last}" if last else "there is no checkpoint yet"
        number = getattr(trainer.checkpoint_callback, "stopped_by", None) or signal.SIGINT
        word = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        raise Interrupted(f"{word} at step {trainer.global_step}; {where}", 128 + number) from stop


def quieten_lightning() -> None:
    """Keeps only Lightning's unexpected warnings; its other messages are logged below or are advertising."""
    logging.getLogger("lightning").handlers.clear()  # else every line appears twice
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for known in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=known)


def train(cfg: DictConfig) -> None:
    """Builds data, module and trainer from the configuration, and trains."""
    reader = cache(read)
    cfg = with_decoder_of(cfg, reader)
    checkpoint = resume_from(cfg)
    quieten_lightning()
    run = build(cfg, reader, resumed=checkpoint is not None)
    reader.cache_clear()  # frees the memory of what it has read
    trainer = run.trainer
    say = rank_zero_only(log.info)
    rank_zero_only(save_config)(cfg, cfg.output_dir)
    device, precision = trainer.strategy.root_device.type, trainer.precision
    if device == "cpu":
        keep_freed_memory()
    say("stage %s on %s, %d process(es), %s", cfg.stage, device, trainer.world_size, precision)
    begin = -1
    if checkpoint is not None:
        begin = read_step(checkpoint)
        say("continuing from step %d, %s", begin, checkpoint)
    fit(run, checkpoint)
    if trainer.global_step == begin:
        say("the run was finished already; to go on, raise trainer.max_steps or trainer.max_epochs")
    else:
        sources = run.data.val_ranges() if isinstance(run.data, ImageDataModule) else ()
        if scores := by_source(trainer.callback_metrics, sources):
            say("scores of each source:\n%s", scores)
        say("finished at step %d; everything is in %s", trainer.global_step, cfg.output_dir)
