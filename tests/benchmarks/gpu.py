"""Speed and memory on a GPU in one call: training, sampling and decoding, each beside the plain procedure, and the ceiling.

Run with ``python tests/benchmarks/gpu.py [--json FILE] [--match TEXT] [--minutes M]``; with ``--device cpu --tiny`` the same code
runs on small networks. Rows come in order of value, and none is begun once the minutes are over. MFU is the share of the ceiling,
the speed of a large matrix product measured first; FLOPs are counted in a real step. Weights are random. A batch that does not fit
is halved. Both sides' results are compared in float32 before anything is timed.

Of training, a row also tells how often a step makes the host wait for the GPU, and how long writing a checkpoint takes.
"""

from __future__ import annotations

import argparse
import logging
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
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
from rae.cli.errors import compose
from rae.data import SyntheticDataModule
from rae.flow import AutoGuidance, ClassifierFreeGuidance, EulerSampler, NoGuidance, PublishedGrid
from rae.generator import Generator
from rae.io.files import write_json
from rae.training.checkpoint_io import StreamedCheckpointIO
from rae.training.ema import EMA
from tests.helpers import plain_procedure
from tests.helpers.plain_sampling import PlainDiTDH, plain_sample

HEAD = (
    *("what", "precision", "variant", "batch", "images/s", "MFU", "memory", "plain, images/s", "ratio"),
    *("waits per step", "checkpoint"),
)
VARIANTS = {"eager": None, "compiled": None, "CUDA graphs": "reduce-overhead"}
"""How networks are run, and the mode of ``torch.compile``."""
GUIDANCE = {"none": (1.0, (0.0, 1.0)), "cfg": (1.5, (0.0, 0.85)), "autoguidance": (1.42, (0.0, 1.0))}


@dataclass(frozen=True)
class Network:
    """A network whose training is timed."""

    name: str
    overrides: tuple[str, ...]
    batch: int
    average: tuple[str, float]
    """The averaged network's name within the module, and the decay."""
    peer: type
    """The plain procedure."""


@cache
def config(overrides: tuple[str, ...]) -> DictConfig:
    """The configuration of some overrides."""
    return compose("train", overrides)


class Bench(Device):
    """The rows found so far, and what finds them.

    Args:
        kind: ``cuda`` or ``cpu``.
        tiny: Small networks and few steps.
        file: Where the figures go, after every row; None for nowhere.
    """

    def __init__(self, kind: str, tiny: bool, file: Path | None = None) -> None:
        super().__init__(kind, tiny)
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.agreed: set[str] = set()
        self.plain: dict[tuple[Any, ...], float] = {}
        """Images per second of the plain procedures."""
        self.flops: dict[tuple[Any, ...], float] = {}
        """FLOPs per image, counted where nothing is compiled."""
        self.points = 4 if tiny else 50
        self.xl, self.s = (tuple(overrides(f"imagenet256_dit_dh_{size}", 2, tiny)) for size in ("xl", "s"))
        # The plain procedure's draws are to be on the device, as our modules' are.
        plain_procedure.normal = partial(rng.normal, device=self.device)
        plain_procedure.uniform = lambda *arguments: rng.uniform(*arguments).to(self.device)

    def order(self) -> list[tuple[str, Callable[[], None]]]:
        """All rows by name, the most valuable first."""
        networks = {}
        for size, batch in (("S", 256), ("B", 128), ("XL", 64)):
            given = tuple(overrides(f"imagenet256_dit_dh_{size.lower()}", 2, self.tiny))
            name, batch = f"training DiT-DH-{size}", 2 if self.tiny else batch
            networks[size] = Network(name, given, batch, ("denoiser", 0.9995), plain_procedure.PlainStage2)
        given = tuple(overrides("imagenet256_dinov2_b_vit_xl", 1, self.tiny))
        average = ("autoencoder.decoder", 0.9978)
        networks["ViT"] = Network(
            "training ViT-XL", given, 2 if self.tiny else 32, average, plain_procedure.PlainStage1
        )
        rows: list[tuple[str, Callable[[], None]]] = []

        def train(sizes: Sequence[str], precision: str, variant: str) -> None:
            for size in sizes:
                rows.append((networks[size].name, partial(self.train, networks[size], precision, variant)))

        def sample(methods: Sequence[str], variants: Sequence[str]) -> None:
            for method, variant, batch in product(methods, variants, (1, 2) if self.tiny else (8, 64, 1)):
                name = f"sampling, {self.points} points, {method}"
                rows.append((name, partial(self.sample, name, method, variant, batch)))

        def decode(variant: str) -> None:
            for batch in (1, 2) if self.tiny else (8, 64, 1):
                rows.append(("decoding", partial(self.decode, variant, batch)))

        train(("XL", "ViT"), "bf16", "eager")
        sample(("cfg",), ("eager",))
        decode("eager")
        train(("S",), "bf16", "eager")
        train(("XL", "ViT", "S"), "tf32", "eager")
        train(("XL", "ViT", "S"), "bf16", "compiled")
        sample(("cfg",), ("compiled", "CUDA graphs"))
        decode("compiled")
        sample(("none", "autoguidance"), VARIANTS)
        for precision, variant in product(("bf16", "tf32"), ("eager", "compiled")):
            train(("B",), precision, variant)
        train(("XL", "ViT", "S"), "tf32", "compiled")
        return rows

    def run(self, rows: Sequence[tuple[str, Callable[[], None]]], seconds: float) -> None:
        """Finds rows until the time is over; one that fails leaves the others.

        Args:
            rows: From :meth:`order`.
            seconds: None is begun later.
        """
        begin = time.monotonic()
        for number, (name, row) in enumerate(rows):
            if time.monotonic() - begin > seconds:
                print(f"The time is over; {len(rows) - number} rows are left out, from {name!r} on.", flush=True)
                return
            try:
                row()
            except torch.OutOfMemoryError:
                print(f"| {name} | out of memory |", flush=True)

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

    def add(self, name: str, precision: str, variant: str, found: dict[str, Any], plain: float) -> None:
        """Keeps and prints a row."""
        row = {"name": name, "precision": precision, "variant": variant, **found, "plain_images_per_s": plain}
        row["mfu"] = found["flops_per_image"] * found["images_per_s"] / self.ceiling(precision)
        row["ratio"] = found["images_per_s"] / plain
        self.rows.append(row)
        print(f"| {' | '.join(cells(row))} |", flush=True)
        if self.file is not None:
            ceilings = {precision: value / 1e12 for precision, value in self.ceilings.items()}
            write_json(self.file, {**versions(), "ceilings_tflops": ceilings, "gpu": self.rows})

    # --- training ------------------------------------------------------------------------------------------------

    def train(self, network: Network, precision: str, variant: str) -> None:
        """The row of one network's training, beside the plain procedure."""
        key = (network.name, precision)
        if network.name not in self.agreed:
            self.forget()
            self.agree_on_training(network)
            self.agreed.add(network.name)
        if key not in self.plain:
            found = self.fitting(network.batch, partial(self.plain_steps, network, precision))
            self.plain[key] = found["images_per_s"]
        found = self.fitting(network.batch, partial(self.steps, network, precision, variant))
        self.flops[key] = found["flops_per_image"] = found["flops_per_image"] or self.flops[key]
        self.add(network.name, precision, variant, found, self.plain[key])

    def module(self, overrides: tuple[str, ...]) -> L.LightningModule:
        """The training module of a configuration on the device, the same weights at every call."""
        torch.manual_seed(0)
        with self.device:
            return build_module(config(overrides))

    def batch(self, overrides: tuple[str, ...], size: int) -> dict[str, Tensor]:
        """A batch of random images."""
        cfg = config(overrides)
        data = SyntheticDataModule(size, image_size=cfg.image_size, train_images=size, val_images=0)
        return next(iter(data.train_dataloader()))

    def steps(self, network: Network, precision: str, variant: str, batch: int) -> dict[str, Any]:
        """Images per second of our training, by Lightning's loop with the average of the weights."""
        compiled = variant == "compiled"
        module = self.module((*network.overrides, f"training.compile={str(compiled).lower()}"))
        clock, average = Clock(self, count=not compiled), EMA(network.average[1], network.average[0])
        trainer = self.fit(module, self.batch(network.overrides, batch), clock.total, precision, [average, clock])
        found = {"images_per_s": batch / clock.seconds, "memory_gb": self.memory(), "waits_per_step": clock.waits}
        if (precision, variant) == ("bf16", "eager"):
            found |= self.write(trainer)
        return found | {"flops_per_image": clock.flops / batch if clock.flops else None}

    def write(self, trainer: L.Trainer) -> dict[str, float]:
        """Seconds and gigabytes of a checkpoint of all that is trained."""
        trainer.strategy.checkpoint_io = StreamedCheckpointIO()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "run.ckpt"
            begin = time.perf_counter()
            trainer.save_checkpoint(file)
            return {"checkpoint_s": time.perf_counter() - begin, "checkpoint_gb": file.stat().st_size / 1e9}

    def fit(
        self,
        module: L.LightningModule,
        batch: dict[str, Tensor],
        steps: int,
        precision: str,
        callbacks: list[L.Callback],
    ) -> L.Trainer:
        """Trains on one batch over and over."""
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
        return trainer

    def agree_on_training(self, network: Network) -> None:
        """Compares the losses of the second step in float32, with which the first update has agreed too.

        Raises:
            AssertionError: They differ.
        """
        batch = self.batch(network.overrides, 2)
        plain = network.peer(self.module(network.overrides))
        with self.autocast("fp32"):
            expected = [plain.step({key: value.to(self.device) for key, value in batch.items()}) for _ in range(2)][-1]
        average = EMA(network.average[1], network.average[0])
        ours = self.fit(self.module(network.overrides), batch, 2, "fp32", [average]).callback_metrics
        shared = [name for name in expected if f"train/{name}" in ours]
        assert shared, f"nothing to compare in {sorted(ours)} and {sorted(expected)}"
        for name in shared:
            there = expected[name].to(ours[f"train/{name}"])
            torch.testing.assert_close(ours[f"train/{name}"], there, rtol=2e-2, atol=1e-4)

    def plain_steps(self, network: Network, precision: str, batch: int) -> dict[str, Any]:
        """Images per second of the plain procedure."""
        procedure = network.peer(self.module(network.overrides))
        given = {key: value.to(self.device) for key, value in self.batch(network.overrides, batch).items()}

        def step() -> None:
            with self.autocast(precision):
                procedure.step(given)

        return {"images_per_s": batch / self.median(step, 8), "memory_gb": self.memory()}

    # --- sampling and decoding -----------------------------------------------------------------------------------

    def generator(self, method: str, points: int) -> Generator:
        """A generator of random weights; modulations that begin at zero are drawn."""
        torch.manual_seed(0)
        cfg = config(self.xl)
        with self.device:
            denoiser = make(cfg.denoiser)
            weak = make(config(self.s).denoiser) if method == "autoguidance" else None
            for network in (denoiser, weak):
                for parameter in network.parameters() if network is not None else ():
                    nn.init.normal_(parameter, std=0.02)
            autoencoder = build_autoencoder(cfg, encode=False)
        scale, interval = GUIDANCE[method]
        rules = {"none": NoGuidance, "cfg": ClassifierFreeGuidance, "autoguidance": AutoGuidance}
        rule = rules[method]() if method == "none" else rules[method](scale, interval)
        made = Generator(autoencoder, denoiser, make(cfg.flow), EulerSampler(PublishedGrid(points)), rule, weak)
        return made.to(self.device).eval()

    def plain_sampling(self, generator: Generator, method: str, labels: Tensor) -> Callable[[], Tensor]:
        """The plain procedure with the weights and the noise of a generator, decoded."""
        times = generator.sampler.grid.times(generator.flow.shift).tolist()
        model = PlainDiTDH(generator.denoiser)
        guide = None if generator.guide is None else PlainDiTDH(generator.guide)
        noise = generator.noise(0, range(len(labels)))
        scale, interval = GUIDANCE[method]
        return lambda: plain_sample(model, noise, labels, times, method, scale, interval, guide)

    def sample(self, name: str, method: str, variant: str, batch: int) -> None:
        """The row of sampling latents in bf16 with one guidance and batch."""
        if name not in self.agreed:
            self.forget()
            self.agree_on_sampling(method)
            self.agreed.add(name)
        self.forget()
        key, labels = (name, batch), torch.arange(batch, device=self.device) % 1000
        generator = self.generator(method, self.points)
        with self.autocast("bf16"):
            if key not in self.plain:
                self.plain[key] = batch / self.median(self.plain_sampling(generator, method, labels), 2)
                with Operations() as counter:
                    generator.latents(labels)
                self.flops[key] = counter.flops / batch
            self.forget()
            if variant != "eager":
                generator.compile(mode=VARIANTS[variant])
            speed = batch / self.median(partial(generator.latents, labels))
        found = {"images_per_s": speed, "memory_gb": self.memory(), "batch": batch, "flops_per_image": self.flops[key]}
        self.add(name, "bf16", variant, found, self.plain[key])

    def agree_on_sampling(self, method: str) -> None:
        """Compares latents in float32, few steps.

        Raises:
            AssertionError: They differ.
        """
        generator = self.generator(method, points=4)
        labels = torch.tensor([1, 7], device=self.device)
        with self.autocast("fp32"):
            ours, plain = generator.latents(labels), self.plain_sampling(generator, method, labels)()
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4)

    def decode(self, variant: str, batch: int) -> None:
        """The row of decoding in bf16, beside the same decoder with attention spelt out."""
        self.forget()
        torch.manual_seed(0)
        with self.device:
            model = build_autoencoder(config(self.xl), encode=False).to(self.device).eval()
        latents = torch.randn(batch, *model.latent_shape, device=self.device)
        work, key = partial(decoded, model, latents), ("decoding", batch)
        if key not in self.flops:
            with torch.no_grad(), Operations() as counter:
                model.decode(latents)
            self.flops[key] = counter.flops / batch
        with self.autocast("bf16"):
            if key not in self.plain:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    self.plain[key] = batch / self.median(work)
            self.forget()
            if variant == "compiled":
                model.decoder.compile(dynamic=False)
            speed = batch / self.median(work)
        found = {"images_per_s": speed, "memory_gb": self.memory(), "batch": batch, "flops_per_image": self.flops[key]}
        self.add("decoding", "bf16", variant, found, self.plain[key])


@torch.inference_mode()
def decoded(model: RAE, latents: Tensor) -> Tensor:
    """Images of latents."""
    return model.decode(latents)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    memory, waits, seconds = (row.get(name) for name in ("memory_gb", "waits_per_step", "checkpoint_s"))
    return (
        row["name"],
        row["precision"],
        row["variant"],
        str(row["batch"]),
        f"{row['images_per_s']:.1f}",
        f"{row['mfu']:.0%}",
        "" if memory is None else f"{memory:.1f} GB",
        f"{row['plain_images_per_s']:.1f}",
        f"× {row['ratio']:.2f}",
        "" if waits is None else f"{waits:g}",
        "" if seconds is None else f"{seconds:.1f} s, {row['checkpoint_gb']:.1f} GB",
    )


def main() -> None:
    """Measures everything and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--tiny", action="store_true", help="small networks and few steps: the same code on any machine"
    )
    parser.add_argument("--match", default="", help="only rows whose name holds this text")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no row is begun after them")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --tiny runs the same code with small networks")
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.tiny:
        torch.compile = partial(torch.compile, backend="eager")  # graphs as they are: no minutes of compilation
    bench = Bench(options.device, options.tiny, options.json)
    print(markdown(HEAD, []), flush=True)
    bench.run([row for row in bench.order() if options.match in row[0]], 60 * options.minutes)
    said = ", ".join(f"{value / 1e12:.1f} TFLOP/s in {precision}" for precision, value in bench.ceilings.items())
    where = versions()
    print(f"\nMatrix products: {said}. {where['device']}, PyTorch {where['torch']}, {where['date']}.")


if __name__ == "__main__":
    main()
