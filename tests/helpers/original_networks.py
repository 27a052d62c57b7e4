"""Networks of the original projects, from the arguments of their classes and their state dicts, in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rae.condition import Condition, LabelTokens, NavigationTokens, TextTokens
from rae.decoder import ViTDecoder
from rae.denoiser import Denoiser, InContextDiT, InContextDiTDH
from rae.formats.decoder import load_decoder
from rae.formats.denoiser import denoiser_from_config, load_denoiser, sizes_of


def original_decoder(config: Mapping[str, Any], state: Mapping[str, Tensor], **options: Any) -> ViTDecoder:
    """A decoder; ``options`` are colours and output, ``raw`` for one of RAEv2."""
    decoder = ViTDecoder(
        channels=config["latent_dim"],
        grid=math.isqrt(config["num_patches"]),
        width=config["decoder_hidden_size"],
        depth=config["decoder_num_hidden_layers"],
        heads=config["decoder_num_attention_heads"],
        mlp_width=config["decoder_intermediate_size"],
        patch=config["patch_size"],
        norm_eps=config.get("layer_norm_eps", 1e-12),
        **options,
    )
    load_decoder(decoder, state, "the original decoder")
    return decoder.eval()


def original_denoiser(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Denoiser:
    """A denoiser of the first project."""
    model = denoiser_from_config(config)
    load_denoiser(model, state, "the original state dict")
    return model.eval()


def raev2_denoiser(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> InContextDiT:
    """A denoiser of RAEv2."""
    sizes, arch = sizes_of(config), config["arch"]
    kind = config.get("condition_type", "label")
    condition: Condition
    if kind == "nwm":
        condition = NavigationTokens(
            config["in_channels"], config["input_size"], config["frames"], sizes["patch"], arch["n_action_tokens"]
        )
    elif kind == "text":
        condition = TextTokens(config["context_dim"], arch["num_c_tokens"])
    else:
        condition = LabelTokens(config["num_classes"], arch["num_c_tokens"])
    model = (InContextDiTDH if "head_width" in sizes else InContextDiT)(
        channels=config["in_channels"],
        grid=config["input_size"],
        mlp_ratio=config.get("mlp_ratio", 4.0),
        time_tokens=arch["num_t_tokens"],
        base_depth=config["base_model_depth"],
        condition=condition,
        **sizes,
    )
    load_denoiser(model, state, "the state dict of RAEv2")
    return model.eval()
