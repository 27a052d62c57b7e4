"""Stage 1: trains the ViT decoder against L1, LPIPS and a DINO-feature discriminator (paper §3, appendix)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rae.autoencoder import RAE
from rae.data.transforms import to_float
from rae.discriminator import DiffAugment, DinoDiscriminator, quantize
from rae.latent import add_noise
from rae.loss import Stage1Loss, adaptive_weight
from rae.metric.functional import psnr
from rae.rng import normal, sample_seeds, uniform
from rae.training.module import Batch, OptimizerFactory, SchedulerFactory, TrainingModule


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

    Gradients are averaged over processes here, once per optimiser step, because the adaptive weight is a function of the
    averaged gradients. ``global_step`` counts decoder updates.

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
        compile: Whether the decoder is compiled.
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
        compile: bool = False,  # noqa: A002 (the option's name everywhere)
        on_nonfinite: Literal["stop", "skip"] = "stop",
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
        if compile:
            self.autoencoder.decoder.compile()

    @property
    def decoder(self) -> nn.Module:
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

    # --- one step ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Gradients of one micro-batch; after ``accumulate`` of them, the decoder's and the discriminator's update."""
        self.remember(batch)
        phases = self.loss.phases(self.trainer.global_step, self._steps_per_epoch)
        with self._no_sync():
            self._decoder_gradients(batch, phases)
            if (batch_idx + 1) % self.accumulate and batch_idx + 1 < self.trainer.num_training_batches:
                return
            self._update_decoder(phases)
            if phases.discriminator:
                self._update_discriminator()
        self.log_throughput(sum(len(micro.indices) for micro in self._pending))
        self._pending = []
