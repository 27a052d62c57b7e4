"""The configurations: each choice composes, each node fits its class, each default is explained, faults are named."""

from __future__ import annotations

import inspect
import re
from functools import cache
from itertools import zip_longest

import pytest
import torch
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from rae.cli.checks import weight_files
from rae.cli.compose import walk
from rae.cli.config import absolute_paths, check_complete, check_same_run, plain, save_config
from rae.cli.errors import compose
from rae.cli.groups import SHARED, command_files, conf_dir, config_groups, normalise
from rae.cli.help import GROUPS, help_groups, help_keys
from rae.cli.schema import check_values
from rae.io.errors import ConfigError
from rae.jobs.processes import set_matmul

CONF = conf_dir()
FILES = sorted(CONF.rglob("*.yaml"))
ROOTS = sorted(path.stem for path in CONF.glob("*.yaml"))
STAGES = [f"stage={stage}" for stage in config_groups()["stage"]]
HYDRA_KEYS = {"defaults", "_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
GIVEN_LATER = {"training", "optimizer", "scheduler", "callbacks"}
"""Groups whose classes receive further arguments from the program, or whose files may hold several classes."""


def name(path):
    return path.relative_to(CONF).as_posix()


@cache
def composed(root: str, *overrides: str):
    return compose(root, overrides)


@cache
def groups_of(root: str, *overrides: str) -> frozenset:
    """The top-level keys of a composed root: the groups that it makes use of."""
    return frozenset(composed(root, *overrides))


def applies(setting: tuple[str, ...], group: str, choice: str) -> bool:
    """Whether a choice is meant for a root (and stage)."""
    if group in ("stage", "hydra", "paths", *SHARED):
        return False
    if group == "experiment":  # it chooses its stage itself
        roots = {"stats": ("stats",), "latents": ("cache_latents",)}
        return setting == roots.get(choice.rpartition("_")[2], ("train", "stage=0"))
    if group == "debug":
        return setting[0] == "train"
    if choice.startswith("stage"):
        return setting[-1] == f"stage={choice[len('stage')]}"
    if (setting[-1], group) == ("stage=0", "encoder"):
        return choice == "digits"
    return group in groups_of(*setting)


_FAST_ROWS = 2
_ENCODERS = ("clip_l14", "digits", "dinov2", "dinov3_l_k7")
"""Encoders that are composed in every setting; the others have the same keys, and are composed once."""


def cases() -> dict[tuple[str, str], list[tuple[str, ...]]]:
    """Every choice of every group, with the roots (and stages) that it is meant for."""
    settings = [*(("train", stage) for stage in reversed(STAGES)), *((root,) for root in ROOTS if root != "train")]
    return {
        (group, choice): [one for one in settings if applies(one, group, choice)]
        for group, choices in config_groups().items()
        for choice in choices
    }


def each() -> list:
    """A setting and one choice, for all but the first settings of a choice, which :func:`together` holds."""
    return [
        pytest.param(setting, f"{group}={choice}", id=f"{'-'.join(setting)}-{group}={choice}")
        for (group, choice), settings in cases().items()
        for setting in settings[1:]
        if group != "encoder" or choice in _ENCODERS
    ]


def together() -> list:
    """Settings and choices, one of each group at once, so that few compositions hold every choice once.

    Experiments and debugging runs change other groups: these are composed alone.
    """
    alone, mixed = ("experiment", "debug"), {}
    for (group, choice), settings in cases().items():
        if settings:
            mixed.setdefault((settings[0], group), []).append(f"{group}={choice}")
    found = [
        pytest.param(
            setting,
            (choice,),
            id=f"{'-'.join(setting)}-{choice}",
            marks=[pytest.mark.slow] if "imagenet" in choice else [],
        )
        for (setting, group), choices in mixed.items()
        if group in alone
        for choice in choices
    ]
    for setting in dict.fromkeys(setting for setting, _ in mixed):
        columns = [choices for (one, group), choices in mixed.items() if one == setting and group not in alone]
        rows = [tuple(filter(None, row)) for row in zip_longest(*columns)]
        # The last rows hold encoders alone, which tests/encoder/test_encoders.py composes too.
        for number, row in enumerate(rows):
            marks = [pytest.mark.slow] if number >= _FAST_ROWS else []
            found.append(pytest.param(setting, row, id=f"{'-'.join(setting)}-{number}", marks=marks))
    return found


def check_composes(setting: tuple[str, ...], choices: tuple[str, ...]) -> None:
    root, *overrides = setting
    cfg = compose(root, [*([] if choices[0].startswith("experiment=") else overrides), *choices])
    check_values(cfg, root)
    for key in [key for key, node in walk(cfg) if node._is_missing()]:
        OmegaConf.update(cfg, key, 16)
    if root not in ("train", "stats"):  # the commands put their configuration over that of a trained run
        cfg = OmegaConf.merge(plain(composed("train", "stage=2", "image_size=256")), cfg)
    plain(cfg)  # every interpolation leads somewhere


def test_together_holds_every_choice():
    held = {choice for case in together() for choice in case.values[1]}
    assert held == {f"{group}={choice}" for (group, choice), settings in cases().items() if settings}


@pytest.mark.parametrize(("setting", "choices"), together())
def test_every_choice_composes(setting, choices):
    check_composes(setting, choices)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "choice"), each())
def test_every_choice_composes_wherever_it_is_meant_for(setting, choice):
    check_composes(setting, (choice,))


@pytest.mark.parametrize("stage", STAGES)
def test_stages_hold_what_their_module_asks_for(stage):
    cfg = composed("train", stage)
    parameters = inspect.signature(get_object(cfg.training["_target_"])).parameters
    needed = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    assert needed <= {*cfg.training, *cfg, "autoencoder"}
    assert f"{cfg.stage}" == stage[-1]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_targets_exist_and_take_the_keys(path):
    group = path.parent.relative_to(CONF).as_posix()
    for node in nodes(with_bases(path)):
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        keys = {key for key in node if key not in HYDRA_KEYS}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            assert keys <= parameters.keys(), f"{node['_target_']} does not take {sorted(keys - parameters.keys())}"
        needed = {
            key
            for key, parameter in parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        inherits = "defaults" in node or path.stem.startswith("_")
        if group not in GIVEN_LATER and not inherits and not node.get("_partial_", False):
            assert needed <= keys, f"{node['_target_']} also needs {sorted(needed - keys)}"


def with_bases(path):
    """A file's content over that of the ``_base`` files that its defaults list names."""
    content = yaml.safe_load(path.read_text()) or {}
    bases = [
        one
        for one in content.get("defaults", [])
        if isinstance(one, str) and one.startswith("_") and one != "_self_" and "@" not in one
    ]
    merged = {}
    for base in bases:
        merged |= with_bases(path.parent / f"{base}.yaml")
    own = {key: value for key, value in content.items() if not (bases and key == "defaults")}
    return {**merged, **own}


def nodes(value):
    """Every mapping with a ``_target_`` inside a parsed file."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_default_is_explained(path):
    lines = path.read_text().splitlines()
    heading = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert heading.startswith("# "), "the file begins with a line that says what it is"
    block = None  # indentation of a defaults list or block of text, whose lines are no defaults
    for number, line in enumerate(lines, 1):
        indent = len(line) - len(line.lstrip())
        if block is not None and (not line.strip() or indent > block):
            continue
        block = None
        if re.match(r"\s*(- )?[\w@/]+:( [|>]-?)?$", line) and (
            line.startswith("defaults:") or line.rstrip("-")[-1] in "|>"
        ):
            block = indent
        elif re.match(r"\s*(- )?[\w@/]+: \S", line) and not re.match(r"\s*(- )?(_\w+_|app_name):", line):
            assert " # " in line, f"line {number} has no comment: {line.strip()}"


@pytest.mark.parametrize("config", sorted(path.stem for path in conf_dir().glob("*.yaml")))
def test_the_help_lists_every_key_of_a_command_with_its_comment(config):
    contents = [yaml.safe_load(file.read_text()) for file in command_files(config)]
    own = list(dict.fromkeys(key for content in contents for key in content if key not in ("defaults", "hydra")))
    text, model = help_keys(config), {"checkpoint", "decoder_checkpoint", "guide_checkpoint", "averaged"}
    own.sort(key=lambda key: key not in model or (config == "evaluate" and key == "checkpoint"))
    assert [line.split("=")[0].strip() for line in text.splitlines() if re.match(r"  \w+=", line)] == own
    assert max(map(len, text.splitlines())) <= 120


def test_every_group_is_explained_in_the_help():
    groups = {group for group in config_groups() if "/" not in group}
    assert groups <= GROUPS.keys()
    text = help_groups({"stage": "1", "encoder": "digits"})
    assert "[digits]" in text
    assert "with stage=2" in text


# --- overriding --------------------------------------------------------------------------------------------------


def test_stage_and_groups_can_be_chosen_together():
    cfg = compose("train", ["stage=2", "denoiser=dit_dh_s", "guidance=cfg"])
    assert cfg.stage == 2
    assert cfg.denoiser.depth == 12
    assert compose("train", ["stage=1"]).stage == 1


def test_numbers_are_quoted_where_they_name_files():
    assert normalise(["stage=2", "stage=1,2", "seed=3", "optimizer.lr=1e-4"]) == [
        "stage='2'",
        "stage='1','2'",
        "seed=3",
        "optimizer.lr=1e-4",
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["encoder=dinov"],
            r"encoder=dinov: there is no such choice; did you mean 'dinov\w+'\? choose one of .*digits",
        ),
        (["encoder.reduce=mean"], "no key 'encoder.reduce': it is called 'encoder.fusion' now"),
        (["encodr=dinov2"], "no key 'encodr'; did you mean 'encoder'"),
        (["stage=2", "optimizer.lrr=1"], "no key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        (["lr=1"], "did you mean 'optimizer.lr'"),
        (["trainer.max_step=1"], "did you mean 'trainer.max_steps'"),
        (["denoiser.depth=1"], "has no 'denoiser'; it belongs to stage=2"),
        (["denoiser=dit_dh_s"], "has no 'denoiser'; it belongs to stage=2"),
        (["stage=7"], "stage=7: there is no such choice; choose one of 0, 1, 2"),
        (["optimizer.lr=[1"], r"cannot read the override 'optimizer.lr=\[1'"),
        (["optimizer.lr=1,2"], "several values: add -m"),
    ],
)
def test_faults_in_overrides_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose("train", overrides)


def test_unknown_root():
    with pytest.raises(ConfigError, match="no config 'sampel'; did you mean 'sample'"):
        compose("sampel")


def test_experiment_as_first_argument():
    assert compose("seed=7").seed == 7


def test_missing_values_are_named_with_what_they_are():
    with pytest.raises(ConfigError, match=r"checkpoint must be given: add checkpoint=… \(run"):
        check_complete(compose("sample"), "sample")


def test_division_is_exact():
    cfg = OmegaConf.create({"a": "${div:224,14}", "b": "${div:224,15}", "c": "${mul:3,4}"})
    composed("train", STAGES[0])  # registers the resolvers
    assert (cfg.a, cfg.c) == (16, 12)
    with pytest.raises(Exception, match="224 is not divisible by 15"):
        _ = cfg.b


# --- runs --------------------------------------------------------------------------------------------------------


def test_config_is_written_resolved(tmp_path):
    cfg = compose("train", ["stage=2", f"output_dir={tmp_path}"])
    written = yaml.safe_load(save_config(cfg, tmp_path).read_text())
    assert "${" not in (tmp_path / "config.yaml").read_text()
    assert written["callbacks"]["checkpoint"]["folder"] == f"{tmp_path}/checkpoints"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_is_not_continued_with_other_networks():
    cfg = compose("train", ["stage=2", "denoiser=dit_dh_s"])
    check_same_run(cfg, plain(cfg), "outputs/x")
    check_same_run(compose("train", ["stage=2", "denoiser=dit_dh_s", "optimizer.lr=1"]), plain(cfg), "outputs/x")
    with pytest.raises(ConfigError, match=r"outputs/x .* denoiser.depth was 12 and is now 3"):
        check_same_run(compose("train", ["stage=2", "denoiser=dit_dh_s", "denoiser.depth=3"]), plain(cfg), "outputs/x")


def test_float32_matrices_are_multiplied_as_the_key_says():
    before = torch.get_float32_matmul_precision()
    try:
        for choice, setting in (("tf32", "high"), ("fp32", "highest")):
            set_matmul(compose("sample", ["checkpoint=x", f"matmul={choice}"]))
            assert torch.get_float32_matmul_precision() == setting
        with pytest.raises(ConfigError, match="matmul=half is unknown; choose fp32 or tf32"):
            set_matmul(compose("train", ["matmul=half"]))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("root", "overrides", "key"),
    [
        ("train", ("stage=1",), "discriminator.checkpoint"),
        ("train", ("stage=1",), "loss.perceptual.vgg_checkpoint"),
        ("train", ("stage=2", "alignment=repa", "+encoder@alignment.encoder=mae"), "alignment.encoder.checkpoint"),
        ("evaluate", ("metric=reconstruction",), "metric.perceptual.vgg_checkpoint"),
        ("evaluate", ("metric=fd_clip",), "metric.detector.encoder.checkpoint"),
        ("evaluate", ("metric=adm",), "metric.detector.checkpoint"),
        ("evaluate", ("metric=clip_score",), "metric.checkpoint"),
        ("evaluate", ("metric=all",), "metric.dinov2.detector.encoder.checkpoint"),
        ("reference", (), "detector.checkpoint"),
    ],
)
def test_files_are_found_from_any_folder(root, overrides, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.pt").touch()
    cfg = compose(root, [*overrides, f"{key}=weights.pt"])
    absolute_paths(cfg)
    assert OmegaConf.select(cfg, key) == str(tmp_path / "weights.pt")
    assert key in weight_files(cfg)
