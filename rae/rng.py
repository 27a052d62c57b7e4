"""Random draws that depend only on named keys.

Every draw in the library is made for one sample from one seed, a hash of what identifies the draw: the run's seed, a purpose,
the epoch, the sample's position in the data set. Results are therefore the same for any batch size, number of workers or
number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_SEED_BITS = 63


def sample_seed(seed: int, *keys: int | str) -> int:
    """Hashes a seed and any number of keys to a 63-bit seed, the same on every machine and Python version.

    Args:
        seed: The run's seed.
        keys: What the draw is for, e.g. ``("noise", epoch, index)``.

    Returns:
        An integer in [0, 2^63) for ``torch.Generator.manual_seed``. CUDA's generators use all of its bits, the CPU's only the
        lower 32: among 50,000 samples drawn on a CPU, two share their noise with probability 0.25. That is too rare to affect
        a score, and a different seeding scheme would change every sample generated so far.
    """
    text = "/".join(str(int(key)) if not isinstance(key, str) else repr(key) for key in (seed, *keys))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - _SEED_BITS)


def sample_seeds(seed: int, purpose: str, epochs: Iterable[int], indices: Iterable[int]) -> list[int]:
    """One seed per sample of a batch, from its epoch and its position in the data set; two purposes never share a draw."""
    return [sample_seed(seed, purpose, int(e), int(i)) for e, i in zip(epochs, indices, strict=True)]


def normal(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal draws [len(seeds), *shape], float32; row i depends only on ``seeds[i]``.

    They are drawn on the device, or on the CPU for devices without generators.
    """
    return _rows(torch.randn, seeds, shape, torch.device(device))


def uniform(seeds: Sequence[int], shape: Sequence[int] = (), device: torch.device | str = "cpu") -> Tensor:
    """Uniform draws in [0, 1) [len(seeds), *shape], float32, drawn on the CPU; row i depends only on ``seeds[i]``."""
    return to_device(_rows(torch.rand, seeds, shape, torch.device("cpu")), torch.device(device))


def arc(first: Tensor, last: Tensor, count: int) -> Tensor:
    """Noise float32 count×… on the arc between two draws, both ends included (Shoemake 1985).

    Points on the straight line would have too small a norm: high-dimensional noise lies near a sphere.
    """
    a, b = first.double(), last.double()
    angle = torch.arccos((torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())).clamp(-1, 1))
    steps = torch.linspace(0, 1, count, dtype=torch.float64, device=a.device).reshape(-1, *(1,) * a.ndim)
    noise = (torch.sin((1 - steps) * angle) * a + torch.sin(steps * angle) * b) / torch.sin(angle)
    noise[0], noise[-1] = a, b
    return noise.float()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Moves CPU values to a device; copies to a GPU are asynchronous."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def _rows(draw: Callable[..., Tensor], seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Draws every row with its own seed; on the CPU for devices without generators."""
    where = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    generator = torch.Generator(device=where)
    out = torch.empty((len(seeds), *shape), device=where, dtype=torch.float32)
    for row, seed in enumerate(seeds):
        generator.manual_seed(seed)
        draw(tuple(shape), generator=generator, out=out[row])
    return out.to(device)
