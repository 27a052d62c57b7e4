"""Fine-tuning: decoders, discriminators and denoisers that begin with trained weights, and the encoder-feature consistency."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import rae
from rae.cli.build import CHECKPOINTS, build
from rae.cli.errors import compose
from rae.condition import LabelTokens
from rae.denoiser import DiTDH, InContextDiTDH
from rae.formats import read
from rae.formats.denoiser import begin_with
from rae.formats.discriminator import begin_heads
from rae.formats.run import read_config, read_step, trained_weights
from rae.image import to_float
from rae.io.errors import ConfigError
from rae.loss import Phases, Stage1Loss
from rae.training.stage1 import Stage1Module
from rae.training.teacher import begin
from tests.denoiser.test_denoiser import randomised
from tests.helpers.digits_runs import run, stage1_options, stage2_options
from tests.helpers.small_runs import make_module, train
from tests.training.test_fusereg import module as fusereg_module
from tests.training.test_plain_procedure import Record

NONE = Phases(perceptual=False, discriminator=False, gan=False)


# --- the encoder-feature consistency -----------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, 0.1])
def test_the_step_is_that_of_l1_and_the_features_difference(weight, tmp_path: Path):
    """One SGD step without noise against autograd through decoder, encoder network and norm, written out."""
    lr, record, start = 0.05, Record(), make_module(1)
    loss = Stage1Loss(gan_weight=0, consistency=weight)
    module = Stage1Module(make_module(1).autoencoder, loss, partial(torch.optim.SGD, lr=lr), noise_tau=0.0)
    train(1, tmp_path, steps=1, callbacks=(record,), module=module)
    images = to_float(record.batches[0]["image"])
    encoder, decoder = start.autoencoder.encoder, start.autoencoder.decoder

    def features(pictures):
        tokens = encoder.network.forward_features(
            (pictures - encoder.image_mean) / encoder.image_std
        )  # to the final norm
        return tokens[:, encoder.network.num_prefix_tokens :]

    made = decoder(encoder(images))
    total = (made - images).abs().mean()
    if weight:
        total = total + weight * (features(made) - features(images).detach()).square().mean()
    gradients = torch.autograd.grad(total, list(decoder.parameters()))
    for before, after, gradient in zip(decoder.parameters(), module.decoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(after, before - lr * gradient, atol=1e-7, rtol=1e-5)


def test_the_loss_is_the_weighted_difference_of_features():
    image, target = torch.rand(2, 2, 3, 8, 8)
    losses = Stage1Loss(consistency=0.5).reconstruction(image, target, NONE, lambda x: 3 * x, 3 * target)
    torch.testing.assert_close(losses["consistency"], 9 * (image - target).square().mean())
    torch.testing.assert_close(losses["total"], losses["l1"] + 0.5 * losses["consistency"])
    assert set(Stage1Loss().reconstruction(image, target, NONE)) == {"l1", "total"}
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"loss\.consistency={wrong} must be above 0, or null for none"):
            Stage1Loss(consistency=wrong)


def test_the_encoder_is_the_same_with_gradients_and_its_weights_have_none():
    for encoder in (make_module(1).autoencoder.encoder, fusereg_module(1).autoencoder.encoder):
        images = torch.rand(2, 3, 20, 20, requires_grad=True)  # resized, too
        with torch.autocast("cpu", torch.bfloat16):
            latents, exact = encoder.differentiable(images), encoder(images)
        assert torch.equal(latents, exact)
        assert not exact.requires_grad
        latents.square().sum().backward()
        assert images.grad.abs().min() > 0
        assert all(weight.grad is None for weight in encoder.parameters())


def test_with_dropped_layers_features_are_compared_with_those_of_all(monkeypatch, tmp_path: Path):
    module, seen = fusereg_module(1, 0.5), []
    module.loss.consistency = 0.1
    monkeypatch.setattr(
        module.loss,
        "reconstruction",
        lambda *given: seen.append(given) or Stage1Loss.reconstruction(module.loss, *given),
    )
    train(1, tmp_path, steps=1, module=module)
    (_, images, _, _, latents) = seen[0]
    assert torch.equal(latents, module.autoencoder.encoder(images))


# --- the decoder and the discriminator ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_begins_with_the_decoder_and_the_heads_of_another(trained: Path, tmp_path: Path):
    """It is built as the other's, whatever ``decoder=`` says, and its own checkpoint says so."""
    begun = [
        *stage1_options(trained),
        f"decoder_checkpoint={trained}/stage1",
        f"discriminator_checkpoint={trained}/stage1",
    ]
    made = build(compose("train", [*begun, "decoder.depth=2", f"output_dir={tmp_path}/run"])).module
    average = trained_weights(trained / "stage1", "autoencoder.decoder")
    heads = trained_weights(trained / "stage1", "discriminator.heads")
    for own, theirs in ((made.decoder, average), (made.discriminator.heads, heads)):
        assert all(torch.equal(value, theirs[key]) for key, value in own.state_dict().items())
    run("train", *begun, "decoder.depth=2", "trainer.max_steps=2", f"output_dir={tmp_path}/run")
    assert read_config(tmp_path / "run")["decoder"]["depth"] == 4
    assert rae.load(tmp_path / "run").decoder.state_dict().keys() == average.keys()


def test_heads_come_from_runs_and_from_the_originals_checkpoints(tmp_path: Path):
    """The original's file, written here in its naming, gives the heads back; a backbone in their place is told."""
    heads = make_module(1).discriminator.heads
    for weight in heads.state_dict().values():
        weight.normal_()
    names = {
        ".first.": ".0.0.",
        ".first_norm.": ".0.1.",
        ".residual.": ".1.fn.0.",
        ".residual_norm.": ".1.fn.1.",
        ".last.": ".2.",
    }
    theirs = {}
    for key, value in heads.state_dict().items():
        for ours, name in names.items():
            key = key.replace(ours, name)
        if "fn.1" not in key and ".0.1." not in key:
            for ending, name in ((".weight", ".weight_orig"), (".u", ".weight_u"), (".v", ".weight_v")):
                key = key.removesuffix(ending) + name if key.endswith(ending) else key
        theirs[f"heads.{key}"] = value
    torch.save({"model": {}, "disc": theirs}, tmp_path / "stage1.pt")
    torch.save({"blocks.0.norm1.weight": torch.ones(3), "cls_token": torch.ones(1)}, tmp_path / "dino.pth")
    begun = make_module(1).discriminator
    begin_heads(begun, str(tmp_path / "stage1.pt"))
    assert all(torch.equal(value, heads.state_dict()[key]) for key, value in begun.heads.state_dict().items())
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    for name in ("dino", "list"):
        with pytest.raises(ConfigError, match=rf"{name}\.pth holds no trained heads.*discriminator\.checkpoint=…"):
            begin_heads(begun, str(tmp_path / f"{name}.pth"))
    with pytest.raises(FileNotFoundError, match=r"nothing.* does not exist"):
        begin_heads(begun, str(tmp_path / "nothing"))


@pytest.mark.slow
def test_heads_without_a_discriminator_are_refused(tmp_path: Path):
    options = ["discriminator=none", "loss=l1", "discriminator_checkpoint=run", "encoder.pretrained=false"]
    cfg = compose("train", ["stage=1", "data=synthetic", "decoder=vit_b", *options, f"output_dir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"discriminator_checkpoint=.*run with discriminator=none: choose"):
        build(cfg)


@pytest.mark.parametrize("key", CHECKPOINTS)
def test_what_is_nowhere_is_said_before_networks_are_built(key, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("rae.cli.build.make", lambda *_, **__: pytest.fail("a network is built"))
    cfg = compose(
        "train", ["stage=2", "data=synthetic", "latent.stats=none", f"{key}=nobody/nothing", f"output_dir={tmp_path}"]
    )
    with pytest.raises(FileNotFoundError, match=r"there is no 'nobody/nothing' here, and as a hub id: "):
        build(cfg)


@pytest.mark.slow
def test_what_several_keys_name_is_read_once(trained: Path, tmp_path: Path, monkeypatch):
    found = []
    monkeypatch.setattr("rae.commands.train.read", lambda source: found.append(source) or read(source))
    options = [one for one in stage2_options(trained) if not one.startswith("experiment=") and "grid" not in one]
    begun = [f"{key}={trained}/stage2" for key in ("init_checkpoint", "teacher_checkpoint")]
    output = ["trainer.max_steps=1", f"output_dir={tmp_path}"]
    run("train", "experiment=digits_meanflow", *options, *begun, *output)
    assert sorted(found) == [f"{trained}/stage1", f"{trained}/stage2"]
    # A run that goes on has its weights, and those that it began with are no longer looked for.
    begun[0] = "init_checkpoint=nobody/nothing"
    run("train", "experiment=digits_meanflow", *options, *begun, *output, "trainer.max_steps=2")
    assert read_step(tmp_path) == 2


# --- new classes -------------------------------------------------------------------------------------------------


def dit(num_classes: int) -> DiTDH:
    return randomised(DiTDH(8, 4, 32, 2, 2, 48, 1, 2, num_classes=num_classes)).eval()


def in_context(num_classes: int):
    sizes = {"width": 32, "depth": 3, "heads": 2, "head_width": 48, "head_depth": 1, "head_heads": 2}
    return randomised(InContextDiTDH(8, 4, condition=LabelTokens(num_classes, 2), base_depth=2, **sizes)).eval()


@pytest.mark.parametrize("kind", [dit, in_context])
def test_old_classes_are_what_they_were_and_new_ones_begin_as_none(kind):
    old, new = kind(5), kind(8)
    begin_with(new, old.state_dict(), "init_checkpoint=run")
    x, t = torch.randn(6, 8, 4, 4), torch.linspace(0.1, 0.9, 6)
    expected = old(x, t, label=torch.tensor([0, 1, 2, 3, 4, 5]))  # the last one is no class
    assert torch.equal(new(x, t, label=torch.tensor([0, 1, 2, 3, 4, 8])), expected)
    for label in (5, 6, 7):
        assert torch.equal(new(x, t, label=torch.full((6,), label)), old(x, t, label=torch.full((6,), 5)))


@pytest.mark.parametrize("kind", [dit, in_context])
def test_fewer_classes_are_refused_with_both_numbers(kind):
    with pytest.raises(
        ValueError, match=r"run knows 8 classes, data\.num_classes=5: .*set data\.num_classes=8 .*or more"
    ):
        begin_with(kind(5), kind(8).state_dict(), "init_checkpoint=run")
    with pytest.raises(ValueError, match=r"of another shape: .*table\.weight: file \(9,\), model \(6, "):
        begin_with(kind(5), {k: v[:, 0] if "table" in k else v for k, v in kind(8).state_dict().items()}, "run")


@pytest.mark.slow
def test_a_run_with_new_classes_draws_the_old_ones_as_before(trained: Path, tmp_path: Path):
    """Of a run's checkpoint and its configuration: ``data.num_classes`` alone is larger."""
    cfg = compose("train", [*stage2_options(trained), "denoiser.num_classes=13"])
    denoiser = build(OmegaConf.merge(cfg, {"init_checkpoint": str(trained / "stage2")})).module.denoiser.eval()
    draw = rae.load(trained / "stage2")
    expected = draw([3, 7, 9], seed=0)
    draw.denoiser, draw.class_names = denoiser, ()
    assert torch.equal(draw([3, 7, 9], seed=0), expected)
    with pytest.raises(ConfigError, match=r"knows 10 classes, data\.num_classes=7"):
        begin(
            build(compose("train", [*stage2_options(trained), "denoiser.num_classes=7"])).module.denoiser,
            str(trained / "stage2"),
        )
