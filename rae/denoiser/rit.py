"""RiT: a plain diffusion transformer that learns the encoder's class token with the latents (arXiv 2605.21981, §3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rae.denoiser.dit import DiT
from rae.layers import FinalLayer, RotaryEmbedding2D, SinusoidalTimeEmbedding, unpatchify


class JointFinalLayer(FinalLayer):
    """Final layer with a separate linear map for the last token, the class token; that map does not start at zero."""

    def __init__(self, width: int, out: int, class_out: int) -> None:
        super().__init__(width, out)
        self.class_linear = nn.Linear(width, class_out)
        nn.init.xavier_uniform_(self.class_linear.weight)
        nn.init.zeros_(self.class_linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Tokens B×(N+1)×D and the condition after its SiLU => image values B×N×out, class token B×class_out."""
        x = self.modulated(x, condition)
        return self.linear(x[:, :-1]), self.class_linear(x[:, -1])


class RiT(DiT):
    """LightningDiT with normalised queries and keys, a jointly diffused class token, and class labels in context.

    Its state is B×C×(1+H·W): the class token, then the latent row by row. The blocks see image tokens, the class token and, from
    block ``context_start`` on, label tokens; only image tokens have positions, rotary and in the fixed table. The time is
    embedded by sinusoids of 1 − t.

    Arguments besides those of :class:`~rae.denoiser.dit.DiT`:
        context_tokens: Learned tokens to which the label's embedding is added.
        context_start: Number of blocks that run before these tokens join.
        class_weight: Weight of the class token's loss, a mean over its values; the latent's has weight 1.

    Raises:
        ValueError: Sizes that do not divide, no token, a start outside the blocks, or a negative weight.
    """

    takes_class_token = True
    _weight: Tensor

    def __init__(
        self,
        channels: int,
        grid: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        patch: int = 1,
        mlp_ratio: float = 4.0,
        context_tokens: int = 32,
        context_start: int = 8,
        class_weight: float = 0.2,
        checkpointing: bool = False,
    ) -> None:
        super().__init__(
            *(channels, grid, width, depth, heads, num_classes, patch, mlp_ratio),
            qk_norm=True,
            checkpointing=checkpointing,
        )
        if context_tokens < 1:
            raise ValueError(f"denoiser.context_tokens={context_tokens} must be at least 1")
        if not 0 <= context_start < depth:
            raise ValueError(f"denoiser.context_start={context_start} must lie in [0, {depth - 1}], before a block")
        if class_weight < 0:
            raise ValueError(f"denoiser.class_weight={class_weight} must not be negative; 0.2 is published")
        self.context_start = context_start
        self.time_embedding = SinusoidalTimeEmbedding(width)
        self.class_projection = nn.Linear(channels, width)
        nn.init.xavier_uniform_(self.class_projection.weight)
        nn.init.zeros_(self.class_projection.bias)
        self.context = nn.Parameter(torch.randn(context_tokens, width) * 0.02)
        self.rope = RotaryEmbedding2D(width // heads, grid // patch, extra=1 + context_tokens)
        self.final = JointFinalLayer(width, patch * patch * channels, channels)
        places = grid * grid
        weight = torch.full((1 + places,), (1 + places) / places)
        weight[0] = class_weight * (1 + places)
        self.register_buffer("_weight", weight, persistent=False)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Channels, and positions: the class token and the latent's."""
        return (self.channels, 1 + self.grid * self.grid)

    @property
    def loss_weight(self) -> Tensor:
        """Position weights that make the overall mean the latent's mean plus ``class_weight`` times the class token's."""
        return self._weight

    def join(self, latents: Tensor, class_token: Tensor | None = None) -> Tensor:
        """Latents B×C×H×W and class token B×C => B×C×(1+H·W).

        Raises:
            ValueError: The class token is missing.
        """
        if class_token is None:
            raise ValueError("RiT is trained on the encoder's class token beside the latents; give both")
        return torch.cat([class_token[..., None], latents.flatten(2)], dim=2)

    def split(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """B×C×(1+H·W) => latents B×C×H×W and class token B×C."""
        return state[..., 1:].unflatten(2, (self.grid, self.grid)), state[..., 0]

    def begin(self, noise: Tensor) -> Tensor:
        """Noise B×C×H×W => initial state: the class token's noise is the mean of the latent's over positions."""
        return self.join(noise, noise.mean((2, 3)))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor, *, r: Tensor | None = None) -> Tensor:
        """Prediction B×C×(1+H·W) for x_t, class token and latents, B×C×(1+H·W); see :meth:`DiT.forward`, but without r."""
        self.check(x_t, t, {"label": label}, r)
        latents, token = self.split(x_t)
        assert token is not None
        told = self.label_embedding(label)  # B×D
        condition = F.silu(self.time_embedding(1 - t) + told)[:, None]  # B×1×D
        x = self.patch_embedding(latents) + self.position  # B×N×D
        seen = x.shape[1] + 1
        x = torch.cat([x, self.class_projection(token)[:, None]], dim=1)  # B×(N+1)×D
        blocks = list(self.blocks)
        x = self.run_blocks(blocks[: self.context_start], x, condition, self.rope)
        x = torch.cat([x, told[:, None] + self.context], dim=1)  # B×(N+1+context)×D
        x = self.run_blocks(blocks[self.context_start :], x, condition, self.rope)
        patches, token = self.final(x[:, :seen], condition)
        return self.join(unpatchify(patches, self.patch, self.channels), token)
