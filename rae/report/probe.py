"""One page of plots of rae-probe's results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rae.io.files import write_atomically

_TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "rfid": "rFID",
    "cycle_error": "cycle error ‖E(D(z)) − z‖² / ‖z‖²",
}


def plot_probe(found: Mapping[str, Any], path: Path) -> None:
    """Plots spectrum, variance by position, and every score against noise and against interpolation, as a PNG file.

    ``found`` has ``eigenvalues``, ``position_variance``, ``encoder``, and the rows ``noise`` and ``interpolation``.
    """
    scores = [name for name in found["noise"][0] if name != "sigma"]
    columns = 3
    rows = -(-(2 + len(scores)) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns).flat)
    encoder = found["encoder"]
    spectrum, positions = axes[:2]
    varying = [value for value in found["eigenvalues"] if value > 1e-9 * found["eigenvalues"][0]]
    spectrum.semilogy(range(1, len(varying) + 1), varying)
    spectrum.set(title=f"effective rank {encoder['effective_rank']:.1f} of {len(found['eigenvalues'])}")
    spectrum.set(xlabel="direction", ylabel="variance of the latents")
    image = positions.imshow(found["position_variance"], cmap="viridis")
    figure.colorbar(image, ax=positions)
    positions.set(xticks=[], yticks=[])
    positions.set(title=f"variance by position: largest / smallest {encoder['position_spread']:.2f}")
    for axis, name in zip(axes[2:], scores, strict=False):
        for kind, level, label in (
            ("noise", "sigma", "noise of deviation σ"),
            ("interpolation", "alpha", "share α of the next image's latent"),
        ):
            axis.plot([row[level] for row in found[kind]], [row[name] for row in found[kind]], "o-", label=label)
        axis.set(title=_TITLES.get(name, name), xlabel="σ or α")
    axes[2].legend()
    for axis in axes[2 + len(scores) :]:
        axis.axis("off")
    FigureCanvasAgg(figure)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
