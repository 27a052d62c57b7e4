"""Latents: normalisation by stored statistics, training noise, exact statistics of a data set (paper §3, appendix)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rae.io.describe import Described
from rae.io.files import parse_json
from rae.io.tensors import read_file

FORMS = ("variance", "deviation")
SPACES = ("encoder", "decoder_input")


class LatentNormalizer(Described, nn.Module):
    """Normalises latents z to (z − mean) / √(var + eps), per channel and position; the identity without statistics.

    Args:
        shape: Channels, height and width of a latent.
        mean: Mean C×H×W; None for 0.
        var: Population variance C×H×W; None for no scaling.
        eps: Added to the variance, or to the standard deviation.
        form: ``variance``: divide by √(var + eps); ``deviation``: by √var + eps, as diffusers' ``AutoencoderRAE`` does.
        stats: File with ``mean`` and ``var`` instead of the tensors; the mean may be missing or None, as in released files.
            None, or ``none`` where a configuration has to say so, for no file.
        space: What the latents are: ``encoder``: the encoder's output; ``decoder_input``: the patch tokens that enter the
            decoder's first block, D×h×w (FuseLift).
        class_token: Mean D of the class token that enters the decoder's blocks with them; None for the decoder's own.
        decoder: Fingerprint of the decoder whose input the latents are, if known; a file's description may give it.

    Raises:
        ValueError: Statistics given twice, of a different shape or space, not finite, or with a negative variance.
        FileNotFoundError: The file does not exist.
    """

    mean: Tensor
    var: Tensor
    class_mean: Tensor | None
    class_var: Tensor | None
    class_token: Tensor | None

    def __init__(
        self,
        shape: Sequence[int],
        mean: Tensor | None = None,
        var: Tensor | None = None,
        eps: float = 1e-5,
        stats: str | Path | None = None,
        form: str = "variance",
        space: str = "encoder",
        class_token: Tensor | None = None,
        decoder: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if space not in SPACES:
            raise ValueError(f"latent.space={space!r} is unknown; choose one of {', '.join(SPACES)}")
        if form not in FORMS:
            raise ValueError(f"latent.form={form!r} is unknown; choose variance or deviation")
        if eps < 0:
            raise ValueError(f"latent.eps={eps} must not be negative; 1e-5 is usual")
        self.shape = tuple(int(size) for size in shape)
        self.eps = eps
        self.form = form
        self.space = space
        self.decoder = decoder
        source = "latent statistics"
        class_mean, class_var = (None, None)
        self.encoder: dict[str, Any] | None = None
        """Fingerprint of the encoder the statistics belong to, if the file's description gives it."""
        if stats is not None and stats != "none":
            description = _described(Path(stats))
            if (said := description.get("space", "encoder")) != space and description:
                raise ValueError(
                    f"latent.stats={stats} is of latents in the space {said!r}, but latent.space={space}; make statistics with "
                    f"rae-stats latent.space={space}"
                )
            self.encoder = description.get("encoder")
            self.decoder = description.get("decoder", decoder)
            if mean is not None or var is not None:
                raise ValueError("latent statistics are given twice: as a file and as tensors; give one of them")
            content = read_statistics(stats)
            mean, var, class_token = (content.get(name) for name in ("mean", "var", "class_token"))
            class_mean, class_var = class_statistics(content, self.shape[0], str(stats))
            source = str(stats)
        # Without a variance the scale must be exactly 1, so the epsilon is subtracted.
        self.register_buffer("mean", self._fit(mean, 0.0, "mean", source))
        neutral = 1.0 - eps if form == "variance" else (1.0 - eps) ** 2
        self.register_buffer("var", self._fit(var, neutral, "var", source))
        if var is not None and (self.var < 0).any():
            raise ValueError(f"{source}: the variance is negative in places; it must be a population variance")
        self._given = source if mean is not None or var is not None else None
        self.register_buffer("class_mean", class_mean, persistent=False)  # only training needs them
        self.register_buffer("class_var", class_var, persistent=False)
        if class_token is not None and (space == "encoder" or class_token.numel() != self.shape[0]):
            raise ValueError(
                f"{source}: class_token of {class_token.numel()} values does not fit latents of {self.shape[0]} channels with "
                f"latent.space={space}; it belongs to latent.space=decoder_input"
            )
        self.register_buffer("class_token", None if class_token is None else class_token.detach().float().reshape(-1))

    def _fit(self, value: Tensor | None, default: float, name: str, source: str) -> Tensor:
        if value is None:
            return torch.full(self.shape, default)
        if not isinstance(value, Tensor):
            raise ValueError(f"{source}: {name} is a {type(value).__name__}, it must be a tensor of shape {self.shape}")
        value = value.detach().float()
        if value.ndim == 1 and value.shape[0] == self.shape[0]:
            value = value[:, None, None].expand(self.shape)  # one value per channel
        if tuple(value.shape) != self.shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(value.shape)}, the encoder's latents have {self.shape}; "
                "compute the statistics for this encoder and image size with rae-stats"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{source}: {name} holds NaN or infinite values")
        return value.clone()

    @property
    def scale(self) -> Tensor:
        """The divisor of the latents, C×H×W."""
        return self._scale(self.var)

    def _scale(self, var: Tensor) -> Tensor:
        return (var + self.eps).sqrt() if self.form == "variance" else var.sqrt() + self.eps

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.shape:
            raise ValueError(
                f"latents of shape {tuple(latents.shape)} do not fit statistics of shape {self.shape}; "
                "they must be B×C×H×W of the encoder and image size that the statistics belong to"
            )

    def normalize(self, latents: Tensor) -> Tensor:
        """Latents B×C×H×W as the encoder returns them => normalised.

        Raises:
            ValueError: Latents of a different shape.
        """
        self._check(latents)
        return (latents - self.mean) / self.scale

    def check_class_token(self) -> None:
        """Raises ValueError if the latents are normalised but the statistics do not cover the class token."""
        if self._given is not None and self.class_mean is None:
            raise ValueError(
                f"{self._given}: there are no statistics of the class token, which the denoiser learns too; make them with "
                "rae-stats class_token=true and give the file as latent.stats"
            )

    def normalize_class_token(self, tokens: Tensor) -> Tensor:
        """Class tokens B×C as the encoder returns them => normalised by their own mean and variance.

        Raises:
            ValueError: See :meth:`check_class_token`.
        """
        self.check_class_token()
        if self.class_mean is None or self.class_var is None:
            return tokens
        return (tokens - self.class_mean) / self._scale(self.class_var)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Normalised latents B×C×H×W => as the decoder takes them.

        Raises:
            ValueError: Latents of a different shape.
        """
        self._check(latents)
        return latents * self.scale + self.mean


def read_statistics(path: str | Path) -> dict[str, Any]:
    """Reads a statistics file, the original project's or ours: ``mean`` and ``var``, either of which may be None or missing.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds neither.
    """
    content = read_file(path)
    if not isinstance(content, dict) or not {"mean", "var"} & content.keys():
        raise ValueError(f"{str(path)!r} is no statistics file: it must hold 'mean' and 'var' of the latents")
    return content


def class_statistics(content: Mapping[str, Any], channels: int, source: str) -> tuple[Tensor | None, Tensor | None]:
    """Mean and variance C of the class token from the content of a statistics file, ours or RiT's; None where absent.

    Raises:
        ValueError: They have a different shape, are not finite, or the variance is negative.
    """
    found: list[Any] = [content.get(f"class_{name}", content.get(f"{name}_cls_token")) for name in ("mean", "var")]
    if all(value is None for value in found):
        return None, None
    fits = [isinstance(one, Tensor) and one.shape == (channels,) and bool(one.isfinite().all()) for one in found]
    if not all(fits) or (found[1] < 0).any():
        raise ValueError(f"{source!r}: mean and variance of the class token must be {channels} finite numbers each")
    return found[0].float(), found[1].float()


def _described(stats: Path) -> dict[str, Any]:
    """The description ``rae-stats`` wrote next to the statistics; empty for files from elsewhere."""
    description = stats.expanduser().with_suffix(".json")
    if not description.is_file():
        return {}
    content = parse_json(description.read_bytes(), str(description))
    if not isinstance(content, dict):
        return {}
    for part in ("encoder", "decoder"):
        if content.get(part) is not None and not isinstance(content[part], dict):
            raise ValueError(
                f"{str(description)!r} says nothing usable of its {part}; make the statistics anew with rae-stats"
            )
    return content


def add_noise(latents: Tensor, tau: float, uniform: Tensor, noise: Tensor) -> Tensor:
    """Training noise of the decoder, before normalisation: z + σ·ε with one σ = τ·u per sample (paper §3, eq. of τ).

    Latents and standard normal ε are B×C×H×W, uniform draws u in [0, 1) are B; other shapes or a negative τ raise ValueError.
    """
    if tau < 0:
        raise ValueError(f"tau={tau} must not be negative; 0 is no noise, 0.8 the published setting")
    if uniform.shape != latents.shape[:1] or noise.shape != latents.shape:
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} need one uniform draw a sample and noise of the same shape, "
            f"got {tuple(uniform.shape)} and {tuple(noise.shape)}"
        )
    return latents + tau * uniform.reshape(-1, 1, 1, 1).to(latents.dtype) * noise


class RunningMoments:
    """Exact mean and population variance per element, in float64, independent of order and batch size up to rounding.

    Two sets of moments merge by the parallel formula, so processes and interrupted runs can be combined.

    Args:
        shape: Shape of one sample.
        device: Device of the moments; None for the CPU.
    """

    def __init__(self, shape: Sequence[int], device: torch.device | str | None = None) -> None:
        self.count = 0
        self.mean = torch.zeros(tuple(shape), dtype=torch.float64, device=device)
        self.m2 = torch.zeros(tuple(shape), dtype=torch.float64, device=device)

    @property
    def var(self) -> Tensor:
        """Population variance.

        Raises:
            ValueError: No sample was added.
        """
        if self.count == 0:
            raise ValueError("no sample was added to the statistics")
        return self.m2 / self.count

    def update(self, batch: Tensor) -> None:
        """Adds samples B×….

        Raises:
            ValueError: Samples of a different shape.
        """
        if batch.shape[1:] != self.mean.shape:
            raise ValueError(
                f"a batch of shape {tuple(batch.shape)} does not fit moments of samples {tuple(self.mean.shape)}"
            )
        if len(batch) == 0:
            return
        batch = batch.detach().to(self.mean.device, torch.float64)
        mean = batch.mean(0)
        self._join(len(batch), mean, (batch - mean).square().sum(0))

    def merge(self, other: RunningMoments) -> None:
        """Adds the samples of other moments.

        Raises:
            ValueError: Moments of a different shape.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"moments of samples {tuple(other.mean.shape)} cannot be merged into those of {tuple(self.mean.shape)}"
            )
        if other.count:
            self._join(other.count, other.mean.to(self.mean.device), other.m2.to(self.mean.device))

    def _join(self, count: int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * (count / total)
        self.m2 += m2 + delta.square() * (self.count * count / total)
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Count and tensors, for saving."""
        return {"count": self.count, "mean": self.mean.clone(), "m2": self.m2.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.count = int(state["count"])
        self.mean.copy_(state["mean"])
        self.m2.copy_(state["m2"])
