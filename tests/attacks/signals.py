"""Signals at random moments to commands that write, then the same command again: it must end as if nothing had been.

``python -m tests.attacks.signals [--trials 40] [--seed 0] [--only COMMAND]`` prints a line for each trial and a table of counts,
and ends with 1 where a result differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.helpers.small_images import ENCODER, write_images
from tests.training.test_kill import STAGES

ROOT = Path(__file__).parents[2]
SIGNALS: dict[str, Sequence[int]] = {
    "kill": [signal.SIGKILL],
    "term": [signal.SIGTERM],
    "interrupt": [signal.SIGINT],
    "interrupt twice": [signal.SIGINT, signal.SIGINT],
    "stop and go on": [signal.SIGSTOP, signal.SIGCONT],
}
RESULTS = (".png", ".npz", ".npy", ".tar", ".json", ".pt", ".safetensors", ".csv")
"""Endings of files that are compared byte by byte, the folder's name in them aside."""
TIMED = ("summary.json", "metrics.csv")
"""Files that hold times."""


def commands(work: Path) -> dict[str, list[str]]:
    """Commands by name, with arguments that make each a matter of seconds; what they read is made first."""
    images = [f"data.train_path={work}/images/train", f"data.val_path={work}/images/val", "data.num_classes=5"]
    encoded = [*ENCODER, *images, "data.batch_size=8", "data.num_workers=0", "part_size=8", "device=cpu"]
    drawn = [f"checkpoint={work}/stage2", "samples_per_class=4", "sampler.grid.points=6", "batch_size=4", "part_size=4"]
    return {
        "train stage 1": ["train", *STAGES[1]],
        "train stage 2": ["train", *STAGES[2]],
        "shard": ["shard", f"images={work}/images/train", "images_per_shard=8"],
        "stats": ["stats", *encoded],
        "cache-latents": ["cache_latents", *encoded],
        "sample": ["sample", *drawn, "device=cpu", f"decoder_checkpoint={work}/stage1"],
        "evaluate": ["evaluate", *drawn, "device=cpu", f"decoder_checkpoint={work}/stage1", "metric=digits"],
        "reconstruct": ["reconstruct", f"checkpoint={work}/stage1", "part_size=32", "png=true", "device=cpu"],
    }


class Trial:
    """One command, disturbed.

    Args:
        arguments: The module below ``rae.cli`` and its overrides.
        folder: Where it writes.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.arguments, self.folder = arguments, folder

    def start(self) -> subprocess.Popen[str]:
        """Starts the command in a process group of its own."""
        name, *overrides = self.arguments
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        line = [sys.executable, "-m", "rae", name.replace("_", "-"), *overrides, f"output_dir={self.folder}"]
        return subprocess.Popen(
            line,
            cwd=ROOT,
            env=variables,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def disturb(self, sent: str, after: float) -> tuple[int, str]:
        """Sends signals after some seconds; returns the exit code, and what was said."""
        process = self.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(after)
        for number in SIGNALS[sent]:
            if process.poll() is None:
                process.send_signal(number)
                time.sleep(0.3)
        if SIGNALS[sent][0] == signal.SIGKILL:  # what it leaves behind goes too, as a scheduler would have it
            process.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate(timeout=300)
        return process.returncode, said

    def finish(self) -> float:
        """Runs the command to its end; that its result exists already is an answer, too.

        Returns:
            How many seconds it took.

        Raises:
            AssertionError: It fails.
        """
        begun, process = time.monotonic(), self.start()
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0 or "exists: force=true replaces it" in said, said
        return time.monotonic() - begun


def results(folder: Path) -> dict[str, Any]:
    """What a command has made: files by name, and a run's last checkpoint without the names of its folder."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in RESULTS and path.name not in TIMED and path.is_file():
            found[name] = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        if path.suffix == ".tmp":
            found[name] = "left behind"
    last = folder / "checkpoints" / "last.ckpt"
    if last.exists():
        checkpoint = torch.load(last, weights_only=True)
        del checkpoint["config"]
        found["last.ckpt"] = checkpoint
    return found


def logged(folder: Path) -> dict[tuple[int, str], str]:
    """Every value in a run's tables, by step and name, but times."""
    values = {}
    for file in sorted(folder.glob("metrics/version_*/metrics.csv"), key=lambda path: path.stat().st_mtime_ns):
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
        values.update({(int(row["step"]), name): value for row in rows for name, value in row.items() if value})
    return {key: value for key, value in values.items() if "per_second" not in key[1] and key[1] != "step"}


def differences(first: Any, second: Any, place: str = "") -> list[str]:
    """Places where two results differ."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [place]
    if isinstance(first, dict):
        keys = first.keys() ^ second.keys()
        shared = [
            found
            for key in first.keys() & second.keys()
            for found in differences(first[key], second[key], f"{place}/{key}")
        ]
        return [*(f"{place}/{key} is in one only" for key in sorted(map(str, keys))), *shared]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [f"{place}: {len(first)} and {len(second)} long"]
        return [
            found
            for i, pair in enumerate(zip(first, second, strict=True))
            for found in differences(*pair, f"{place}/{i}")
        ]
    if first == second:
        return []
    return [place if isinstance(first, bytes) else f"{place}: {first!r} and {second!r}"]


def attack(trials: int, seed: int, work: Path, only: str = "") -> dict[str, collections.Counter[str]]:
    """Disturbs commands, each up to three times, and compares.

    Args:
        trials: How many commands are disturbed.
        seed: For the commands, signals and moments.
        work: An empty folder.
        only: The name of one command; empty for all in turn.

    Returns:
        Counts by command: ``trials``, ``signals``, ``differ``.
    """
    draws, tables = random.Random(seed), collections.defaultdict[str, collections.Counter[str]](collections.Counter)
    write_images(work / "images")
    for stage in (1, 2):
        Trial(["train", *STAGES[stage]], work / f"stage{stage}").finish()
    known, durations = {}, {}
    names = [only] if only else list(commands(work))
    for number in range(trials):
        name = names[number % len(names)]
        arguments = commands(work)[name]
        if name not in known:
            whole = work / "whole" / name.replace(" ", "_")
            durations[name] = Trial(arguments, whole).finish()
            known[name] = whole
        folder = work / "disturbed"
        shutil.rmtree(folder, ignore_errors=True)
        trial, sent, said = Trial(arguments, folder), [], ""
        for _ in range(draws.randint(1, 3)):
            kind = draws.choice(list(SIGNALS))
            after = durations[name] * draws.uniform(0.2, 1)
            code, said = trial.disturb(kind, after)
            sent.append(f"{kind} at {after:.1f} s -> {code}")
            # Python reports where a second Ctrl-C met code that cannot raise it
            assert kind == "interrupt twice" or "Traceback" not in said, f"{name}, {sent}: {said}"
        trial.finish()
        found = differences(results(known[name]), results(folder))
        if name.startswith("train"):
            lost = logged(known[name]).items() - logged(folder).items()
            found += [f"logged values lost or changed: {sorted(lost)[:4]}"] if lost else []
        tables[name] += collections.Counter(trials=1, signals=len(sent), differ=bool(found))
        print(f"{number + 1:3d} {name}: {'; '.join(sent)}: {found or 'the same'}", flush=True)
    return tables


def main() -> None:
    """Runs the attack and prints its counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        tables = attack(given.trials, given.seed, Path(work), given.only)
    for name, counts in tables.items():
        print(f"{name:15s} {counts['trials']:3d} trials {counts['signals']:3d} signals {counts['differ']:3d} differ")
    raise SystemExit(1 if any(counts["differ"] for counts in tables.values()) else 0)


if __name__ == "__main__":
    main()
