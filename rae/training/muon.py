"""Muon for matrices and AdamW for all other weights, as one optimiser (Jordan et al. 2024; RAEv2, arXiv 2605.18324)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import AdamW, Muon, Optimizer

from rae.training.strategy import full_tensor

_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
_SAFETY = 1.05
POLAR_EXPRESS = tuple((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS)
"""Coefficients (a, b, c) of the five steps (Amsel et al. 2025, arXiv 2505.16932), divided by their safety factor."""
Coefficients = Literal["polar_express", "quintic"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def orthogonalize(matrix: Tensor, eps: float = 1e-7, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest matrix with singular values near 1: five Newton-Schulz steps with the Polar Express coefficients.

    Args:
        matrix: Rows×columns.
        eps: Added to the norm that divides the matrix.
        dtype: Precision of the steps; for float32, float64 matrices keep their own.

    Returns:
        A matrix of the same shape, in the precision of the steps.
    """
    x = matrix.to(torch.promote_types(dtype, matrix.dtype) if dtype == torch.float32 else dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + eps)
    with torch.autocast(x.device.type, enabled=False):  # stage 1 steps under autocast
        for a, b, c in POLAR_EXPRESS:
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class PolarExpressMuon(Muon):
    """Muon as in torch, with coefficients that change from step to step, and a choice of precision."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """M ← μ·m + g; u = g + μ·m; p ← p·(1 − lr·decay) − lr·0.2·√max(rows, columns)·orthogonalize(u)."""
        assert closure is None  # MuonAdamW calls it
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                update = _orthogonalized(gradient + group["momentum"] * momentum, group)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


def _orthogonalized(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Orthogonalises a whole matrix; if it is sharded (FSDP2), every process gathers it and keeps its shard."""
    whole = orthogonalize(full_tensor(update), group["eps"], DTYPES[group["dtype"]]).to(update.dtype)
    if not isinstance(update, DTensor):
        return whole
    everywhere = [Replicate()] * update.device_mesh.ndim
    return DTensor.from_local(whole, update.device_mesh, everywhere, run_check=False).redistribute(
        update.device_mesh, update.placements
    )


class MuonAdamW(Optimizer):
    """Updates weights with exactly two dimensions by Muon, all others by AdamW, with one learning rate.

    Matrix updates have the size of AdamW's, 0.2·√max(rows, columns) times an orthogonal matrix, so learning rates carry over.

    Args:
        params: Weights, or pairs of name and weight, which ``exclude`` needs.
        lr: Learning rate of both.
        momentum: Muon's Nesterov momentum, without the factor (1 − momentum).
        weight_decay: Decoupled weight decay of both.
        betas: Decay of AdamW's moments.
        eps: Added to the root of AdamW's second moment.
        coefficients: ``polar_express``, or ``quintic`` for torch's own Muon, in bfloat16.
        dtype: Precision of the Polar Express steps: ``float32``, or ``bfloat16``, which changes about 1 % of an update.
        exclude: Parts of names; matrices whose names contain one use AdamW. ``[table, tokens, learned]`` are the embeddings.

    Raises:
        ValueError: A value outside its range, no weights, or ``exclude`` without names.
    """

    by_name = True
    """Whether it takes names, see :func:`takes_names`."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        lr: float = 2e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        coefficients: Coefficients = "polar_express",
        dtype: Literal["float32", "bfloat16"] = "float32",
        exclude: Sequence[str] = (),
    ) -> None:
        named = [item if isinstance(item, tuple) else ("", item) for item in params]
        if not named:
            raise ValueError("optimizer: there are no weights to train")
        if coefficients not in get_args(Coefficients):
            known = " or ".join(get_args(Coefficients))
            raise ValueError(f"optimizer.coefficients={coefficients!r} is unknown; choose {known}")
        if dtype not in DTYPES:
            raise ValueError(f"optimizer.dtype={dtype!r} is unknown; choose {' or '.join(DTYPES)}")
        for name, value, most in (("lr", lr, math.inf), ("momentum", momentum, 1), ("weight_decay", weight_decay, 1)):
            if not 0 <= value < most:
                raise ValueError(f"optimizer.{name}={value} must lie in [0, {most})")
        if exclude and not all(name for name, _ in named):
            raise ValueError(f"optimizer.exclude={list(exclude)} needs names: give pairs of name and weight")
        chosen: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in named:
            chosen[parameter.ndim == 2 and not any(part in name for part in exclude)].append(parameter)
        self._inner: list[Optimizer] = []
        if chosen[True]:
            kind = PolarExpressMuon if coefficients == "polar_express" else Muon
            options: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
            self._inner.append(kind(chosen[True], **options, adjust_lr_fn="match_rms_adamw"))
            if coefficients == "polar_express":
                self._inner[0].param_groups[0]["dtype"] = dtype
        if chosen[False]:
            self._inner.append(
                AdamW(chosen[False], lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay)
            )
        super().__init__([group for inner in self._inner for group in inner.param_groups], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps both; returns the result of the closure, which computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner, group in zip(self._inner, self.param_groups, strict=True):
            # Restoring a checkpoint replaces both.
            inner.param_groups, inner.state = [group], self.state
            inner.step()
        return loss


def takes_names(factory: Any) -> bool:
    """Whether an optimiser factory, a class or a partial of one, takes pairs of name and weight."""
    return bool(getattr(getattr(factory, "func", factory), "by_name", False))
