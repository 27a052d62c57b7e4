"""Encoders are known by their published weights; runs and exports open with the encoder that they were made with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

import rae
from rae.autoencoder import RAE
from rae.cli.build import Run, build, make
from rae.cli.config import check_same_run, plain
from rae.cli.errors import compose
from rae.encoder import TimmEncoder, timm_vit
from rae.formats import assemble, find_checkpoint, read
from rae.formats.run import read_encoder
from rae.image import to_float
from rae.io.describe import rebuild
from rae.io.errors import ConfigError
from rae.io.tensors import state_hash
from tests.helpers.digits_runs import run

ROOT = Path(__file__).parents[2]

NETWORK = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FACTS = {"model": "vit_tiny_patch16_224", "channels": 32, "stride": 8, "model_args": NETWORK}


def weight_file(path: Path, seed: int) -> Path:
    """Weights for images of 48 pixels, so that encoders of 32 resize the position table."""
    torch.manual_seed(seed)
    encoder = TimmEncoder(**FACTS, input_size=48, pretrained=False)
    save_file({key: torch.randn_like(value) * 0.2 for key, value in encoder.network.state_dict().items()}, path)
    return path


def stage1(output_dir: Path, *overrides: str) -> Run:
    """A run of stage 1 on digits, to be fitted for two steps."""
    small = ["data.batch_size=32", "trainer.max_steps=2", "trainer.val_check_interval=2", "scheduler.warmup_steps=1"]
    quiet = ["trainer.enable_progress_bar=false", "callbacks.preview=null", f"output_dir={output_dir}"]
    return build(compose("train", ["experiment=digits_small_stage1", *small, *quiet, *overrides]))


def hash_of(module) -> str:
    return module.autoencoder.encoder.weights_hash()


def fit(parts: Run) -> None:
    parts.trainer.fit(parts.module, datamodule=parts.data)


RANDOM = ["encoder.checkpoint=null", "+encoder.pretrained=false"]


# --- what an encoder is ------------------------------------------------------------------------------------------


def test_the_hash_is_of_the_weights_before_they_are_resized(tmp_path: Path):
    path = weight_file(tmp_path / "a.safetensors", 0)
    first, second = (TimmEncoder(**FACTS, input_size=32, checkpoint=str(path)) for _ in range(2))
    second.network.pos_embed.data += 2e-8 * torch.randn_like(second.network.pos_embed)  # as another CPU rounds
    assert state_hash(first.state_dict()) != state_hash(second.state_dict())
    assert first.weights_hash() == second.weights_hash()
    assert not second.differences(first.fingerprint())
    other = TimmEncoder(**FACTS, input_size=32, checkpoint=str(weight_file(tmp_path / "b.safetensors", 1)))
    assert other.differences(first.fingerprint()).startswith("weights ")
    larger = TimmEncoder(**FACTS, input_size=64, checkpoint=str(path))
    assert larger.differences(first.fingerprint()) == "input_size 32 and not 64"


def test_where_weights_come_from_does_not_tell_encoders_apart(tmp_path: Path, monkeypatch):
    path = weight_file(tmp_path / "a.safetensors", 0)
    local = TimmEncoder(**FACTS, input_size=32, checkpoint=str(path))
    weights = timm_vit.read_weights(str(path), None, None)
    monkeypatch.setattr(timm_vit, "read_weights", lambda checkpoint, hub_id, revision: weights)
    for revision in ("main", "0" * 40):
        hub = TimmEncoder(**FACTS, input_size=32, hub_id="me/vit", revision=revision)
        assert hub.fingerprint() == local.fingerprint()


def test_hashes_of_former_versions_are_compared_by_their_own_rule(tmp_path: Path):
    encoder = TimmEncoder(**FACTS, input_size=32, checkpoint=str(weight_file(tmp_path / "a.safetensors", 0)))
    former = encoder.fingerprint() | {"weights": state_hash(encoder.state_dict()), "hub_id": "me/vit", "revision": None}
    assert not encoder.differences(former)
    encoder.network.pos_embed.data += 2e-8 * torch.randn_like(encoder.network.pos_embed)
    assert "a hash of a former version, which depends on the CPU" in encoder.differences(former)
    assert encoder.differences({}).startswith("weights None and not")


NEW = ("fusion", "pooled_layer", "resize_first", "interpolation", "final_norm", "final_norm_eps", "rope_bfloat16")


@pytest.mark.parametrize(
    ("layers", "reduce", "fusion"), [(None, "sum", "last"), ([1], "mean", "last"), ([0, 1], "sum", "sum")]
)
def test_what_former_versions_called_reduce_is_understood(layers, reduce: str, fusion: str):
    former = {"_target_": "rae.encoder.TimmEncoder", **FACTS, "input_size": 32, "pretrained": False, "layers": layers}
    former["reduce"] = reduce
    for encoder in (make(OmegaConf.create({"encoder": former}).encoder), rebuild(former)):
        assert encoder.fusion == fusion
        assert "reduce" not in encoder.arguments
        said = {key: value for key, value in encoder.fingerprint().items() if key not in NEW} | {"reduce": reduce}
        assert not encoder.differences(said)
        if layers == [0, 1]:
            assert encoder.differences(said | {"reduce": "mean"}) == "fusion mean and not sum"
    with pytest.raises(ConfigError, match=r"encoder\.reduce='mean' is called encoder\.fusion now"):
        make(OmegaConf.create({"encoder": former | {"reduce": "mean", "fusion": "sum"}}).encoder)


def test_a_run_of_a_former_version_is_continued():
    cfg = compose("train", ["experiment=digits_small_stage1", *RANDOM])
    former = plain(cfg)
    former["encoder"] = {key: value for key, value in former["encoder"].items() if key not in NEW} | {"reduce": "sum"}
    del former["decoder"]["output"]
    check_same_run(cfg, former, "outputs/x")
    former["encoder"]["layers"], former["decoder"]["output"] = [0, 1], "raw"
    with pytest.raises(ConfigError, match=r"encoder.fusion was 'sum' and is now 'last'; decoder.output was 'raw' and"):
        check_same_run(compose("train", ["experiment=digits_small_stage1", *RANDOM]), former, "outputs/x")


def test_every_revision_is_a_commit_or_is_said_to_be_unknown():
    lines = [
        (path.name, line.strip())
        for path in sorted((ROOT / "conf").rglob("*.yaml"))
        if path.parent.name in ("encoder", "detector", "discriminator")
        for line in path.read_text().splitlines()
        if line.strip().startswith("revision:")
    ]
    assert len(lines) >= 17
    pinned = [name for name, line in lines if re.match(r"revision: [0-9a-f]{40} ", line)]
    unknown = [name for name, line in lines if re.match(r"revision: (main|null) .*not known here", line)]
    assert sorted(pinned + unknown) == sorted(name for name, _ in lines)
    assert {"dinov2.yaml", "dinov2_s.yaml", "dinov2_l.yaml", "mae.yaml", "clip_l14.yaml", "dinov3_b.yaml"} <= set(
        pinned
    )


# --- runs and exports --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_run(tmp_path_factory):
    """A run on a random encoder, with its module and the PSNR that it reported."""
    folder = tmp_path_factory.mktemp("random")
    parts = stage1(folder, *RANDOM)
    fit(parts)
    return folder, parts, float(parts.trainer.callback_metrics["val/psnr"])


@pytest.mark.slow
def test_a_random_encoder_is_the_same_whenever_its_run_is_opened(random_run):
    folder, parts, reported = random_run
    trained = parts.module.autoencoder.encoder.state_dict()
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = rae.load(folder)
        assert all(torch.equal(value, trained[key]) for key, value in model.encoder.state_dict().items())
        ratios = []
        with torch.no_grad():
            for batch in parts.data.val_dataloader():
                images = to_float(batch["image"])
                error = (model(images).clamp(0, 1) - images).square().flatten(1).mean(1)
                ratios.append(-10 * error.log10())
        assert float(torch.cat(ratios).mean()) == pytest.approx(reported, abs=1e-4)


@pytest.mark.slow
def test_an_export_holds_the_runs_random_encoder(random_run, tmp_path: Path):
    folder, parts, _ = random_run
    again = RAE.from_pretrained(rae.load(folder).save_pretrained(tmp_path / "out"))
    assert again.encoder.weights_hash() == hash_of(parts.module)
    torch.manual_seed(9)
    later = compose("train", ["experiment=digits_small_stage2", *RANDOM, "latent.stats=none", "seed=9"])
    for source in (folder, tmp_path / "out"):  # stage 2 begins with the decoder's encoder
        later.decoder_checkpoint = str(source)
        assert hash_of(build(later).module) == again.encoder.weights_hash()


@pytest.mark.slow
def test_stage_2_builds_the_decoder_that_its_checkpoint_describes(random_run, tmp_path: Path):
    folder, _, _ = random_run
    own = rae.load(folder).decoder
    later = compose("train", ["experiment=digits_small_stage2", *RANDOM, "latent.stats=none", "decoder.depth=5"])
    for source in (folder, rae.load(folder).save_pretrained(tmp_path / "out")):
        later.decoder_checkpoint = str(source)
        found = build(later).module
        assert state_hash(found.autoencoder.decoder.state_dict()) == state_hash(own.state_dict())
        assert found.config["decoder"]["depth"] == own.arguments["depth"] != 5  # its checkpoints say so too
    assert later.decoder.depth == 5


@pytest.mark.parametrize("damaged", ["x", {}, {"fingerprint": 1}, {"fingerprint": {}, "weights": {"a": 1}}])
def test_a_record_that_says_nothing_of_an_encoder_is_refused(damaged, tmp_path: Path):
    torch.save({"encoder": damaged}, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"bad.ckpt' is no checkpoint of a training run: its 'encoder' says nothing"):
        read_encoder(tmp_path / "bad.ckpt")


def test_exports_of_former_versions_open(random_run, tmp_path: Path):
    folder, _, _ = random_run
    model = rae.load(folder)
    stored = model.save_pretrained(tmp_path / "stored")
    path = tmp_path / "encoder.safetensors"
    save_file(model.encoder.network.state_dict(), path)
    model.encoder.arguments |= {"pretrained": True, "hub_id": "me/vit"}
    named = model.save_pretrained(tmp_path / "named")
    for export, words in ((stored, None), (named, "a hash of a former version, which depends on the CPU")):
        description = json.loads((export / "config.json").read_text())
        for hashed in (state_hash(model.encoder.state_dict()), 64 * "0"):
            description["encoder"]["sha256"] = hashed
            description["encoder"]["model"]["checkpoint"] = str(path) if words else None
            (export / "config.json").write_text(json.dumps(description))
            if words and hashed == 64 * "0":
                with pytest.raises(ValueError, match=words):
                    RAE.from_pretrained(export)
            else:  # weights that an export stores have a hash of their own
                assert RAE.from_pretrained(export).encoder.weights_hash() == model.encoder.weights_hash()


def test_a_resumed_run_keeps_its_random_encoder(random_run, tmp_path: Path):
    folder, parts, _ = random_run
    more = stage1(tmp_path, *RANDOM, "seed=7", "trainer.max_steps=3")
    assert hash_of(more.module) != hash_of(parts.module)
    more.module.on_load_checkpoint({"encoder": read_encoder(folder)})
    assert hash_of(more.module) == hash_of(parts.module)
    with pytest.raises(ValueError, match="does not hold them: former versions did not keep them"):
        more.module.on_load_checkpoint({})


@pytest.mark.slow
def test_a_changed_encoder_file_is_refused_wherever_its_run_is_opened(tmp_path: Path):
    encoder = stage1(tmp_path, *RANDOM).module.autoencoder.encoder
    path, folder = tmp_path / "encoder.safetensors", tmp_path / "run"
    save_file(encoder.network.state_dict(), path)
    weights = f"encoder.checkpoint={path}"
    fit(stage1(folder, weights))
    record = read_encoder(folder)
    assert record.keys() == {"fingerprint"}  # the file has the weights
    later = compose("train", ["experiment=digits_small_stage2", weights, "latent.stats=none"])
    later.decoder_checkpoint = str(folder)
    for opened in (lambda: rae.load(folder), lambda: build(later)):
        opened()
    save_file({key: value + 1e-6 for key, value in encoder.network.state_dict().items()}, path)
    again = stage1(folder, weights).module
    hashes = [value.removeprefix("published:")[:12] for value in (record["fingerprint"]["weights"], hash_of(again))]
    words = f"was made with another encoder: weights {hashes[0]}… and not {hashes[1]}…"
    for refused in (
        lambda: rae.load(folder),
        lambda: build(later),
        lambda: again.on_load_checkpoint({"encoder": record}),
    ):
        with pytest.raises(ValueError, match=words):
            refused()


def test_a_decoder_of_another_encoder_is_refused_without_the_encoder_too(random_run, tmp_path: Path):
    folder, _, _ = random_run
    bundle = read(folder)
    export = rae.load(folder).save_pretrained(tmp_path / "export")
    assert assemble(bundle.with_decoder(read(export)), encode=False).encoder is None
    checkpoint = torch.load(find_checkpoint(folder), weights_only=True)
    checkpoint["encoder"]["fingerprint"]["weights"] = "published:" + 64 * "0"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(
        ValueError, match=r"other.ckpt was made with another encoder than .*: weights 000000000000… and"
    ):
        assemble(bundle.with_decoder(read(tmp_path / "other.ckpt")), encode=False)


@pytest.mark.slow
def test_commands_reconstruct_alike_whatever_their_seed(random_run, tmp_path: Path):
    folder, _, reported = random_run
    for seed in (1, 2):
        run("reconstruct", f"checkpoint={folder}", f"seed={seed}", f"output_dir={tmp_path}/{seed}")
        scores = json.loads((tmp_path / str(seed) / "scores.json").read_text())["scores"]
        assert scores["psnr"] == pytest.approx(reported, abs=0.02)  # of images in bytes


@pytest.mark.slow
def test_the_hash_is_the_same_with_every_cpu_kernel(tmp_path: Path):
    path = weight_file(tmp_path / "a.safetensors", 0)
    script = (
        "from rae.encoder import TimmEncoder; from rae.io.tensors import state_hash; "
        f"e = TimmEncoder(**{FACTS}, input_size=56, checkpoint={str(path)!r}); "
        "print(state_hash(e.state_dict()), e.weights_hash())"
    )
    found = []
    for capability in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        found.append(done.stdout.split())
    assert found[0][1] == found[1][1]
