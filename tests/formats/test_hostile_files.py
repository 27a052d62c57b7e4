"""Files of strangers on every option that reads a file: nothing runs, nothing leaks, and the answer is one line."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

import rae
from rae.autoencoder import RAE
from rae.cli import main
from rae.cli.config import plain
from rae.cli.errors import compose
from rae.cli.models import open_model
from rae.encoder import tiny_encoder
from rae.formats.run import usable
from rae.generator import Generator
from rae.io.describe import check, rebuild
from tests.attacks.files import SECRET, blobs, places, replaced, run_config, targets, write_run
from tests.helpers.small_models import make_generator

HIDDEN = "nobody may read this"
IN_PYTHONS_WORDS = (
    "recursion depth",
    "has no attribute",
    "not supported between",
    "indices must be",
    "KeyError",
)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that must never come about, and a secret in the environment."""
    monkeypatch.setenv(SECRET, HIDDEN)
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def model():
    return make_generator()


def say(call, canary):
    """The message with which a call refuses a hostile file."""
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    text = str(caught.value)
    assert not canary.exists(), text
    assert HIDDEN not in text
    assert "\n" not in text
    assert not any(word in text for word in IN_PYTHONS_WORDS), text
    return text


@pytest.fixture(scope="module")
def opened():
    """Opens a checkpoint as ``rae-sample`` does."""
    composed = compose("sample", ["checkpoint=PATH", "device=cpu", "sampler=euler"])

    def call(path):
        cfg = composed.copy()
        cfg.checkpoint = str(path)
        return open_model(cfg, encode=True)

    return call


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_runs_checkpoint_opens(model, tmp_path):
    """The checkpoints that are made hostile below are good ones; the optimiser in their configuration is not needed."""
    found = rae.load(write_run(model, tmp_path))
    assert torch.equal(next(found.denoiser.parameters()), next(model.denoiser.parameters()))


def test_configurations_of_checkpoints_build_nothing_but_models(model, canary, opened, tmp_path):
    own = run_config(model, tmp_path / "stage1.ckpt")
    draws = random.Random(0)
    hostile = targets(canary)
    buildable = [
        path for path in places(own) if path[0] in ("encoder", "decoder", "denoiser", "flow", "sampler", "guidance")
    ]
    for number, node in enumerate([*hostile, *hostile]):
        path = draws.choice([path for path in buildable if path[-1] != "_target_"])
        value = node if number % 3 else draws.choice([[node], {"inner": node}, [[{"deep": [node]}]]])
        config = replaced(own, path, value)
        text = say(lambda config=config: usable(config, "a.ckpt"), canary)
        if number % 8 == 0:  # the command refuses what the check refuses
            checkpoint = write_run(model, tmp_path, config)
            assert (
                say(lambda checkpoint=checkpoint: opened(checkpoint), canary).replace(str(checkpoint), "a.ckpt") == text
            )
        assert re.search("is no known class of a model|has no key", text), (path, node, text)


def test_targets_elsewhere_in_a_configuration_are_never_built(model, canary, opened, tmp_path):
    own = run_config(model, tmp_path / "stage1.ckpt")
    for number, node in enumerate(targets(canary)):
        key = ("optimizer", "callbacks", "metric", "data", "logger", "trainer", "hydra", "paths")[number % 8]
        config = {**own, key: node if number % 2 else {"a": [node]}}
        assert key not in usable(config, "a.ckpt")
        if number % 8 == 0:
            opened(write_run(model, tmp_path, config))
        assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe", ["digits_stage1", *(f"digits_stage2 flow={flow}" for flow in ("linear", "vp", "gvp"))]
)
def test_what_runs_say_of_themselves_is_no_strangers(recipe):
    config = plain(compose("train", [f"experiment={recipe.split()[0]}", *recipe.split()[1:]]))
    kept = usable(config, "a.ckpt")
    assert all(kept[part] == config[part] for part in ("encoder", "decoder", "latent", "flow") if part in config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["${oc.env:%s}", "${oc.decode:%s}", "a ${oc.env:%s} b", "${stage}", "${.x}", "${oc.select:%s}"]
)
def test_interpolations_are_refused(model, canary, opened, tmp_path, text):
    own = run_config(model, tmp_path / "stage1.ckpt")
    text = text.replace("%s", SECRET)
    for path in (("image_size",), ("name",), ("denoiser", "width"), ("sampler", "grid"), ("flow", "path"), ("data",)):
        config = (
            {**own, "data": text}
            if path == ("data",)
            else replaced(own, path, text)
            if path[0] in own
            else {**own, "name": text}
        )
        checkpoint = write_run(model, tmp_path, config)
        if path == ("data",):  # not needed, left out
            assert "data" not in opened(checkpoint)[1] or opened(checkpoint)[1].data is None
        else:
            assert "holds the interpolation" in say(lambda checkpoint=checkpoint: opened(checkpoint), canary)


@pytest.mark.parametrize("key", ["_args_", "_partial_", "_recursive_", "_convert_", "_self_", 3])
def test_special_keys_are_refused(model, canary, opened, tmp_path, key):
    own = run_config(model, tmp_path / "stage1.ckpt")
    checkpoint = write_run(model, tmp_path, replaced(own, ("denoiser", key), True))
    assert "has no key" in say(lambda: opened(checkpoint), canary)


def test_endless_nesting_is_refused(canary):
    node: dict = {}
    for _ in range(2000):
        node = {"a": node}
    assert "levels deep" in say(lambda: check(node, "a.ckpt"), canary)
    assert "holds a Tensor" in say(lambda: check({"a": torch.zeros(1)}, "a.ckpt"), canary)


@pytest.mark.slow
def test_guides_and_decoders_of_strangers_build_nothing_else(model, canary, tmp_path):
    good = write_run(model, tmp_path / "good")
    own = run_config(model, tmp_path / "good" / "stage1.ckpt")
    for node in targets(canary)[:6]:
        guide = write_run(model, tmp_path / "bad", {**own, "denoiser": node})
        cfg = compose(
            "sample", [f"checkpoint={good}", f"guide_checkpoint={guide}", "guidance=autoguidance", "device=cpu"]
        )
        say(lambda cfg=cfg: open_model(cfg), canary)


def test_own_classes_are_built_where_the_user_names_them(model, tmp_path, monkeypatch):
    """A class outside the library: refused from a file, taken once it is imported, or named below --config-dir."""
    module = tmp_path / "my_sampler_of_a_test.py"
    module.write_text("from rae.flow import EulerSampler\n\n\nclass Mine(EulerSampler):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = {**rae.io.describe.describe(model.sampler), "_target_": "my_sampler_of_a_test.Mine"}
    with pytest.raises(ValueError, match=r"'my_sampler_of_a_test\.Mine' .* name it in a YAML file below --config-dir"):
        check(node, "a.ckpt")
    monkeypatch.setattr("rae.io.describe._trusted", {"my_sampler_of_a_test.Mine"})
    check(node, "a.ckpt")
    monkeypatch.setattr("rae.io.describe._trusted", set())
    import my_sampler_of_a_test

    check(node, "a.ckpt")
    assert type(rebuild(node)) is my_sampler_of_a_test.Mine


# --- exports -------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(model, tmp_path):
    return model.save_pretrained(tmp_path / "export", store_encoder=True)


def test_exports_build_nothing_but_models(export, canary):
    good = json.loads((export / "config.json").read_text())
    assert isinstance(Generator.from_pretrained(export), Generator)
    draws, tried = random.Random(1), 0
    for node in targets(canary) * 2:
        path = draws.choice(
            [path for path in places(good) if path[-1] != "_target_" and path[0] not in ("format", "library_version")]
        )
        (export / "config.json").write_text(json.dumps(replaced(good, path, node)))
        say(lambda: Generator.from_pretrained(export), canary)
        tried += 1
    assert tried == 40


@pytest.mark.parametrize("value", [None, [], {}, "text", -1, 1.5, 10**30, True, "${oc.env:%s}", [[]], {"a": 1}])
def test_damaged_descriptions_of_exports_are_answered_in_words(export, canary, value):
    good = json.loads((export / "config.json").read_text())
    value = value.replace("%s", SECRET) if isinstance(value, str) else value
    refused = 0
    for path in [
        ("weights",),
        ("encoder",),
        ("decoder",),
        ("latent",),
        ("flow",),
        ("weights", "file"),
        ("weights", "sha256"),
        ("encoder", "stored"),
        ("encoder", "model"),
        ("encoder", "sha256"),
        ("format_version",),
        ("kind",),
    ]:
        (export / "config.json").write_text(json.dumps(replaced(good, path, value)))
        for call in (Generator.from_pretrained, RAE.from_pretrained):
            try:
                call(export)
            except (ValueError, OSError):
                say(lambda call=call: call(export), canary)
                refused += 1
    assert refused >= 10


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/etc/passwd", "a/../../b.safetensors", "..", "sub/model.safetensors"]
)
def test_weights_of_exports_stand_in_their_folder(export, canary, name):
    config = json.loads((export / "config.json").read_text())
    config["weights"]["file"] = name
    (export / "config.json").write_text(json.dumps(config))
    assert "must be the name of a file in its own folder" in say(lambda: RAE.from_pretrained(export), canary)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint_path",
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "cache_dir",
        "features_only",
        "scriptable",
        "anything",
    ],
)
def test_arguments_of_networks_name_no_files(export, canary, name):
    config = json.loads((export / "config.json").read_text())
    (export / "extra.json").write_bytes(b"a pickle, say")
    config["encoder"]["model"]["model_args"][name] = str(export / "extra.json")
    (export / "config.json").write_text(json.dumps(config))
    assert f"encoder.model_args.{name} is refused" in say(lambda: RAE.from_pretrained(export), canary)
    with pytest.raises(ValueError, match=rf"model_args\.{name} is refused"):
        rae.encoder.TimmEncoder("vit_tiny_patch16_224", 192, 16, 32, pretrained=False, model_args={name: "x"})
    assert tiny_encoder().channels == 32


# --- any file on any option ----------------------------------------------------------------------------------------

_BARE = "data=synthetic trainer=cpu encoder=digits encoder.checkpoint=null +encoder.pretrained=false "
OPTIONS = {
    "sample": [
        "checkpoint={}",
        "checkpoint={good} decoder_checkpoint={}",
        "checkpoint={good} guidance=autoguidance guide_checkpoint={}",
        "checkpoint={good} labels={}",
    ],
    "reconstruct": ["checkpoint={}", "checkpoint={first} images={}"],
    "evaluate": [
        "checkpoint={} metric=psnr",
        "samples={} metric=psnr originals={images}",
        "samples={images} metric.reference={}",
        "samples={images} metric.reference={images} metric.detector.checkpoint={}",
        "samples={images} metric=psnr originals={}",
    ],
    "convert": ["checkpoint={}", "config={}"],
    "reference": ["data.val_path={images} split=val detector.checkpoint={}"],
    "stats": ["data=imagenet data.train_path={images} encoder.checkpoint={}", "data=shards data.train_path={}"],
    "shard": ["images={}", "images={images} synsets={}"],
    "train": [
        "stage=1 data=synthetic trainer=cpu encoder=digits encoder.checkpoint={}",
        f"stage=1 {_BARE} loss.perceptual.vgg_checkpoint={{}}",
        f"stage=1 {_BARE} loss=l1_gan discriminator.checkpoint={{}}",
        f"stage=2 {_BARE} latent.stats={{}}",
        f"stage=2 {_BARE} latent.stats=none decoder_checkpoint={{}}",
        f"stage=2 {_BARE} latent.stats=none resume={{}}",
    ],
}
"""Every option of a command that reads a file, {} in its place."""


@pytest.mark.slow
def test_no_file_runs_or_leaks_on_any_option(model, canary, tmp_path, monkeypatch, capfd):
    from PIL import Image

    files = blobs(tmp_path / "files", canary)
    good = write_run(model, tmp_path / "good")
    images = tmp_path / "images"
    for number in range(2):
        (images / "a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(images / "a" / f"{number}.png")
    draws, answers = random.Random(0), {"refused": 0, "right": 0}
    for command, options in OPTIONS.items():
        task = getattr(main, command)
        for option in options:
            for file in draws.sample(files, 4):
                given = option.replace("{good}", str(good)).replace("{first}", str(good.with_name("stage1.ckpt")))
                given = given.replace("{images}", str(images)).replace("{}", str(file)).split()
                output = tmp_path / "out" / f"{command}{answers['refused'] + answers['right']}"
                monkeypatch.setattr("sys.argv", [f"rae-{command}", *given, f"output_dir={output}"])
                code = 0
                try:
                    task()
                except SystemExit as end:
                    code = end.code or 0
                said = capfd.readouterr()
                shown = f"{command} {given}: {code} {said.err[-2000:]}"
                assert not canary.exists(), shown
                assert HIDDEN not in said.out + said.err, shown
                assert not any(
                    HIDDEN in path.read_text(errors="replace") for path in output.rglob("*") if path.is_file()
                ), shown
                assert "Traceback" not in said.err, shown
                answers["right" if code == 0 else "refused"] += 1
                if code:
                    (line,) = [line for line in said.err.splitlines() if ": error: " in line]
                    assert not any(word in line for word in IN_PYTHONS_WORDS), shown
    assert answers["refused"] > 60, answers
