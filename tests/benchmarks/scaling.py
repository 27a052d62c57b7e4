"""How a training step's time and memory grow with the batch, the tokens and the width, and what rae-cost's figures say of it.

Run with ``python tests/benchmarks/scaling.py [--repeats 3] [--threads N] [--json FILE]``. A step is forward pass, flow-matching
loss, backward pass and AdamW of a diffusion transformer on latents of 768 channels. The steps take turns; peak memory is that of a
process of its own, less what a process without a network has. Ratios are to the first row of each table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from side_by_side import Work, peak_memory, take_turns, versions  # first: it sets how threads wait

from rae.cost import to_meta
from rae.denoiser import DiTDH
from rae.flow import FlowMatching
from tests.helpers.small_runs import denoiser_step

CHANNELS = 768
CLASSES = 1000


@dataclass(frozen=True)
class Setting:
    """One step to be timed."""

    batch: int = 1
    grid: int = 16
    width: int = 384
    head_width: int = 768

    def network(self) -> DiTDH:
        """Three blocks and a head of one, 64 dimensions to an attention head."""
        heads = self.width // 64, self.head_width // 64
        return DiTDH(CHANNELS, self.grid, self.width, 3, heads[0], self.head_width, 1, heads[1], CLASSES)

    def step(self) -> Work:
        """The work of a step, on draws that are made once."""
        torch.manual_seed(0)
        network, flow = self.network(), FlowMatching()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        data, noise = (torch.randn(self.batch, CHANNELS, self.grid, self.grid) for _ in range(2))
        t, label = torch.rand(self.batch), torch.zeros(self.batch, dtype=torch.int64)

        def work() -> float:
            loss = flow.loss(network, data, noise, t, label=label).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # gradients stay, as weights do: what is left are the activations
            return loss.item()

        return work

    def predicted(self) -> dict[str, float]:
        """Operations of a step, and megabytes at its peak: activations, and weights with gradients and two moments."""
        with torch.device("meta"):
            network = to_meta(self.network())
        cost = denoiser_step(network).work  # type: ignore[arg-type]
        held = 4 * sum(p.numel() * p.element_size() for p in network.parameters())
        return {
            "flops": self.batch * cost.flops,
            "activations_mb": (self.batch * cost.peak + cost.fixed) / 1e6,
            "held_mb": held / 1e6,
        }


SERIES = {
    "batch": {f"batch {batch}": Setting(batch=batch) for batch in (1, 2, 4, 8)},
    "tokens": {f"{grid**2} tokens": Setting(grid=grid) for grid in (16, 24, 32)},
    "width": {
        f"width {width}, head {2 * width}": Setting(width=width, head_width=2 * width) for width in (192, 384, 768)
    },
}


def memory(series: str, name: str, threads: int) -> float:
    """Peak memory of a step in a process of its own, in MB, less that of the process without a network."""
    found = []
    for what in ("base", name):
        command = [sys.executable, __file__, "--memory", series, what, "--threads", str(threads)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(float(done.stdout.split()[-1]))
    return found[1] - found[0]


def measure(series: str, repeats: int, threads: int) -> list[dict[str, object]]:
    """Time, memory and predictions of every setting of a series, with ratios to the first."""
    settings = SERIES[series]
    laps, _ = take_turns({name: setting.step() for name, setting in settings.items()}, repeats)
    rows: list[dict[str, object]] = []
    first: dict[str, float] = {}
    for name, setting in settings.items():
        said = setting.predicted()
        seconds, peak = statistics.median(laps[name]), memory(series, name, threads)
        first = first or {"s": seconds, **said}
        rows.append(
            {
                "series": series,
                "name": name,
                "seconds": seconds,
                "laps": laps[name],
                "time_ratio": seconds / first["s"],
                "flops_ratio": said["flops"] / first["flops"],
                "gflops_per_second": said["flops"] / seconds / 1e9,
                "peak_mb": peak,
                "predicted_mb": said["held_mb"] + said["activations_mb"],
                **said,
            }
        )
    return rows


def main() -> None:
    """Measures all series, prints a Markdown table of each and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=3, help="turns of each step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--memory", nargs=2, metavar=("SERIES", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        series, name = options.memory
        print(peak_memory(SERIES[series][name].step() if name != "base" else lambda: None))
        return
    rows = []
    for series in SERIES:
        print(
            f"\n| {series} | ms a step | ratio | operations' ratio | GFLOP/s | peak memory | rae-cost's |\n|{'---|' * 7}",
            flush=True,
        )
        for row in measure(series, options.repeats, options.threads):
            rows.append(row)
            print(
                f"| {row['name']} | {1e3 * row['seconds']:.0f} | {row['time_ratio']:.2f} | {row['flops_ratio']:.2f} "  # type: ignore[operator]
                f"| {row['gflops_per_second']:.0f} | {row['peak_mb']:.0f} MB | {row['predicted_mb']:.0f} MB |",
                flush=True,
            )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**versions(), "repeats": options.repeats, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
