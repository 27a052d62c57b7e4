"""What the benchmarks share: ours and a peer take turns in one run; medians, ratios, peak memory, a table and a JSON file.

A script describes its comparisons and calls :func:`main`::

    main(__file__, __doc__, {"encode, batch 2": Comparison(ours=make_ours, peer=make_theirs, images=2)})

``python tests/benchmarks/SCRIPT.py [--repeats N] [--json FILE] [--match TEXT]``. Peak memory is that of a process of its own for
each side, started by the script itself (``--memory NAME SIDE``): neither side pays for what the other has left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the commands do
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.…

import torch

Work = Callable[[], object]
SIDES = ("ours", "peer")


@dataclass
class Comparison:
    """Two ways to the same result.

    Attributes:
        ours: Builds our side and returns the work to be timed.
        peer: The same of the other side.
        images: Images that one call of the work handles.
        goal: Ratio of the peer's time to ours that is aimed at; None where only the figure is wanted.
        check: Called with both sides' results of the first turn, raises where they differ; None where another test compares them.
        memory: Whether peak memory is measured.
    """

    ours: Callable[[], Work]
    peer: Callable[[], Work]
    images: int = 1
    goal: float | None = None
    check: Callable[[Any, Any], None] | None = None
    memory: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)


def seconds(work: Work) -> tuple[float, Any]:
    """Wall time of one call, and its result; waits for the device where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def take_turns(works: Mapping[str, Work], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Times every work ``repeats`` times, one after the other, after one turn that warms up; and the results of that turn."""
    results = {name: seconds(work)[1] for name, work in works.items()}
    laps: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats):
        names = list(works) if turn % 2 == 0 else list(works)[::-1]
        for name in names:
            laps[name].append(seconds(works[name])[0])
    return laps, results


def peak_memory(work: Work) -> float:
    """Largest resident memory of this process while the work runs a second time, in MB, weights included; of the device on CUDA."""
    work()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        seconds(work)
        return torch.cuda.max_memory_allocated() / 1e6
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
        work()
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    except OSError:
        work()
        scale = 1e6 if sys.platform == "darwin" else 1e3
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale


def give_back() -> None:
    """Lets go of what is not needed any more, to the system where the C library is glibc: loaded weights, sides that were timed."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_of(script: str, name: str, side: str, threads: int) -> float:
    """Peak memory of one side in a process of its own, in MB."""
    command = [sys.executable, script, "--memory", name, side, "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def versions() -> dict[str, str]:
    """Where the figures were measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    today = time.strftime("%Y-%m-%d")
    return {"device": device, "torch": torch.__version__, "python": platform.python_version(), "date": today}


def main(script: str, doc: str, comparisons: Mapping[str, Comparison], repeats: int = 5) -> list[dict[str, Any]]:
    """Runs the comparisons, prints a Markdown table and writes the figures.

    Args:
        script: The script's ``__file__``.
        doc: Its docstring.
        comparisons: By name.
        repeats: Turns of each side.

    Returns:
        The figures of every comparison.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each side")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument("--match", default="", help="only comparisons whose name holds this text")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--memory", nargs=2, metavar=("NAME", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        name, side = options.memory
        print(peak_memory(getattr(comparisons[name], side)()), flush=True)
        os._exit(0)  # a training run that waits in a thread would end in an abort
    rows = []
    print("| what | ours | peer | ratio | goal | peak memory ours / peer |\n|---|---|---|---|---|---|", flush=True)
    for name, comparison in comparisons.items():
        if options.match not in name:
            continue
        row = measure(script, name, comparison, options.repeats, options.threads)
        rows.append(row)
        goal = "" if comparison.goal is None else f"≥ {comparison.goal:.2f}"
        memory = f"{row['ours_mb']:.0f} / {row['peer_mb']:.0f} MB" if comparison.memory else ""
        print(
            f"| {name} | {1e3 * row['ours_s']:.0f} ms | {1e3 * row['peer_s']:.0f} ms | × {row['ratio']:.2f} | {goal} | {memory} |",
            flush=True,
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**versions(), "repeats": options.repeats, "rows": rows}, indent=2))
    return rows


def measure(script: str, name: str, comparison: Comparison, repeats: int, threads: int) -> dict[str, Any]:
    """Medians, their ratio and peak memory of one comparison.

    Raises:
        AssertionError: Both sides' results differ.
    """
    laps, results = take_turns({side: getattr(comparison, side)() for side in SIDES}, repeats)
    if comparison.check is not None:
        comparison.check(results["ours"], results["peer"])
    del results
    give_back()
    medians = {side: statistics.median(laps[side]) for side in SIDES}
    # The median of the ratios of neighbouring turns: what slows the whole machine for a while slows both.
    ratio = statistics.median(peer / ours for ours, peer in zip(laps["ours"], laps["peer"], strict=True))
    row: dict[str, Any] = {"name": name, "images": comparison.images, "ratio": ratio, "goal": comparison.goal}
    row |= {f"{side}_s": medians[side] for side in SIDES} | {f"{side}_laps": laps[side] for side in SIDES}
    if comparison.memory:
        row |= {f"{side}_mb": memory_of(script, name, side, threads) for side in SIDES}
    return row | dict(comparison.extra)
