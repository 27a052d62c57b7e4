"""The original's training steps in plain PyTorch, written from its description: what our steps are compared with.

Stage 1 takes two extra gradient calls through LPIPS and discriminator for the adaptive weight, then goes backward through all of it
and encodes the images again for the discriminator's turn. Linear layers are PyTorch's own; attention is a product, a softmax and a
product; averages and AdamW go weight by weight, and the averages cover the frozen weights too. The draws (noise, times, labels,
augmentation) are those of our modules, whose networks and losses the steps take over, so that the results can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from rae.image import to_float
from rae.latent import add_noise
from rae.layers import Attention, RotaryEmbedding2D
from rae.rng import normal, sample_seeds, uniform
from rae.training.stage1 import Stage1Module
from rae.training.stage2 import Stage2Module

Batch = dict[str, Tensor]
plain_adamw = partial(torch.optim.AdamW, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.0, foreach=False, fused=False)
"""AdamW of the recipe, weight by weight."""


def attend(self: Attention, x: Tensor, rope: RotaryEmbedding2D | None = None) -> Tensor:
    """Our attention with its matrix of weights written out, B×N×D => B×N×D."""
    batch, count, width = x.shape
    qkv = self.qkv(x).reshape(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
    q, k, v = self.q_norm(qkv[0]), self.k_norm(qkv[1]), qkv[2]
    if rope is not None:
        q, k = rope(q), rope(k)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(width // self.heads)
    out = scores.softmax(-1) @ v
    return self.proj(out.transpose(1, 2).reshape(batch, count, width))


def make_plain(*networks: nn.Module) -> None:
    """Makes attention explicit, in our networks and in timm's."""
    for module in (module for network in networks for module in network.modules()):
        if isinstance(module, Attention):
            module.forward = partial(attend, module)
        elif hasattr(module, "fused_attn"):
            module.fused_attn = False  # timm's own explicit attention


class PlainAverage:
    """Average of all parameters of a network, the frozen ones too, one at a time."""

    def __init__(self, network: nn.Module, decay: float):
        self.network = network
        self.decay = decay
        self.averages = {name: value.detach().clone() for name, value in network.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        for name, value in self.network.named_parameters():
            self.averages[name].mul_(self.decay).add_(value, alpha=1 - self.decay)


class PlainStage1:
    """Stage-1 steps without accumulation.

    Args:
        module: Gives networks, losses, phases and seed; its networks are trained.
        decay: Of the averages, which are kept of encoder and decoder.
        optimizer: Makes the optimisers.
        scheduler: Makes their schedules; None for a constant rate.
    """

    def __init__(
        self,
        module: Stage1Module,
        decay: float = 0.9978,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = plain_adamw,
        scheduler: Callable | None = None,
    ):
        self.module = module
        self.encoder, self.decoder = module.autoencoder.encoder, module.autoencoder.decoder
        self.discriminator, self.loss, self.augment = module.discriminator, module.loss, module.augment
        make_plain(self.encoder, self.decoder, self.discriminator)
        if self.loss.perceptual is not None:
            self.loss.perceptual.to(memory_format=torch.contiguous_format)  # as weights come; ours are channels last
        networks = (self.decoder, self.discriminator.heads)
        self.optimizers = [optimizer(network.parameters()) for network in networks]
        self.schedulers = [scheduler(one) for one in self.optimizers] if scheduler else None
        self.average = PlainAverage(module.autoencoder, decay)
        self.taken = 0

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step of both networks; the losses."""

        def seeds(purpose: str) -> list[int]:
            return sample_seeds(self.module.seed, purpose, batch["epoch"].tolist(), batch["index"].tolist())

        phases = self.loss.phases(self.taken, 1)
        images = to_float(batch["image"])
        z = self.encoder(images)
        noise, level = normal(seeds("latent noise"), z.shape[1:]), uniform(seeds("latent noise level"))
        image = self.decoder(add_noise(z, self.module.noise_tau, level, noise))
        losses = {"l1": (image - images).abs().mean()}
        total = losses["l1"]
        if phases.perceptual:
            target = images.to(image)  # a float32 image would be rounded on its way into the network
            losses["lpips"] = self.loss.perceptual.network(image, target, normalize=True).mean()
            total = total + self.loss.perceptual_weight * losses["lpips"]
        if phases.gan:
            self.discriminator.eval()
            losses["gan"] = -self.discriminator(self.augment(image, seeds("augment generator"))).mean()
            weight = self.adaptive_weight(total, losses["gan"])
            total = total + self.loss.gan_weight * weight * losses["gan"]
            losses["adaptive_weight"] = weight
        self.zero_grad()
        total.backward()
        self.advance(0)
        if phases.discriminator:
            losses["discriminator"] = self.discriminator_step(images, seeds)
        self.average.update()
        self.taken += 1
        return {name: value.detach() for name, value in losses.items()}

    def adaptive_weight(self, reconstruction: Tensor, gan: Tensor) -> Tensor:
        """Quotient of the norms of both gradients of the last layer, each by a pass of its own."""
        last = self.decoder.last_layer.weight
        norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, gan)]
        return (norms[0] / (norms[1] + 1e-6)).clamp(0, self.loss.adaptive_maximum).detach()

    def discriminator_step(self, images: Tensor, seeds: Callable[[str], list[int]]) -> Tensor:
        """The discriminator's turn: the images encoded anew, reconstructed by the updated decoder."""
        with torch.no_grad():
            fake = self.decoder(self.encoder(images)).clamp(0, 1).mul(255).round().div(255)
        self.discriminator.train()
        fakes = self.discriminator(self.augment(fake, seeds("augment fake")))
        reals = self.discriminator(self.augment(images, seeds("augment real")))
        loss = 0.5 * (F.relu(1 - reals).mean() + F.relu(1 + fakes).mean())
        self.zero_grad()
        loss.backward()
        self.advance(1)
        return loss

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def advance(self, number: int) -> None:
        self.optimizers[number].step()
        if self.schedulers is not None:
            self.schedulers[number].step()


class PlainStage2:
    """Stage-2 steps of the published recipe: linear path, velocity; images are encoded in every step.

    Args:
        module: Gives networks, time distribution, shift, label dropout and seed; its denoiser is trained.
        decay: Of the averages, which are kept of the denoiser.
        optimizer: Makes the optimiser.
        clip: Largest norm of the gradient.
    """

    def __init__(
        self,
        module: Stage2Module,
        decay: float = 0.9995,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] = plain_adamw,
        clip: float = 1.0,
    ):
        self.module, self.clip = module, clip
        self.autoencoder, self.denoiser = module.autoencoder, module.denoiser
        make_plain(self.autoencoder.encoder, self.denoiser)
        self.optimizer = optimizer(self.denoiser.parameters())
        self.average = PlainAverage(self.denoiser, decay)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One step; the loss and the gradient's norm."""

        def seeds(purpose: str) -> list[int]:
            return sample_seeds(self.module.seed, f"train {purpose}", batch["epoch"].tolist(), batch["index"].tolist())

        with torch.no_grad():
            data = self.autoencoder.encode(to_float(batch["image"]))
        noise = normal(seeds("noise"), data.shape[1:])
        t = self.module.flow.sample_time(uniform(seeds("time")))
        dropped = uniform(seeds("label")) < self.module.label_dropout
        label = torch.where(dropped, self.denoiser.num_classes, batch["label"])
        at = t[:, None, None, None]
        prediction = self.denoiser((1 - at) * data + at * noise, t, label)
        loss = (prediction - (noise - data)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.clip)
        self.optimizer.step()
        self.average.update()
        return {"loss": loss.detach(), "grad_norm": norm}
