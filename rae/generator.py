"""From noise and class labels or prompts to images: guided denoiser, sampler, decoder (paper §4 and appendix)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rae.autoencoder import RAE
from rae.condition import Conditions, readable_names
from rae.denoiser import Denoiser, check_shapes
from rae.encoder.text import TextEncoder
from rae.flow import FlowMatching, Guidance, NoGuidance, Sampler, check_guidance
from rae.image import to_pil, to_uint8
from rae.io.export import Exportable
from rae.layers import unchecked
from rae.prompts import Classes, beside_null, check_negative_prompt, check_text_encoder, checked_prompts, labels_of
from rae.rng import arc, normal, sample_seed

PRECISIONS = ("32-true", "bf16-mixed")
"""Precisions available for sampling; published numbers use float32 with TF32 matrix products."""
OUTPUTS = ("float", "uint8", "pil")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def computing(precision: str, device: torch.device) -> torch.autocast:
    """Autocast for one of Lightning's precision names; raises ValueError unless it is ``32-true`` or ``bf16-mixed``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is unknown; choose {' or '.join(PRECISIONS)}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")


class Generator(Exportable, nn.Module):
    """Generates images of given classes or prompts.

    Sample ``i`` depends only on the seed and ``i``, so it is the same for any batch size, order or number of processes.

    Args:
        autoencoder: Decodes the latents.
        denoiser: Network (x_t B×C×h×w, t B, label B) -> prediction B×C×h×w.
        flow: Path, prediction and time shift that the denoiser was trained with.
        sampler: Any sampler of :mod:`rae.flow`.
        guidance: Any guidance of :mod:`rae.flow`; None for no guidance.
        guide: The smaller, less trained denoiser that autoguidance steers away from.
        class_names: Names of the classes 0, 1, …, or ``imagenet1k``; None if unknown.
        text_encoder: Turns prompts into features, for a text-conditioned denoiser.
        negative_prompt: What classifier-free guidance steers away from; None for the null text.

    Raises:
        ValueError: The guidance needs something that is missing (see :func:`rae.flow.check_guidance`), the networks' latent shapes
            differ, or the number of names is wrong.
    """

    def __init__(
        self,
        autoencoder: RAE,
        denoiser: Denoiser,
        flow: FlowMatching,
        sampler: Sampler,
        guidance: Guidance | None = None,
        guide: Denoiser | None = None,
        class_names: Sequence[str] | str | None = None,
        text_encoder: TextEncoder | None = None,
        negative_prompt: str | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.denoiser = denoiser
        self.flow = flow
        self.sampler = sampler
        self.guidance = guidance if guidance is not None else NoGuidance()
        self.guide = guide
        self.class_names = readable_names(class_names or ())
        self.text_encoder = text_encoder
        self.negative_prompt = negative_prompt
        check_text_encoder(denoiser, text_encoder)
        check_negative_prompt(negative_prompt, text_encoder, self.guidance)
        self._captured = False
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} names for {self.num_classes} classes")
        check_guidance(self.guidance, flow, sampler, denoiser, guide)
        check_shapes(autoencoder.latent_shape, denoiser, guide)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.denoiser.num_classes)

    @property
    def device(self) -> torch.device:
        """Device of the denoiser's weights."""
        return next(self.denoiser.parameters()).device

    def __repr__(self) -> str:
        """What it generates and how; ``print(draw.denoiser)`` shows a network."""
        told = f"{self.num_classes} classes" if self.num_classes else "texts" if self.text_encoder else "no classes"
        parameters = sum(weight.numel() for weight in self.denoiser.parameters()) / 1e6
        return (
            f"Generator({self.autoencoder.image_size}×{self.autoencoder.image_size} px, {told}, "
            f"{type(self.denoiser).__name__} {parameters:.1f} M parameters, {self.sampler!r}, {self.guidance!r})"
        )

    def configured(self, steps: int | None = None, guidance_scale: float | None = None) -> Generator:
        """A copy with other settings that shares the networks; this generator is unchanged.

        Args:
            steps: Steps of the sampler; None keeps its number.
            guidance_scale: Strength of the guidance, 1 for none; None keeps it. Without guidance, classifier-free guidance is used.

        Raises:
            ValueError: ``steps`` is below 1; also see :func:`rae.flow.check_guidance`.
        """
        other = copy.copy(self)
        if steps is not None:
            other.sampler = self.sampler.with_steps(steps)
        if guidance_scale is not None:
            other.guidance = self.guidance.with_scale(guidance_scale)
            check_guidance(other.guidance, self.flow, self.sampler, self.denoiser, self.guide)
        return other

    def labels_of(self, classes: Classes) -> Tensor:
        """Labels int64 B of classes given by number or by name, one or several.

        A name is a class's full name or one of its synonyms ("goldfish" for "goldfish, Carassius auratus"); case does not matter.

        Raises:
            ValueError: An unknown name, or a number outside [0, num_classes).
        """
        return labels_of(classes, self.class_names, self.num_classes)

    def conditions_of(self, told: Classes | Conditions) -> dict[str, Tensor]:
        """The denoiser's conditions, tensors B×… by name, from classes (see :meth:`labels_of`), prompts or such tensors.

        Raises:
            ValueError: Unknown classes, empty prompts, or conditions that the denoiser does not take.
        """
        if isinstance(told, Mapping):
            conditions = dict(told)
        elif "label" in self.denoiser.condition.names:
            conditions = {"label": self.labels_of(told)}
        elif self.text_encoder is not None:
            conditions = self.text_encoder(checked_prompts(told))
        else:
            raise ValueError(f"this model is not told a class; give a mapping of {list(self.denoiser.condition.names)}")
        if not conditions:
            raise ValueError(f"conditions are empty; give {list(self.denoiser.condition.names)}")
        self.denoiser.condition.check(conditions, len(next(iter(conditions.values()))))
        return conditions

    def compile(self, *, mode: str | None = None, **options: Any) -> None:
        """Compiles denoiser, guide and decoder in place; weights and names are unchanged.

        Shapes are static, so each batch size takes one graph per network and, with classifier-free guidance, one more for the
        doubled batch inside its interval; steps share them. Every new batch size recompiles.

        Args:
            mode: Of ``torch.compile``; ``reduce-overhead`` replays CUDA graphs, which helps small batches.
            options: Further arguments of ``torch.compile``.

        Raises:
            ValueError: An unknown mode.
        """
        if mode not in (None, *COMPILE_MODES):
            raise ValueError(f"compile={mode!r} is unknown; choose true, false or one of {', '.join(COMPILE_MODES)}")
        for network in (self.denoiser, self.guide, self.autoencoder.decoder):
            if network is not None:
                network.compile(**{"dynamic": False, "mode": mode, **options})
        self._captured = mode in ("reduce-overhead", "max-autotune")

    def _callable(self, network: Denoiser) -> Callable[..., Any]:
        """The network as the sampler calls it."""
        if not self._captured:
            return network

        def call(*inputs: Tensor, **conditions: Any) -> Any:
            # A CUDA graph writes every result to the same memory, and higher-order samplers keep several results.
            torch.compiler.cudagraph_mark_step_begin()
            output = network(*inputs, **conditions)
            return tuple(head.clone() for head in output) if isinstance(output, tuple) else output.clone()

        return call

    def noise(self, seed: int, indices: Sequence[int]) -> Tensor:
        """Initial noise of samples in a set: standard normal B×C×h×w.

        Args:
            seed: Seed of the set.
            indices: Numbers of the samples in it; sample i depends only on the seed and i.
        """
        seeds = [sample_seed(seed, "sample", number) for number in indices]
        return normal(seeds, self.autoencoder.latent_shape, device=self.device)

    @torch.no_grad()
    def latents(
        self,
        labels: Classes | Conditions,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        on_step: Callable[[int, float, Tensor], None] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Samples normalised latents.

        Args:
            labels: Classes, B integers in [0, num_classes) or names; a single one may be given without a list. For denoisers with
                other conditions, the tensors by name.
            seed: Seed of the whole set of samples.
            indices: Number of each sample in that set; 0, 1, … by default.
            on_step: Called after every step with its number, the time reached and the latents.
            noise: Initial noise B×C×h×w; None draws it from the seed and the indices.

        Returns:
            Latents B×C×h×w.

        Raises:
            ValueError: A label is out of range, or the numbers of indices and labels differ.
        """
        conditions = self.conditions_of(labels)
        batch = len(next(iter(conditions.values())))
        indices = range(batch) if indices is None else indices
        if len(indices) != batch:
            raise ValueError(f"indices must number as many as labels: {len(indices)} for {batch}")
        noise = self.denoiser.begin(self.noise(seed, indices) if noise is None else noise.to(self.device))

        def step_noise(step: int) -> Tensor:
            return normal([sample_seed(seed, "step", i, step) for i in indices], self.denoiser.state_shape, self.device)

        guide = self.flow.velocity_model(self._callable(self.guide)) if self.guide is not None else None
        conditions = {name: value.to(self.device) for name, value in conditions.items()}
        null = None
        if "null" in self.guidance.needs:
            told = self.denoiser.condition
            conditions, null = beside_null(conditions, told, self.text_encoder, self.negative_prompt)
        velocity = self.guidance(
            self.flow.velocity_model(self._callable(self.denoiser)), conditions, null=null, guide=guide
        )

        def seen(step: int, t: float, state: Tensor) -> None:
            if on_step is not None:
                on_step(step, t, self.denoiser.split(state)[0])

        with unchecked():
            state = self.sampler.sample(velocity, noise, shift=self.flow.shift, step_noise=step_noise, on_step=seen)
        return self.denoiser.split(state)[0]

    def __call__(
        self,
        labels: Classes | Conditions,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        output: str = "float",
        progress: bool = True,
    ) -> Any:
        """Samples images: ``draw(207)``, ``draw(["goldfish", 207], steps=25, guidance_scale=1.5, output="pil")``.

        Args:
            labels: One class or several, by number or by name.
            seed: Seed of the whole set of samples.
            indices: Number of each sample in that set; 0, 1, … by default.
            steps: Steps of the sampler in this call; None for the sampler's own number.
            guidance_scale: Strength of the guidance in this call, 1 for none; None for the guidance's own.
            output: ``float``: float32 B×3×H×W in [0, 1]; ``uint8``: B×3×H×W; ``pil``: a list of PIL images.
            progress: Whether to show a progress bar once sampling takes more than two seconds.

        Raises:
            ValueError: An unknown class or output, or a wrong number of steps or indices.
        """
        if output not in OUTPUTS:
            raise ValueError(f"output={output!r} is unknown; choose one of {', '.join(OUTPUTS)}")
        chosen = self.configured(steps, guidance_scale)
        with tqdm(total=chosen.sampler.calls, desc="sampling", delay=2, disable=not progress) as bar:
            images = chosen.forward(labels, seed, indices, lambda number, t, x: bar.update())
        if output == "float":
            return images
        pixels = to_uint8(images).cpu()
        return [to_pil(image) for image in pixels] if output == "pil" else pixels

    @torch.no_grad()
    def forward(
        self,
        labels: Classes | Conditions,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        on_step: Callable[[int, float, Tensor], None] | None = None,
    ) -> Tensor:
        """Samples images B×3×H×W in [0, 1] of the given classes; arguments as for :meth:`latents`."""
        return self.autoencoder.decode(self.latents(labels, seed, indices, on_step)).clamp(0, 1)

    def draw(
        self,
        labels: Classes | Conditions,
        seed: int = 0,
        indices: Sequence[int] | None = None,
        precision: str = "32-true",
        quantize: str = "floor",
        on_latents: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Samples images uint8 B×3×H×W, for scoring and writing.

        Args:
            labels: See :meth:`latents`.
            seed: See :meth:`latents`.
            indices: See :meth:`latents`.
            precision: Precision of the networks, ``32-true`` or ``bf16-mixed`` (Lightning's names).
            quantize: See :func:`rae.image.to_uint8`.
            on_latents: Called with the denormalised latents, float32 B×C×h×w, as the encoder returns them: any decoder of that
                encoder takes them. With ``latent.space=decoder_input``, only this decoder does.

        Raises:
            ValueError: An unknown precision or ``quantize``; also see :meth:`latents`.
        """
        with computing(precision, self.device):
            latents = self.latents(labels, seed, indices)
            if on_latents is not None:
                on_latents(self.autoencoder.latent.denormalize(latents).float())
            with torch.no_grad():
                images = self.autoencoder.decode(latents).clamp(0, 1)
        return to_uint8(images.float(), quantize)  # bfloat16 cannot tell neighbouring grey levels apart

    @torch.no_grad()
    def interpolate(self, label: int | str, pair: tuple[int, int], count: int, seed: int = 0) -> Tensor:
        """Images count×3×H×W interpolated between two samples of a class, along the arc between their initial noise.

        Args:
            label: The class, or the prompt.
            pair: Numbers of the two samples in the seed's set; they become the first and last image.
            count: Number of images, including both ends.
            seed: Seed of the set.

        Raises:
            ValueError: Fewer than two images.
        """
        if count < 2:
            raise ValueError(f"count must be at least 2, both ends counted, got {count}")
        first, last = self.noise(seed, pair)
        noise = arc(first, last, count)
        # Stochastic samplers draw further noise; sharing it across the row keeps the interpolation from jumping.
        latents = self.latents([label] * count, seed, [pair[0]] * count, noise=noise)
        return self.autoencoder.decode(latents).clamp(0, 1)
