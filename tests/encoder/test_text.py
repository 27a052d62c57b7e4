"""Text encoders: prompts to features, from a small model in a local folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import transformers

from rae.encoder.text import TransformersTextEncoder, WordTextEncoder
from rae.io.errors import ConfigError
from tests.helpers.text_runs import write_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model of two layers and its tokenizer, one token a word, as a hub repository holds them."""
    return write_language_model(tmp_path_factory.mktemp("qwen"))


def test_features_are_the_hidden_states_whatever_the_padding(folder: Path):
    encoder = TransformersTextEncoder(str(folder), features=16, tokens=4)
    told = encoder(["a red cube", "ball", "", "a red cube left of a ball"])
    assert told["text_mask"].tolist() == [[True] * 3 + [False], [True] + [False] * 3, [False] * 4, [True] * 4]
    assert told["text"].dtype == torch.float32  # the file holds bfloat16
    alone = encoder(["ball"])
    assert alone["text"].shape == (1, 1, 16)
    torch.testing.assert_close(alone["text"][0, 0], told["text"][1, 0])
    assert not told["text"][~told["text_mask"]].any()
    assert not encoder([""])["text_mask"].any()
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids, _ = encoder.tokenize(["a red cube"])
    expected = whole(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(told["text"][0, :3], expected[0])
    assert not encoder.train().training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_bad_input_is_refused_in_words(folder: Path, tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match=r"features=8 differs from .*'s 16"):
        TransformersTextEncoder(str(folder), features=8)
    with pytest.raises(ConfigError, match="tokens=0"):
        TransformersTextEncoder(str(folder), features=16, tokens=0)
    with pytest.raises(ConfigError, match=r"text_encoder.model=.*cannot be had"):
        TransformersTextEncoder(str(tmp_path), features=16)

    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"needs the package transformers: pip install 'rae\[text\]'"):
        TransformersTextEncoder(str(folder), features=16)


def test_long_prompts_are_cut_and_it_is_said_once(folder: Path, caplog):
    encoder = TransformersTextEncoder(str(folder), features=16, tokens=2)
    for _ in range(2):
        assert encoder(["a red cube"])["text"].shape == (1, 2, 16)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("rae")]
    assert said == ["prompts of more than text_encoder.tokens=2 tokens are cut: 'a red cube' has 3"]


def test_the_text_part_of_larger_models(tmp_path: Path, folder: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    for name, model in (
        (
            "clip_text",
            transformers.CLIPModel(
                transformers.CLIPConfig(
                    text_config={**small, "num_hidden_layers": 2, "vocab_size": 7},
                    vision_config={**small, "num_hidden_layers": 1},
                )
            ),
        ),
        (
            "t5_encoder",
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, vocab_size=7)
            ),
        ),
    ):
        model.eval().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        encoder = TransformersTextEncoder(str(tmp_path / name), features=16, tokens=4, architecture=name)
        ids, mask = encoder.tokenize(["a red cube"])
        part = model.text_model if name == "clip_text" else model.encoder
        expected = part(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        torch.testing.assert_close(encoder(["a red cube"])["text"], expected)
    with pytest.raises(ConfigError, match="architecture='bert' is unknown; choose one of auto, clip_text, t5_encoder"):
        TransformersTextEncoder(str(folder), features=16, architecture="bert")


def test_words_are_told_apart_by_their_letters_and_places(tmp_path: Path):
    torch.manual_seed(0)
    encoder = WordTextEncoder(features=16, tokens=8, heads=2, depth=1)
    told = encoder(["a tiger above an owl", "an owl above a tiger", "Tiger"])
    assert told["text_mask"].sum(1).tolist() == [5, 5, 1]
    assert (told["text"][0] - told["text"][1]).abs().max() > 1e-3
    torch.testing.assert_close(encoder(["tiger"])["text"][0], told["text"][2, :1])
    assert not told["text"][~told["text_mask"]].any()
    assert not encoder([""])["text_mask"].any()
    assert encoder(["tiger, owl!"])["text"].shape[1] == 4
    other = WordTextEncoder(features=16, tokens=8, heads=2, depth=1)
    with pytest.raises(ConfigError, match="run was made with another text encoder: weights"):
        other.check(encoder.fingerprint(), "run")
    encoder.check(encoder.fingerprint(), "run")
    with pytest.raises(ConfigError, match="heads=3"):
        WordTextEncoder(features=16, heads=3)
