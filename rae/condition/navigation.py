"""Past frames, an action and the elapsed time as tokens: the condition of a navigation world model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rae.condition.base import Condition, Conditions
from rae.condition.label import check_tokens, learned_tokens
from rae.layers import TimeEmbedding, grid_to_tokens


class NavigationTokens(Condition):
    """Tokens of past latent frames, of an action and of the time to the generated frame (RAEv2).

    All frames pass through one patch convolution; the action is added to learned tokens, the time to one learned token. The null
    condition is all zeros.

    Args:
        channels: Channels of the latent.
        grid: Side of the latent.
        frames: Number of past frames.
        patch: Side of the denoiser's patches, dividing ``grid``.
        action_tokens: Tokens of the action.
        actions: Numbers of an action: forward, sideways and turn.

    Raises:
        ValueError: A size below 1, or a patch that does not divide the grid.
    """

    names = ("frames", "action", "elapsed")

    def __init__(
        self, channels: int, grid: int, frames: int = 4, patch: int = 1, action_tokens: int = 4, actions: int = 3
    ) -> None:
        super().__init__()
        if min(channels, grid, frames, patch, actions) < 1 or grid % patch:
            raise ValueError(
                f"channels={channels}, grid={grid}, frames={frames}, patch={patch} and actions={actions} must be at least 1, and "
                "the grid divisible by the patch"
            )
        self.shapes = {"frames": (frames, channels, grid, grid), "action": (actions,), "elapsed": (1,)}
        self.patch = patch
        self.action_tokens = check_tokens(action_tokens)
        self.tokens = frames * (grid // patch) ** 2 + action_tokens + 1

    def build(self, width: int, latent_shape: tuple[int, int, int], patch: int) -> None:
        """See :meth:`Condition.build`; also raises ValueError if the frames do not have the denoiser's latent shape."""
        self.claim()
        if self.shapes["frames"][1:] != tuple(latent_shape) or patch != self.patch:
            raise ValueError(
                f"condition: frames of shape {self.shapes['frames'][1:]} in patches of {self.patch} differ from the denoiser's "
                f"latents {tuple(latent_shape)} in patches of {patch}"
            )
        (actions,) = self.shapes["action"]
        self.frame_embedding = nn.Conv2d(latent_shape[0], width, kernel_size=patch, stride=patch)
        self.action_embedding = nn.Linear(actions, width)
        self.action_learned = learned_tokens(self.action_tokens, width)
        self.elapsed_embedding = TimeEmbedding(width)
        self.elapsed_learned = learned_tokens(1, width)

    def nothing(self, batch: int) -> dict[str, Tensor]:
        """All zeros."""
        return {name: torch.zeros(batch, *shape) for name, shape in self.shapes.items()}

    def check(self, conditions: Conditions, batch: int) -> None:
        """See :meth:`Condition.check`; also raises ValueError for tensors of a different shape."""
        super().check(conditions, batch)
        for name, shape in self.shapes.items():
            if tuple(conditions[name].shape[1:]) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(conditions[name].shape)}, required is B×{'×'.join(map(str, shape))}"
                )

    def forward(self, frames: Tensor, action: Tensor, elapsed: Tensor) -> tuple[Tensor, None]:
        """Past frames, an action and a time => tokens, without a mask.

        Args:
            frames: Normalised latents of past frames, oldest first, B×K×C×H×W.
            action: Normalised actions B×3; see :func:`normalize_action`.
            elapsed: Number of frames from the last one to the generated one, divided by 128, B×1.

        Returns:
            Tokens B×(K·N + action_tokens + 1)×width.
        """
        batch = frames.shape[0]
        past = grid_to_tokens(self.frame_embedding(frames.flatten(0, 1)))  # (B·K)×N×D
        past = past.reshape(batch, -1, past.shape[2])
        acts = self.action_learned + self.action_embedding(action)[:, None]
        time = self.elapsed_learned + self.elapsed_embedding(elapsed[:, 0])[:, None]
        return torch.cat([past, acts, time], dim=1), None


def normalize_action(poses: Tensor, spacing: float, low: Sequence[float], high: Sequence[float]) -> Tensor:
    """The action between two poses: displacement in the current heading, scaled to [−1, 1], and the turn.

    Args:
        poses: Current and target (x, y, yaw), …×2×3, yaw in radians.
        spacing: Metres between two waypoints of the data set, the unit of displacements.
        low: Smallest displacement forward and sideways in these units, mapped to −1.
        high: Largest displacement, mapped to 1.

    Returns:
        (forward, sideways, turn), …×3; the turn in radians within [−π, π).
    """
    current, target = poses.unbind(-2)
    dx, dy = (target - current)[..., :2].unbind(-1)
    cos, sin = current[..., 2].cos(), current[..., 2].sin()
    moved = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], dim=-1) / spacing
    bottom, top = moved.new_tensor(low), moved.new_tensor(high)
    turn = (target[..., 2] - current[..., 2] + math.pi) % (2 * math.pi) - math.pi
    return torch.cat([2 * (moved - bottom) / (top - bottom) - 1, turn[..., None]], dim=-1)
