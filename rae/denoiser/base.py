"""Base of the denoisers: arguments, checks, patch embedding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rae.condition import Condition, Conditions, LabelEmbedding
from rae.io.describe import Described
from rae.layers import (
    AdaptiveBlock,
    SinusoidalTimeEmbedding,
    TimeEmbedding,
    check_time,
    grid_to_tokens,
    should_check,
)


class PatchEmbedding(nn.Module):
    """Linear map from patches of side ``patch`` to tokens; Xavier initialisation on the flattened kernel."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        assert self.proj.bias is not None
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """B×C×H×W => B×N×width."""
        return grid_to_tokens(self.proj(x))


class Denoiser(Described, nn.Module):
    """Base of the denoisers: (x_t B×C×H×W, t B, conditions by name) -> prediction B×C×H×W.

    Args:
        channels: Channels of the latent.
        grid: Side of the latent.
        patch: Side of a patch, dividing ``grid``.
        width: Width of the time embedding.
        checkpointing: Recompute the blocks in the backward pass instead of keeping their activations.
        second_time: Whether it is also conditioned on a time r ≤ t, for average velocities over [r, t]
            (:mod:`rae.flow.mean_flow`). The embedding of r is added to that of t and starts at zero, so a denoiser
            initialised from one without it predicts the same.

    Raises:
        ValueError: A size below 1, or ``grid`` is not divisible by ``patch``.
    """

    condition: Condition
    """What it is conditioned on besides latent and time."""
    has_base = False
    """Whether it also predicts from its first blocks (``base=True``); internal guidance steers away from that prediction."""
    takes_class_token = False
    """Whether it learns the encoder's class token jointly with the latents: :meth:`join`, :meth:`split`, :meth:`begin`."""

    def __init__(
        self, channels: int, grid: int, patch: int, width: int, checkpointing: bool, second_time: bool = False
    ) -> None:
        super().__init__()
        if min(channels, grid, patch, width) < 1:
            raise ValueError(
                f"denoiser: channels={channels}, grid={grid}, patch={patch} and width={width} must be at least 1"
            )
        if grid % patch:
            raise ValueError(f"grid={grid} is not divisible by patch={patch}; the latent must divide into patches")
        self.channels = channels
        self.grid = grid
        self.patch = patch
        self.checkpointing = checkpointing
        self.watched: tuple[nn.Module, list[Tensor]] | None = None
        """A block, and the list that receives its output in every forward with gradients; for losses on inner tokens."""
        self.time_embedding: TimeEmbedding | SinusoidalTimeEmbedding = TimeEmbedding(width)
        self.second_time = second_time
        if second_time:
            self.second_embedding = TimeEmbedding(width)
            nn.init.zeros_(self.second_embedding.fc2.weight)
            nn.init.zeros_(self.second_embedding.fc2.bias)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if it is conditioned on something else."""
        return int(getattr(self.condition, "num_classes", 0))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return (self.channels, self.grid, self.grid)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the diffused state; by default that of the latents."""
        return self.latent_shape

    @property
    def loss_weight(self) -> Tensor | None:
        """Weights of a state's values in the loss, a mean over them; None for 1."""
        return None

    def join(self, latents: Tensor, class_token: Tensor | None = None) -> Tensor:
        """Combines latents B×C×H×W, and for some denoisers the class token B×C, into the state that is diffused."""
        return latents

    def split(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """The latents B×C×H×W of a state, and its class token B×C if it has one."""
        return state, None

    def begin(self, noise: Tensor) -> Tensor:
        """The initial state of samples, from noise B×C×H×W."""
        return noise

    def embed_time(self, t: Tensor, r: Tensor | None) -> Tensor:
        """Times B => B×width; with a second time, the embedding of r (t if not given) is added."""
        embedding = self.time_embedding(t)
        return embedding + self.second_embedding(t if r is None else r) if self.second_time else embedding

    def check(self, x_t: Tensor, t: Tensor, conditions: Conditions, r: Tensor | None = None) -> None:
        """Checks shapes and, on the host, values; nothing is read back from a device.

        The state is B×…, the times B, the second times B and at most t; ValueError states what was received and is required.
        """
        if tuple(x_t.shape[1:]) != self.state_shape:
            raise ValueError(f"x_t has shape {tuple(x_t.shape)}, required is B×{'×'.join(map(str, self.state_shape))}")
        if t.shape != x_t.shape[:1]:
            raise ValueError(f"t must hold one value a sample: batch {x_t.shape[0]}, t {tuple(t.shape)}")
        if r is not None and not self.second_time:
            raise ValueError(
                f"this {type(self).__name__} knows no second time r, which average velocities need: train one with "
                "denoiser.second_time=true and flow=mean_flow, or choose a sampler of velocities, e.g. sampler=euler"
            )
        if r is not None and r.shape != t.shape:
            raise ValueError(f"r must hold one value a sample, as t does: t {tuple(t.shape)}, r {tuple(r.shape)}")
        self.condition.check(conditions, x_t.shape[0])
        if should_check(x_t):
            check_time(t)
            if r is not None and not (r.min() >= 0 and (r <= t).all()):
                raise ValueError(f"r must lie in [0, t], got r={r.tolist()[:8]} for t={t.tolist()[:8]}")
            self.condition.check_values(conditions)

    def run_blocks(self, blocks: Iterable[nn.Module], x: Tensor, *arguments: Tensor | nn.Module | None) -> Tensor:
        """Runs blocks in sequence with the same further arguments, B×N×D => B×N×D."""
        for block in blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *arguments, use_reentrant=False)
            else:
                x = block(x, *arguments)
            if self.watched is not None and block is self.watched[0] and torch.is_grad_enabled():
                self.watched[1].append(x)
        return x


class LabelDenoiser(Denoiser):
    """Base of the denoisers conditioned on a class label, which modulates their blocks.

    ``width`` is that of time and label embeddings; the null label is ``num_classes``. See :class:`Denoiser` for the rest.
    """

    def __init__(
        self,
        channels: int,
        grid: int,
        patch: int,
        num_classes: int,
        width: int,
        checkpointing: bool,
        second_time: bool = False,
    ) -> None:
        super().__init__(channels, grid, patch, width, checkpointing, second_time)
        self.label_embedding = LabelEmbedding(num_classes, width)

    @property
    def condition(self) -> Condition:  # type: ignore[override]
        """The label."""
        return self.label_embedding


def check_shapes(latent: tuple[int, int, int], denoiser: Denoiser, guide: Denoiser | None = None) -> None:
    """Raises ValueError if the networks have other latents, or denoiser and guide do not learn the same state."""
    for name, network in (("denoiser", denoiser), ("guide", guide)):
        if network is not None and tuple(network.latent_shape) != tuple(latent):
            raise ValueError(
                f"{name} is for latents of shape {tuple(network.latent_shape)}, the autoencoder makes {tuple(latent)}"
            )
    if guide is not None and guide.state_shape != denoiser.state_shape:
        raise ValueError(
            f"denoiser and guide must both learn the class token, or neither; their states are {tuple(denoiser.state_shape)} and "
            f"{tuple(guide.state_shape)}"
        )


def make_blocks(
    depth: int, width: int, heads: int, mlp_ratio: float, qk_norm: bool, norm: str, mlp: str
) -> nn.ModuleList:
    """``depth`` adaptive blocks, see :class:`~rae.layers.AdaptiveBlock`, with feed-forward layers ``mlp_ratio`` times as wide."""
    return nn.ModuleList(AdaptiveBlock(width, heads, int(width * mlp_ratio), qk_norm, norm, mlp) for _ in range(depth))
