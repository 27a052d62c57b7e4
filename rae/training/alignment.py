"""Auxiliary loss that aligns a block's tokens with an encoder's: REPA (arXiv 2410.06940) and iREPA (arXiv 2512.10794)."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from rae.denoiser import Denoiser
from rae.encoder import Encoder
from rae.layers import at_least_float, denoiser_blocks, grid_to_tokens, tokens_to_grid

Projector = Literal["mlp", "conv", "linear"]
Target = Literal["plain", "zscore"]
Loss = Literal["cosine", "mse"]


class Alignment(nn.Module):
    """Projects the image tokens after a block of the denoiser and compares them with target tokens at the same positions.

    The projector is trained with the denoiser but is not part of it: sampling and exports do not use it.

    Args:
        width: Width of the block's tokens.
        channels: Channels of the target.
        block: Number of the block, counted from 1; for DiT-DH the backbone's blocks come first.
        projector: ``mlp``: three linear layers with SiLU between (REPA); ``conv``: a 3×3 convolution (iREPA); ``linear`` (RAEv2).
        hidden: Hidden width of ``mlp``.
        target: ``plain``, or ``zscore``, see :func:`zscore`.
        gamma: Fraction of the tokens' mean that ``zscore`` subtracts.
        loss: ``cosine``: negative cosine similarity; ``mse``: mean squared error.
        weight: Weight of this loss; flow matching has weight 1.
        encoder: The frozen encoder whose tokens are the target; None for the normalised latents that the denoiser learns.

    Raises:
        ValueError: An unknown choice, a size below 1, a negative weight, or an encoder with random weights, which no run keeps.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        block: int = 8,
        projector: Projector = "mlp",
        hidden: int = 2048,
        target: Target = "plain",
        gamma: float = 1.0,
        loss: Loss = "cosine",
        weight: float = 0.5,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        for name, value, kind in (
            ("projector", projector, Projector),
            ("target", target, Target),
            ("loss", loss, Loss),
        ):
            if value not in (known := get_args(kind)):
                raise ValueError(f"alignment.{name}={value!r} is unknown; choose one of {', '.join(known)}")
        for name, size in {"width": width, "channels": channels, "block": block, "hidden": hidden}.items():
            if size < 1:
                raise ValueError(f"alignment.{name}={size} must be at least 1")
        if weight < 0:
            raise ValueError(f"alignment.weight={weight} must not be negative; 0.5 is REPA's")
        if encoder is not None and not encoder.recoverable:
            raise ValueError(
                "alignment.encoder has random weights, which a continued run would not have; give alignment.encoder.checkpoint=…"
            )
        if encoder is not None and encoder.channels != channels:
            raise ValueError(f"alignment.channels={channels} must be {encoder.channels}, those of alignment.encoder")
        self.width, self.channels, self.block = width, channels, block
        self.target, self.gamma, self.loss, self.weight = target, gamma, loss, weight
        self.encoder = encoder
        self.projector: nn.Module
        if projector == "mlp":
            widths = (width, hidden, hidden, channels)
            layers = [nn.Linear(first, second) for first, second in zip(widths[:-1], widths[1:], strict=True)]
            self.projector = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        elif projector == "conv":
            self.projector = nn.Conv2d(width, channels, kernel_size=3, padding=1)
        else:
            self.projector = nn.Linear(width, channels)
        self._seen: list[Tensor] = []

    def watch(self, denoiser: Denoiser) -> None:
        """Makes the denoiser record the tokens after the block in every forward with gradients.

        Raises:
            ValueError: The denoiser has no such block, or its tokens have another width or another grid than the target's.
        """
        blocks = denoiser_blocks(denoiser)
        if self.block > len(blocks):
            raise ValueError(f"alignment.block={self.block} must lie in [1, {len(blocks)}], the denoiser's blocks")
        block = blocks[self.block - 1]
        found = int(block.attn.proj.out_features)  # type: ignore[union-attr, arg-type]
        if found != self.width:
            raise ValueError(f"alignment.width={self.width} must be {found}, that of block {self.block}")
        side = denoiser.grid // denoiser.patch
        given = denoiser.grid if self.encoder is None else self.encoder.grid
        if side != given:
            raise ValueError(
                f"alignment compares {side}×{side} tokens of the denoiser with {given}×{given} of the target; as many are needed: "
                "set denoiser.patch=1, or another alignment.encoder.input_size"
            )
        if self.encoder is None and denoiser.channels != self.channels:
            raise ValueError(f"alignment.channels={self.channels} must be {denoiser.channels}, those of the latents")
        self._tokens = side * side
        denoiser.watched = (block, self._seen)

    def forward(self, target: Tensor) -> Tensor:
        """Weighted loss B of the tokens recorded by the last forward, which are then discarded.

        Args:
            target: Latents or features B×C×h×w, without gradients.
        """
        tokens = self._seen[-1][:, : self._tokens]  # B×N×D; condition tokens come after
        self._seen.clear()
        if isinstance(self.projector, nn.Conv2d):
            projected = grid_to_tokens(self.projector(tokens_to_grid(tokens)))
        else:
            projected = self.projector(tokens)
        projected, wanted = at_least_float(projected), grid_to_tokens(target)  # B×N×C each
        if self.target == "zscore":
            wanted = zscore(wanted, self.gamma)
        if self.loss == "mse":
            return self.weight * (projected - wanted).square().flatten(1).mean(1)
        return -self.weight * F.cosine_similarity(projected, wanted, dim=-1).mean(1)


def zscore(tokens: Tensor, gamma: float = 1.0) -> Tensor:
    """(x − γ·mean) / (std + 1e-6), with mean and sample standard deviation over an image's tokens B×N×C, per channel (iREPA)."""
    return (tokens - gamma * tokens.mean(1, keepdim=True)) / (tokens.std(1, keepdim=True) + 1e-6)
