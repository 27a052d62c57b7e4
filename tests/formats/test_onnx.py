"""Networks written as ONNX, against PyTorch's; the sampling loop of docs/deploy.md, as it stands there."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from rae.autoencoder import RAE
from rae.cli import checks
from rae.cli.errors import compose
from rae.commands.convert import convert
from rae.condition import LabelTokens, NavigationTokens
from rae.denoiser import DiT, DiTDH, InContextDiT, InContextDiTDH, RiT
from rae.flow import (
    ClassifierFreeGuidance,
    EulerSampler,
    FlowMatching,
    FullGrid,
    GVPPath,
    JumpSampler,
    MeanFlow,
    PublishedGrid,
)
from rae.formats import onnx, save_onnx
from rae.generator import Generator
from rae.io.errors import ConfigError
from rae.latent import LatentNormalizer
from tests.helpers.guides import ROOT, blocks
from tests.helpers.small_models import make_autoencoder, make_generator, randomise
from tests.helpers.text_runs import make_text_generator


def loud(denoiser):
    """Weights with which labels and times change the velocity visibly."""
    randomise(denoiser, 1)
    for parameter in denoiser.parameters():
        parameter.data *= 4
    return denoiser


def generator(denoiser=None, flow=None, sampler=None, guidance=None, autoencoder=None) -> Generator:
    denoiser = loud(denoiser or DiTDH(32, 4, 32, 1, 4, 48, 1, 4, 10))
    sampler = sampler or EulerSampler(PublishedGrid(6))
    return Generator(
        autoencoder or make_autoencoder(), denoiser, flow or FlowMatching(shift=1.4), sampler, guidance
    ).eval()


def run(folder: Path, part: str, **inputs: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(folder / f"{part}.onnx").run(None, inputs)


@pytest.mark.slow
def test_the_loop_on_the_page_draws_what_the_generator_draws(tmp_path: Path, monkeypatch):
    model = generator(DiT(32, 4, 32, 1, 4, 10), guidance=ClassifierFreeGuidance(2.5, (0.3, 1.0)))
    model.class_names = tuple(f"digit {number}" for number in range(10))
    source = model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    convert(compose("convert", [f"checkpoint={source}", "to=onnx", "output_dir=exported_onnx"]))
    (loop,) = (block for block in blocks(ROOT / "docs" / "deploy.md", "python") if "onnxruntime" in block)
    found: dict = {}
    exec(loop, found)
    noise = torch.from_numpy(found["noise"])
    assert found["images"].shape == (2, 3, 32, 32)
    with torch.no_grad():
        latents = model.latents([3, 7], noise=noise)
        images = model.autoencoder.decode(latents).clamp(0, 1)
    assert np.abs(found["x"] - latents.numpy()).max() < 1e-4
    assert np.abs(found["images"] - images.numpy()).max() < 1e-4
    assert (model.configured(guidance_scale=1).latents([3, 7], noise=noise) - latents).abs().max() > 0.05
    assert Path("1.png").is_file()

    about = found["about"]
    assert about["class_names"][7] == "digit 7"
    assert (about["opset"], about["shift"], about["prediction"]) == (20, 1.4, "velocity")
    assert all(0 <= one["difference"] <= 1e-4 for one in about["networks"].values())
    assert about["networks"]["denoiser"]["inputs"]["x_t"] == {"shape": ["batch", 32, 4, 4], "dtype": "float32"}
    assert not list(Path("exported_onnx").glob("*.data"))


def decoder_input() -> RAE:
    made = make_autoencoder()
    values = torch.Generator().manual_seed(5)
    mean, var = torch.randn(48, 4, 4, generator=values), torch.rand(48, 4, 4, generator=values) + 0.1
    token = torch.randn(48, generator=values)
    return RAE(
        made.encoder, made.decoder, LatentNormalizer((48, 4, 4), mean, var, space="decoder_input", class_token=token)
    ).eval()


KINDS = {
    "guide": make_generator,
    "base": lambda: generator(InContextDiTDH(32, 4, 32, 3, 2, 48, 1, 2, LabelTokens(10), base_depth=2)),
    "text": make_text_generator,
    "navigation": lambda: generator(InContextDiT(32, 4, 32, 1, 2, NavigationTokens(32, 4, frames=2), base_depth=None)),
    "class_token": lambda: generator(RiT(32, 4, 32, 2, 4, 10, context_tokens=3, context_start=1)),
    "data": lambda: generator(flow=FlowMatching(prediction="data", shift=1.4)),
    "noise": lambda: generator(DiT(32, 4, 32, 1, 4, 10), FlowMatching(GVPPath(), prediction="noise")),
    "second_time": lambda: generator(
        DiT(32, 4, 32, 1, 4, 10, second_time=True), MeanFlow(prediction="data"), JumpSampler(FullGrid(2))
    ),
    "decoder_input": lambda: generator(DiT(48, 4, 32, 1, 4, 10), autoencoder=decoder_input()),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(kind: str, tmp_path: Path):
    """Velocities at several batch sizes, and what is decoded."""
    model = KINDS[kind]()
    about = json.loads((save_onnx(model, tmp_path) / onnx.CONFIG).read_text())
    for rows in (1, 2, 5):
        values = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, *model.denoiser.state_shape, generator=values)
        t = torch.rand(rows, generator=values) * 0.9 + 0.05
        told = model.denoiser.condition.nothing(rows)
        for name, value in told.items():
            if value.dtype == torch.int64:
                told[name] = torch.randint(0, 11, (rows,), generator=values)
            elif value.is_floating_point():
                told[name] = torch.randn(value.shape, generator=values)
        given = {"x_t": x, "t": t, **told}
        options = {}
        if kind == "second_time":
            given["r"] = options["r"] = t * torch.rand(rows, generator=values)
        with torch.no_grad():
            output = model.denoiser(x, t, **told, **options)
            velocity = model.flow.velocity(output, x, t)
            image = model.autoencoder.decode(model.denoiser.split(x)[0]).clamp(0, 1)
        found = run(tmp_path, "denoiser", **{name: value.numpy() for name, value in given.items()})
        assert np.abs(found[0] - velocity.numpy()).max() < 1e-4 * max(1, velocity.abs().max())
        latents = model.denoiser.split(x)[0].numpy().copy()
        assert np.abs(run(tmp_path, "decoder", latents=latents)[0] - image.numpy()).max() < 1e-5
        if kind == "base":
            base = model.denoiser(x, t, **told, base=True)[1].detach().numpy()
            assert np.abs(found[1] - base).max() < 1e-4
            assert np.abs(found[1] - found[0]).max() > 1e-3
    assert about["times"] == model.sampler.grid.times(1.0 if kind == "second_time" else model.flow.shift).tolist()
    assert (tmp_path / "guide.onnx").exists() == (kind == "guide")
    if kind == "class_token":  # as the page says
        noise = model.noise(0, range(2))
        flat = noise.flatten(2).numpy()
        begin = np.concatenate([flat.mean(2, keepdims=True), flat], 2)
        assert np.allclose(begin, model.denoiser.begin(noise).numpy(), atol=1e-6)
        assert np.array_equal(
            begin[..., 1:].reshape(-1, 32, 4, 4), model.denoiser.split(torch.from_numpy(begin))[0].numpy()
        )


@pytest.mark.slow
def test_an_autoencoder_gives_its_decoder_and_large_weights_a_file_of_their_own(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(onnx, "_LARGEST", 1000)
    model = make_autoencoder()
    save_onnx(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["decoder.onnx", "decoder.onnx.data", "onnx.json"]
    latents = torch.randn(4, 32, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = model.decode(latents).clamp(0, 1).detach().numpy()
    assert np.abs(run(tmp_path, "decoder", latents=latents.numpy())[0] - expected).max() < 1e-5
    with pytest.raises(FileExistsError, match="choose another folder"):
        save_onnx(model, tmp_path)


class ReadsValues(DiT):
    """A denoiser whose path depends on its input's values."""

    def forward(self, x_t, t, label, *, r=None):
        return super().forward(x_t * (2 if x_t.sum() > 0 else 3), t, label, r=r)


class ReadsTheBatch(DiT):
    """A denoiser that reads the size of its batch as a number."""

    def forward(self, x_t, t, label, *, r=None):
        return super().forward(x_t / int(x_t.shape[0]), t, label, r=r)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"), [(ReadsValues, "cannot be expressed in ONNX"), (ReadsTheBatch, "a batch of 3 alone")]
)
def test_what_cannot_be_expressed_is_refused_in_words(kind, words: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"to=onnx: the denoiser .*{words}"):
        save_onnx(generator(kind(32, 4, 32, 1, 4, 10)), tmp_path)


def test_values_that_differ_are_refused(tmp_path: Path, monkeypatch, caplog):
    class Session:
        def __init__(self, *args, **options):
            pass

        def run(self, outputs, inputs):
            return [next(iter(inputs.values())) + 2e-4]

    network, given = torch.nn.Identity(), {"x": torch.linspace(-1, 1, 6).reshape(3, 2)}
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(ValueError, match=r"to=onnx: a\.onnx differs from PyTorch by 0\.0002, more than 0\.0001"):
        onnx.compare("a", network, given, tmp_path / "a.onnx")
    assert onnx.compare("a", network, {"x": given["x"] * 3}, tmp_path / "a.onnx") == pytest.approx(2e-4 / 3, rel=1e-3)
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert onnx.compare("a", network, given, tmp_path / "a.onnx") is None
    assert "not compared with PyTorch, since onnxruntime is not installed" in caplog.text


def test_without_the_packages_the_command_says_which(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'to=onnx needs onnx and onnxscript.*pip install "rae\[onnx\]"'):
        checks.check_files(compose("convert", ["checkpoint=x", "to=onnx"]), "convert")
