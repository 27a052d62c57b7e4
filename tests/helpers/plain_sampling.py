"""DiT-DH and guided sampling as plainly as they can be written, after the description of the original's procedure.

Attention is a matrix product, a softmax and a product; norms and rotations are spelt out; every step runs the doubled batch,
whatever the guidance, throws half of the result away and masks what lies outside the interval. It is what the benchmarks measure
against, and an independent rendering that results are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rae.denoiser import DiTDH


class PlainNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        normed = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * self.weight.float()).to(x.dtype)


def rotation(head: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines N×head: the first half of the head turns by the row, the second by the column."""
    frequency = 10000.0 ** -(torch.arange(0, head // 2, 2, device=device).double() / (head // 2))
    place = torch.arange(side * side, device=device).double()
    row, column = place.div(side, rounding_mode="floor"), place % side
    angle = torch.cat([torch.outer(row, frequency), torch.outer(column, frequency)], 1).repeat_interleave(2, 1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack([-odd, even], -1).reshape(x.shape)
    return (x * cos + turned * sin).to(x.dtype)


class PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, count, width = x.shape
        qkv = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin), qkv[2]
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(width // self.heads)
        out = scores.softmax(-1).to(v.dtype) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, count, width))


class PlainMlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, -1)
        return self.w3(nn.functional.silu(gate) * value)


class PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = PlainNorm(width), PlainNorm(width)
        self.attn = PlainAttention(width, heads)
        self.mlp = PlainMlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainDiTDH(nn.Module):
    """A DiT-DH with the published options, patch 1, that shares the weights of ours.

    Args:
        model: Ours.
    """

    def __init__(self, model: DiTDH):
        super().__init__()
        width, head_width = model.backbone_embedding.proj.out_channels, model.head_embedding.proj.out_channels
        heads, head_heads = model.backbone[0].attn.heads, model.head[0].attn.heads
        self.null_label, self.side = model.num_classes, model.grid
        with torch.device("meta"):
            self.backbone_embedding = nn.Conv2d(model.channels, width, 1)
            self.head_embedding = nn.Conv2d(model.channels, head_width, 1)
            self.backbone = nn.ModuleList(PlainBlock(width, heads) for _ in model.backbone)
            self.head = nn.ModuleList(PlainBlock(head_width, head_heads) for _ in model.head)
            self.projection = nn.Linear(width, head_width)
            self.fc1, self.fc2 = nn.Linear(512, width), nn.Linear(width, width)
            self.labels = nn.Embedding(model.num_classes + 1, width)
            self.norm, self.modulation = PlainNorm(head_width), nn.Linear(head_width, 2 * head_width)
            self.linear = nn.Linear(head_width, model.channels)
        names = {
            "backbone_embedding.proj": "backbone_embedding",
            "head_embedding.proj": "head_embedding",
            "time_embedding.fc": "fc",
            "label_embedding.table": "labels",
            "final.": "",
        }
        state = dict(model.state_dict(keep_vars=True))
        self.register_buffer("frequencies", state.pop("time_embedding.frequencies"), persistent=False)
        for ours, plain in names.items():
            state = {key.replace(ours, plain): value for key, value in state.items()}
        self.load_state_dict(state, assign=True)
        device = self.linear.weight.device
        for name, size in (("backbone", width // heads), ("head", head_width // head_heads)):
            cos, sin = rotation(size, self.side, device)
            self.register_buffer(f"{name}_cos", cos, persistent=False)
            self.register_buffer(f"{name}_sin", sin, persistent=False)
        self.register_buffer("position", self._table(width).to(device), persistent=False)

    def _table(self, width: int) -> Tensor:
        """Sine-cosine table 1×N×width: the first half of the channels is the column's."""
        frequency = 10000.0 ** -(torch.arange(width // 4).double() / (width // 4))
        place = torch.arange(self.side**2).double()
        parts = [torch.outer(line, frequency) for line in (place % self.side, place // self.side)]
        return torch.cat([f(part) for part in parts for f in (torch.sin, torch.cos)], 1).float()[None]

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        silu = nn.functional.silu
        angle = 2 * math.pi * t.float()[:, None] * self.frequencies
        time = self.fc2(silu(self.fc1(torch.cat([angle.sin(), angle.cos()], 1).to(self.fc1.weight.dtype))))
        condition = silu(silu(time + self.labels(label)))[:, None]
        s = self.backbone_embedding(x_t).flatten(2).transpose(1, 2) + self.position
        for block in self.backbone:
            s = block(s, condition, self.backbone_cos, self.backbone_sin)
        s = silu(self.projection(silu(time[:, None] + s)))
        x = self.head_embedding(x_t).flatten(2).transpose(1, 2)
        for block in self.head:
            x = block(x, s, self.head_cos, self.head_sin)
        shift, scale = self.modulation(s).chunk(2, -1)
        x = self.linear(self.norm(x) * (1 + scale) + shift)
        return x.transpose(1, 2).reshape(len(x), -1, self.side, self.side)


@torch.no_grad()
def plain_sample(
    model: nn.Module,
    noise: Tensor,
    label: Tensor,
    times: Sequence[float],
    method: str = "none",
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    guide: nn.Module | None = None,
) -> Tensor:
    """Euler steps along the times with the doubled batch.

    Args:
        model: Velocity network of x B×C×h×w, t B, label B.
        noise: Start B×C×h×w.
        label: Classes B.
        times: Descending times.
        method: ``none``, ``cfg`` or ``autoguidance``.
        scale: Strength of the guidance.
        interval: Times between which it acts.
        guide: The weaker network.
    """
    count = len(noise)
    x = torch.cat([noise, noise])
    other = label if method == "autoguidance" else torch.full_like(label, model.null_label)
    labels = torch.cat([label, other])
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        both = torch.cat([x[:count], x[:count]])
        moment = torch.full((2 * count,), t, device=x.device)
        first, second = model(both, moment, labels).chunk(2)
        inside = ((moment.clamp(max=1) >= interval[0]) & (moment.clamp(max=1) <= interval[1]))[:count, None, None, None]
        if method == "none":
            velocity = first
        else:
            weak = second if method == "cfg" else guide(both, moment, labels)[:count]
            velocity = torch.where(inside, weak + scale * (first - weak), first)
        x = x + (t_next - t) * torch.cat([velocity, velocity])
    return x[:count]
