"""REPA and iREPA: the loss, where it acts, and that runs with it are as repeatable as others."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rae.cli.build import make
from rae.cli.config import check_same_run, plain
from rae.cli.errors import compose
from rae.commands.train import train as train_command
from rae.condition import LabelTokens
from rae.denoiser import DiT, DiTDH, InContextDiT
from rae.encoder import tiny_encoder
from rae.flow import FlowMatching
from rae.formats import read
from rae.formats.bundle import make_part
from rae.io.describe import describe
from rae.io.errors import ConfigError
from rae.training.alignment import Alignment, zscore
from rae.training.checkpoint import RunCheckpoint
from rae.training.muon import MuonAdamW
from rae.training.stage2 import Stage2Module
from tests.helpers.small_images import ENCODER
from tests.helpers.small_models import randomise
from tests.helpers.small_runs import ema_of, make_module, script, train, weights
from tests.training.test_training import assert_same, run_script

KINDS = {
    "dit": lambda: DiT(8, 4, 16, 3, 2, num_classes=5),
    "dit_dh": lambda: DiTDH(8, 4, 16, 3, 2, 24, 1, 2, num_classes=5),
    "in_context": lambda: InContextDiT(8, 4, 16, 3, 2, LabelTokens(5, 3), base_depth=None),
}

SMALL = ["denoiser.width=32", "denoiser.heads=2", "denoiser.head_width=32", "denoiser.head_heads=2"]


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_zscore_is_its_formula():
    tokens = torch.tensor([[[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]]])
    # Means 3 and 20; deviations 2 and √300, of three tokens with n − 1.
    expected = torch.tensor([[-1.0, -10 / 300**0.5], [0.0, -10 / 300**0.5], [1.0, 20 / 300**0.5]])
    torch.testing.assert_close(zscore(tokens)[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(zscore(tokens, 0.0)[0, :, 0], torch.tensor([0.5, 1.5, 2.5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("projector", "target", "loss"),
    [("mlp", "plain", "cosine"), ("conv", "zscore", "cosine"), ("linear", "plain", "mse")],
)
def test_the_loss_is_that_of_the_tokens_after_the_block(kind, projector, target, loss):
    """Against a hook on the block and a few lines of its own."""
    denoiser = KINDS[kind]()
    randomise(denoiser)
    alignment = Alignment(16, 8, 2, projector, 12, target, loss=loss, weight=0.7)
    alignment.watch(denoiser)
    seen = []
    blocks = denoiser.blocks if kind == "dit" else denoiser.backbone
    blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    denoiser(draws(3, 8, 4, 4), torch.tensor([0.1, 0.5, 0.9]), label=torch.tensor([0, 2, 5]))
    latents = draws(3, 8, 4, 4, seed=1)
    found = alignment(latents)

    layers = dict(alignment.projector.named_parameters())
    tokens = seen[0][:, :16]
    if projector == "mlp":
        for name in ("0", "2", "4"):
            tokens = F.linear(
                tokens if name == "0" else F.silu(tokens), layers[f"{name}.weight"], layers[f"{name}.bias"]
            )
    elif projector == "linear":
        tokens = tokens @ layers["weight"].T + layers["bias"]
    else:
        image = tokens.transpose(1, 2).unflatten(2, (4, 4))
        tokens = F.conv2d(F.pad(image, (1, 1, 1, 1)), layers["weight"], layers["bias"]).flatten(2).transpose(1, 2)
    wanted = latents.flatten(2).transpose(1, 2)
    if target == "zscore":
        wanted = (wanted - wanted.mean(1, keepdim=True)) / (wanted.std(1, keepdim=True) + 1e-6)
    if loss == "mse":
        expected = ((tokens - wanted) ** 2).mean((1, 2))
    else:
        expected = -((tokens * wanted).sum(-1) / (tokens.norm(dim=-1) * wanted.norm(dim=-1))).mean(1)
    torch.testing.assert_close(found, 0.7 * expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_teaches_the_blocks_up_to_its_own_alone(kind, checkpointing):
    denoiser = KINDS[kind]()
    randomise(denoiser)
    denoiser.checkpointing = checkpointing
    alignment = Alignment(16, 8, 2, hidden=12)
    alignment.watch(denoiser)
    denoiser(draws(2, 8, 4, 4), torch.tensor([0.2, 0.7]), label=torch.tensor([1, 4]))
    alignment(draws(2, 8, 4, 4, seed=1)).sum().backward()
    blocks = denoiser.blocks if kind == "dit" else denoiser.backbone
    for block in blocks[:2]:
        assert all(weight.grad is not None and weight.grad.any() for weight in block.attn.parameters())
    rest = [weight for part in (blocks[2], denoiser.final) for weight in part.parameters()]
    assert all(weight.grad is None for weight in rest)
    assert all(weight.grad.any() for weight in alignment.parameters())
    assert not alignment._seen, "the tokens are kept for no longer than the step"


def test_samples_leave_nothing_behind():
    denoiser = KINDS["dit"]()
    alignment = Alignment(16, 8, 2)
    alignment.watch(denoiser)
    with torch.no_grad():
        denoiser(draws(2, 8, 4, 4), torch.tensor([0.2, 0.7]), label=torch.tensor([1, 4]))
    assert not alignment._seen


def aligned(monkeypatch, projector: str = "mlp", **options):
    monkeypatch.setenv("ALIGNED", projector)
    return make_module(2, **options)


def aligned_to(monkeypatch, seed: int):
    """The same with an encoder to align with: with seed 0, the autoencoder's own."""
    module = aligned(monkeypatch)
    encoder = tiny_encoder(input_size=16, channels=16, stride=8, depth=2, seed=seed)
    encoder.arguments["pretrained"] = True  # as if its weights were a hub's
    module.alignment.encoder = encoder
    return module


def test_without_weight_the_denoiser_learns_as_without_it(tmp_path, monkeypatch):
    plain = weights(train(2, tmp_path)[1])
    module = aligned(monkeypatch)
    start = weights(module)
    module.alignment.weight = 0.0
    found = weights(train(2, tmp_path, module=module)[1])
    assert_same(plain, {key: value for key, value in found.items() if not key.startswith("alignment.")})
    module = aligned(monkeypatch)
    found = weights(train(2, tmp_path, module=module)[1])
    for part in ("alignment.projector.0", "denoiser.backbone.0"):
        changed = [not torch.equal(start[key], found[key]) for key in start if key.startswith(part)]
        assert all(changed), part
    assert any(not torch.equal(plain[key], found[key]) for key in plain)


def test_training_adds_it_and_validation_does_not(monkeypatch):
    plain, module = make_module(2), aligned(monkeypatch)
    batch = {
        "latent": draws(4, 16, 2, 2),
        "label": torch.arange(4),
        "epoch": torch.zeros(4).long(),
        "index": torch.arange(4),
    }
    torch.testing.assert_close(
        module.losses(batch, "validate", 0.0), plain.losses(batch, "validate", 0.0), rtol=0, atol=0
    )
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    difference = module.losses(batch, "train", 0.1) - plain.losses(batch, "train", 0.1)
    assert difference.abs().min() > 1e-3
    torch.testing.assert_close(difference.mean(), logged["train/alignment"], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_ends_bitwise_where_the_whole_one_does(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNED", "conv")
    whole = weights(train(2, tmp_path / "whole", callbacks=(ema_of(2),))[1])
    assert "alignment.projector.weight" in whole
    train(2, tmp_path, steps=3, callbacks=(ema_of(2), RunCheckpoint(str(tmp_path))))
    rest = train(2, tmp_path, callbacks=(ema_of(2),), checkpoint=str(tmp_path / "last.ckpt"))[1]
    assert_same(whole, weights(rest))
    monkeypatch.delenv("ALIGNED")
    with pytest.raises(ValueError, match=r"the checkpoint does not fit Stage2Module.*alignment"):
        train(2, tmp_path, callbacks=(ema_of(2),), checkpoint=str(tmp_path / "last.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_or_not_it_is_the_same_but_for_rounding(checkpointing, tmp_path, monkeypatch):
    """Dynamo alone: what is handed over leaves the graph."""
    plain = weights(train(2, tmp_path, module=aligned(monkeypatch))[1])
    if checkpointing:
        monkeypatch.setenv("CHECKPOINTING", "1")
    module = aligned(monkeypatch)
    module.denoiser.compile(backend="aot_eager")
    assert_same(plain, weights(train(2, tmp_path, module=module)[1]), atol=1e-5, rtol=1e-4)


def test_another_encoder_may_be_the_target(tmp_path, monkeypatch):
    """With the autoencoder's own, and latents that are not normalised, the target is the same."""
    own, module = aligned(monkeypatch), aligned_to(monkeypatch, seed=0)
    found = weights(train(2, tmp_path, module=module)[1])
    assert not [key for key in found if "encoder" in key]
    assert_same(weights(train(2, tmp_path, module=own)[1]), found)
    batch = {"latent": draws(2, 16, 2, 2), "epoch": torch.zeros(2), "index": torch.arange(2)}
    with pytest.raises(ValueError, match=r"alignment\.encoder needs images, and data=latents holds none"):
        module.aligned_to(batch, batch["latent"])


def test_a_run_goes_on_with_the_encoder_that_it_was_aligned_with(tmp_path, monkeypatch):
    options = {"callbacks": (ema_of(2), RunCheckpoint(str(tmp_path)))}
    train(2, tmp_path, steps=1, module=aligned_to(monkeypatch, seed=0), **options)
    last = tmp_path / "last.ckpt"
    train(2, tmp_path, steps=2, module=aligned_to(monkeypatch, seed=0), checkpoint=str(last), **options)
    with pytest.raises(ValueError, match=r"begun with another alignment\.encoder: weights \w+… and not \w+…; give"):
        train(2, tmp_path, steps=3, module=aligned_to(monkeypatch, seed=1), checkpoint=str(last), **options)
    checkpoint = torch.load(last, weights_only=False)
    del checkpoint["alignment_encoder"]  # as former versions
    torch.save(checkpoint, tmp_path / "former.ckpt")
    former = str(tmp_path / "former.ckpt")
    train(2, tmp_path, steps=3, module=aligned_to(monkeypatch, seed=1), checkpoint=former, **options)


def test_a_configuration_with_another_encoder_to_align_with_is_refused():
    given = ["stage=2", "latent.stats=none", "alignment=repa"]
    before, now = (compose("train", [*given, f"+encoder@alignment.encoder={name}"]) for name in ("dinov2_s", "mae"))
    check_same_run(before, plain(before), "run")
    with pytest.raises(ConfigError, match=r"cannot be continued: .*alignment\.encoder\.\w+ was '.* and is now '"):
        check_same_run(now, plain(before), "run")
    with pytest.raises(ConfigError, match=r"alignment\.encoder was None and is now {"):
        check_same_run(now, plain(compose("train", given)), "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repa", "irepa"])
def test_the_choices_make_what_they_say(name):
    cfg = compose(
        "train", ["stage=2", f"alignment={name}", "encoder=dinov2", "latent.stats=none", *SMALL, "denoiser.depth=8"]
    )
    alignment = make(cfg.alignment)
    assert (alignment.width, alignment.channels, alignment.block) == (32, 768, 8)
    alignment.watch(make(cfg.denoiser))
    assert (alignment.weight, alignment.target) == {"repa": (0.5, "plain"), "irepa": (1.0, "zscore")}[name]
    assert "alignment" not in compose("train", ["stage=2", "latent.stats=none"])


@pytest.mark.slow
def test_runs_that_are_read_know_nothing_of_it(tmp_path):
    given = ["experiment=digits_stage2", "alignment=irepa", "alignment.block=1", *ENCODER, "latent.stats=none", *SMALL]
    steps = ["denoiser.depth=1", "trainer.max_steps=2", "trainer.val_check_interval=2", "data.batch_size=8"]
    quiet = ["decoder_checkpoint=null", "trainer.enable_progress_bar=false", "callbacks.preview=null"]
    train_command(compose("train", [*given, *steps, *quiet, f"output_dir={tmp_path}/run"]))
    state = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=False)["state_dict"]
    assert {"alignment.projector.weight", "alignment.projector.bias"} <= state.keys()
    bundle = read(tmp_path / "run")
    assert "alignment" not in {*bundle.description, *bundle.states}
    denoiser = make_part("denoiser", bundle.description["denoiser"])
    bundle.fill("denoiser", denoiser)
    assert denoiser.watched is None
    assert "lignment" not in str(describe(denoiser))


def test_muon_trains_the_projector_too():
    module = Stage2Module(
        make_module(2).autoencoder,
        denoiser := DiT(16, 2, 16, 2, 2, num_classes=4),
        FlowMatching(),
        MuonAdamW,
        alignment=Alignment(16, 16, 1, hidden=8),
    )
    optimizer = module.optimizer(list(module.networks()[0].named_parameters()))
    held = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    assert held == {id(weight) for part in (denoiser, module.alignment) for weight in part.parameters()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projector": "deep"}, "alignment.projector='deep' is unknown; choose one of mlp, conv, linear"),
        ({"target": "norm"}, "alignment.target='norm' is unknown; choose one of plain, zscore"),
        ({"loss": "l1"}, "alignment.loss='l1' is unknown; choose one of cosine, mse"),
        ({"hidden": 0}, "alignment.hidden=0 must be at least 1"),
        ({"weight": -1.0}, "alignment.weight=-1.0 must not be negative"),
        ({"block": 4}, r"alignment.block=4 must lie in \[1, 3\], the denoiser's blocks"),
        ({"width": 8}, "alignment.width=8 must be 16, that of block 2"),
        ({"channels": 9}, "alignment.channels=9 must be 8, those of the latents"),
        ({"encoder": tiny_encoder()}, "alignment.encoder has random weights, which a continued run would not have"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Alignment(**{"width": 16, "channels": 8, "block": 2, **change}).watch(KINDS["dit"]())


def test_tokens_and_target_must_be_as_many():
    with pytest.raises(ValueError, match="compares 2×2 tokens of the denoiser with 4×4 of the target"):
        Alignment(16, 8, 1).watch(DiT(8, 4, 16, 1, 2, num_classes=5, patch=2))


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_two_processes_are_one_with_twice_the_batch(projector, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNED", projector)
    one = weights(train(2, tmp_path)[1])
    two = run_script(2, 2, 2, 1, 6, tmp_path / "two.pt")
    assert_same(one, {key: two[key] for key in one}, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_shared_out_among_processes_it_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNED", "mlp")
    script("aligned", tmp_path)
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    assert_same(one, torch.load(tmp_path / "last.ckpt", weights_only=False)["state_dict"], atol=1e-5, rtol=1e-4)
