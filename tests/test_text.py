"""Text encoders: prompts to features, from a small model in a local folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rae.encoder.text import TextEncoder
from rae.io.errors import ConfigError

WORDS = ["a", "red", "cube", "left", "of", "ball"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model of two layers and its tokenizer, one token a word, as a hub repository holds them."""
    path = tmp_path_factory.mktemp("qwen")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "[PAD]"])}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=len(WORDS) + 1)
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def test_features_are_the_hidden_states_whatever_the_padding(folder: Path):
    encoder = TextEncoder(str(folder), features=16, tokens=4)
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
        TextEncoder(str(folder), features=8)
    with pytest.raises(ConfigError, match="tokens=0"):
        TextEncoder(str(folder), features=16, tokens=0)
    with pytest.raises(ConfigError, match=r"text_encoder.model=.*cannot be had"):
        TextEncoder(str(tmp_path), features=16)

    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"needs the package transformers: pip install 'rae\[text\]'"):
        TextEncoder(str(folder), features=16)
