"""Building blocks of all networks."""

from rae.layers.attention import Attention
from rae.layers.block import AdaptiveBlock, Block, FinalLayer, adaptive_blocks
from rae.layers.checks import may_look, trusted
from rae.layers.embedding import LabelEmbedding, TimeEmbedding, drop_labels
from rae.layers.mlp import GELUMlp, SwiGLU
from rae.layers.norm import RMSNorm, at_least_float, modulate
from rae.layers.patch import grid_to_tokens, patchify, tokens_to_grid, unpatchify
from rae.layers.position import RotaryEmbedding2D, resize_position_table, sincos_table

__all__ = [
    "AdaptiveBlock",
    "Attention",
    "Block",
    "FinalLayer",
    "GELUMlp",
    "LabelEmbedding",
    "RMSNorm",
    "RotaryEmbedding2D",
    "SwiGLU",
    "TimeEmbedding",
    "adaptive_blocks",
    "at_least_float",
    "drop_labels",
    "grid_to_tokens",
    "may_look",
    "modulate",
    "patchify",
    "resize_position_table",
    "sincos_table",
    "tokens_to_grid",
    "trusted",
    "unpatchify",
]
