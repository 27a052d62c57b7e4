"""Small models and runs that are told a text, for tests."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from rae.cli.errors import compose
from rae.commands.train import train
from rae.condition import TextTokens
from rae.denoiser import InContextDiT
from rae.encoder.text import WordTextEncoder
from rae.flow import EulerSampler, FlowMatching, PublishedGrid
from rae.generator import Generator
from rae.io.tensors import save_state
from tests.helpers.small_models import make_autoencoder, randomise

WORDS = ["a", "red", "cube", "left", "of", "ball"]

SMALL = [
    *("experiment=pictures_stage2", "+encoder.pretrained=false", "encoder.checkpoint=null", "latent.stats=none"),
    *("encoder.model_args.depth=2", "encoder.model_args.embed_dim=32", "encoder.channels=32", "encoder.layers=[0,1]"),
    *("decoder.width=32", "decoder.depth=1", "decoder.mlp_width=64", "data.batch_size=16", "data.train_images=96"),
    *("data.val_images=16", "denoiser.width=32", "denoiser.depth=2", "denoiser.base_depth=1", "denoiser.heads=2"),
    *("denoiser.head_heads=2", "denoiser.head_width=48", "sampler.grid.steps=3", "trainer.log_every_n_steps=1"),
    *(
        "callbacks.preview.classes=2",
        "callbacks.preview.prompts=null",
        "callbacks.preview.per_class=2",
        "flow.shift.base=64",
    ),
    *("text_encoder.features=16", "text_encoder.depth=1", "text_encoder.heads=2", "trainer.enable_progress_bar=false"),
]
"""A run of pictures_stage2 within seconds; it needs ``decoder_checkpoint`` and ``text_encoder.checkpoint``."""


def text_weights(folder: Path) -> Path:
    """The weights of a small text encoder."""
    torch.manual_seed(5)
    return save_state(
        WordTextEncoder(features=16, tokens=24, depth=1, heads=2).state_dict(), folder / "text.safetensors"
    )


def write_language_model(path: Path) -> Path:
    """A language model of two layers and its tokenizer, one token a word, as a hub repository holds them."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "[PAD]"])}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(path)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=8, vocab_size=len(WORDS) + 1)
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


def make_text_generator(**options) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        text = WordTextEncoder(features=16, tokens=12, depth=1, heads=2)
        denoiser = InContextDiT(32, 4, 32, 2, 4, TextTokens(16, 12), base_depth=1)
    randomise(denoiser, 1)
    for parameter in denoiser.parameters():
        parameter.data *= 4  # so that a text changes more than a grey level
    sampler = EulerSampler(PublishedGrid(4))
    return Generator(
        make_autoencoder(), denoiser, FlowMatching(shift=1.5), sampler, text_encoder=text, **options
    ).eval()


def train_small(folder: Path, *overrides: str) -> Path:
    """A stage-2 run of two steps on a stage-1 run of two; returns its folder."""
    stage1 = [one for one in SMALL if one.split(".")[0] in ("+encoder", "encoder", "decoder", "data", "trainer")]
    steps = ["trainer.max_steps=2"]
    if not (folder / "stage1").exists():
        train(compose("train", ["experiment=pictures_stage1", *stage1, *steps, f"output_dir={folder}/stage1"]))
    text = f"text_encoder.checkpoint={text_weights(folder)}"
    given = [text, f"decoder_checkpoint={folder}/stage1", f"output_dir={folder}/stage2", "trainer.max_steps=2"]
    train(compose("train", [*SMALL, *given, *overrides]))
    return folder / "stage2"
