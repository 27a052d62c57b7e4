"""Files in RAEv2's layout, under their published names: sampled, reconstructed from, converted and written back bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rae.cli.errors import compose
from rae.commands.convert import convert
from rae.commands.download import files_of
from rae.commands.reconstruct import reconstruct
from rae.commands.sample import sample
from rae.condition import LabelTokens
from rae.decoder import ViTDecoder
from rae.denoiser import InContextDiTDH
from rae.formats import save_original
from rae.io.errors import ConfigError
from rae.latent import LatentNormalizer
from tests.golden_checks import Case
from tests.golden_checks.encoder import make_dinov3
from tests.helpers.small_models import randomise

CASE = Case(Path(__file__).parents[1] / "golden", "encoder_dinov3_mls")
TINY = [
    *("image_size=64", "encoder.model=vit_small_patch16_dinov3_qkvb", "encoder.channels=32", "encoder.layers=[1,2,3]"),
    "encoder.model_args={embed_dim: 32, depth: 4, num_heads: 2, mlp_ratio: 2, num_reg_tokens: 4}",
    *("decoder.width=48", "decoder.depth=2", "decoder.heads=4", "decoder.mlp_width=96", "data.num_classes=10"),
    *("denoiser.width=32", "denoiser.depth=3", "denoiser.heads=2", "denoiser.head_width=48", "denoiser.head_depth=1"),
    *("denoiser.head_heads=2", "denoiser.base_depth=2", "flow.shift.base=256", "class_names=null"),
]


def networks() -> tuple[ViTDecoder, LatentNormalizer, InContextDiTDH]:
    generator = torch.Generator().manual_seed(0)
    decoder = ViTDecoder(32, 4, 48, 2, 4, 96, output="raw")
    denoiser = InContextDiTDH(32, 4, 32, 3, 2, 48, 1, 2, LabelTokens(10), base_depth=2)
    for number, network in enumerate((decoder, denoiser)):
        randomise(network, number)
    moments = torch.randn(2, 32, 4, 4, generator=generator)
    return decoder, LatentNormalizer((32, 4, 4), moments[0], moments[1].square() + 0.5), denoiser


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> Path:
    """Four files under the names that ``rae-download model=raev2_k7`` fetches, with networks of a few thousand weights."""
    from rae.autoencoder import RAE

    folder = tmp_path_factory.mktemp("collection")
    decoder, latent, denoiser = networks()
    save_original(RAE(None, decoder, latent), folder / "made", denoiser, "raev2")
    torch.save(CASE.part("weights/hub/"), folder / "made" / "encoder.pth")
    names = files_of(compose("download", ["model=raev2_k7"]))
    for name, source in zip(names, ("checkpoint.pt", "decoder.pt", "stats.pt", "encoder.pth"), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "made" / source).rename(folder / name)
    return folder


def model(collection: Path) -> list[str]:
    return ["model=raev2_k7", f"collection={collection}", *TINY]


def drawn(folder: Path) -> np.ndarray:
    return np.load(folder / "samples.npz")["arr_0"]


@pytest.mark.parametrize("guidance", [pytest.param("none", marks=pytest.mark.slow), "internal"])
def test_sampled_converted_and_written_back(collection: Path, tmp_path: Path, guidance: str):
    options = ["sampler=euler_full", "sampler.grid.steps=3", "samples_per_class=1", "png=false", f"guidance={guidance}"]
    sample(compose("sample", [*model(collection), *options, f"output_dir={tmp_path}/one"]))
    convert(
        compose("convert", [*model(collection), *options[:2], f"guidance={guidance}", f"output_dir={tmp_path}/export"])
    )
    sample(compose("sample", [f"checkpoint={tmp_path}/export", *options, f"output_dir={tmp_path}/two"]))
    assert drawn(tmp_path / "one").std() > 1
    assert np.array_equal(drawn(tmp_path / "one"), drawn(tmp_path / "two"))
    convert(compose("convert", [f"checkpoint={tmp_path}/export", "to=raev2", f"output_dir={tmp_path}/back"]))
    for name in files_of(compose("download", ["model=raev2_k7", "encoder_weights=false"])):
        before, after = (torch.load(file) for file in (collection / name, tmp_path / "back" / Path(name).name))
        before, after = (state.get("ema", state) for state in (before, after))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(ValueError, match=r"to=original.*output=raw and InContextDiTDH"):
        convert(compose("convert", [f"checkpoint={tmp_path}/export", "to=original", f"output_dir={tmp_path}/other"]))


def test_reconstructions_go_through_dinov3_in_its_own_layout(collection: Path, tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    reconstruct(
        compose(
            "reconstruct",
            [*model(collection), f"images={tmp_path}/in", "npz=true", f"output_dir={tmp_path}/out"],
        )
    )
    encoder = make_dinov3(CASE, layers=[1, 2, 3], fusion="mean_plus_pooled")
    decoder, _, _ = networks()
    with torch.no_grad():
        drawn = decoder(encoder(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)).clamp(0, 1)
    found = np.load(next((tmp_path / "out").glob("*.npz")))["arr_0"]
    expected = (drawn * 255).floor().permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("denoiser.width=48", r"enc_rope.*\(28, 16\).*\(28, 24\).*denoiser.width / denoiser.heads"),
        ("denoiser.head_depth=2", r"head\.1\."),
        ("decoder.width=32", r"decoder_pos_embed of shape \(1, 17, 48\).*\(1, 17, 32\)"),
        ("condition.tokens=4", "rotary table.*time_tokens, the condition's tokens"),
        ("denoiser.base_depth=null", "base_final"),
    ],
)
def test_weights_of_other_sizes_are_refused(collection: Path, tmp_path: Path, override: str, words: str):
    with pytest.raises(ValueError, match=words):
        sample(compose("sample", [*model(collection), override, "samples_per_class=1", f"output_dir={tmp_path}"]))


def test_missing_files_name_the_command_that_fetches_them(collection: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"checkpoint.pt.*does not exist: rae-download model=…"):
        sample(compose("sample", ["model=raev2_k7", f"collection={tmp_path}", f"output_dir={tmp_path}"]))
