"""Frozen text encoders: prompts -> features and mask, the tensors of :class:`rae.condition.TextTokens`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae.io.describe import Described
from rae.io.errors import ConfigError

EXTRA = "text needs the package transformers: pip install 'rae[text]'"


class TextEncoder(Described, nn.Module):
    """A language model of transformers; a prompt's features are the last hidden states, after the final norm (RAEv2).

    Prompts are tokenised as they stand, without template, and padded at the end. The empty prompt is padding alone: the null text.

    Args:
        model: Hub id or folder of the model and its tokenizer.
        features: Width of the hidden states; checked against the model.
        tokens: Largest length; longer prompts are cut.
        revision: Branch, tag or commit on the hub.
        pretrained: Whether weights are loaded; False leaves random ones.

    Raises:
        ConfigError: transformers is not installed, the model cannot be had, or its width is another.
    """

    def __init__(
        self, model: str, features: int, tokens: int = 256, revision: str | None = None, pretrained: bool = True
    ) -> None:
        super().__init__()
        try:
            transformers: Any = importlib.import_module("transformers")  # an extra
        except ImportError as error:
            raise ConfigError(EXTRA) from error
        if tokens < 1:
            raise ConfigError(f"text_encoder.tokens={tokens} must be at least 1")
        options = {"revision": revision, "trust_remote_code": False}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(model, **options)
            if pretrained:
                network = transformers.AutoModel.from_pretrained(
                    model, dtype=torch.float32, use_safetensors=True, **options
                )
            else:
                network = transformers.AutoModel.from_config(
                    transformers.AutoConfig.from_pretrained(model, **options), dtype=torch.float32
                )
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
        self.features = features
        self.tokens = tokens
        self.eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids int64 B×L and mask bool B×L, on the CPU; L is the longest prompt's, at least 1."""
        ids = [self.tokenizer(prompt, truncation=True, max_length=self.tokens)["input_ids"] for prompt in prompts]
        length = max(1, *map(len, ids)) if ids else 1
        padding = self.tokenizer.pad_token_id or 0
        padded = torch.tensor([row + [padding] * (length - len(row)) for row in ids], dtype=torch.int64)
        return padded, torch.arange(length) < torch.tensor([[len(row)] for row in ids])

    def forward(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``text`` float32 B×L×features and ``text_mask`` bool B×L of prompts."""
        device = next(self.network.parameters()).device
        ids, mask = (value.to(device) for value in self.tokenize(prompts))
        return {"text": hidden_states(self.network, ids, mask), "text_mask": mask}


@torch.no_grad()
def hidden_states(network: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states after the final norm, float32 B×L×C, zero at padding.

    Args:
        network: A model of transformers without head.
        ids: Token ids B×L.
        mask: B×L, true or 1 for tokens, false for padding.
    """
    with torch.autocast(ids.device.type, enabled=False):
        states = network(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    # What stands at padding depends on the attention kernel, and may be NaN where nothing is seen.
    return torch.where(mask.bool()[..., None], states.float(), 0.0)
