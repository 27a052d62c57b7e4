"""Stage 1: trains the ViT decoder against L1, LPIPS and a DINO-feature discriminator (paper §3, appendix)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.parallel import DistributedDataParallel

from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.discriminator import DiffAugment, DinoDiscriminator, quantize
from rae.image import to_float
from rae.latent import add_noise
from rae.loss import Phases, Stage1Loss, adaptive_weight, generator_loss, gradient_at
from rae.rng import normal, sample_seeds, uniform
from rae.training.adversarial_step import decoder_gradients, gan_gradients, last_layer_gradients, reconstruct, trained
from rae.training.averaging import average_gradients, average_over_processes, several_processes
from rae.training.module import Batch, OnNonfinite, OptimizerFactory, SchedulerFactory, TrainingModule
from rae.training.subsets import check_subsets, draw_subsets


class Stage1Module(TrainingModule):
    """Decoder step, then discriminator step, with one backward pass through each network: see ``adversarial_step.py``.

    The discriminator sees a fresh reconstruction by the updated decoder, from the same latents without noise. Gradients are
    averaged over processes here, once per optimiser step; the adaptive weight is computed from the averaged gradients, or,
    with ``loss.adaptive=per_process``, by each process from its own. ``global_step`` counts decoder updates.

    Args:
        autoencoder: Frozen encoder and the trained decoder.
        loss: Reconstruction losses, GAN weight and the starts of the phases.
        optimizer: Creates an optimiser from parameters; used for the decoder and for the discriminator.
        scheduler: Creates a schedule from an optimiser and ``steps_per_epoch``; None for a constant rate.
        discriminator: The discriminator; None to train without.
        augment: Differentiable augmentation of the discriminator's input; None for none.
        noise_tau: Largest standard deviation of the training noise on the latents, τ.
        layer_dropout: Probability p in [0, 1) of dropping each layer of the encoder from an image's latent in training
            (FuseReg, arXiv 2609.31620); 0 uses the whole fusion, as validation always does.
        accumulate: Micro-batches per optimiser step.
        seed: Seed of every random draw.
        compile: Whether to compile the decoder, or names of networks: ``decoder``, ``encoder``.
        on_nonfinite: See :class:`~rae.training.module.TrainingModule`.
        config: See :class:`~rae.training.module.TrainingModule`.
    """

    frozen = ("autoencoder.encoder.", "loss.", "discriminator.backbone.")

    def __init__(
        self,
        autoencoder: RAE,
        loss: Stage1Loss,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        discriminator: DinoDiscriminator | None = None,
        augment: DiffAugment | None = None,
        noise_tau: float = 0.8,
        layer_dropout: float = 0.0,
        accumulate: int = 1,
        seed: int = 42,
        compile: bool | Sequence[str] = False,
        on_nonfinite: OnNonfinite = "stop",
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, seed, on_nonfinite, config)
        if accumulate < 1:
            raise ValueError(f"training.accumulate={accumulate} must be at least 1")
        if noise_tau < 0:
            raise ValueError(f"training.noise_tau={noise_tau} must not be negative; 0 trains without noise")
        if autoencoder.latent.space != "encoder":
            raise ValueError(
                f"stage=1 with latent.space={autoencoder.latent.space}: the decoder is trained here, and its input is no space "
                "before it is; set latent.space=encoder"
            )
        self.automatic_optimization = False
        self.autoencoder = autoencoder
        self.autoencoder.latent.requires_grad_(False)
        self.loss = loss
        self.discriminator = discriminator
        self.augment = augment
        self.noise_tau = noise_tau
        self.layer_dropout = check_subsets(layer_dropout, autoencoder.encoder)
        self.accumulate = accumulate
        self._pending: list[Batch] = []  # for the discriminator's step: images as floats, latents without noise
        self._gan_gradients: list[Tensor] | None = None
        if compile and accumulate > 1:
            # Both kinds of gradients then come from one graph, whose buffers a compiled network would free in the first pass.
            functorch_config.donated_buffer = False
        self.compile_networks(compile, {"decoder": autoencoder.decoder, "encoder": autoencoder.encoder})

    @property
    def decoder(self) -> ViTDecoder:
        """The network that is trained and averaged by the EMA."""
        return self.autoencoder.decoder

    def networks(self) -> list[nn.Module]:
        """The decoder and the discriminator, whose schedule advances only when it is updated."""
        return [self.decoder] + ([self.discriminator] if self.discriminator is not None else [])

    def setup(self, stage: str) -> None:
        """Leaves DistributedDataParallel only one weight, the least it accepts: it would reserve memory for all gradients."""
        super().setup(stage)
        names = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names[1:])

    def on_fit_start(self) -> None:
        """Gives all processes the first one's weights, as DistributedDataParallel would."""
        super().on_fit_start()
        for parameter in trained(self) if several_processes() else ():
            dist.broadcast(parameter.data, 0)

    # --- one step ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Gradients of one micro-batch; after ``accumulate`` of them, the decoder's and the discriminator's update."""
        steps_per_epoch = self.steps_per_epoch or sys.maxsize  # with endless data the first epoch never ends
        phases = self.loss.phases(self.trainer.global_step, steps_per_epoch)
        with self._no_sync():
            self._decoder_gradients(batch, phases, self.group_size(batch_idx))
            if (batch_idx + 1) % self.accumulate and batch_idx + 1 < self.trainer.num_training_batches:
                return
            self._update_decoder()
            if phases.discriminator and self.discriminator is not None:
                self._update_discriminator(self.discriminator)
        self._pending = []

    def _decoder_gradients(self, batch: Batch, phases: Phases, group: int) -> None:
        """Adds the gradients of one of ``group`` micro-batches to the decoder."""
        images = to_float(batch["image"])
        # Not RAE.encode and RAE.decode: one undoes the other's normalisation, and the noise comes before both.
        latents = self._encoded(images, batch)
        self._pending.append({**batch, "image": images, "latent": latents})
        noise = normal(self._seeds("latent noise", batch), latents.shape[1:], device=latents.device)
        level = uniform(self._seeds("latent noise level", batch), device=latents.device)
        made = reconstruct(self.decoder, add_noise(latents, self.noise_tau, level, noise))

        losses = self.loss.reconstruction(made.leaf, images, phases, *self._consistent_with(images, latents))
        at_image = gradient_at(made.leaf, losses["total"]) / group
        for name, value in losses.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "l1")
        if phases.gan and self.discriminator is not None:
            gan_loss = generator_loss(self._judge(self.discriminator, made.leaf, batch, "augment generator", False))
            gan_at_image = gradient_at(made.leaf, gan_loss) / group
            self.log("train/gan", gan_loss.detach())
            if self.accumulate == 1:
                pair = last_layer_gradients(self.decoder, made, at_image, gan_at_image)
                at_image = at_image + self._gan_scale(pair) * gan_at_image
            else:
                gradients = gan_gradients(self.decoder, made, gan_at_image)
                if self._gan_gradients is None:
                    self._gan_gradients = gradients
                else:
                    torch._foreach_add_(self._gan_gradients, gradients)
        decoder_gradients(made, at_image)

    def _encoded(self, images: Tensor, batch: Batch) -> Tensor:
        """Latents as the encoder returns them, from a random subset of its layers if layers are dropped."""
        encoder = self.autoencoder.encoder
        if not self.layer_dropout:
            latents: Tensor = encoder(images)
            return latents
        layers = encoder(images, stacked=True)
        return encoder.fused(layers, draw_subsets(self._seeds("latent layers", batch), layers, self.layer_dropout))

    def _consistent_with(
        self, images: Tensor, latents: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], Tensor] | tuple[()]:
        """The differentiable encoder and the images' latents from all its layers; empty unless a loss needs them."""
        if self.loss.consistency is None:
            return ()
        encoder = self.autoencoder.encoder
        return encoder.differentiable, encoder(images) if self.layer_dropout else latents

    def _gan_scale(self, pair: Tensor) -> Tensor:
        """Weight of the GAN loss, from the stacked gradients of both losses at the last layer's weight."""
        reconstruction, gan = average_over_processes(pair) if self.loss.adaptive == "averaged" else pair
        adaptive = adaptive_weight(reconstruction, gan, self.loss.adaptive_maximum)
        self.log("train/adaptive_weight", adaptive)
        return self.loss.gan_weight * adaptive

    def _update_decoder(self) -> None:
        """Adds the weighted gradients of the GAN loss, if they were accumulated separately, and takes the decoder's step."""
        if self._gan_gradients is not None:
            parameters = trained(self.decoder)
            gradients = gradients_of(parameters)
            last = next(i for i, p in enumerate(parameters) if p is self.decoder.last_layer.weight)
            scale = self._gan_scale(torch.stack([gradients[last], self._gan_gradients[last]]))
            torch._foreach_add_(gradients, list(torch._foreach_mul(self._gan_gradients, scale)))
            self._gan_gradients = None
        self._take_step(0, self.decoder, "train/grad_norm")

    def _update_discriminator(self, discriminator: DinoDiscriminator) -> None:
        """Takes the discriminator's step on fresh reconstructions by the updated decoder."""
        for number, batch in enumerate(self._pending):
            with torch.no_grad():
                fake = quantize(self.decoder(batch["latent"]))
            # In training mode every call runs one power iteration; only the first micro-batch does, as with one large batch.
            training = number == 0
            fake_logits = self._judge(discriminator, fake, batch, "augment fake", training)
            real_logits = self._judge(discriminator, batch["image"], batch, "augment real", training)
            loss = self.loss.discriminator(real_logits, fake_logits)
            (loss / len(self._pending)).backward()
            self.log("train/discriminator", loss.detach())
            self.log("train/logits_real", real_logits.detach().mean())
            self.log("train/logits_fake", fake_logits.detach().mean())
        self._take_step(1, discriminator, "train/discriminator_grad_norm")

    def _take_step(self, number: int, network: nn.Module, norm_name: str) -> None:
        """Averages a network's gradients over processes, steps its optimiser and schedule, and logs the norm."""
        parameters = trained(network)
        gradients = gradients_of(parameters)
        average_gradients(gradients)
        norm = nn.utils.get_total_norm(gradients)
        if self.check_finite(norm, parameters):
            self.log(norm_name, norm)
        # Lightning counts the steps of its own optimiser: the decoder's.
        optimizers: Any = self.optimizers(use_pl_optimizer=number == 0)
        optimizer = optimizers[number] if isinstance(optimizers, list) else optimizers
        optimizer.step()  # without gradients (a skipped step) it counts but changes nothing
        optimizer.zero_grad(set_to_none=True)
        schedulers: Any = self.lr_schedulers()
        if schedulers is not None:
            (schedulers if isinstance(schedulers, list) else [schedulers])[number].step()

    def _judge(
        self, discriminator: DinoDiscriminator, images: Tensor, batch: Batch, purpose: str, training: bool
    ) -> Tensor:
        """Logits of augmented images."""
        if self.augment is not None:
            images = self.augment(images, self._seeds(purpose, batch))
        discriminator.train(training)
        return discriminator(images)

    def _seeds(self, purpose: str, batch: Batch) -> list[int]:
        return sample_seeds(self.seed, purpose, batch["epoch"].tolist(), batch["index"].tolist())

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Keeps DistributedDataParallel from averaging: that happens here, once a step's gradients are complete."""
        model = self.trainer.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    # --- validation --------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """L1 and PSNR of held-out images reconstructed without noise."""
        images = to_float(batch["image"])
        reconstructions = self.autoencoder(images)
        if reconstructions.shape != images.shape:
            raise ValueError(
                f"reconstructions have shape {tuple(reconstructions.shape)}, the images {tuple(images.shape)}: "
                "image_size must be decoder.grid · decoder.patch"
            )
        error = (reconstructions.clamp(0, 1) - images).square().flatten(1).mean(1)
        self.log_validation("l1", (reconstructions - images).abs().mean(), batch)
        self.log_validation("psnr", (-10 * error.log10()).mean(), batch, prog_bar=True)


def gradients_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradients, none of which may be missing."""
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in gradients)
    return gradients  # type: ignore[return-value]
