"""Sampling as a diffusers pipeline, with the guidance, samplers and random numbers of ``rae``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from rae.encoder.text import TextEncoder, TransformersTextEncoder
from rae.flow import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    ComposedGuidance,
    EulerMaruyamaSampler,
    EulerSampler,
    FlowMatching,
    FullGrid,
    GVPPath,
    Heun3Sampler,
    HeunEulerSampler,
    HeunSampler,
    InternalGuidance,
    JumpSampler,
    LinearPath,
    MidpointSampler,
    NoGuidance,
    PublishedGrid,
    RK4Sampler,
    StochasticHeunSampler,
    VPPath,
    check_guidance,
)
from rae.formats.components.make import by_name, make
from rae.image import to_pil, to_uint8
from rae.prompts import Classes, beside_null, check_negative_prompt, checked_prompts, labels_of
from rae.rng import normal, sample_seed

PATHS = by_name(LinearPath, GVPPath, VPPath)
GRIDS = by_name(PublishedGrid, FullGrid)
SAMPLERS = by_name(
    EulerSampler,
    HeunSampler,
    HeunEulerSampler,
    Heun3Sampler,
    MidpointSampler,
    RK4Sampler,
    EulerMaruyamaSampler,
    StochasticHeunSampler,
    JumpSampler,
)
"""Classes that a description of the sampler may name, besides paths and grids."""
GUIDANCES = by_name(
    NoGuidance,
    ClassifierFreeGuidance,
    AutoGuidance,
    InternalGuidance,
    AdaptiveProjectedGuidance,
    ClassifierFreeZeroStarGuidance,
    ComposedGuidance,
)
"""Classes that a description of the guidance may name."""
OUTPUTS = ("pil", "np", "pt", "latent")


class LanguageModel(TransformersTextEncoder):
    """An already loaded language model from transformers, with its tokenizer.

    Args:
        network: The model.
        tokenizer: Its tokenizer.
        features: Width of the features.
        tokens: Maximum length; longer prompts are truncated.
    """

    def __init__(self, network: Any, tokenizer: Any, features: int, tokens: int) -> None:
        TextEncoder.__init__(self, features, tokens)
        self.network = network
        self.tokenizer = tokenizer
        self.padding = tokenizer.pad_token_id or 0


class RAEPipeline(DiffusionPipeline):
    """Generates images for given classes or prompts.

    Args:
        transformer: The denoiser.
        vae: Decodes normalised latents: ``decode(z).sample``.
        scheduler: Its ``config.shift`` shifts the times of every sampler; it performs the steps of the Euler sampler.
        guide: The weaker denoiser that autoguidance steers away from.
        text_encoder: Encodes prompts, for a denoiser conditioned on text.
        tokenizer: Tokenizer of a language model; None for text encoders of ``rae``.
        flow: Description of the objective: prediction and path.
        sampler: Description of the sampler and its grid of times.
        guidance: Description of the guidance.
        id2label: Names of the classes by number.
        encoder: Record of the encoder for ``rae``; not used here.
        latent: Record of the latents' normalisation for ``rae``; not used here.
        text: Record of the text encoder for ``rae``.
        negative_prompt: What classifier-free guidance steers away from; None for the null text.
        rae_format: Version of this folder format.
    """

    transformer: Any
    vae: Any
    scheduler: Any
    guide: Any
    text_encoder: Any
    tokenizer: Any
    model_cpu_offload_seq: Any = "text_encoder->guide->transformer->vae"
    _optional_components: Any = ["guide", "text_encoder", "tokenizer"]  # noqa: RUF012 (diffusers expects a list)

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        guide: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        flow: Any = None,
        sampler: Any = None,
        guidance: Any = None,
        id2label: Any = None,
        encoder: Any = None,
        latent: Any = None,
        text: Any = None,
        negative_prompt: Any = None,
        rae_format: Any = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, guide=guide)
        self.register_modules(text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(
            flow=flow,
            sampler=sampler,
            guidance=guidance,
            id2label=id2label,
            encoder=encoder,
            latent=latent,
            text=text,
            negative_prompt=negative_prompt,
            rae_format=rae_format,
        )
        told = {key: flow[key] for key in ("path", "prediction", "time_floor") if key in flow}
        self._flow = FlowMatching(**make(told, PATHS))  # the rest of the objective is only for training
        self._sampler = make(sampler, {**SAMPLERS, **GRIDS, **PATHS})
        self._guidance = make(guidance, GUIDANCES)
        names = id2label or {}
        self.class_names = tuple(names[label] for label in sorted(names, key=int))
        self._text = text_encoder
        if tokenizer is not None:
            self._text = LanguageModel(text_encoder, tokenizer, text["model"]["features"], text["model"]["tokens"])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Classes | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        seed: int | None = None,
        indices: Sequence[int] | None = None,
        conditions: Mapping[str, Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Generates images.

        Args:
            class_labels: One class or several, by number or name.
            prompt: One prompt or several, for a text-conditioned model.
            negative_prompt: What classifier-free guidance steers away from; None for the exported one.
            num_inference_steps: Sampler steps; None for the exported number.
            guidance_scale: Guidance scale, 1 for none; None for the exported one.
            generator: Random generator for the noise, if ``latents`` and ``seed`` are not given.
            latents: Initial noise, B×C×h×w.
            seed: Seed for the same noise as ``rae-sample seed=…``: sample i depends only on the seed and i.
            indices: Numbers i of the samples under ``seed``; 0, 1, … by default.
            conditions: Inputs of denoisers not conditioned on a class, tensors B×… by name.
            output_type: ``pil``: images as ``rae-sample`` writes them; ``np``: float B×H×W×3 in [0, 1]; ``pt``: float B×3×H×W;
                ``latent``: normalised latents B×C×h×w.
            return_dict: Whether to return an object with ``images``, or a tuple.

        Raises:
            ValueError: Unknown class or output, invalid number of steps, noise of the wrong shape, guidance whose requirements
                are not met, or weights that are not float32.
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type={output_type!r} is unknown; choose one of {', '.join(OUTPUTS)}")
        if self.transformer.dtype != torch.float32:
            raise ValueError(
                f"the weights are {self.transformer.dtype}, and times and positions need float32: load them without "
                "torch_dtype, and call below torch.autocast for products in bfloat16"
            )
        denoiser, device = self.transformer.denoiser, self._execution_device
        sampler = self._sampler if num_inference_steps is None else self._sampler.with_steps(num_inference_steps)
        guidance = self._guidance if guidance_scale is None else self._guidance.with_scale(guidance_scale)
        check_guidance(guidance, self._flow, sampler, denoiser, self.guide)
        away = self.config["negative_prompt"] if negative_prompt is None else negative_prompt
        check_negative_prompt(away, self._text, guidance)
        told = {name: value.to(device) for name, value in self._told(class_labels, prompt, conditions).items()}
        batch = len(next(iter(told.values())))
        denoiser.condition.check(told, batch)
        numbers = range(batch) if indices is None else indices
        shape = (batch, *denoiser.latent_shape)
        if len(numbers) != batch or (latents is not None and tuple(latents.shape) != shape):
            given = None if latents is None else tuple(latents.shape)
            raise ValueError(
                f"{batch} samples need as many indices, got {len(numbers)}, and latents {shape}, got {given}"
            )

        def draw(of: Sequence[int], purpose: str, *step: int) -> Tensor:
            if seed is None:
                return randn_tensor((batch, *of), generator=generator, device=device, dtype=torch.float32)
            return normal([sample_seed(seed, purpose, i, *step) for i in numbers], of, device=device)

        noise = draw(shape[1:], "sample") if latents is None else latents.to(device, torch.float32)
        null = None
        if "null" in guidance.needs:
            told, null = beside_null(told, denoiser.condition, self._text, away)
        guide = None if self.guide is None else self._velocity(self.guide)
        velocity = guidance(self._velocity(self.transformer), told, null=null, guide=guide)
        with self.progress_bar(total=sampler.calls) as bar:
            begun, of = denoiser.begin(noise), denoiser.state_shape
            drawn = self._walk(velocity, begun, sampler, lambda step: draw(of, "step", step), bar.update)
            drawn = denoiser.split(drawn)[0]
            images = drawn if output_type == "latent" else self.vae.decode(drawn).sample.float().clamp(0, 1)
        self.maybe_free_model_hooks()
        made: Any = images
        if output_type == "pil":
            made = [to_pil(image) for image in to_uint8(images).cpu()]
        elif output_type == "np":
            made = images.permute(0, 2, 3, 1).cpu().numpy()
        return ImagePipelineOutput(images=made) if return_dict else (made,)

    def _told(
        self, labels: Classes | None, prompt: str | Sequence[str] | None, conditions: Mapping[str, Tensor] | None
    ) -> dict[str, Tensor]:
        """The denoiser's conditions."""
        if sum(given is not None for given in (labels, prompt, conditions)) != 1:
            raise ValueError(
                "give one of class_labels, prompt and, for models that are told something else, conditions"
            )
        if conditions is not None:
            return dict(conditions)
        if labels is not None:
            return {"label": labels_of(labels, self.class_names, self.transformer.denoiser.num_classes)}
        if self._text is None:
            raise ValueError(f"prompt={prompt!r}: this model is told no text; give class_labels")
        told: dict[str, Tensor] = self._text(checked_prompts(prompt))
        return told

    def _velocity(self, network: Any) -> Callable[..., Any]:
        """Wraps a network as a velocity field."""

        def call(x: Tensor, t: Tensor, **conditions: Any) -> Any:
            heads = network(x, t, return_dict=False, **conditions)
            return heads if len(heads) > 1 else heads[0]

        field: Callable[..., Any] = self._flow.velocity_model(call)
        return field

    def _walk(self, velocity: Any, x: Tensor, sampler: Any, step_noise: Any, update: Callable[[], Any]) -> Tensor:
        """Integrates from noise to data; the scheduler performs Euler steps, over the grid's own times."""
        if type(sampler) is not EulerSampler:
            shift = self.scheduler.config.shift
            drawn: Tensor = sampler.sample(velocity, x, shift, step_noise, lambda number, t, state: update())
            return drawn
        times = sampler.grid.times(1.0).tolist()  # the scheduler shifts them and appends 0
        self.scheduler.set_timesteps(sigmas=times if times[-1] > 0 else times[:-1], device=x.device)
        sigmas = self.scheduler.sigmas.tolist()
        for number in range(sampler.grid.steps):
            step = self.scheduler.timesteps[number]
            x = self.scheduler.step(velocity(x, sigmas[number]), step, x, return_dict=False)[0]
            update()
        return x
