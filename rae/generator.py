"""From noise and class labels to images: guided denoiser, sampler, decoder (paper §4 and appendix)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae.autoencoder import RAE
from rae.denoiser import Denoiser
from rae.flow import AutoGuidance, FlowMatching, Guidance, NoGuidance, Sampler
from rae.image import to_uint8
from rae.io.export import Exportable
from rae.layers import trusted
from rae.rng import normal, sample_seed

PRECISIONS = ("float32", "bfloat16")
"""Arithmetic of the networks that samples can be drawn in; published numbers are of float32 (with TF32 products)."""
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class Generator(Exportable, nn.Module):
    """Draws images of given classes.

    Sample ``i`` depends on the seed and on ``i`` alone, so it is the same for any batch size, order or number of processes.

    Args:
        autoencoder: Decodes the latents.
        denoiser: Network (x_t B×C×h×w, t B, label B) -> prediction B×C×h×w.
        flow: Path, prediction and time shift that the denoiser was trained with.
        sampler: Any sampler of :mod:`rae.flow`.
        guidance: Any guidance of :mod:`rae.flow`; None for none.
        guide: The smaller, less trained denoiser that autoguidance steers away from.

    Raises:
        ValueError: Autoguidance without a guide, or networks for latents of another shape.
    """

    def __init__(
        self,
        autoencoder: RAE,
        denoiser: Denoiser,
        flow: FlowMatching,
        sampler: Sampler,
        guidance: Guidance | None = None,
        guide: Denoiser | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.denoiser = denoiser
        self.flow = flow
        self.sampler = sampler
        self.guidance = guidance if guidance is not None else NoGuidance()
        self.guide = guide
        self._captured = False
        if isinstance(self.guidance, AutoGuidance) and guide is None:
            raise ValueError("autoguidance needs a guide: a trained denoiser smaller than the one that it steers")
        for name, network in (("denoiser", denoiser), ("guide", guide)):
            shape = getattr(network, "latent_shape", None)
            if shape is not None and tuple(shape) != tuple(autoencoder.latent_shape):
                raise ValueError(
                    f"{name} is for latents of shape {tuple(shape)}, the autoencoder makes {autoencoder.latent_shape}"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes that can be asked for."""
        return int(self.denoiser.num_classes)

    @property
    def device(self) -> torch.device:
        """Where the denoiser's weights are."""
        return next(self.denoiser.parameters()).device

    def compile(self, *, mode: str | None = None, **options: Any) -> None:
        """Compiles denoiser, guide and decoder in place; weights and names stay.

        Shapes are static, so a batch size takes one graph a network and, with classifier-free guidance, one more for the doubled
        batch inside its interval; steps share them. Sampling with batches of many sizes compiles anew for each.

        Args:
            mode: Of ``torch.compile``; ``reduce-overhead`` replays CUDA graphs, which small batches gain from.
            options: More arguments of ``torch.compile``.

        Raises:
            ValueError: An unknown mode.
        """
        if mode not in (None, *COMPILE_MODES):
            raise ValueError(f"compile={mode!r} is unknown; choose true, false or one of {', '.join(COMPILE_MODES)}")
        for network in (self.denoiser, self.guide, self.autoencoder.decoder):
            if network is not None:
                network.compile(**{"dynamic": False, "mode": mode, **options})
        self._captured = mode in ("reduce-overhead", "max-autotune")

    def _callable(self, network: Denoiser) -> Callable[..., Tensor]:
        """The network as the sampler calls it."""
        if not self._captured:
            return network

        def call(*inputs: Tensor) -> Tensor:
            # A CUDA graph writes every result to the same place, and samplers of higher order keep several.
            torch.compiler.cudagraph_mark_step_begin()
            return network(*inputs).clone()

        return call

    def noise(self, seed: int, indices: Sequence[int]) -> Tensor:
        """What samples of a set begin with: standard normal B×C×h×w.

        Args:
            seed: Seed of the set.
            indices: Numbers of the samples in it; sample i depends on both alone.
        """
        seeds = [sample_seed(seed, "sample", number) for number in indices]
        return normal(seeds, self.autoencoder.latent_shape, device=self.device)

    @torch.no_grad()
    def latents(
        self,
        labels: Tensor | Sequence[int],
        seed: int = 0,
        indices: Sequence[int] | None = None,
        on_step: Callable[[int, float, Tensor], None] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Samples normalised latents.

        Args:
            labels: Classes, B integers in [0, num_classes).
            seed: Seed of the whole set of samples.
            indices: Number of every sample in that set; 0, 1, … where not given.
            on_step: Called after every step with its number, the time reached and the latents.
            noise: What to begin with, B×C×h×w; None draws it from the seed and the indices.

        Returns:
            Latents B×C×h×w.

        Raises:
            ValueError: A label outside the range, or as many indices as labels are not given.
        """
        labels = torch.as_tensor(labels, dtype=torch.int64)
        indices = range(len(labels)) if indices is None else indices
        if len(indices) != len(labels):
            raise ValueError(f"indices must number as many as labels: {len(indices)} for {len(labels)}")
        wrong = [label for label in labels.tolist() if not 0 <= label < self.num_classes]
        if wrong:
            raise ValueError(f"labels must lie in [0, {self.num_classes - 1}], got {wrong[:8]}")
        shape = self.autoencoder.latent_shape
        noise = self.noise(seed, indices) if noise is None else noise.to(self.device)

        def step_noise(step: int) -> Tensor:
            return normal([sample_seed(seed, "step", i, step) for i in indices], shape, device=self.device)

        guide = self.flow.velocity_model(self._callable(self.guide)) if self.guide is not None else None
        velocity = self.guidance(
            self.flow.velocity_model(self._callable(self.denoiser)),
            labels.to(self.device),
            null_label=self.denoiser.null_label,
            guide=guide,
        )
        with trusted():
            return self.sampler.sample(velocity, noise, shift=self.flow.shift, step_noise=step_noise, on_step=on_step)

    @torch.no_grad()
    def forward(self, labels: Tensor | Sequence[int], seed: int = 0, indices: Sequence[int] | None = None) -> Tensor:
        """Samples images B×3×H×W in [0, 1] of the given classes; arguments as for :meth:`latents`."""
        return self.autoencoder.decode(self.latents(labels, seed, indices)).clamp(0, 1)

    def draw(
        self,
        labels: Tensor | Sequence[int],
        seed: int = 0,
        indices: Sequence[int] | None = None,
        precision: str = "float32",
        quantize: str = "floor",
    ) -> Tensor:
        """Samples images uint8 B×3×H×W, as they are scored and written.

        Args:
            labels: See :meth:`latents`.
            seed: See :meth:`latents`.
            indices: See :meth:`latents`.
            precision: ``float32`` or ``bfloat16``: arithmetic of the networks.
            quantize: See :func:`rae.image.to_uint8`.

        Raises:
            ValueError: An unknown precision or ``quantize``, or see :meth:`latents`.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision} is unknown; choose {' or '.join(PRECISIONS)}")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            images = self(labels, seed, indices)
        return to_uint8(images.float(), quantize)  # in bfloat16 neighbouring grey levels are one number

    @torch.no_grad()
    def interpolate(self, label: int, pair: tuple[int, int], count: int, seed: int = 0) -> Tensor:
        """Images count×3×H×W between two samples of a class, from noise on the arc between theirs.

        Points on the straight line would have too small a norm: noise of high dimension lies near a sphere (Shoemake 1985).

        Args:
            label: The class.
            pair: Numbers of the two samples in the set of the seed; they are the first and last image.
            count: Images, both ends counted.
            seed: Seed of the set.

        Raises:
            ValueError: Fewer than two images.
        """
        if count < 2:
            raise ValueError(f"count must be at least 2, both ends counted, got {count}")
        first, last = self.noise(seed, pair).double()
        cosine = torch.dot(first.flatten(), last.flatten()) / (first.norm() * last.norm())
        angle = torch.arccos(cosine.clamp(-1, 1))
        steps = torch.linspace(0, 1, count, dtype=torch.float64, device=first.device).reshape(-1, 1, 1, 1)
        noise = (torch.sin((1 - steps) * angle) * first + torch.sin(steps * angle) * last) / torch.sin(angle)
        noise[0], noise[-1] = first, last
        # Stochastic samplers draw further noise: one and the same for the whole row, or it would jump.
        latents = self.latents([label] * count, seed, [pair[0]] * count, noise=noise.float())
        return self.autoencoder.decode(latents).clamp(0, 1)
