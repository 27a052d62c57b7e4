"""Stage 2: trains a diffusion transformer on the normalised latents of a frozen autoencoder (paper §4-5)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from rae.autoencoder import RAE
from rae.condition import drop
from rae.data.latents import LatentsDataModule
from rae.denoiser import Denoiser, check_shapes
from rae.encoder import Encoder
from rae.encoder.text import TextEncoder
from rae.flow import FlowMatching
from rae.image import to_float
from rae.io.tensors import state_hash
from rae.prompts import check_text_encoder
from rae.rng import normal, sample_seeds, to_device, uniform
from rae.training.alignment import Alignment
from rae.training.module import Batch, OnNonfinite, OptimizerFactory, SchedulerFactory, TrainingModule
from rae.training.strategy import shard
from rae.training.subsets import check_subsets, draw_subsets
from rae.training.teacher import Teacher

_NO_CLASS_TOKENS = (
    "data=latents holds no class tokens, which this denoiser learns beside the latents: choose data=imagenet, say"
)


class Stage2Module(TrainingModule):
    """Encodes a batch, computes the flow-matching loss and logs it.

    Every draw for a training sample (noise, time, label dropout) depends on the seed, the epoch and the sample's number, so
    two processes with batches of b train like one process with batches of 2b.

    Args:
        autoencoder: Frozen autoencoder; encodes the images, decodes previews and samples.
        denoiser: The network that is trained.
        flow: Path, prediction, time distribution and shift.
        optimizer: Creates the optimiser from the parameters.
        scheduler: Creates the schedule from the optimiser and ``steps_per_epoch``; None for a constant rate.
        text_encoder: Frozen; computes caption features for a text-conditioned denoiser. Not needed for batches with cached
            features.
        teacher: Trained denoiser that the flow learns from (optional for ``flow=mean_flow``, required for ``flow=cmt``).
        label_dropout: Fraction of labels (or other conditions) replaced by the null condition, in [0, 1); 0 rules out
            classifier-free guidance.
        layer_dropout: Probability p in [0, 1) of dropping each layer of the encoder from the denoiser's input; the target
            remains the whole fusion (FuseReg, arXiv 2609.31620). 0 drops none; validation never does.
        seed: Seed of every random draw.
        compile: Whether to compile the denoiser, or names of networks: ``denoiser``, ``encoder``.
        on_nonfinite: See :class:`~rae.training.module.TrainingModule`.
        config: See :class:`~rae.training.module.TrainingModule`.
        alignment: An additional loss on the tokens of one block (REPA); None for none.
    """

    frozen = ("autoencoder.", "text_encoder.", "teacher.", "alignment.encoder.")
    takes_latents = True
    takes_captions = True

    def __init__(
        self,
        autoencoder: RAE,
        denoiser: Denoiser,
        flow: FlowMatching,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        text_encoder: TextEncoder | None = None,
        teacher: Teacher | None = None,
        label_dropout: float = 0.1,
        layer_dropout: float = 0.0,
        seed: int = 42,
        compile: bool | Sequence[str] = False,
        on_nonfinite: OnNonfinite = "stop",
        config: dict[str, Any] | None = None,
        alignment: Alignment | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler, seed, on_nonfinite, config)
        if not 0.0 <= label_dropout < 1.0:
            raise ValueError(f"training.label_dropout={label_dropout} must lie in [0, 1)")
        check_shapes(autoencoder.latent_shape, denoiser)
        if denoiser.takes_class_token:
            if autoencoder.encoder is not None:
                autoencoder.encoder.check_class_token()
            autoencoder.latent.check_class_token()
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.denoiser = denoiser
        check_text_encoder(denoiser, text_encoder)
        self.text_encoder = None if text_encoder is None else text_encoder.requires_grad_(False)
        if flow.second_time and not denoiser.second_time:
            raise ValueError(
                f"{type(flow).__name__} trains average velocities, which need denoiser.second_time=true, not false"
            )
        if teacher is not None:
            teacher.check(denoiser)
            if not flow.second_time:
                raise ValueError(
                    f"{type(flow).__name__} learns from no teacher: teacher_checkpoint=null, or flow=mean_flow or cmt"
                )
        self.teacher = teacher
        self.flow = flow
        self.label_dropout = label_dropout
        self.layer_dropout = check_subsets(layer_dropout, autoencoder.encoder)
        if layer_dropout and not flow.takes_target:
            raise ValueError(
                f"training.layer_dropout={layer_dropout} needs a velocity towards the whole fusion, (x_t − z) / max(t, floor): "
                f"flow.prediction={flow.prediction} with flow.time_floor={flow.time_floor} has none; choose flow=raev2, or "
                "flow.prediction=velocity with flow.time_floor=0.05"
            )
        if layer_dropout and denoiser.takes_class_token:
            raise ValueError(
                f"training.layer_dropout={layer_dropout} leaves layers of the latents out, not of the class token that "
                f"{type(denoiser).__name__} learns: set it to 0"
            )
        self.alignment = alignment
        if alignment is not None:
            if flow.needs_teacher:
                raise ValueError(f"{type(flow).__name__} trains on no images, which alignment needs: alignment=null")
            alignment.watch(denoiser)
        self._sharded = False
        self.compile_networks(compile, {"denoiser": denoiser, "encoder": autoencoder.encoder})

    def networks(self) -> list[nn.Module]:
        """The denoiser, together with its alignment projector if any: one optimiser trains both."""
        return [self.denoiser if self.alignment is None else nn.ModuleList([self.denoiser, self.alignment])]

    def train(self, mode: bool = True) -> Stage2Module:
        """Sets the mode of the denoiser; the autoencoder always stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def setup(self, stage: str) -> None:
        """Raises ValueError for cached latents or latent statistics of another encoder, or a missing teacher."""
        super().setup(stage)
        if self.teacher is None and self.flow.needs_teacher:
            raise ValueError(f"{type(self.flow).__name__} needs teacher_checkpoint=…, a run of stage 2 or its export")
        data = getattr(self.trainer, "datamodule", None)
        encoder, described = self.autoencoder.encoder, self.autoencoder.latent.encoder
        if isinstance(data, LatentsDataModule):
            if self.denoiser.takes_class_token:
                raise ValueError(_NO_CLASS_TOKENS)
            data.check_encoder(encoder.differences)
            if self.layer_dropout:
                data.check_stacked(f"training.layer_dropout={self.layer_dropout}")
            if self.text_encoder is not None:
                data.check_text_encoder(self.text_encoder.check)
        if described is not None and (differing := encoder.differences(described)):
            raise ValueError(
                f"the latent statistics (latent.stats) are of another encoder: {differing}; compute them for this one with "
                "rae-stats"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the class names, if the data provide them, and the records of the other frozen networks."""
        super().on_save_checkpoint(checkpoint)
        checkpoint.update(self._records)
        names = getattr(getattr(self._trainer, "datamodule", None), "class_names", [])
        if len(names) == int(self.denoiser.num_classes):
            checkpoint["class_names"] = list(names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes over the run's encoder; raises ValueError if this module's, or another frozen network, differs."""
        super().on_load_checkpoint(checkpoint)
        if self.text_encoder is not None and "text_encoder" in checkpoint:
            self.text_encoder.check(checkpoint["text_encoder"], "the checkpoint")
        if self.teacher is not None and checkpoint.get("teacher") != self._records["teacher"]:
            raise ValueError(
                "the run was begun with another teacher: teacher_checkpoint holds other weights now; give those that it had"
            )
        described = checkpoint.get("alignment_encoder")  # missing in earlier versions
        if self._target is not None and described is not None and (found := self._target.differences(described)):
            raise ValueError(f"the run was begun with another alignment.encoder: {found}; give the one that it had")

    @property
    def _target(self) -> Encoder | None:
        """The encoder whose tokens the alignment compares with."""
        return None if self.alignment is None else self.alignment.encoder

    @cached_property
    def _records(self) -> dict[str, Any]:
        """Records of the other frozen networks, computed once: hashes read all weights, which never change in training."""
        records: dict[str, Any] = {}
        if self.text_encoder is not None:
            records["text_encoder"] = self.text_encoder.fingerprint()
        if self.teacher is not None:
            records["teacher"] = state_hash(self.teacher.state_dict())
        if self._target is not None:
            records["alignment_encoder"] = self._target.fingerprint()
        return records

    def configure_model(self) -> None:
        """Shards the denoiser if the strategy requires it (``trainer=fsdp``)."""
        mesh = getattr(self, "_device_mesh", None)
        if mesh is not None and not self._sharded:
            shard(self.denoiser, mesh["data_parallel"])
            if self.alignment is not None:
                shard(self.alignment.projector, mesh["data_parallel"])
            self._sharded = True

    def encode(self, batch: Batch) -> Tensor:
        """The denoiser's training target, from a batch of images or of cached latents (stacked layers included).

        Normalised latents B×C×h×w, see :meth:`rae.denoiser.Denoiser.join`.

        Raises:
            ValueError: The denoiser also learns the class token, and the batch holds cached latents.
        """
        if self.denoiser.takes_class_token:
            if "latent" in batch:
                raise ValueError(_NO_CLASS_TOKENS)
            return self.denoiser.join(*self.autoencoder.encode_with_class_token(to_float(batch["image"])))
        if "latent" in batch:
            cached = batch["latent"].float()
            whole = self.autoencoder.encoder.fused(cached) if cached.ndim == 5 else cached
            return self.autoencoder.normalize(whole)
        return self.autoencoder.encode(to_float(batch["image"]))

    def encode_subset(self, batch: Batch, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Normalised latents B×C×h×w from a random subset of the layers, and from all of them; one seed per sample."""
        encoder, normalize = self.autoencoder.encoder, self.autoencoder.normalize
        layers = batch["latent"].float() if "latent" in batch else encoder(to_float(batch["image"]), stacked=True)
        keep = draw_subsets(seeds, layers, self.layer_dropout)
        return normalize(encoder.fused(layers, keep)), normalize(encoder.fused(layers))

    def text_of(self, batch: Any) -> dict[str, Tensor]:
        """Features and mask of a batch's captions; empty if they are cached, or the denoiser is not text-conditioned.

        Raises:
            ValueError: There are neither captions nor features.
        """
        if "text" not in self.denoiser.condition.names or "text" in batch:
            return {}
        if "caption" not in batch:
            raise ValueError(
                "the denoiser is told a text, but the data hold no captions: add data.captions=…, or cached latents with text "
                "(rae-cache-latents text=true)"
            )
        if self.text_encoder is None:
            raise ValueError("the denoiser is told a text: add text_encoder=…, e.g. text_encoder=qwen3_0_6b")
        return self.text_encoder(batch["caption"])

    def losses(self, batch: Batch, purpose: str, label_dropout: float, subsets: bool = False) -> Tensor:
        """Flow-matching loss per sample, B, with each sample's own draws; ``subsets`` uses random subsets of the layers."""
        epochs, indices = batch["epoch"].tolist(), batch["index"].tolist()

        def seeds(what: str) -> list[int]:
            return sample_seeds(self.seed, f"{purpose} {what}", epochs, indices)

        latents, target = self.encode_subset(batch, seeds("layers")) if subsets else (self.encode(batch), None)
        noise = normal(seeds("noise"), latents.shape[1:], device=latents.device)
        t = to_device(self.flow.sample_time(uniform(seeds("time"), self.flow.draws)), latents.device)
        told = self.denoiser.condition
        conditions = {name: batch[name] for name in told.names if name in batch} | self.text_of(batch)
        if label_dropout:
            draws = uniform(seeds("label"), device=latents.device)
            conditions = drop(conditions, told.null(conditions), draws, label_dropout)
        options = {
            "base": self.denoiser.has_base or None,
            "teacher": self.teacher,
            "target": target,
            "value_weight": self.denoiser.loss_weight,
        }
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        loss = self.flow.loss(self.denoiser, latents, noise, t, **given, **conditions)
        if self.alignment is None or purpose != "train":
            return loss
        learnt = self.denoiser.split(latents if target is None else target)[0]
        aligned = self.alignment(self.aligned_to(batch, learnt))
        self.log("train/alignment", aligned.mean(), batch_size=len(aligned))
        return loss + aligned

    def aligned_to(self, batch: Batch, latents: Tensor) -> Tensor:
        """The alignment's target, B×C×h×w: the latents, or its own encoder's features of the images.

        Raises:
            ValueError: The alignment has an encoder, and the batch holds cached latents but no images.
        """
        if self._target is None:
            return latents
        if "image" not in batch:
            raise ValueError(
                "alignment.encoder needs images, and data=latents holds none: choose data=imagenet, say, or align with the "
                "latents themselves (alignment.encoder=null)"
            )
        return self._target(to_float(batch["image"]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss of the batch."""
        loss = self.losses(batch, "train", self.label_dropout, subsets=self.layer_dropout > 0).mean()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["epoch"]))
        return self.share_of_step(loss, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss on held-out images, with the same noise and times in every validation."""
        loss = self.losses(batch, "validate", label_dropout=0.0)
        self.log_validation("loss", loss.mean(), batch, prog_bar=True)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Raises ValueError for labels outside the denoiser's classes while they are still in host memory."""
        if "label" not in self.denoiser.condition.names:
            return batch
        labels, classes = batch["label"], int(self.denoiser.num_classes)
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(
                f"labels must lie in [0, {classes - 1}] (denoiser.num_classes={classes}), got {wrong[:8].tolist()}; "
                "set data.num_classes to the data set's number of classes"
            )
        return batch
