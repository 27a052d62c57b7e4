"""What notebooks call: rae.load, latents as colours, previews that a notebook shows."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

import rae
from rae.condition import readable_names
from rae.data import ImageTransform
from rae.flow import ClassifierFreeGuidance, HeunSampler, NoGuidance, PublishedGrid
from rae.generator import Generator
from rae.image import latent_colours, save_png, to_float, to_tensor, to_uint8
from rae.io.errors import ConfigError
from rae.training.preview import ReconstructionPreview
from tests.helpers.small_models import make_generator


@pytest.mark.slow
def test_an_export_is_loaded_with_what_it_was_exported_with_unless_told(tmp_path):
    generator = make_generator().eval()
    generator.guidance, generator.sampler = ClassifierFreeGuidance(2.0), HeunSampler()
    generator.save_pretrained(tmp_path / "export", store_encoder=True)
    again = rae.load(tmp_path / "export")
    assert isinstance(again, Generator)
    assert not again.training
    assert isinstance(again.sampler, HeunSampler)
    assert again.guidance.scale == 2.0
    assert torch.equal(again([0], seed=1), generator([0], seed=1))
    for overrides in (["guidance=none"], "guidance=none"):
        other = rae.load(str(tmp_path / "export"), overrides, encode=False)
        assert isinstance(other.guidance, NoGuidance)
        assert isinstance(other.sampler, HeunSampler)


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        rae.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"did you mean 'cfg'|choose one of"):
        rae.load(tmp_path, ["guidance=cgf"])


def test_a_call_takes_settings_and_changes_nothing_else():
    draw = make_generator()
    before = draw([3], seed=1)
    images = draw(3, seed=1, steps=2, guidance_scale=1)
    plain = Generator(draw.autoencoder, draw.denoiser, draw.flow, HeunSampler(PublishedGrid(3))).eval()
    assert torch.equal(images, plain([3], seed=1))
    assert torch.equal(draw([3], seed=1), before)
    assert torch.equal(plain(3, guidance_scale=2.5), plain.configured(guidance_scale=2.5)(torch.tensor(3)))
    assert isinstance(plain.configured(guidance_scale=2.5).guidance, ClassifierFreeGuidance)
    pictures = draw([3, 4], seed=1, output="pil")
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    assert torch.equal(draw([3, 4], seed=1, output="uint8"), draw.draw([3, 4], seed=1))
    assert list(pictures[0].getdata())[:1] == [tuple(draw.draw([3, 4], seed=1)[0, :, 0, 0].tolist())]
    for wrong, message in (({"output": "png"}, "output='png'"), ({"steps": 0}, "steps=0"), ({"steps": True}, "steps=")):
        with pytest.raises(ValueError, match=message):
            draw(3, **wrong)
    assert repr(draw).startswith("Generator(32×32 px, 10 classes, DiTDH 0.1 M parameters, HeunSampler(3 steps, 6 eval")


def test_a_photograph_is_reconstructed_in_one_line(tmp_path):
    photograph = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    path = save_png(photograph, tmp_path / "photo.png")
    make_generator().autoencoder.save_pretrained(tmp_path / "export")
    model = rae.load(tmp_path / "export")
    model.reconstruct(path).save(tmp_path / "again.png")
    with Image.open(path) as opened:
        drawn = model.reconstruct(opened)
        expected = model(to_float(ImageTransform(32, "center_crop", exact=True)(opened, 0)[None]))
    assert drawn.size == (32, 32)
    assert torch.equal(to_tensor(drawn), to_uint8(expected)[0])
    assert torch.equal(to_tensor(Image.open(tmp_path / "again.png")), to_tensor(drawn))
    assert repr(model) == (
        "RAE(TimmEncoder(vit_tiny_patch16_224), latents 32×4×4, ViTDecoder 0.0 M parameters, images 32×32 px)"
    )
    with pytest.raises(OSError, match="no image of a known format"):
        model.reconstruct(tmp_path / "export" / "config.json")


def test_an_open_picture_is_reconstructed_as_its_file_is(tmp_path):
    """Turned as its EXIF orientation says, transparency on white, 16-bit grey as 8 bits."""
    model = make_generator().autoencoder
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    turned = photograph.getexif()
    turned[0x0112] = 6
    photograph.save(tmp_path / "turned.jpg", exif=turned)
    clear = photograph.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16).save(tmp_path / "grey.png")
    for name in ("turned.jpg", "clear.png", "grey.png"):
        with Image.open(tmp_path / name) as opened:
            drawn = to_tensor(model.reconstruct(opened))
        assert torch.equal(drawn, to_tensor(model.reconstruct(tmp_path / name))), name


def test_classes_have_names(tmp_path):
    named = make_generator()
    assert readable_names("imagenet1k")[207] == readable_names(["n02099601"])[0] == "golden retriever"
    named.class_names = ("tench, Tinca tinca", *"bcdefghij")
    named.save_pretrained(tmp_path)
    again = rae.load(tmp_path)
    assert again.class_names == named.class_names
    assert again.labels_of(["Tinca Tinca", 4, "J"]).tolist() == [0, 4, 9]
    with pytest.raises(ValueError, match=r"class 'tinca tinc' is unknown; near: tinca tinca"):
        again("tinca tinc")
    with pytest.raises(ValueError, match="this model knows numbers alone"):
        make_generator()("cat")
    with pytest.raises(ValueError, match="class_names has 1 names for 10 classes"):
        Generator(again.autoencoder, again.denoiser, again.flow, again.sampler, class_names=["a"])


@pytest.mark.slow
def test_runs_are_loaded_as_what_they_are(trained):
    generator = rae.load(trained / "stage2", ["guidance=cfg", "guidance.scale=3"])
    assert generator.guidance.scale == 3
    assert generator.sampler.grid.points == 6  # the run's own
    images = torch.rand(2, 3, 32, 32)
    autoencoder = rae.load(trained / "stage1")
    assert torch.equal(
        generator.autoencoder.decoder(torch.ones(1, 64, 4, 4)), autoencoder.decoder(torch.ones(1, 64, 4, 4))
    )
    assert autoencoder(images).shape == images.shape


def test_colours_are_the_principal_components():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(12, 3, generator=generator, dtype=torch.float64))[0]
    values = torch.rand(5, 3, 8, 8, generator=generator, dtype=torch.float64) * torch.tensor([9.0, 3.0, 1.0]).view(
        3, 1, 1
    )
    latents = torch.einsum("bkhw,ck->bchw", values, axes) + 7
    colours = latent_colours(latents.float()).double()
    assert colours.dtype == torch.float64
    assert tuple(colours.shape) == (5, 3, 8, 8)
    for number in range(3):
        both = torch.stack([colours[:, number].flatten(), values[:, number].flatten()])
        assert torch.corrcoef(both)[0, 1].abs() > 0.95
        assert (colours[:, number].min(), colours[:, number].max()) == (0, 255)
    assert torch.equal(latent_colours(latents.float() * 5), latent_colours(latents.float()))
    for wrong, message in ((latents[0], "B×C×h×w"), (latents[:, :2], "at least 3 channels"), (latents / 0, "finite")):
        with pytest.raises(ValueError, match=message):
            latent_colours(wrong)


def test_live_previews_replace_each_other(tmp_path, monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda image: shown.append(("update", image)))
    module = SimpleNamespace(
        Image=lambda filename: filename, display=lambda image, display_id: shown.append(("display", image)) or handle
    )
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    preview = ReconstructionPreview(count=2, folder=str(tmp_path), live=True)
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=True, global_step=0, loggers=[])
    for trainer.global_step in (1, 2, 3):
        preview._pairs = [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
        preview.on_validation_epoch_end(trainer, None)
    files = [str(tmp_path / f"reconstruction_{step:08d}.png") for step in (1, 2, 3)]
    assert shown == [("display", files[0]), ("update", files[1]), ("update", files[2])]


def test_live_previews_need_ipython(monkeypatch):
    monkeypatch.setattr("rae.training.preview.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="live=true shows pictures in a notebook, which needs IPython"):
        ReconstructionPreview(live=True)
