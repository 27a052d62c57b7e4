"""Speed and memory on a GPU in one call: training, sampling and decoding, each beside the plain procedure, and the ceiling.

Run with ``python tests/benchmarks/gpu.py [--json FILE] [--match TEXT]``; with ``--device cpu --tiny`` the same code runs on small
networks. MFU is the share of the ceiling, the speed of a large matrix product measured first; FLOPs are counted in a real step.
Weights are random. A batch that does not fit is halved. Both sides' results are compared in float32 before anything is timed.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from gpu_parts import Clock, Device, Operations, overrides
from omegaconf import DictConfig
from side_by_side import versions
from table import markdown
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rae import rng
from rae.autoencoder import RAE
from rae.cli.build import build_autoencoder, build_module, make
from rae.cli.config import compose
from rae.data import SyntheticDataModule
from rae.flow import AutoGuidance, ClassifierFreeGuidance, EulerSampler, NoGuidance, OfficialGrid
from rae.generator import Generator
from rae.training.ema import EMA
from rae.weights import write_json
from tests import plain_procedure
from tests.plain_sampling import PlainDiTDH, plain_sample

HEAD = ("what", "precision", "variant", "batch", "images/s", "MFU", "memory", "plain, images/s", "ratio")
GUIDANCE = {"none": (1.0, (0.0, 1.0)), "cfg": (1.5, (0.0, 0.85)), "autoguidance": (1.42, (0.0, 1.0))}


@cache
def _config(overrides: tuple[str, ...]) -> DictConfig:
    return compose("train", overrides)


def config(overrides: list[str]) -> DictConfig:
    """The configuration of some overrides."""
    return _config(tuple(overrides))


class Bench(Device):
    """The rows found so far, and what finds them.

    Args:
        kind: ``cuda`` or ``cpu``.
        tiny: Small networks and few steps.
        match: Only rows whose name holds this text.
        file: Where the figures go, after every row; None for nowhere.
    """

    def __init__(self, kind: str, tiny: bool, match: str, file: Path | None = None) -> None:
        super().__init__(kind, tiny)
        self.match = match
        self.file = file
        self.rows: list[dict[str, Any]] = []
        # The plain procedure's draws are to be on the device, as our modules' are.
        plain_procedure.normal = partial(rng.normal, device=self.device)
        plain_procedure.uniform = lambda *arguments: rng.uniform(*arguments).to(self.device)

    def fitting(self, batch: int, run: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """What ``run`` finds with the largest batch that fits."""
        while True:
            try:
                self.forget()
                return run(batch) | {"batch": batch}
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                batch //= 2

    def add(self, name: str, precision: str, variant: str, found: dict[str, Any], plain: float | None) -> None:
        """Keeps and prints a row."""
        row = {"name": name, "precision": precision, "variant": variant, **found, "plain_images_per_s": plain}
        row["mfu"] = found["flops_per_image"] * found["images_per_s"] / self.ceiling(precision)
        row["ratio"] = None if plain is None else found["images_per_s"] / plain
        self.rows.append(row)
        print(f"| {' | '.join(cells(row))} |", flush=True)
        if self.file is not None:
            ceilings = {precision: value / 1e12 for precision, value in self.ceilings.items()}
            write_json(self.file, {**versions(), "ceilings_tflops": ceilings, "gpu": self.rows})

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, name: str, overrides: list[str], batch: int, average: tuple[str, float], peer: type) -> None:
        """Rows of one network's training: bf16 and tf32, compiled and not, beside the plain procedure."""
        if self.match not in name:
            return
        self.agree_on_training(overrides, average, peer)
        for precision in ("bf16", "tf32"):
            plain = self.fitting(batch, partial(self.plain_steps, overrides, peer, precision))
            flops = None
            for compiled in (False, True):
                found = self.fitting(batch, partial(self.steps, overrides, average, precision, compiled))
                flops = found["flops_per_image"] = found["flops_per_image"] or flops
                self.add(name, precision, "compiled" if compiled else "eager", found, plain["images_per_s"])

    def module(self, overrides: list[str]) -> L.LightningModule:
        """The training module of a configuration, the same weights at every call."""
        torch.manual_seed(0)
        return build_module(config(overrides))

    def batch(self, overrides: list[str], size: int) -> dict[str, Tensor]:
        """A batch of random images."""
        cfg = config(overrides)
        data = SyntheticDataModule(size, image_size=cfg.image_size, train_images=size, val_images=0)
        return next(iter(data.train_dataloader()))

    def steps(
        self, overrides: list[str], average: tuple[str, float], precision: str, compiled: bool, batch: int
    ) -> dict[str, Any]:
        """Images per second of our training, by Lightning's loop with the average of the weights."""
        module = self.module([*overrides, f"training.compile={str(compiled).lower()}"])
        clock = Clock(self, count=not compiled)
        self.fit(module, self.batch(overrides, batch), clock.total, precision, [EMA(average[1], average[0]), clock])
        flops = clock.flops / batch if clock.flops else None
        return {"images_per_s": batch / clock.seconds, "memory_gb": self.memory(), "flops_per_image": flops}

    def fit(
        self,
        module: L.LightningModule,
        batch: dict[str, Tensor],
        steps: int,
        precision: str,
        callbacks: list[L.Callback],
    ) -> dict[str, Tensor]:
        """Trains on one batch over and over; what was logged last."""
        self.autocast(precision)
        trainer = L.Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if precision == "bf16" else "32-true",
            max_steps=steps,
            gradient_clip_val=1.0 if module.automatic_optimization else None,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
        return dict(trainer.callback_metrics)

    def agree_on_training(self, overrides: list[str], average: tuple[str, float], peer: type) -> None:
        """Compares the losses of the second step in float32, with which the first update has agreed too.

        Raises:
            AssertionError: They differ.
        """
        batch = self.batch(overrides, 2)
        plain = peer(self.module(overrides).to(self.device))
        with self.autocast("fp32"):
            expected = [plain.step({key: value.to(self.device) for key, value in batch.items()}) for _ in range(2)][-1]
        ours = self.fit(self.module(overrides), batch, 2, "fp32", [EMA(average[1], average[0])])
        shared = [name for name in expected if f"train/{name}" in ours]
        assert shared, f"nothing to compare in {sorted(ours)} and {sorted(expected)}"
        for name in shared:
            there = expected[name].to(ours[f"train/{name}"])
            torch.testing.assert_close(ours[f"train/{name}"], there, rtol=2e-2, atol=1e-4)

    def plain_steps(self, overrides: list[str], peer: type, precision: str, batch: int) -> dict[str, Any]:
        """Images per second of the plain procedure."""
        procedure = peer(self.module(overrides).to(self.device))
        given = {key: value.to(self.device) for key, value in self.batch(overrides, batch).items()}

        def step() -> None:
            with self.autocast(precision):
                procedure.step(given)

        return {"images_per_s": batch / self.median(step, 8), "memory_gb": self.memory()}

    # --- sampling and decoding -----------------------------------------------------------------------------------

    def generator(self, overrides: list[str], guide: list[str], method: str, points: int) -> Generator:
        """A generator of random weights; modulations that begin at zero are drawn."""
        torch.manual_seed(0)
        cfg = config(overrides)
        denoiser = make(cfg.denoiser)
        weak = make(config(guide).denoiser) if method == "autoguidance" else None
        for network in (denoiser, weak):
            for parameter in network.parameters() if network is not None else ():
                nn.init.normal_(parameter, std=0.02)
        scale, interval = GUIDANCE[method]
        rules = {"none": NoGuidance, "cfg": ClassifierFreeGuidance, "autoguidance": AutoGuidance}
        rule = rules[method]() if method == "none" else rules[method](scale, interval)
        autoencoder = build_autoencoder(cfg, encode=False)
        made = Generator(autoencoder, denoiser, make(cfg.flow), EulerSampler(OfficialGrid(points)), rule, weak)
        return made.to(self.device).eval()

    def plain_sampling(self, generator: Generator, method: str, labels: Tensor) -> Callable[[], Tensor]:
        """The plain procedure with the weights and the noise of a generator, decoded."""
        times = generator.sampler.grid.times(generator.flow.shift).tolist()
        model = PlainDiTDH(generator.denoiser)
        guide = None if generator.guide is None else PlainDiTDH(generator.guide)
        noise = generator.noise(0, range(len(labels)))
        scale, interval = GUIDANCE[method]
        return lambda: plain_sample(model, noise, labels, times, method, scale, interval, guide)

    def sample(self, overrides: list[str], guide: list[str], batches: tuple[int, ...], points: int) -> None:
        """Rows of sampling latents in bf16: each guidance, each batch, compiled and not."""
        name = f"sampling, {points} points"
        for method in GUIDANCE:
            title = f"{name}, {method}"
            if self.match not in title:
                continue
            self.agree_on_sampling(overrides, guide, method)
            for batch in batches:
                plain = None
                for variant in ("eager", "compiled", "CUDA graphs"):
                    self.forget()
                    generator = self.generator(overrides, guide, method, points)
                    labels = torch.arange(batch, device=self.device) % 1000
                    with self.autocast("bf16"):
                        if plain is None:
                            plain = batch / self.median(self.plain_sampling(generator, method, labels), 2)
                            with Operations() as counter:
                                generator.latents(labels)
                        self.forget()
                        if variant != "eager":
                            generator.compile(mode="reduce-overhead" if variant == "CUDA graphs" else None)
                        speed = batch / self.median(partial(generator.latents, labels))
                    found = {"images_per_s": speed, "memory_gb": self.memory(), "batch": batch}
                    found["flops_per_image"] = counter.flops / batch
                    self.add(title, "bf16", variant, found, plain)

    def agree_on_sampling(self, overrides: list[str], guide: list[str], method: str) -> None:
        """Compares latents in float32, few steps.

        Raises:
            AssertionError: They differ.
        """
        generator = self.generator(overrides, guide, method, points=4)
        labels = torch.tensor([1, 7], device=self.device)
        with self.autocast("fp32"):
            ours, plain = generator.latents(labels), self.plain_sampling(generator, method, labels)()
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)

    def decode(self, overrides: list[str], batches: tuple[int, ...]) -> None:
        """Rows of decoding in bf16, beside the same decoder with attention spelt out."""
        if self.match not in "decoding":
            return
        torch.manual_seed(0)
        model = build_autoencoder(config(overrides), encode=False).to(self.device).eval()
        for batch in batches:
            latents = torch.randn(batch, *model.latent_shape, device=self.device)
            with torch.inference_mode(), Operations() as counter:
                model.decode(latents)
            work = partial(decoded, model, latents)
            plain = None
            for variant in ("eager", "compiled"):
                self.forget()
                with self.autocast("bf16"):
                    if plain is None:
                        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                            plain = batch / self.median(work)
                        self.forget()
                    else:
                        model.decoder.compile(dynamic=False)
                    speed = batch / self.median(work)
                found = {"images_per_s": speed, "memory_gb": self.memory(), "batch": batch}
                found["flops_per_image"] = counter.flops / batch
                self.add("decoding", "bf16", variant, found, plain)
            model.decoder._compiled_call_impl = None


@torch.inference_mode()
def decoded(model: RAE, latents: Tensor) -> Tensor:
    """Images of latents."""
    return model.decode(latents)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    memory, plain, ratio = row["memory_gb"], row["plain_images_per_s"], row["ratio"]
    return (
        row["name"],
        row["precision"],
        row["variant"],
        str(row["batch"]),
        f"{row['images_per_s']:.1f}",
        f"{row['mfu']:.0%}",
        "" if memory is None else f"{memory:.1f} GB",
        "" if plain is None else f"{plain:.1f}",
        "" if ratio is None else f"× {ratio:.2f}",
    )


def main() -> None:
    """Measures everything and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--tiny", action="store_true", help="small networks and few steps: the same code on any machine"
    )
    parser.add_argument("--match", default="", help="only rows whose name holds this text")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny runs the same code with small networks")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.tiny:
        torch.compile = partial(torch.compile, backend="eager")  # graphs as they are: no minutes of compilation
    bench = Bench(options.device, options.tiny, options.match, options.json)
    print(markdown(HEAD, []), flush=True)
    stage1 = overrides("imagenet256_dinov2_b_vit_xl", 1, options.tiny)
    stage2 = {size: overrides(f"imagenet256_dit_dh_{size}", 2, options.tiny) for size in ("s", "b", "xl")}
    for size, batch in (("s", 256), ("b", 128), ("xl", 64)):
        batch = 2 if options.tiny else batch
        bench.train(
            f"training DiT-DH-{size.upper()}", stage2[size], batch, ("denoiser", 0.9995), plain_procedure.PlainStage2
        )
    average = ("autoencoder.decoder", 0.9978)
    bench.train("training ViT-XL", stage1, 2 if options.tiny else 32, average, plain_procedure.PlainStage1)
    batches = (1, 2) if options.tiny else (1, 8, 64)
    bench.sample(stage2["xl"], stage2["s"], batches, 4 if options.tiny else 50)
    bench.decode(stage2["xl"], batches)
    said = ", ".join(f"{value / 1e12:.1f} TFLOP/s in {precision}" for precision, value in bench.ceilings.items())
    where = versions()
    print(f"\nMatrix products: {said}. {where['device']}, PyTorch {where['torch']}, {where['date']}.")


if __name__ == "__main__":
    main()
