"""Stage 1: trains the ViT decoder against L1, LPIPS and a DINO-feature discriminator (paper §3, appendix)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from rae.loss import Phases, Stage1Loss, adaptive_weight, generator_loss, gradient_at, last_layer_gradient
from rae.rng import normal, sample_seeds, uniform
from rae.training.module import Batch, OnNonfinite, OptimizerFactory, SchedulerFactory, TrainingModule


@dataclass
class MicroBatch:
    """What the discriminator's turn needs of a batch the decoder has seen."""

    images: Tensor
    """Real images B×3×H×W in [0, 1]."""
    latents: Tensor
    """The encoder's latents B×C×h×w, without noise."""
    epochs: list[int]
    indices: list[int]


class Stage1Module(TrainingModule):
    """Decoder step, then discriminator step, with one backward pass through each network.

    The gradients of the reconstruction loss and of the GAN loss are taken at the reconstructed image; the adaptive weight
    follows from them and the last layer's input; one backward pass through the decoder carries their weighted sum. The
    discriminator then sees a fresh reconstruction by the updated decoder, from the same tokens without noise.

    Gradients are averaged over processes here, once per optimiser step. The adaptive weight is a function of the averaged
    gradients, or, with ``loss.adaptive=per_process``, each process's own of its gradients. ``global_step`` counts decoder updates.

    Args:
        autoencoder: Frozen encoder and the decoder that is trained.
        loss: Reconstruction losses, GAN weight and the starts of the phases.
        optimizer: Makes an optimiser from parameters; used for the decoder and for the discriminator.
        scheduler: Makes a schedule from an optimiser and ``steps_per_epoch``; None for a constant rate.
        discriminator: The discriminator; None to train without.
        augment: Differentiable augmentation of what the discriminator sees; None for none.
        noise_tau: Largest standard deviation of the training noise on the latents, τ.
        accumulate: Micro-batches per optimiser step.
        seed: Seed of every draw.
        compile: Whether the decoder is compiled, or names of networks: ``decoder``, ``encoder``.
        on_nonfinite: See :class:`~rae.training.module.TrainingModule`.
        config: See :class:`~rae.training.module.TrainingModule`.

    Raises:
        ValueError: ``accumulate`` below 1 or ``noise_tau`` below 0.
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
        accumulate: int = 1,
        seed: int = 42,
        compile: bool | Sequence[str] = False,
        on_nonfinite: OnNonfinite = "stop",
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(seed, on_nonfinite, config)
        if accumulate < 1:
            raise ValueError(f"training.accumulate={accumulate} must be at least 1")
        if noise_tau < 0:
            raise ValueError(f"training.noise_tau={noise_tau} must not be negative; 0 trains without noise")
        self.automatic_optimization = False
        self.autoencoder = autoencoder
        self.autoencoder.latent.requires_grad_(False)
        self.loss = loss
        self.discriminator = discriminator
        self.augment = augment
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.noise_tau = noise_tau
        self.accumulate = accumulate
        self._pending: list[MicroBatch] = []
        self._gan_gradients: list[Tensor] | None = None
        if compile and accumulate > 1:
            # The two kinds of gradients are then taken from one graph, which a compiled network would use up in the first pass.
            functorch_config.donated_buffer = False
        self.compile_networks(compile, {"decoder": autoencoder.decoder, "encoder": autoencoder.encoder})

    @property
    def decoder(self) -> ViTDecoder:
        """The network that is trained, and averaged by the EMA."""
        return self.autoencoder.decoder

    def configure_optimizers(self) -> Any:
        """Two optimisers; the discriminator's schedule advances only when the discriminator is updated."""
        networks = [self.decoder] + ([self.discriminator] if self.discriminator is not None else [])
        optimizers = [self.optimizer([p for p in net.parameters() if p.requires_grad]) for net in networks]
        if self.scheduler is None:
            return optimizers
        steps = self.steps_per_epoch(self.accumulate)
        return optimizers, [self.scheduler(optimizer, steps_per_epoch=steps) for optimizer in optimizers]

    def setup(self, stage: str) -> None:
        """Leaves DistributedDataParallel one weight, without which it does not go: it would keep room for all gradients."""
        super().setup(stage)
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, trained[1:])

    def on_fit_start(self) -> None:
        """Gives all processes the first one's weights, as DistributedDataParallel would."""
        super().on_fit_start()
        for parameter in self.parameters() if _several() else ():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, 0)

    # --- one step ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Gradients of one micro-batch; after ``accumulate`` of them, the decoder's and the discriminator's update."""
        self.remember(batch)
        phases = self.loss.phases(self.trainer.global_step, self._steps_per_epoch())
        with self._no_sync():
            self._decoder_gradients(batch, phases, self.group_size(batch_idx, self.accumulate))
            if (batch_idx + 1) % self.accumulate and batch_idx + 1 < self.trainer.num_training_batches:
                return
            self._update_decoder(phases)
            if phases.discriminator and self.discriminator is not None:
                self._update_discriminator(self.discriminator)
        self.log_throughput(sum(len(micro.indices) for micro in self._pending))
        self._pending = []

    def _decoder_gradients(self, batch: Batch, phases: Phases, group: int) -> None:
        """Adds the gradients of one of ``group`` micro-batches to the decoder."""
        images = to_float(batch["image"])
        latents = self.autoencoder.encoder(images)
        micro = MicroBatch(images, latents, batch["epoch"].tolist(), batch["index"].tolist())
        self._pending.append(micro)
        noise = normal(self._seeds("latent noise", micro), latents.shape[1:], device=latents.device)
        level = uniform(self._seeds("latent noise level", micro), device=latents.device)
        features = self.decoder.forward_features(add_noise(latents, self.noise_tau, level, noise))
        cut = features.detach().requires_grad_()
        image = self.decoder.to_image(cut)
        leaf = image.detach().requires_grad_()
        losses = self.loss.reconstruction(leaf, images, phases)
        at_image = gradient_at(leaf, losses["total"]) / group
        for name, value in losses.items():
            self.log(f"train/{name}", value.detach(), prog_bar=name == "l1")
        if not (phases.gan and self.discriminator is not None):
            self._backward(features, cut, image, at_image)
            return
        gan_loss = generator_loss(self._judge(self.discriminator, leaf, micro, "augment generator", training=False))
        gan_at_image = gradient_at(leaf, gan_loss) / group
        self.log("train/gan", gan_loss.detach())
        if self.accumulate == 1:
            weight = self.decoder.last_layer.weight
            pair = torch.stack([last_layer_gradient(image, weight, at) for at in (at_image, gan_at_image)])
            scale = self._gan_scale(*(average_over_processes(pair) if self.loss.adaptive == "averaged" else pair))
            self._backward(features, cut, image, at_image + scale * gan_at_image)
            return
        # The adaptive weight is a function of the whole batch's gradients: the two kinds are summed apart until it is known.
        parameters = self._decoder_parameters()
        (at_cut,) = torch.autograd.grad(image, cut, gan_at_image, retain_graph=True)
        last = list(self.decoder.last_layer.parameters())
        gradients = dict(zip(last, torch.autograd.grad(image, last, gan_at_image, retain_graph=True), strict=True))
        rest = [p for p in parameters if p not in gradients]
        gradients |= dict(zip(rest, torch.autograd.grad(features, rest, at_cut, retain_graph=True), strict=True))
        gan = [gradients[p] for p in parameters]
        if self._gan_gradients is None:
            self._gan_gradients = gan
        else:
            torch._foreach_add_(self._gan_gradients, gan)
        self._backward(features, cut, image, at_image)

    def _backward(self, features: Tensor, cut: Tensor, image: Tensor, at_image: Tensor) -> None:
        """One backward pass through the decoder, from the gradient at the image."""
        image.backward(at_image)
        features.backward(cut.grad)

    def _gan_scale(self, reconstruction: Tensor, gan: Tensor) -> Tensor:
        """Weight of the GAN gradient from the two averaged gradients of the last layer's weight."""
        adaptive = adaptive_weight(reconstruction, gan, self.loss.adaptive_maximum)
        self.log("train/adaptive_weight", adaptive)
        return self.loss.gan_weight * adaptive

    def _update_decoder(self, phases: Phases) -> None:
        """Averages the gradients over processes and takes the decoder's step."""
        parameters = self._decoder_parameters()
        gradients = gradients_of(parameters)
        if self._gan_gradients is not None:
            last = next(i for i, p in enumerate(parameters) if p is self.decoder.last_layer.weight)
            pair = torch.stack([gradients[last], self._gan_gradients[last]])
            scale = self._gan_scale(*(average_over_processes(pair) if self.loss.adaptive == "averaged" else pair))
            torch._foreach_add_(gradients, list(torch._foreach_mul(self._gan_gradients, scale)))
            self._gan_gradients = None
        average_gradients(gradients)
        norm = nn.utils.get_total_norm(gradients)
        optimizer = self._optimizers()[0]
        if self.check_finite(norm, parameters):
            self.log("train/grad_norm", norm)
        optimizer.step()  # with all gradients removed (a skipped step) it counts and changes nothing
        optimizer.zero_grad(set_to_none=True)
        self._advance(0)

    def _update_discriminator(self, discriminator: DinoDiscriminator) -> None:
        """Takes the discriminator's step on fresh reconstructions by the updated decoder."""
        for number, micro in enumerate(self._pending):
            with torch.no_grad():
                fake = quantize(self.decoder(micro.latents))
            # One power iteration a call in training; only the first micro-batch makes them, as one large batch would.
            training = number == 0
            fake_logits = self._judge(discriminator, fake, micro, "augment fake", training)
            real_logits = self._judge(discriminator, micro.images, micro, "augment real", training)
            loss = self.loss.discriminator(real_logits, fake_logits)
            (loss / len(self._pending)).backward()
            self.log("train/discriminator", loss.detach())
            self.log("train/logits_real", real_logits.detach().mean())
            self.log("train/logits_fake", fake_logits.detach().mean())
        parameters = [p for p in discriminator.parameters() if p.requires_grad]
        gradients = gradients_of(parameters)
        average_gradients(gradients)
        norm = nn.utils.get_total_norm(gradients)
        if self.check_finite(norm, parameters):
            self.log("train/discriminator_grad_norm", norm)
            # The bare optimiser: only the decoder's steps are to be counted.
            optimizer = self._optimizers(bare=True)[1]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._advance(1)

    # --- helpers -----------------------------------------------------------------------------------------------

    def _judge(
        self, discriminator: DinoDiscriminator, images: Tensor, micro: MicroBatch, purpose: str, training: bool
    ) -> Tensor:
        """Logits of augmented images."""
        if self.augment is not None:
            images = self.augment(images, self._seeds(purpose, micro))
        discriminator.train(training)
        return discriminator(images)

    def _seeds(self, purpose: str, micro: MicroBatch) -> list[int]:
        return sample_seeds(self.seed, purpose, micro.epochs, micro.indices)

    def _optimizers(self, bare: bool = False) -> list[Any]:
        """The optimisers; bare ones do not count their steps."""
        optimizers = self.optimizers(use_pl_optimizer=not bare)
        return optimizers if isinstance(optimizers, list) else [optimizers]

    def _advance(self, number: int) -> None:
        schedulers: Any = self.lr_schedulers()
        if schedulers is not None:
            (schedulers if isinstance(schedulers, list) else [schedulers])[number].step()

    def _decoder_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.decoder.parameters() if p.requires_grad]

    def _steps_per_epoch(self) -> int:
        return max(1, -(-int(self.trainer.num_training_batches) // self.accumulate))

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Keeps DistributedDataParallel from averaging: it is done here, when a step's gradients are complete."""
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
        count = len(images)
        error = (reconstructions.clamp(0, 1) - images).square().flatten(1).mean(1)
        self.log("val/l1", (reconstructions - images).abs().mean(), batch_size=count, sync_dist=True)
        self.log("val/psnr", (-10 * error.log10()).mean(), batch_size=count, sync_dist=True, prog_bar=True)


def gradients_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradients, all of which must be there."""
    gradients = [parameter.grad for parameter in parameters]
    assert all(gradient is not None for gradient in gradients)
    return gradients  # type: ignore[return-value]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_over_processes(values: Tensor) -> Tensor:
    """Averages numbers over all processes in place; returns them."""
    if _several():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def average_gradients(gradients: list[Tensor], most: int = 2**26) -> None:
    """Averages gradients over all processes in place.

    Args:
        gradients: Tensors of one device.
        most: Numbers that are copied into one message, unless one gradient alone has more; 64 M are 256 MB of float32.
    """
    if not _several():
        return
    groups: list[list[Tensor]] = []
    for gradient in gradients:
        group = groups[-1] if groups else []
        if group and gradient.dtype == group[0].dtype and sum(map(Tensor.numel, group)) + gradient.numel() <= most:
            group.append(gradient)
        else:
            groups.append([gradient])
    for group in groups:
        flat = average_over_processes(torch.cat([gradient.flatten() for gradient in group]))
        pieces = flat.split([gradient.numel() for gradient in group])
        torch._foreach_copy_(group, [piece.view_as(g) for piece, g in zip(pieces, group, strict=True)])
