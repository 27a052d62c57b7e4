"""Frozen text encoders: prompts -> features and mask, the inputs of :class:`rae.condition.TextTokens`."""

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
"""Classes of transformers by ``architecture``: a whole model, or the text part of a larger one."""


class TextEncoder(Described, nn.Module, ABC):
    """Frozen encoder of prompts to features.

    Args:
        features: Width of the features.
        tokens: Maximum length; longer prompts are truncated, with a single warning.

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
        """All tokens of a prompt, not truncated, as rows of :meth:`tokenize`."""

    @abstractmethod
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Features float32 B×L×features of ids B×L… and mask B×L; values at padding are ignored."""

    padding: Any = 0
    """Token id used for padding."""

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64 B×L… and mask bool B×L, on the CPU; L is the length of the longest prompt, at least 1."""
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
        # Values at padding depend on the attention kernel, and may be NaN where every token is masked.
        return {"text": torch.where(mask[..., None], states, 0.0), "text_mask": mask}

    def weights_hash(self) -> str:
        """SHA-256 of the weights."""
        return state_hash(self.state_dict())

    def fingerprint(self) -> dict[str, Any]:
        """What distinguishes this encoder's features from another's."""
        return {
            "class": type(self).__name__,
            "features": self.features,
            "tokens": self.tokens,
            "weights": self.weights_hash(),
        }

    def check(self, described: Mapping[str, Any], source: str) -> None:
        """Raises ConfigError, naming what differs, unless a source has this encoder's :meth:`fingerprint`."""
        found = self.fingerprint()
        differing = [key for key, value in described.items() if found.get(key) != value]
        if differing:
            said = ", ".join(
                f"{key} {str(described[key])[:12]} and not {str(found.get(key))[:12]}" for key in differing
            )
            raise ConfigError(f"{source} was made with another text encoder: {said}; give its weights and options")

    @property
    def recoverable(self) -> bool:
        """Whether the weights can be loaded again from the hub; if not, exports store them."""
        return False


class TransformersTextEncoder(TextEncoder):
    """A language model from transformers; a prompt's features are the last hidden states, after the final norm (RAEv2).

    Prompts are tokenised unchanged, without a template, and padded at the end. If the tokenizer adds no special tokens, the
    empty prompt is all padding: the null text.

    Args:
        model: Hub id or folder of the model and its tokenizer.
        features: Width of the hidden states; checked against the model.
        tokens: Maximum length; longer prompts are truncated.
        revision: Branch, tag or commit on the hub.
        pretrained: Whether to load weights; False keeps random ones.
        architecture: ``auto``, or ``clip_text`` or ``t5_encoder`` for the text part of such a model.

    Raises:
        ConfigError: transformers is not installed, the model cannot be loaded, or its width differs from ``features``.
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
        """Whether the weights come from the hub or a folder."""
        return bool(self.arguments.get("pretrained", True))

    def token_ids(self, prompt: str) -> list[int]:
        """Ids from the model's tokenizer; truncation keeps its end token."""
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
    """Last hidden states, after the final norm, of a transformers model without head: float32 B×L×C, zero at padding.

    ``ids`` and ``mask`` are B×L; ``mask`` is true or 1 for tokens, false or 0 for padding.
    """
    with torch.autocast(ids.device.type, enabled=False):
        states = network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return torch.where(mask.bool()[..., None], states.float(), 0.0)


class WordTextEncoder(TextEncoder):
    """A tiny text encoder: words embedded by their letters, then a transformer; no vocabulary, no download.

    A word is embedded as the sum of one learned vector per (byte, position) of its first bytes, followed by a feed-forward
    layer. :class:`rae.training.contrastive.ContrastiveModule` trains it together with an image encoder.

    Args:
        features: Width of the features.
        tokens: Maximum length in words; punctuation marks count as words.
        depth: Number of blocks.
        heads: Number of attention heads.
        letters: Number of bytes used per word.
        checkpoint: Weight file; None keeps random weights.

    Raises:
        ConfigError: A size below 1, or heads that do not divide the width.
        FileNotFoundError: The file does not exist.
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
        """One row of letters per word, in lower case; 0 is padding."""
        words = [word.encode()[: self.letters] for word in re.findall(r"\w+|[^\w\s]", prompt.lower())]
        return [
            [1 + 256 * place + letter for place, letter in enumerate(word)] + [0] * (self.letters - len(word))
            for word in words
        ]

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`TextEncoder.states`; ids are B×L×letters."""
        words = self.word(self.letter_embedding(ids).sum(2)) + self.position[: ids.shape[1]]
        return self.blocks(words, src_key_padding_mask=~mask)
