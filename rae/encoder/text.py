"""Frozen text encoders: prompts -> features and mask, the tensors of :class:`rae.condition.TextTokens`."""

from __future__ import annotations

import importlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae.io.describe import Described
from rae.io.errors import ConfigError
from rae.io.tensors import load_strict, read_file, state_hash

log = logging.getLogger(__name__)

EXTRA = "text needs the package transformers: pip install 'rae[text]'"
ARCHITECTURES = {"auto": "AutoModel", "clip_text": "CLIPTextModel", "t5_encoder": "T5EncoderModel"}
"""Networks of transformers by the names of ``architecture``: a model whole, or the text part of a larger one."""


class TextEncoder(Described, nn.Module, ABC):
    """Prompts to features; frozen.

    Args:
        features: Width of the features.
        tokens: Largest length; longer prompts are cut, which is said once.

    Raises:
        ConfigError: A size below 1.
    """

    def __init__(self, features: int, tokens: int) -> None:
        super().__init__()
        if min(features, tokens) < 1:
            raise ConfigError(f"text_encoder.features={features} and text_encoder.tokens={tokens} must be at least 1")
        self.features = features
        self.tokens = tokens
        self._told_of_cuts = False

    @abstractmethod
    def token_ids(self, prompt: str) -> list[Any]:
        """The tokens of a prompt, of whatever length, as rows of :meth:`tokenize`."""

    @abstractmethod
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features float32 B×L×features of ids B×L… and mask B×L; what stands at padding is of no consequence."""

    padding: Any = 0
    """What stands at padding."""

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64 B×L… and mask bool B×L, on the CPU; L is the longest prompt's, at least 1."""
        rows = [self.token_ids(prompt) for prompt in prompts]
        long = [(prompt, len(row)) for prompt, row in zip(prompts, rows, strict=True) if len(row) > self.tokens]
        if long and not self._told_of_cuts:
            self._told_of_cuts = True
            log.warning("prompts of more than text_encoder.tokens=%d tokens are cut: %r has %d", self.tokens, *long[0])
        rows = [row[: self.tokens] for row in rows]
        length = max(1, *map(len, rows)) if rows else 1
        padded = torch.tensor([row + [self.padding] * (length - len(row)) for row in rows], dtype=torch.int64)
        return padded, torch.arange(length) < torch.tensor([[len(row)] for row in rows])

    def forward(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``text`` float32 B×L×features, zero at padding, and ``text_mask`` bool B×L of prompts."""
        device = next(self.parameters()).device
        ids, mask = (value.to(device) for value in self.tokenize(prompts))
        with torch.autocast(device.type, enabled=False):
            states = self.states(ids, mask).float()
        # What stands at padding depends on the attention kernel, and may be NaN where nothing is seen.
        return {"text": torch.where(mask[..., None], states, 0.0), "text_mask": mask}

    def weights_hash(self) -> str:
        """SHA-256 of the weights."""
        return state_hash(self.state_dict())

    def fingerprint(self) -> dict[str, Any]:
        """What tells this encoder's features from another's."""
        return {
            "class": type(self).__name__,
            "features": self.features,
            "tokens": self.tokens,
            "weights": self.weights_hash(),
        }

    def check(self, described: Mapping[str, Any], source: str) -> None:
        """Refuses to be another encoder than the one whose :meth:`fingerprint` a source has; ConfigError names what differs."""
        found = self.fingerprint()
        differing = [key for key, value in described.items() if found.get(key) != value]
        if differing:
            said = ", ".join(
                f"{key} {str(described[key])[:12]} and not {str(found.get(key))[:12]}" for key in differing
            )
            raise ConfigError(f"{source} was made with another text encoder: {said}; give its weights and options")

    @property
    def recoverable(self) -> bool:
        """Whether the weights can be had again from the hub; exports store those that cannot."""
        return False


class TransformersTextEncoder(TextEncoder):
    """A language model of transformers; a prompt's features are the last hidden states, after the final norm (RAEv2).

    Prompts are tokenised as they stand, without template, and padded at the end. Where the tokenizer adds no tokens of its own,
    the empty prompt is padding alone: the null text.

    Args:
        model: Hub id or folder of the model and its tokenizer.
        features: Width of the hidden states; checked against the model.
        tokens: Largest length; longer prompts are cut.
        revision: Branch, tag or commit on the hub.
        pretrained: Whether weights are loaded; False leaves random ones.
        architecture: ``auto``, or ``clip_text`` and ``t5_encoder`` for the text part of such a model.

    Raises:
        ConfigError: transformers is not installed, the model cannot be had, or its width is another.
    """

    def __init__(
        self,
        model: str,
        features: int,
        tokens: int = 256,
        revision: str | None = None,
        pretrained: bool = True,
        architecture: str = "auto",
    ) -> None:
        super().__init__(features, tokens)
        try:
            transformers: Any = importlib.import_module("transformers")  # an extra
        except ImportError as error:
            raise ConfigError(EXTRA) from error
        if architecture not in ARCHITECTURES:
            raise ConfigError(
                f"text_encoder.architecture={architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}"
            )
        options = {"revision": revision, "trust_remote_code": False}
        kind = getattr(transformers, ARCHITECTURES[architecture])
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
            if pretrained:
                network = kind.from_pretrained(model, dtype=torch.float32, use_safetensors=True, **options)
            else:
                described = transformers.AutoConfig.from_pretrained(model, **options)
                described = getattr(described, "text_config", described) if architecture == "clip_text" else described
                network = (kind.from_config if architecture == "auto" else kind)(described).float()
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"text_encoder.model={model} cannot be had ({reason}); give a folder that holds it"
            ) from error
        if network.config.hidden_size != features:
            raise ConfigError(
                f"text_encoder.features={features} differs from {model}'s {network.config.hidden_size}; set it to that"
            )
        self.network: Any = network.requires_grad_(False)
        self.padding = self.tokenizer.pad_token_id or 0
        self.eval()

    @property
    def recoverable(self) -> bool:
        """Whether they come from the hub or a folder."""
        return bool(self.arguments.get("pretrained", True))

    def token_ids(self, prompt: str) -> list[int]:
        """Ids of the model's own tokenizer; cut ones keep its mark of an end."""
        whole: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        if len(whole) <= self.tokens:
            return whole
        cut: list[int] = self.tokenizer(prompt, truncation=True, max_length=self.tokens)["input_ids"]
        return cut + whole[self.tokens :]

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`TextEncoder.states`."""
        return hidden_states(self.network, ids, mask)


@torch.no_grad()
def hidden_states(network: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states, after the final norm, of a model of transformers without head: float32 B×L×C, zero at padding.

    ``ids`` are B×L, and so is ``mask``: true or 1 for tokens, false for padding.
    """
    with torch.autocast(ids.device.type, enabled=False):
        states = network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return torch.where(mask.bool()[..., None], states.float(), 0.0)


class WordTextEncoder(TextEncoder):
    """A tiny text encoder of one's own: words by their letters, then a transformer; no vocabulary, no download.

    A word is the sum of one learned vector for each of its first bytes at its place, through a feed-forward layer. It is trained
    beside an image encoder by :class:`rae.training.contrastive.ContrastiveModule`.

    Args:
        features: Width of the features.
        tokens: Largest length, in words; signs of punctuation count as words.
        depth: Blocks.
        heads: Attention heads.
        letters: Bytes of a word that are looked at.
        checkpoint: Weight file; None leaves random weights.

    Raises:
        ConfigError: A size below 1, or heads that do not divide the width.
        FileNotFoundError: There is no such file.
        ValueError: The weights do not fit.
    """

    def __init__(
        self,
        features: int = 64,
        tokens: int = 32,
        depth: int = 2,
        heads: int = 4,
        letters: int = 16,
        checkpoint: str | None = None,
    ) -> None:
        super().__init__(features, tokens)
        if min(depth, heads, letters) < 1 or features % heads:
            raise ConfigError(
                f"text_encoder.depth={depth}, heads={heads} and letters={letters} must be at least 1, and the heads must divide "
                f"features={features}"
            )
        self.letters = letters
        self.padding = [0] * letters
        self.letter_embedding = nn.Embedding(256 * letters + 1, features, padding_idx=0)
        self.word = nn.Sequential(nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features))
        self.position = nn.Parameter(torch.randn(tokens, features) * 0.5)
        layer = nn.TransformerEncoderLayer(
            features, heads, 4 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(features), enable_nested_tensor=False)
        if checkpoint is not None:
            load_strict(self, read_file(checkpoint), checkpoint)
        self.requires_grad_(False)
        self.eval()

    def token_ids(self, prompt: str) -> list[list[int]]:
        """A row of letters a word, in lower case; 0 stands for no letter."""
        words = [word.encode()[: self.letters] for word in re.findall(r"\w+|[^\w\s]", prompt.lower())]
        return [
            [1 + 256 * place + letter for place, letter in enumerate(word)] + [0] * (self.letters - len(word))
            for word in words
        ]

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`TextEncoder.states`; ids are B×L×letters."""
        words = self.word(self.letter_embedding(ids).sum(2)) + self.position[: ids.shape[1]]
        return self.blocks(words, src_key_padding_mask=~mask)
