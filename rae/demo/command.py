"""rae-demo: trains all stages from scratch on a CPU, on small real images, and ends with samples and a table of scores."""

from __future__ import annotations

import argparse
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rae.demo import digits, pictures
from rae.report.table import columns

DEMOS = {"digits": digits, "pictures": pictures}
"""Each has ``FOLDER``, ``GUIDANCE``, ``NOTE``, ``PICTURES``, ``commands(folder, guidance)`` and ``table(folder, wall, cpu)``."""


def run(title: str, command: list[str]) -> float:
    """Prints one command and runs it in a separate process; returns its wall-clock seconds.

    Raises:
        SystemExit: The command failed.
    """
    print(f"\n{title}\n$ {shlex.join(command)}", flush=True)
    start = time.perf_counter()
    arguments = [command[0].removeprefix("rae-"), *command[1:]]
    status = subprocess.run([sys.executable, "-m", "rae", *arguments], check=False).returncode  # noqa: S603
    if status:
        raise SystemExit(f"rae-demo: {command[0]} failed with exit code {status}; the command above can be run alone")
    return time.perf_counter() - start


def main() -> None:
    """Runs a demo and prints its table."""
    parser = argparse.ArgumentParser(prog="rae-demo", description=__doc__)
    parser.add_argument(
        "what", nargs="?", choices=list(DEMOS), default="digits", help="digits by class, or pictures from sentences"
    )
    parser.add_argument("--output", type=Path, help="folder for everything the demo makes; demo or demo_text")
    parser.add_argument("--guidance", type=float, help="scale of classifier-free guidance")
    arguments = parser.parse_args()
    demo = DEMOS[arguments.what]
    folder: Path = arguments.output or Path(demo.FOLDER)
    print(demo.NOTE)
    start = time.perf_counter()
    guidance = demo.GUIDANCE if arguments.guidance is None else arguments.guidance
    for title, command in demo.commands(folder, guidance).items():
        seconds = run(title, command)
        print(f"  ({seconds:.0f} s)", flush=True)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = demo.table(folder, time.perf_counter() - start, usage.ru_utime + usage.ru_stime)
    print(f"\n{columns(rows)}")
    print("\nPictures:")
    for name in demo.PICTURES:
        print(f"  {(folder / name / 'grid.png').resolve()}")


if __name__ == "__main__":
    main()
