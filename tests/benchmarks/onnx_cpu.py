"""Decoder and denoiser in PyTorch, against onnxruntime with the files that ``rae-convert to=onnx`` writes, on the CPU.

Sizes of the digits demo, and of ViT-B: a decoder and a LightningDiT of 12 blocks, 768 wide, for latents 768×16×16. The exporter
compares the results once more, and refuses those that differ by more than 1e-4.
"""

from __future__ import annotations

import importlib
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import Comparison, Work, main

SIZES: dict[str, dict[str, Any]] = {
    "digits": {"channels": 64, "grid": 4, "width": 128, "depth": 4, "heads": 4},
    "ViT-B": {"channels": 768, "grid": 16, "width": 768, "depth": 12, "heads": 12},
}


def network(part: str, size: str) -> Any:
    """Our network with random weights, as it is exported."""
    from rae.autoencoder import RAE
    from rae.decoder import ViTDecoder
    from rae.denoiser import DiT
    from rae.flow import FlowMatching
    from rae.formats.onnx import Images, Velocities

    torch.manual_seed(0)
    sizes = SIZES[size]
    if part == "decoder":
        return Images(RAE(None, ViTDecoder(**sizes, mlp_width=4 * sizes["width"]))).eval()
    denoiser = DiT(**sizes, num_classes=1000)
    for parameter in denoiser.parameters():  # modulations and the last layer begin at zero
        torch.nn.init.normal_(parameter, std=0.02)
    return Velocities(denoiser, FlowMatching()).eval()


def given(part: str, size: str, batch: int) -> dict[str, torch.Tensor]:
    """Inputs by name."""
    channels, grid = SIZES[size]["channels"], SIZES[size]["grid"]
    x = torch.randn(batch, channels, grid, grid, generator=torch.Generator().manual_seed(1))
    if part == "decoder":
        return {"latents": x}
    return {"x_t": x, "t": torch.linspace(0.1, 0.9, batch), "label": torch.arange(batch)}


def ours(part: str, size: str, batch: int) -> Work:
    """PyTorch."""
    made, inputs = network(part, size), given(part, size, batch)

    @torch.no_grad()
    def work() -> torch.Tensor:
        return made(*inputs.values())

    return work


@cache
def session(part: str, size: str) -> Any:
    """The network in onnxruntime, on as many threads as PyTorch has."""
    from rae.formats.onnx import write

    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        write(part, network(part, size), given(part, size, 3), ["output"], Path(folder))
        return runtime.InferenceSession(Path(folder) / f"{part}.onnx", options, providers=["CPUExecutionProvider"])


def peer(part: str, size: str, batch: int) -> Work:
    """onnxruntime."""
    made, inputs = session(part, size), {name: value.numpy() for name, value in given(part, size, batch).items()}
    return lambda: torch.from_numpy(made.run(None, inputs)[0])


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    """Compares the results."""
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def comparisons() -> dict[str, Comparison]:
    """One a network, size and batch."""
    return {
        f"{part} of {size} size, batch {batch}, against onnxruntime": Comparison(
            partial(ours, part, size, batch), partial(peer, part, size, batch), batch, None, same, memory=False
        )
        for size in SIZES
        for part in ("decoder", "denoiser")
        for batch in (1, 8 if size == "digits" else 2)
    }


if __name__ == "__main__":
    main(__file__, __doc__, comparisons(), repeats=3)
