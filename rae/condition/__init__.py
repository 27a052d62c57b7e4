"""Conditions of a denoiser besides the noisy latent and the time, as a small mapping of batch-first tensors."""

from rae.condition.base import Condition, Conditions, concatenate, drop, select
from rae.condition.label import LabelEmbedding, LabelTokens, learned_tokens
from rae.condition.names import label_of, readable_names
from rae.condition.navigation import NavigationTokens, normalize_action
from rae.condition.text import TextTokens

__all__ = [
    "Condition",
    "Conditions",
    "LabelEmbedding",
    "LabelTokens",
    "NavigationTokens",
    "TextTokens",
    "concatenate",
    "drop",
    "label_of",
    "learned_tokens",
    "normalize_action",
    "readable_names",
    "select",
]
