"""Model cards: what the hub reads, and what people read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rae.cli.checks import check_files
from rae.cli.errors import compose
from rae.commands.convert import convert
from rae.formats.card import model_card
from rae.formats.export import describe_encoder
from tests.helpers.guides import blocks
from tests.helpers.small_models import make_autoencoder, make_generator
from tests.helpers.text_runs import make_text_generator

RESULT = {
    "scores": {"fid": 1.23456789, "samples": 50000},
    "identity": {
        "samples": {"checkpoint": "/home/me/secret/stage2"},
        "protocol": {"bytes": "floor", "sampler": {"points": 50}, "reference": "/home/me/secret/ref.npz"},
    },
}


def header(card: str) -> dict:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_says_how_it_is_loaded_and_how_it_was_scored(tmp_path: Path, monkeypatch):
    model = make_generator()
    model.class_names = tuple(f"digit {number}" for number in range(10))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "scores.json").write_text(json.dumps(RESULT))
    given = [f"scores={tmp_path}/scores.json", "license=apache-2.0", "trained_on='digits of scikit-learn'"]
    convert(compose("convert", [f"checkpoint={tmp_path}/model", f"output_dir={tmp_path}/exported", *given]))
    file = tmp_path / "exported" / "README.md"
    card = file.read_text()
    assert header(card) == {
        "license": "apache-2.0",
        "library_name": "rae",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["rae", "representation-autoencoder", "flow-matching", "diffusion"],
    }
    for line in (
        "| fid | 1.2346 |",
        "| samples | 50000 |",
        "| bytes | floor |",
        "| sampler.points | 50 |",
        "| reference | ref.npz |",
        "| images | 32×32 pixels |",
        "| latents | 32×4×4 |",
        "| classes | 10: digit 0, digit 1, digit 2, digit 3, digit 4, digit 5, digit 6, digit 7, digit 8, digit 9 |",
        "digits of scikit-learn",
        "The encoder's weights are stored here; whether they have a licence of their own is not known here.",
    ):
        assert line in card.splitlines() or line in card
    assert "secret" not in card
    assert str(tmp_path) not in card
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(blocks(file, "python")[0], found)
    assert found["pictures"][0].size == (32, 32)


def test_other_kinds_of_models(tmp_path: Path):
    card = (make_autoencoder().save_pretrained(tmp_path / "a") / "README.md").read_text()
    assert header(card)["pipeline_tag"] == "image-feature-extraction"
    assert header(card)["license"] == "other"
    assert 'RAE.from_pretrained("a")' in card
    assert "Not stated by the owner." in card
    assert "None were given." in card
    card = (make_text_generator().save_pretrained(tmp_path / "b") / "README.md").read_text()
    assert header(card)["pipeline_tag"] == "text-to-image"
    assert 'draw("a sentence", output="pil")' in card


@pytest.mark.parametrize(
    ("hub_id", "name", "licence"),
    [
        ("facebook/dinov2-with-registers-base", "vit_base_patch14_reg4_dinov2.lvd142m", "Apache-2.0"),
        ("timm/vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", "vit_base_patch16_dinov3_qkvb", "FAIR Noncommercial"),
        ("timm/vit_base_patch16_dinov3.lvd1689m", "vit_base_patch16_dinov3", "DINOv3 License"),
        ("facebook/webssl-dino1b-full2b-224", "vit_giant_patch14_dinov2", "CC-BY-NC"),
        ("facebook/vit-mae-base", "vit_base_patch16_224.mae", "CC-BY-NC"),
        ("timm/vit_large_patch14_clip_224.openai", "ViT-L-14-quickgelu", "MIT"),
    ],
)
def test_licences_of_encoders_from_the_hub(hub_id: str, name: str, licence: str, tmp_path: Path):
    config = json.loads((make_autoencoder().save_pretrained(tmp_path / "a") / "config.json").read_text())
    assert describe_encoder(make_autoencoder(), None)["stored"]
    config["encoder"]["model"] |= {"hub_id": hub_id, "model": name}
    for stored, where in ((False, "come from the hub"), (True, "are stored here")):
        config["encoder"]["stored"] = stored
        assert f"The encoder's weights {where}, under their own licence: {licence}" in model_card(config)


def test_a_card_that_is_there_stays(tmp_path: Path):
    source = make_autoencoder().save_pretrained(tmp_path / "model")
    target = tmp_path / "out"
    target.mkdir()
    (target / "README.md").write_text("mine")
    given = [f"checkpoint={source}", f"output_dir={target}"]
    convert(compose("convert", given))
    assert (target / "README.md").read_text() == "mine"
    convert(compose("convert", [*given, "force=true"]))
    assert "representation autoencoder" in (target / "README.md").read_text()


def test_scores_that_are_none_are_refused(tmp_path: Path):
    model = make_autoencoder()
    with pytest.raises(
        FileNotFoundError, match=r"scores=.*none.json does not exist: give a scores.json of rae-evaluate"
    ):
        check_files(compose("convert", ["checkpoint=a/b", f"scores={tmp_path}/none.json"]), "convert")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds no scores: give a"):
        model.save_pretrained(tmp_path / "out", scores=tmp_path / "a.json")
    assert not (tmp_path / "out" / "config.json").exists()
