"""Console scripts: Hydra's command line with errors in one line, folders of our own and Ctrl-C."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from rae.cli.config import VERSION_BASE, absolute_paths, check_complete, conf_dir, normalise, register_resolvers

if TYPE_CHECKING:
    from rae.cli.sweep import Job

Task = Callable[[DictConfig], None]
AfterSweep = Callable[[Sequence["Job"]], None]

# Idle OpenMP threads are to spin but briefly: on a CPU that other work shares, the default made a training step up to 40 times
# slower; not spinning at all makes it half as fast on an idle one.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

USER_ERROR, TASK_ERROR, INTERRUPTED = 2, 1, 130
_FLAGS_WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"),
    *("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or another signal, with a message that says where the work stands.

    Args:
        text: The message.
        code: The exit code.
    """

    def __init__(self, text: str, code: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.code = code


def entry(config: str, task: Task, after_sweep: AfterSweep | None = None, complete: bool = True) -> Callable[[], None]:
    """Makes the ``main`` of a console script.

    The exit code is 0, 1 (the task failed; one line says why), 2 (the command line is wrong; one line names the nearest
    right one) or 130 (Ctrl-C). ``RAE_TRACEBACK=1`` or ``hydra.verbose=true`` shows full traces.

    Args:
        config: Name of the root config in ``conf/``.
        task: Receives the composed configuration, whose ``output_dir`` is absolute and exists.
        after_sweep: Called with all jobs once a sweep is over.
        complete: Whether a configuration with values still to be given is refused.
    """
    program = f"rae-{config.replace('_', '-')}"
    return functools.partial(_main, config, task, program, after_sweep, complete)


def _main(config: str, task: Task, program: str, after_sweep: AfterSweep | None, complete: bool) -> None:
    import hydra  # noqa: PLC0415 (after the resolvers; slow)
    from hydra.core.hydra_config import HydraConfig  # noqa: PLC0415

    from rae.cli.sweep import Job  # noqa: PLC0415

    register_resolvers()
    given = sys.argv[1:]
    _trust_own_classes(given)
    sys.argv[1:] = _without_fixed_keys(normalise(_flags_first(given)))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra is to raise its errors, which are put in words below
    jobs: list[Job] = []

    def guarded(cfg: DictConfig) -> None:
        error = _run(cfg, config, task, program, complete)
        jobs.append(Job(list(HydraConfig.get().overrides.task), Path(cfg.output_dir), error is not None))

    command = hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=config)(guarded)
    try:
        command()
        if after_sweep is not None and _is_sweep(sys.argv):
            after_sweep(jobs)
        _reader_left()
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            raise SystemExit(TASK_ERROR) from None  # as other programs do, without a word
        if _wants_trace():
            raise
        from hydra._internal.utils import get_args_parser  # noqa: PLC0415 (only where it is needed)

        from rae.cli.errors import explain  # noqa: PLC0415 (only where it is needed)

        arguments = get_args_parser().parse_known_args(_flags_first(given))[0]
        folders = [Path(arguments.config_dir).resolve()] if arguments.config_dir else []
        text = explain(error, arguments.config_name or config, arguments.overrides, folders)
        print(f"{program}: error: {text}", file=sys.stderr)
        raise SystemExit(USER_ERROR) from None
    if any(job.failed for job in jobs):
        raise SystemExit(TASK_ERROR)


def _run(cfg: DictConfig, config: str, task: Task, program: str, complete: bool) -> BaseException | None:
    """Runs one job; returns its error, already reported, so that the other jobs of a sweep still run."""
    from hydra.core.hydra_config import HydraConfig  # noqa: PLC0415
    from hydra.types import RunMode  # noqa: PLC0415

    from rae.cli.errors import blame, describe, is_expected  # noqa: PLC0415
    from rae.cli.schema import check_values  # noqa: PLC0415

    job = HydraConfig.get()
    sweeping = job.mode == RunMode.MULTIRUN
    cfg.output_dir = job.runtime.output_dir if sweeping else str(Path(cfg.output_dir).expanduser().resolve())
    arguments, environment = sys.argv, dict(os.environ)
    if sweeping:
        # Processes that a strategy starts repeat the command line: for them it is this one job's.
        sys.argv = [arguments[0], *job.overrides.hydra, *job.overrides.task, f"output_dir='{cfg.output_dir}'"]
        sys.argv = [argument for argument in sys.argv if argument != "hydra.mode=MULTIRUN"]
    try:
        if complete:
            check_complete(cfg, job.job.config_name or config)
        check_values(cfg, job.job.config_name or config)
        absolute_paths(cfg)
        task(cfg)
    except KeyboardInterrupt as stop:
        print(f"{program}: {str(stop) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(getattr(stop, "code", INTERRUPTED)) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return error
        if _wants_trace() or not is_expected(error):
            traceback.print_exc()
        print(f"{program}: error: {blame(describe(error), job.overrides.task)}", file=sys.stderr)
        with contextlib.suppress(OSError):  # they are not empty
            Path(cfg.output_dir).rmdir()
            if Path(cfg.paths.outputs).resolve() == Path(cfg.output_dir).parent:
                Path(cfg.paths.outputs).rmdir()
        return error
    finally:
        sys.argv = arguments
        if sweeping:
            _leave_process_group(environment)
    return None


def _trust_own_classes(arguments: list[str]) -> None:
    """Lets files build the classes that the user's own YAML files, below ``--config-dir``, name."""
    from hydra._internal.utils import get_args_parser  # noqa: PLC0415 (only where it is needed)

    folder = get_args_parser().parse_known_args(_flags_first(arguments))[0].config_dir
    if folder is None:
        return
    from rae.describe import trust  # noqa: PLC0415

    for file in Path(folder).rglob("*.yaml"):
        trust(re.findall(r"^\s*_target_:\s*[\"']?([\w.]+)", file.read_text(errors="replace"), re.MULTILINE))


def _reader_left() -> bool:
    """Whether nobody reads the standard output any more, as after ``| head``; what is still to be written goes nowhere then."""
    gone = False
    try:
        sys.stdout.flush()
        # A write that failed leaves nothing behind that flushing would tell. Windows has no poll.
        if hasattr(select, "poll"):
            watch = select.poll()
            watch.register(sys.stdout.fileno(), 0)
            gone = any(event & select.POLLERR for _, event in watch.poll(0))
    except BrokenPipeError:
        gone = True
    except (OSError, ValueError):  # no file, as in a notebook
        return False
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _leave_process_group(environment: dict[str, str]) -> None:
    """Lets the next job of a sweep start its processes anew."""
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
    """Flags may stand anywhere among the overrides, which argparse by itself does not allow."""
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
    """In a sweep, leaves the overrides that all jobs share out of the names of the jobs' folders."""
    if not _is_sweep(arguments):
        return arguments
    from hydra.core.override_parser.overrides_parser import OverridesParser  # noqa: PLC0415
    from hydra.errors import HydraException  # noqa: PLC0415

    parser = OverridesParser.create()
    fixed = []
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            continue
        try:
            override = parser.parse_override(argument)
        except HydraException:
            return arguments  # Hydra says what is wrong
        if not override.is_sweep_override() and not override.is_hydra_override():
            fixed.append(override.get_key_element())
    keys = ",".join(f"'{key}'" for key in fixed)
    return [*arguments, f"hydra.job.config.override_dirname.exclude_keys=[{keys}]"]
