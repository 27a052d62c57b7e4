"""Values that make no sense, on every key of every command: each is answered in one line that names the key, or means something.

``python -m tests.attacks.overrides [--draws 1000] [--seed 0] [--show]`` prints what fell and a table of counts, and
ends with 1 where anything fell.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib
import os
import random
import re
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rae.cli import main as door
from rae.cli.errors import compose
from tests.helpers.small_images import ENCODER, write_images
from tests.training.test_kill import STAGES

VALUES = [
    *(
        "banana",
        "-1",
        "0",
        "1000000000000",
        "1000000000",
        "1.5",
        "nan",
        "inf",
        "-inf",
        "null",
        "''",
        "'  '",
        "true",
        "1e-30",
    ),
    *(
        "[]",
        "[null]",
        "[1,2,3]",
        "[banana]",
        "{}",
        "{a:1}",
        "[[]]",
        "ünï©ode",
        "'日本'",
        "../../etc",
        "/nowhere/at/all",
        "'a=b'",
    ),
]
PYTHONS_WORDS = re.compile(
    r"not supported between|object is not|object has no|has no attribute|expected str, bytes|slice indices|cannot be interpreted"
    r"|argument must be|must be real number|unexpected keyword|invalid literal|recursion|Traceback|not subscriptable|list index"
    r"|unsupported operand|unhashable|could not convert|positional argument|NoneType|not iterable|enforce fail|allocate|KeyError"
    r"|got an unexpected|embedded null|can't multiply|Boolean value of Tensor|sequence item|is not in list|SIG[A-Z]+|Killed"
)
"""Answers that only a programmer understands."""
SECONDS, MEMORY = 120, 12 << 30
LONG = ("max_steps", "max_epochs")
"""Keys whose largest values mean something: a run that is still at it has accepted them."""


def commands(work: Path) -> dict[str, list[str]]:
    """Commands by name, each a matter of seconds."""
    images = [f"data.train_path={work}/images/train", f"data.val_path={work}/images/val", "data.num_classes=5"]
    encoded = [*ENCODER, *images, "data.batch_size=32", "data.num_workers=0", "device=cpu"]
    drawn = [
        f"checkpoint={work}/stage2",
        f"decoder_checkpoint={work}/stage1",
        "samples_per_class=1",
        "sampler.grid.points=3",
        "device=cpu",
    ]
    detector = ["detector=dinov2", "detector.encoder.pretrained=false", "detector.encoder.model=vit_tiny_patch16_224"]
    detector += ["detector.encoder.channels=192", "detector.encoder.stride=16", "detector.encoder.input_size=32"]
    first, few = f"checkpoint={work}/stage1", ["trainer.max_steps=4", "trainer.limit_val_batches=1"]
    return {
        "train": ["stage1", *STAGES[1], *few],
        "train ": ["stage2", *STAGES[2], *few, "evaluation=generation", "metric@callbacks.evaluation.metric=digits"],
        "shard": ["", f"images={work}/images/train", "num_workers=0"],
        "stats": ["", *encoded],
        "cache_latents": ["", *encoded],
        "reference": [
            "",
            *images,
            "data.batch_size=32",
            "data.num_workers=0",
            "device=cpu",
            "image_size=32",
            *detector,
            "split=val",
        ],
        "sample": ["", *drawn],
        "evaluate": ["", *drawn, "metric=digits", "metric.hidden=4"],
        "evaluate ": ["", f"samples={work}/images/val", f"originals={work}/images/val", "metric=psnr"],
        "reconstruct": ["", first, "count=4", "device=cpu"],
        "convert": ["", first],
        "cost": ["", *STAGES[2]],
    }


def keys(command: str, overrides: list[str]) -> list[str]:
    """Every key of a command's configuration, nodes and leaves."""

    def walk(node: Any, prefix: str) -> Iterator[str]:
        for name in node:
            key = f"{prefix}{name}"
            inner = node._get_node(name)
            if key not in ("hydra", "output_dir", "paths", "paths.outputs"):
                yield key
                if OmegaConf.is_dict(inner) and not inner._is_none() and not inner._is_interpolation():
                    yield from walk(inner, f"{key}.")

    cfg = compose(command, overrides)
    return list(walk(cfg, ""))


def run(command: str, overrides: list[str], said: Path) -> int:
    """A command in a child process, what it says going to a file; its exit code, negative where it died."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, 1)
            os.dup2(target, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            os.setsid()
            os.chdir(said.parent)
            sys.argv = [f"rae-{command}", *overrides]
            getattr(door, command)()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):  # processes that it left behind
        os.killpg(child, signal.SIGKILL)
    return code


def judge(code: int, said: str, key: str) -> str:
    """``accepted``, ``refused``, or why an answer is none."""
    if code == 0 or (code == -signal.SIGALRM and key.rpartition(".")[2] in LONG):
        return "accepted"
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    lines = [line for line in said.splitlines() if re.match(r"rae-[\w-]+: error: ", line)]
    if len(lines) != 1:
        return f"{len(lines)} lines of error"
    if found := PYTHONS_WORDS.search(said):
        return f"in Python's words: {found[0]!r}"
    *groups, name = key.split(".")
    names = {name, *groups[:1], *groups[-1:]}
    return "refused" if any(word in lines[0] for word in names) else "the key is not named"


def attack(draws: int, seed: int, work: Path, tell: Callable[[str], None]) -> dict[str, collections.Counter[str]]:
    """Tries values on keys.

    Args:
        draws: How many.
        seed: Of the choice.
        work: An empty folder.
        tell: Called with a line on each draw.

    Returns:
        Counts by command: ``accepted``, ``refused``, ``fell``.
    """
    rng = random.Random(seed)
    for module in (
        "lightning",
        "timm",
        "torchmetrics.functional",
        *(f"rae.commands.{name.strip()}" for name in commands(work)),
    ):
        importlib.import_module(module)  # once, not in every child
    write_images(work / "images")
    said = work / "said"
    small = commands(work)
    for stage in ("1", "2"):
        given = [*STAGES[int(stage)], "trainer.max_steps=4", f"output_dir={work}/stage{stage}"]
        assert run("train", given, said) == 0, said.read_text()
    known = {name: keys(name.strip(), overrides[1:]) for name, overrides in small.items()}
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, overrides in small.items():  # undisturbed, each goes through
        code = run(name.strip(), [*overrides[1:], f"output_dir={work}/plain/{name.strip()}{len(name)}"], said)
        assert code == 0, f"{name}: {said.read_text()}"
    for number in range(draws):
        name = rng.choice(list(small))
        key, value = rng.choice(known[name]), rng.choice(VALUES)
        given = [*small[name][1:], f"{key}={value}", f"output_dir={work}/out/{number}"]
        verdict = judge(run(name.strip(), given, said), said.read_text(errors="replace"), key)
        kind = verdict if verdict in ("accepted", "refused") else "fell"
        counts[name.strip()][kind] += 1
        last = next((line for line in reversed(said.read_text(errors="replace").splitlines()) if line.strip()), "")
        tell(
            f"{number:4d} {kind:8s} rae-{name.strip()} {key}={value}: {verdict if kind == 'fell' else ''} {last[:300]}"
        )
    return counts


def main() -> None:
    """Runs the attack and prints its counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print every draw, not only what fell")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        counts = attack(
            given.draws,
            given.seed,
            Path(work),
            lambda line: print(line, flush=True) if given.show or " fell " in line else None,
        )
    for name, found in sorted(counts.items()):
        print(
            f"rae-{name:14s} {found.total():4d} draws: {found['accepted']} accepted, {found['refused']} refused, "
            f"{found['fell']} fell"
        )
    raise SystemExit(any(found["fell"] for found in counts.values()))


if __name__ == "__main__":
    main()
