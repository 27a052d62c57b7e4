"""What stands behind the web page, against the library; the page itself is clicked through in test_app_browser.py."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae.app.command import app, open_perceptual, open_viewer
from rae.app.viewer import Viewer
from rae.cli.checks import check_files
from rae.cli.config import absolute_paths
from rae.cli.errors import compose
from rae.cli.models import open_generator
from rae.denoiser import DiTDH
from rae.flow import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ComposedGuidance,
    EulerMaruyamaSampler,
    EulerSampler,
    FlowMatching,
    FullGrid,
    GVPPath,
    PublishedGrid,
)
from rae.generator import Generator
from rae.image import center_crop, to_uint8
from rae.io.errors import ConfigError
from rae.loss import PerceptualLoss
from tests.helpers.small_runs import make_module

SIDE, CLASSES = 16, 4


def generator(sampler=None, guidance=None, guide=None) -> Generator:
    """A generator with random weights: images of 16 pixels, 4 classes."""
    module = make_module(2)
    torch.nn.init.normal_(module.denoiser.label_embedding.table.weight, std=5)  # so that classes differ visibly
    sampler = sampler or EulerSampler(PublishedGrid(6))
    return Generator(module.autoencoder, module.denoiser, module.flow, sampler, guidance, guide).eval()


def picture(path: Path, width: int = 50, height: int = 37) -> Path:
    """A random image that is no square."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


# --- behind the page ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_reconstruction_is_that_of_the_autoencoder(tmp_path):
    model = generator()
    found = Viewer(model, perceptual=PerceptualLoss(pretrained=False)).reconstruct(picture(tmp_path / "a.png"))
    square = np.array(center_crop(Image.open(tmp_path / "a.png"), SIDE))
    assert np.array_equal(found.original.permute(1, 2, 0), square)
    images = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = to_uint8(model.autoencoder(images))[0]
    assert torch.equal(found.picture, expected)
    error = np.mean((square / 255.0 - expected.permute(1, 2, 0).numpy() / 255.0) ** 2)
    assert found.scores["psnr"] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert list(found.scores) == ["psnr", "ssim", "lpips"]
    assert list(Viewer(model.autoencoder).reconstruct(tmp_path / "a.png").scores) == ["psnr", "ssim"]


def test_files_that_are_no_image_are_named(tmp_path):
    viewer = Viewer(generator().autoencoder)
    (tmp_path / "a.png").write_text("text")
    whole = picture(tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"^'notes\.png' is no readable image \(no image of a known format\); give a PNG, JPEG"
    ):
        viewer.reconstruct(tmp_path / "a.png", "notes.png")
    with pytest.raises(ValueError, match=r"b\.png' is no readable image \(.*truncated.*\); give a PNG"):
        viewer.reconstruct(tmp_path / "b.png")


@pytest.mark.parametrize(("name", "kind"), [("cfg", ClassifierFreeGuidance), ("autoguidance", AutoGuidance)])
def test_samples_are_those_of_the_generator(name, kind):
    guide = DiTDH(16, 2, 16, 1, 2, 24, 1, 2, num_classes=CLASSES)
    for parameter in guide.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = generator(guidance=ClassifierFreeGuidance(3.0, (0.2, 0.9)), guide=guide)
    reports = []
    viewer = Viewer(model, batch_size=2)
    drawn = viewer.sample(3, name, 1.5, 4, 7, 5, lambda *report: reports.append(report))
    same = Generator(
        model.autoencoder,
        model.denoiser,
        model.flow,
        EulerSampler(PublishedGrid(5)),
        kind(1.5, (0.2, 0.9)),
        guide,
    )
    expected = to_uint8(same([3] * 5, seed=7))
    assert drawn.shape == (5, 3, SIDE, SIDE)
    assert drawn.dtype == torch.uint8
    assert (drawn.int() - expected.int()).abs().max() <= 1
    assert (drawn.int() - viewer.sample(3, "none", 1.5, 4, 7, 5).int()).abs().max() > 1
    # Three batches of four steps each.
    assert [report[:2] for report in reports] == [(number, 12) for number in range(1, 13)]
    assert [report[2] for report in reports[::4]] == [
        "samples 1 to 2 of 5",
        "samples 3 to 4 of 5",
        "samples 5 to 5 of 5",
    ]
    # The model itself is as it was.
    assert (model.sampler.grid.steps, model.guidance.scale) == (5, 3.0)


@pytest.mark.parametrize(
    "sampler",
    [EulerSampler(FullGrid(3)), EulerMaruyamaSampler(PublishedGrid(9), last_step_size=0.1)],
    ids=["ode", "sde"],
)
def test_steps_change_the_grid_alone(sampler):
    changed = sampler.with_steps(7)
    assert type(changed) is type(sampler)
    assert type(changed.grid) is type(sampler.grid)
    assert changed.grid.steps == 7
    assert {**changed.arguments, "grid": None} == {**sampler.arguments, "grid": None} or "path" in sampler.arguments
    assert getattr(changed, "last_step_size", None) == getattr(sampler, "last_step_size", None)
    reports = []
    Viewer(generator(sampler)).sample(0, steps=7, count=1, on_progress=lambda *report: reports.append(report[:2]))
    assert reports == [(number, changed.calls) for number in range(1, changed.calls + 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"told": 4}, "class must be a whole number in 0 … 3, got 4"),
        ({"told": None}, "class must be a whole number in 0 … 3, got nothing"),
        ({"told": float("inf")}, "class must be a whole number in 0 … 3, got inf"),
        ({"told": 1.5}, "class must be a whole number in 0 … 3, got 1.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"count": 0}, "count must be a whole number of at least 1, got 0"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"scale": float("nan")}, "guidance scale must be a number, e.g. 1.5; 1 is none, got nan"),
        (
            {"guidance": "autoguidance"},
            "guidance='autoguidance' must be one of none, cfg, apg, cfg_zero with this model",
        ),
    ],
)
def test_sampling_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Viewer(generator()).sample(**{"told": 0, **arguments})


def test_an_autoencoder_draws_no_samples():
    with pytest.raises(ValueError, match="has no denoiser"):
        Viewer(generator().autoencoder).sample(0)


# --- opening -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A generator and an autoencoder as exported folders."""
    folder = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    model = generator()
    model.save_pretrained(folder / "generator")
    model.autoencoder.save_pretrained(folder / "autoencoder")
    return folder


def configuration(checkpoint: Path, *overrides: str):
    """The configuration that the command would get."""
    cfg = compose("app", [f"checkpoint={checkpoint}", "device=cpu", *overrides])
    absolute_paths(cfg)
    return cfg


@pytest.mark.slow
def test_lpips_only_where_its_weights_are(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert open_perceptual(None) is None
    with pytest.raises(FileNotFoundError):
        open_perceptual(str(tmp_path / "absent.pth"))


def test_classes_are_shown_with_their_names(exports):
    model = generator()
    assert Viewer(model).title_of(1) == "1"
    model.class_names = ("cat", "dog", "cow", "hen")
    assert Viewer(model).title_of(1) == "1 (dog)"


def test_a_composition_is_offered_where_the_model_came_with_one():
    parts = [ClassifierFreeGuidance(2.0, (0.2, 0.9)), AdaptiveProjectedGuidance(1.0)]
    model = generator(guidance=ComposedGuidance(parts))
    viewer = Viewer(model)
    assert viewer.guidances == ["none", "cfg", "apg", "cfg_zero", "composed"]
    drawn = viewer.sample(3, "composed", 1.0, seed=7, count=2)  # the scale is that of the last part
    same = Generator(model.autoencoder, model.denoiser, model.flow, model.sampler, parts[0])
    assert (drawn.int() - same.draw([3, 3], 7).int()).abs().max() <= 1
    curved = Generator(model.autoencoder, model.denoiser, FlowMatching(GVPPath()), model.sampler)
    assert Viewer(curved).guidances == ["none", "cfg", "cfg_zero"]


def test_without_an_encoder_only_samples_are_drawn(exports):
    viewer, about = open_viewer(configuration(exports / "generator", "encode=false", "sampler.grid.points=3"))
    assert not viewer.encodes
    assert about == f"{exports}/generator on cpu"
    assert viewer.sample(1, count=2).shape == (2, 3, SIDE, SIDE)
    with pytest.raises(ConfigError, match=r"is an autoencoder, which only reconstructs: leave out encode=false"):
        open_viewer(configuration(exports / "autoencoder", "encode=false"))


@pytest.mark.slow
def test_autoguidance_is_offered_where_there_is_a_guide(exports, tmp_path):
    model = generator()
    model.guide = DiTDH(16, 2, 16, 1, 2, 24, 1, 2, num_classes=CLASSES)
    model.save_pretrained(tmp_path / "guided")
    for kind, scale in (("none", 1.0), ("cfg", 1.4), ("autoguidance", 1.4)):  # whatever the page starts with
        given = [f"guidance={kind}", *([] if kind == "none" else [f"guidance.scale={scale}"])]
        viewer = open_viewer(configuration(tmp_path / "guided", *given))[0]
        assert viewer.guidances == ["none", "cfg", "apg", "cfg_zero", "autoguidance"]
        assert viewer.generator.guidance.scale == scale
    expected = Generator(
        model.autoencoder, model.denoiser, model.flow, viewer.generator.sampler, AutoGuidance(3), model.guide
    )
    drawn = viewer.sample(1, "autoguidance", 3, seed=5, count=2)
    assert (drawn.int() - expected.draw([1, 1], 5).int()).abs().max() <= 1
    assert open_generator(configuration(tmp_path / "guided"))[0].guide is None  # commands do not carry it along
    assert open_viewer(configuration(exports / "generator"))[0].guidances == ["none", "cfg", "apg", "cfg_zero"]


def test_absent_gradio_is_named(monkeypatch, exports):
    monkeypatch.setattr("rae.cli.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "rae\[app\]"'):
        check_files(configuration(exports / "generator"), "app")


# --- the page ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_autoencoder_has_one_tab_and_the_page_says_why(exports):
    from rae.app.page import build_page, in_words, score_table

    for name, tabs, reason in (("generator", ["Reconstruction", "Samples"], 0), ("autoencoder", ["Reconstruction"], 1)):
        viewer, about = open_viewer(configuration(exports / name))
        page = build_page(viewer, about)
        parts = [(part["type"], part["props"]) for part in page.get_config_file()["components"]]
        assert [props["label"] for kind, props in parts if kind == "tabitem"] == tabs
        texts = " ".join(props["value"] for kind, props in parts if kind == "markdown" and "value" in props)
        assert texts.count("has no denoiser that could draw samples") == reason
        assert f"{exports}/{name} on cpu: images of 16×16 pixels, latents of 16×2×2" in texts
    assert score_table({"psnr": 31.234, "ssim": 0.91}, True).splitlines()[2] == "| 31.23 | 0.9100 |"
    assert "No LPIPS" in score_table({"psnr": 31.234, "ssim": 0.91}, False)

    import gradio

    with pytest.raises(gradio.Error, match="class must be") as caught:
        in_words(viewer_of_generator(exports).sample)(9)
    assert not caught.value.print_exception


def viewer_of_generator(exports):
    return open_viewer(configuration(exports / "generator"))[0]


def test_only_uploaded_files_are_read(exports, tmp_path, monkeypatch):
    """A forged request cannot have other files of the machine shown."""
    from gradio import Error

    from rae.app.page import build_page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    (reconstruct,) = [
        made.fn for made in build_page(viewer_of_generator(exports), "").fns.values() if made.name == "reconstruct"
    ]
    inside, outside = picture(tmp_path / "uploads" / "a.png"), picture(tmp_path / "secret.png")
    assert reconstruct({"path": str(inside)})[1].shape == (SIDE, SIDE, 3)
    for path in (str(outside), f"{tmp_path}/uploads/../secret.png", None):
        with pytest.raises(Error, match="only an image that was uploaded"):
            reconstruct({"path": path})


def test_a_taken_port_is_named(exports, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the command sets it for its process
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} cannot be listened on; choose another port"):
            app(configuration(exports / "generator", f"port={port}"))


# --- what fills the memory -----------------------------------------------------------------------------------------


def bomb(path: Path, side: int) -> Path:
    """A PNG of very many transparent pixels in a small file."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer, row = zlib.compressobj(9), bytes(1 + 4 * side)
    pixels = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


def test_images_that_would_fill_the_memory_are_refused_undecoded(tmp_path, monkeypatch):
    viewer = Viewer(generator().autoencoder)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert viewer.reconstruct(bomb(tmp_path / "a.png", 100)).picture.shape == (3, SIDE, SIDE)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"is no readable image \(101×101 pixels are more than the 10,000 allowed\)"):
        viewer.reconstruct(bomb(tmp_path / "b.png", 101), "b.png")
    with pytest.raises(ValueError, match=r"is no readable image \(Image size \(40000 pixels\) exceeds limit"):
        viewer.reconstruct(bomb(tmp_path / "c.png", 200), "c.png")


def test_the_page_enforces_what_its_sliders_allow():
    from gradio import Error

    from rae.app.page import Limits, build_page

    made = build_page(Viewer(generator()), "", Limits(max_count=3, max_steps=9, max_scale=2)).fns.values()
    (sample,) = [each.fn for each in made if each.name == "sample"]
    assert len(sample(1, "", "cfg", 1.5, 2, 3, 0).value) == 3
    for changed, message in (
        ({"count": 4}, "count must be a whole number in 1 … 3, got 4"),
        ({"count": 1e12}, "count must be a whole number in 1 … 3, got"),
        ({"steps": 10}, "steps must be a whole number in 1 … 9, got 10"),
        ({"scale": 2.1}, "guidance scale must be a number in 1 … 2; 1 is none, got 2.1"),
        ({"scale": "much"}, "guidance scale must be a number in 1 … 2; 1 is none, got 'much'"),
    ):
        given = {"told": 1, "away": "", "guidance": "cfg", "scale": 1.5, "steps": 2, "count": 1, "seed": 0, **changed}
        with pytest.raises(Error, match=re.escape(message)):
            sample(**given)
