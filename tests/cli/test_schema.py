"""Every value that makes no sense is refused in one line that says what its key takes; every value of conf/ is taken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from rae.cli.errors import blame, compose
from rae.cli.groups import config_groups
from rae.cli.schema import check_values
from rae.io.errors import ConfigError
from tests.attacks.overrides import PYTHONS_WORDS

ROOT = Path(__file__).parents[2]
TRAIN = ("stage=2", "latent.stats=none", "denoiser=dit_dh_s", "evaluation=generation")
REFUSED = [
    ("train data.batch_size=banana", "data.batch_size='banana': must be an integer"),
    ("train data.batch_size=1.5", "data.batch_size=1.5: must be an integer"),
    ("train data.batch_size=true", "data.batch_size=true: must be an integer"),
    ("train data.num_workers=[]", "data.num_workers=[]: must be an integer"),
    ("train data.flip=inf", "data.flip=inf: must be a finite number"),
    ("shard num_workers=1000000000", "num_workers=1000000000: must be at most 1,024"),
    ("train data.num_workers=1025", "data.num_workers=1025: must be at most 1,024"),
    ("stats num_nodes=1000000000", "num_nodes=1000000000: must be at most 10,000"),
    ("train trainer.num_nodes=1000000000", "trainer.num_nodes=1000000000: must be at most 10,000"),
    ("train optimizer.lr=[]", "optimizer.lr=[]: must be a number"),
    ("train optimizer.lr=nan", "optimizer.lr=nan: must be a finite number"),
    ("train optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be a list"),
    ("train optimizer._partial_=banana", "optimizer._partial_='banana': must be true or false"),
    ("train seed=1.5", "seed=1.5: must be an integer"),
    ("train seed=-1", "seed=-1: must be an integer of at least 0"),
    ("train seed=9223372036854775808", "seed=9223372036854775808: must be at most 9,223,372,036,854,775,807"),
    ("train matmul=half", "matmul='half': must be fp32 | tf32"),
    ("train decoder_checkpoint=7", "decoder_checkpoint=7: must be text or null"),
    ("train latent.stats=[]", "latent.stats=[]: must be text or a path or null"),
    ("train denoiser.depth=1000000000", "denoiser.depth=1000000000: must be at most 1,000"),
    ("train denoiser.width=1000000000", "denoiser.width=1000000000: must be at most 65,536"),
    ("train data.num_classes=1000000000", "data.num_classes=1000000000: must be at most 65,536"),
    ("train encoder.model_args={patch_size:1000000000000}", "patch_size=1000000000000: must be at most 65,536"),
    ("train encoder.dtype=int8", "encoder.dtype='int8': must be float32 | bfloat16 | float16 or null"),
    ("train encoder.dtype=16", "encoder.dtype=16: must be float32 | bfloat16 | float16 or null"),
    ("train encoder.model_args={depth:banana}", "encoder.model_args.depth='banana': must be an integer"),
    ("train flow.shift=banana", "flow.shift='banana': must be a number"),
    ("train flow.shift._target_=1.5", "flow.shift._target_=1.5: must be the dotted name of a class"),
    ("train callbacks.ema=3", "callbacks.ema=3: must be a mapping with _target_, or null"),
    ("train callbacks.evaluation.metric=digits", "callbacks.evaluation.metric='digits': must be a choice of its group"),
    ("train callbacks.evaluation.sampler=0", "callbacks.evaluation.sampler=0: must be a choice of its group"),
    ("train callbacks.evaluation.precision=' '", "callbacks.evaluation.precision=' ': must not be blank"),
    ("train callbacks.evaluation.precision=16", "callbacks.evaluation.precision=16: must be 32-true | bf16-mixed"),
    ("train callbacks.evaluation.quantize=ceil", "callbacks.evaluation.quantize='ceil': must be floor | round"),
    ("train logger.csv=-1", "logger.csv=-1: must be a mapping with _target_, or null"),
    ("train trainer.max_steps=banana", "trainer.max_steps='banana': must be an integer"),
    ("train data=[null]", "data=null: there is no such choice; choose one of"),
    ("sample checkpoint=7", "checkpoint=7: must be text"),
    ("sample precision=[]", "precision=[]: must be 32-true | bf16-mixed"),
    ("sample precision='  '", "precision='  ': must not be blank"),
    ("sample device=null", "device=null: must be text"),
    ("sample device=1", "device=1: must be text"),
    ("sample labels=[1]", "labels=[1]: must be text"),
    ("sample devices=1000", "devices=1000: must be at most"),
    ("train trainer.devices=1000", "trainer.devices=1000: must be at most"),
    ("sample averaged=[]", "averaged=[]: must be true or false"),
    ("sample count=inf", "count=inf: must be a finite number"),
    ("sample part_size={a:1}", "part_size={'a': 1}: must be an integer"),
    ("sample grid_rows=banana", "grid_rows='banana': must be an integer"),
    ("sample grid_rows=0", "grid_rows=0: must be an integer of at least 1"),
    ("sample interpolations='x'", "interpolations='x': must be an integer or null"),
    ("sample samples_per_class=1000000000000", "samples_per_class=1000000000000: must be at most"),
    ("sample sampler.grid.points=1000000000000", "sampler.grid.points=1000000000000: must be at most 1,000,000"),
    ("sample sampler=0", "sampler=0: there is no such choice; choose one of"),
    ("evaluate samples=1.5", "samples=1.5: must be text or null"),
    ("evaluate neighbours=[]", "neighbours=[]: must be an integer or null"),
    ("evaluate guidance._target_=1.5", "guidance._target_=1.5: must be the dotted name of a class"),
    (
        "evaluate metric.detector.batch_size=1000000000",
        "metric.detector.batch_size=1000000000: must be at most 1,000,000",
    ),
    ("evaluate metric.detector=0", "metric.detector=0: must be a choice of its group"),
    ("evaluate metric.detector.batch_size=1.5", "metric.detector.batch_size=1.5: must be an integer"),
    ("reconstruct grid_pairs=banana", "grid_pairs='banana': must be an integer"),
    ("reconstruct grid_pairs=0", "grid_pairs=0: must be an integer of at least 1"),
    ("convert push_to_hub=7", "push_to_hub=7: must be text or null"),
    ("convert checkpoint=null", "checkpoint=null: must be text"),
    ("sample checkpoint=null", "checkpoint=null: must be text"),
    ("shard images=null", "images=null: must be text"),
    ("cache_latents dtype=float8", "dtype='float8': must be bfloat16 | float16 | float32"),
    ("cache_latents flips=some", "flips='some': must be both | none"),
    ("cache_latents splits=[test]", "splits=['test']: must be a list, each train | val"),
    ("reference split=test", "split='test': must be train | val"),
    ("cost print=csv", "print='csv': must be table | row"),
    ("cost matmul=bf16", "matmul='bf16': must be fp32 | tf32"),
    ("evaluate batch_size=0", "batch_size=0: must be an integer of at least 1"),
    ("stats data.resize=[null]", "data.resize=[None]: must be an integer or null"),
]


@cache
def plainly(command):
    """A command's configuration without bad values."""
    return compose(command, TRAIN if command == "train" else ())


def composed(command, override):
    """The same with an override, as Hydra reads it; composing anew would take half a second for each."""
    read = OverridesParser.create().parse_override(override)
    if read.key_or_group in config_groups():
        return compose(command, [override])
    cfg = plainly(command).copy()
    OmegaConf.update(cfg, read.key_or_group, read.value(), merge=False, force_add=True)
    return cfg


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[given for given, _ in REFUSED])
def test_what_makes_no_sense_is_refused_in_words(given, message):
    command, override = given.split(" ", 1)
    with pytest.raises(ConfigError) as caught:
        check_values(composed(command, override), command)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text
    assert not PYTHONS_WORDS.search(text)


def test_a_message_that_names_the_value_alone_is_given_its_key():
    overrides = ["checkpoint=../../etc", "+images='a b'", "seed=7", "data=x"]
    assert blame("'../../etc' is no folder", overrides) == "checkpoint=../../etc: '../../etc' is no folder"
    assert blame("/etc is no folder", ["checkpoint=/../etc"]) == "checkpoint=/../etc: /etc is no folder"
    for text in ("dtype='float16' is unknown", "null for no base head"):
        assert blame(text, ["data.batch_size=16", "class_names=null"]) == text
    assert blame("250 is not divisible by 16", ["image_size=250"]) == "image_size=250: 250 is not divisible by 16"
    assert blame("norm is nan (samples [16, 17])", ["data.batch_size=16"]) == "norm is nan (samples [16, 17])"
    assert blame("'a b' cannot be read", overrides) == "images=a b: 'a b' cannot be read"
    for text in ("checkpoint '../../etc' is no folder", "seven are missing", "7 are missing"):
        assert blame(text, overrides) == text


@pytest.mark.slow
def test_overrides_drawn_at_random_are_answered_in_words():
    """A share of ``python -m tests.attacks.overrides``, which draws 1,000; it forks, so not in a process that has computed."""
    attack = [sys.executable, "-m", "tests.attacks.overrides", "--draws=60", "--seed=7"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(attack, cwd=ROOT, env=variables, text=True, capture_output=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert sum(map(int, re.findall(r"(\d+) refused", ended.stdout))) >= 40
