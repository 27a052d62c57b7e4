"""All that is to be known on a GPU in one command: the tests that need one, then the benchmark, within some minutes.

``python -m tests.on_gpu [--minutes 8] [--json outputs/bench_gpu.json]`` ends with 0 where every test passes. It needs nothing but
this repository and its packages. Without a GPU it runs the tests with fake CUDA tensors and says so.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
MARGIN = 0.6
"""Minutes kept for the last row: none is begun in them."""


def run(arguments: list[str], seconds: float) -> int:
    """Runs Python in the repository's root; its exit code, 124 where it was ended after the seconds."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        return subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, timeout=max(1.0, seconds)
        ).returncode
    except subprocess.TimeoutExpired:
        print("ended: the time is over", flush=True)
        return 124


def main() -> None:
    """Runs what this machine can."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8, help="for everything")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench_gpu.json"), help="file for the figures")
    options = parser.parse_args()
    begin, seconds = time.monotonic(), 60 * options.minutes
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", "-W", "ignore"]
    if not torch.cuda.is_available():
        code = run([*tests, "tests/test_fake_cuda.py"], seconds)
        print(
            "There is no CUDA device: the tests with fake tensors were run, those of a GPU and the benchmark were not."
        )
        raise SystemExit(code)
    code = run([*tests, "-m", "gpu", "tests/test_gpu.py"], seconds)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    left = seconds - (time.monotonic() - begin)
    benchmark = ["tests/benchmarks/gpu.py", "--json", str(options.json.resolve())]
    ended = run([*benchmark, f"--minutes={max(0.0, left / 60 - MARGIN):.2f}"], left)
    print(f"The figures are in {options.json}. {'All tests passed.' if code == 0 else 'Some tests failed: see above.'}")
    raise SystemExit(code or (ended if ended != 124 else 0))


if __name__ == "__main__":
    main()
