"""How far rules move a score: the demo's model, scored in features of the demo's judge, one rule changed at a time.

Run with ``python tests/benchmarks/rules.py demo/stage2`` after ``make demo``; the table is in docs/results.md.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from table import markdown
from torch import Tensor

import rae
from rae.data.digits import DigitsDataset
from rae.demo.scores import DigitsScores
from rae.image import to_uint8
from rae.metric import CallableDetector, GenerationMetrics, ReferenceBuilder
from rae.rng import sample_seed

COUNT = 600


def judge() -> CallableDetector:
    """Hidden activations and class probabilities of a classifier that saw real digits alone."""
    scores = DigitsScores()
    first, second = (torch.from_numpy(np.asarray(one)).float() for one in scores.judge.coefs_)
    bias, last = (torch.from_numpy(np.asarray(one)).float() for one in scores.judge.intercepts_)

    def function(images: Tensor) -> tuple[Tensor, Tensor]:
        small = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
        hidden = (small @ first + bias).relu()
        return hidden, (hidden @ second + last).softmax(1)

    return CallableDetector(function, len(bias), "judge", classes=10)


def main(checkpoint: str) -> None:
    """Prints the table."""
    model, detector = rae.load(checkpoint), judge()
    references = {}
    for split in ("train", "held_out"):
        images = DigitsDataset(split, 32).images
        builder = ReferenceBuilder(detector, "training", total=len(images), kept=0)
        builder.update(images)
        references[split] = builder.compute()
    balanced = [number * 10 // COUNT for number in range(COUNT)]
    random = [sample_seed(0, "label", number) % 10 for number in range(COUNT)]

    def drawn(labels: list[int], precision: str = "32-true") -> Tensor:
        images = []
        for start in range(0, len(labels), 200):
            numbers = range(start, min(start + 200, len(labels)))
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                made = model([labels[number] for number in numbers], 0, numbers, progress=False)
            images.append(made.float())
        return torch.cat(images)

    def scored(images: Tensor, split: str = "train", rule: str = "floor", **options: str) -> tuple[str, str]:
        size = len(images) // 10
        metric = GenerationMetrics(detector, references[split], ["fid", "inception_score"], split_size=size, **options)
        metric.update(to_uint8(images, rule), index=torch.arange(len(images)))
        found = metric.compute()
        return f"{found['fd_judge']:.4f}", f"{found['inception_score_judge']:.3f}"

    images = drawn(balanced)
    rows = [
        ("balanced labels, floor, training reference, ordered splits, float32", *scored(images)),
        ("bytes rounded", *scored(images, rule="round")),
        ("random labels", *scored(drawn(random))),
        ("Inception Score over permuted splits", *scored(images, protocol="raev2")),
        ("reference of the held-out digits", *scored(images, "held_out")),
        (f"{COUNT // 4} samples instead of {COUNT}", *scored(images[::4])),
        ("networks in bf16-mixed", *scored(drawn(balanced, "bf16-mixed"))),
    ]
    print(markdown(("rules", "Fréchet distance", "Inception Score"), rows))


if __name__ == "__main__":
    main(sys.argv[1])
