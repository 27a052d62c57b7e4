"""Console scripts: Hydra's command line with one-line errors, custom config folders and Ctrl-C handling.

A command is named by a string and imported only after its configuration is composed and checked: ``--help`` and errors are instant.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import pkgutil
import re
import select
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from rae.cli.checks import check_files
from rae.cli.compose import register_resolvers
from rae.cli.config import absolute_paths, check_complete, remove_empty
from rae.cli.errors import blame, describe, explain, is_expected
from rae.cli.groups import OWN, VERSION_BASE, conf_dir, normalise
from rae.cli.help import list_experiments
from rae.cli.schema import check_values
from rae.io.describe import trust
from rae.report.job import Job

# Idle OpenMP threads should spin only briefly: on a shared CPU, the default made a training step up to 40 times slower;
# without any spinning, steps take twice as long on an idle one.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_command: list[str] = []
"""The command's name if given as an argument, as in ``rae train``."""
USER_ERROR, TASK_ERROR, INTERRUPTED = 2, 1, 130
_FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
)


class Interrupted(KeyboardInterrupt):
    """Raised on Ctrl-C or another signal; carries a message about the state of the work and the exit code."""

    def __init__(self, text: str, code: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.code = code


def entry(config: str, target: str, after_sweep: str = "", complete: bool = True) -> Callable[[], None]:
    """Makes a console script.

    The exit code is 0, 1 (the task failed; one line says why), 2 (the command line is wrong; one line suggests the nearest
    valid one) or 130 (Ctrl-C). ``RAE_TRACEBACK=1`` or ``hydra.verbose=true`` shows full tracebacks.

    Args:
        config: Name of the root config in ``conf/``.
        target: ``module:function``; the function receives the composed configuration, whose ``output_dir`` is absolute and exists.
        after_sweep: Also ``module:function``; called with all jobs after a sweep.
        complete: Whether to reject a configuration with missing values.
    """
    return functools.partial(_main, config, target, after_sweep, complete)


def _main(config: str, target: str, after_sweep: str, complete: bool) -> None:
    program = f"rae-{config.replace('_', '-')}"
    register_resolvers()
    given = _flags_first(sys.argv[1:])
    arguments = get_args_parser().parse_known_args(given)[0]
    folders = [Path(arguments.config_dir).resolve()] if arguments.config_dir else []
    for folder in folders:
        _use_own_folder(folder)
    sys.argv[1:] = _without_fixed_keys(normalise(given))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise its errors, which are explained below
    jobs: list[Job] = []

    def guarded(cfg: DictConfig) -> None:
        error = _run(cfg, config, target, program, complete)
        jobs.append(Job(list(HydraConfig.get().overrides.task), Path(cfg.output_dir), error is not None))

    command = hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=config)(guarded)
    try:
        command()
        if after_sweep and _is_sweep(sys.argv):
            pkgutil.resolve_name(after_sweep)(jobs)
        _reader_left()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise SystemExit(TASK_ERROR) from None  # silently, as other programs do
        if _wants_trace():
            raise
        text = explain(error, arguments.config_name or config, arguments.overrides, folders)
        print(f"{program}: error: {text}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
    if any(job.failed for job in jobs):
        raise SystemExit(TASK_ERROR)


def _run(cfg: DictConfig, config: str, target: str, program: str, complete: bool) -> BaseException | None:
    """Runs one job; reports and returns its error, so that the other jobs of a sweep still run."""
    job = HydraConfig.get()
    sweeping = job.mode == RunMode.MULTIRUN
    cfg.output_dir = job.runtime.output_dir if sweeping else str(Path(str(cfg.output_dir)).expanduser().resolve())
    arguments, environment = sys.argv, dict(os.environ)
    # Processes that a strategy launches rerun the command line: in a sweep, they get this job's.
    repeated = arguments[1:]
    if sweeping:
        repeated = [*job.overrides.hydra, *job.overrides.task, f"output_dir='{cfg.output_dir}'"]
        repeated = [argument for argument in repeated if argument != "hydra.mode=MULTIRUN"]
    sys.argv = [arguments[0], *_command, *repeated]
    try:
        if complete:
            check_complete(cfg, job.job.config_name or config)
        check_files(cfg, config)  # before check_values imports the classes, whose annotations give the valid types
        check_values(cfg, job.job.config_name or config)
        absolute_paths(cfg)
        pkgutil.resolve_name(target)(cfg)
    except KeyboardInterrupt as stop:
        print(f"{program}: {str(stop) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(getattr(stop, "code", INTERRUPTED)) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return error
        if _wants_trace() or not is_expected(error):
            traceback.print_exc()
        print(f"{program}: error: {blame(describe(error), job.overrides.task)}", file=sys.stderr)
        remove_empty(cfg)
        return error
    finally:
        sys.argv = arguments
        if sweeping:
            _leave_process_group(environment)
    return None


def _use_own_folder(folder: Path) -> None:
    """Registers a ``--config-dir``: lists its choices; classes that it names may be built, also from the current folder."""
    OWN.append(folder)
    sys.path.insert(0, str(Path.cwd()))
    for file in folder.rglob("*.yaml"):
        trust(re.findall(r"^\s*_target_:\s*[\"']?([\w.]+)", file.read_text(errors="replace"), re.MULTILINE))


def _reader_left() -> bool:
    """Whether the reader of standard output is gone, as after ``| head``; if so, discards any further output."""
    gone = False
    try:
        sys.stdout.flush()
        # After a failed write, flushing no longer raises; hence poll, which Windows lacks.
        if hasattr(select, "poll"):
            watch = select.poll()
            watch.register(sys.stdout.fileno(), 0)
            gone = any(event & select.POLLERR for _, event in watch.poll(0))
    except BrokenPipeError:
        gone = True
    except (OSError, ValueError):  # not a file, as in a notebook
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _say(text: str) -> None:
    """Prints a text; silent if the reader is gone, as after ``| head``."""
    with contextlib.suppress(BrokenPipeError):
        print(text)
    _reader_left()


def _leave_process_group(environment: dict[str, str]) -> None:
    """Destroys the process group and restores the environment, so that the next job of a sweep can launch its own processes."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def _wants_trace() -> bool:
    return os.environ.get("RAE_TRACEBACK") == "1" or "hydra.verbose=true" in sys.argv[1:]


def _is_sweep(arguments: list[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def _flags_first(arguments: list[str]) -> list[str]:
    """Moves flags to the front: they may stand anywhere among the overrides, which argparse alone does not allow."""
    flags, overrides, takes_value = [], [], False
    for argument in arguments:
        is_flag = argument.startswith("-")
        if is_flag or (takes_value and "=" not in argument):
            flags.append(argument)
        else:
            overrides.append(argument)
        takes_value = is_flag and argument in _FLAGS_WITH_VALUE
    return flags + overrides


def _without_fixed_keys(arguments: list[str]) -> list[str]:
    """In a sweep, omits overrides that all jobs share from the job folders' names."""
    if not _is_sweep(arguments):
        return arguments
    parser = OverridesParser.create()
    fixed = []
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException:
            return arguments  # Hydra reports the error
        if not override.is_sweep_override() and not override.is_hydra_override():
            fixed.append(override.get_key_element())
    keys = ",".join(f"'{key}'" for key in fixed)
    return [*arguments, f"hydra.job.config.override_dirname.exclude_keys=[{keys}]"]


_LIST_JOBS = "rae.report.sweep:list_jobs"


# --- the commands ------------------------------------------------------------------------------------------------


def _config_file() -> bool:
    """Rewrites ``rae-convert config FILE`` as ``config=FILE``; returns whether to convert a configuration."""
    arguments = sys.argv[1:]
    if "config" in arguments:
        at = arguments.index("config")
        file = arguments[at + 1 : at + 2]
        given = [f"config='{file[0]}'"] if file and not file[0].startswith("-") and "=" not in file[0] else []
        sys.argv[1:] = [*arguments[:at], *given, *arguments[at + 1 + len(given) :]]
    return "config" in arguments or any(argument.startswith("config=") for argument in arguments)


def train() -> None:
    """Trains; ``--list`` lists the experiments."""
    if "--list" in sys.argv[1:]:
        _say(list_experiments())
    else:
        entry("train", "rae.commands.train:train", _LIST_JOBS)()


def shard() -> None:
    """Packs images into tar shards; ``--verify`` stands for ``verify=true images=none``."""
    if "--verify" in sys.argv:
        sys.argv = [argument for argument in sys.argv if argument != "--verify"] + ["verify=true", "images=none"]
    entry("shard", "rae.commands.shard:shard")()


def convert() -> None:
    """Converts models to other formats; with ``config=FILE``, a configuration of the authors' code to ours."""
    name = "convert_config" if _config_file() else "convert"
    entry(name, f"rae.commands.convert:{name}")()


def demo() -> None:
    """Trains all stages on a small data set: handwritten digits, or pictures from sentences."""
    pkgutil.resolve_name("rae.demo.command:main")()


stats = entry("stats", "rae.commands.stats:stats")
cache_latents = entry("cache_latents", "rae.commands.cache_latents:cache_latents")
reconstruct = entry("reconstruct", "rae.commands.reconstruct:reconstruct", _LIST_JOBS)
sample = entry("sample", "rae.commands.sample:sample", _LIST_JOBS)
app = entry("app", "rae.app.command:app")
reference = entry("reference", "rae.commands.reference:reference")
probe = entry("probe", "rae.commands.probe:probe", _LIST_JOBS)
evaluate = entry("evaluate", "rae.commands.evaluate:evaluate", "rae.report.sweep:summarise")
download = entry("download", "rae.commands.download:download")
cost = entry("cost", "rae.commands.cost:cost", complete=False)

COMMANDS: dict[str, tuple[Callable[[], None], str]] = {
    "demo": (
        demo,
        "trains all stages on small images (digits or pictures), from scratch to samples and scores, on a CPU",
    ),
    "download": (download, "downloads the files of a published model"),
    "shard": (shard, "packs images into tar shards"),
    "train": (train, "trains your own encoder (stage 0), a decoder (stage 1) or a diffusion transformer (stage 2)"),
    "stats": (stats, "computes mean and variance of the latents over a data set"),
    "cache-latents": (cache_latents, "encodes a data set once, for stage 2"),
    "reconstruct": (reconstruct, "encodes and decodes images, and compares them with the originals"),
    "sample": (sample, "generates images"),
    "reference": (reference, "computes the statistics of real images that scores compare with"),
    "evaluate": (evaluate, "scores samples or reconstructions, from files or from a model"),
    "probe": (probe, "analyses an encoder and decoder before you train a denoiser on them"),
    "convert": (convert, "converts models to other formats, and configurations of the authors' code to ours"),
    "cost": (cost, "estimates operations, memory and hours of a training run before you start it"),
    "app": (app, "serves a web page that reconstructs uploaded images and generates samples"),
}
"""Every command, in order of use, and what it does."""
_HEADING = "Each of these commands explains itself with --help; rae-train --list lists the experiments:"


def rae() -> None:
    """Runs ``rae COMMAND …`` as ``rae-COMMAND …``; without a command, lists them all."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  rae-{command:<14} {about}" for command, (_, about) in COMMANDS.items()]
        _say("\n".join([_HEADING, "", *lines]))
    elif name in COMMANDS:
        _command.append(name)
        sys.argv[1:] = arguments
        COMMANDS[name][0]()
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        guess = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
        print(f"rae: error: there is no command {name!r}; {guess}", file=sys.stderr)
        raise SystemExit(USER_ERROR)
