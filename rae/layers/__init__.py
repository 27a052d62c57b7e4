"""Building blocks of all networks."""

from rae.layers.attention import Attention
from rae.layers.block import AdaptiveBlock, Block, ContextBlock, FinalLayer, OutputLayer, denoiser_blocks
from rae.layers.checks import check_time, should_check, unchecked
from rae.layers.embedding import SinusoidalTimeEmbedding, TimeEmbedding
from rae.layers.mlp import GELUMlp, SwiGLU
from rae.layers.norm import RMSNorm, at_least_float, modulate
from rae.layers.patch import grid_to_tokens, patchify, tokens_to_grid, unpatchify
from rae.layers.position import RotaryEmbedding2D, resize_position_table, sincos_table

__all__ = [
    "AdaptiveBlock",
    "Attention",
    "Block",
    "ContextBlock",
    "FinalLayer",
    "GELUMlp",
    "OutputLayer",
    "RMSNorm",
    "RotaryEmbedding2D",
    "SinusoidalTimeEmbedding",
    "SwiGLU",
    "TimeEmbedding",
    "at_least_float",
    "check_time",
    "denoiser_blocks",
    "grid_to_tokens",
    "modulate",
    "patchify",
    "resize_position_table",
    "should_check",
    "sincos_table",
    "tokens_to_grid",
    "unchecked",
    "unpatchify",
]
