"""Vision transformers from timm: DINOv2, DINOv3, SigLIP2, MAE and any other by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import timm
import torch
from timm.layers import GELUTanh, RotaryEmbeddingDinoV3
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from rae.encoder.base import Precision
from rae.encoder.convert import PERIODS, to_timm
from rae.encoder.fusion import check_layers, make_final_norm
from rae.encoder.transformer import TransformerEncoder
from rae.io.hub import read_weights

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "gelu_tanh": GELUTanh}


class NetworkArguments(TypedDict, total=False):
    """Sizes of :class:`timm.models.vision_transformer.VisionTransformer`; its other options are accepted too."""

    img_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    embed_dim: int
    depth: int
    num_heads: int
    num_classes: int
    mlp_ratio: float
    reg_tokens: int
    global_pool: str


_MODEL_ARGS = {
    name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind.__init__).parameters if name != "self"
}
"""Allowed arguments: the networks' own. Others of ``timm.create_model`` could read arbitrary files named in a configuration."""
_UNUSED = ("norm.", "fc_norm.", "head.", "head_dist.", "head_drop.", "attn_pool.", "mask_token")
"""Keys of published checkpoints that an encoder does not use: final affine, pooling, classifier, mask token."""


class TimmEncoder(TransformerEncoder):
    """A timm vision transformer as encoder.

    Arguments beside those of :class:`~rae.encoder.base.Encoder`:
        model: Name of the timm architecture.
        pretrained: Whether to load weights; False keeps random ones.
        checkpoint: Local weight file, in timm's, transformers' or DINOv3's own naming.
        hub_id: Hub repository of the weights, used if there is no file; None for timm's own.
        revision: Branch, tag or commit of that repository.
        act: ``gelu`` (exact) or ``gelu_tanh``; None for timm's.
        norm_eps: Epsilon of all LayerNorms; None for timm's.
        pos_antialias: Whether the position table is resized with antialiasing (DINOv2) or without (SigLIP2, MAE).
        model_args: Further arguments of the timm model.
        final_norm: ``plain``, ``affine`` or ``none``, see :func:`rae.encoder.fusion.make_final_norm`.
        final_norm_eps: Its epsilon; None for the network's own.
        rope_bfloat16: Whether DINOv3's rotary periods are rounded to bfloat16, as in its published files and in RAEv2; timm
            computes unrounded ones.

    Raises:
        ValueError: Unknown model or option, ``channels`` or ``stride`` unlike the network's, or weights that do not fit.
        FileNotFoundError: The weights cannot be found.
    """

    table_name = "pos_embed"

    def __init__(
        self,
        model: str,
        channels: int,
        stride: int,
        input_size: int,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        layers: Sequence[int] | None = None,
        fusion: str = "last",
        dtype: Precision | None = None,
        pretrained: bool = True,
        checkpoint: str | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
        act: str | None = None,
        norm_eps: float | None = None,
        pos_antialias: bool = True,
        model_args: NetworkArguments | None = None,
        pooled_layer: int | None = None,
        resize_first: bool = True,
        interpolation: str = "bicubic",
        final_norm: str = "plain",
        final_norm_eps: float | None = None,
        rope_bfloat16: bool = False,
    ) -> None:
        super().__init__(
            channels, stride, input_size, mean, std, layers, fusion, dtype, pooled_layer, resize_first, interpolation
        )
        self.model_name = model
        self.pos_antialias = pos_antialias
        self.final_norm, self.final_norm_eps = final_norm, final_norm_eps
        self.network_options = {
            "act": act,
            "norm_eps": norm_eps,
            "model_args": dict(model_args or {}),
            "rope_bfloat16": rope_bfloat16,
        }
        self.network: Any = self._build(model, act, norm_eps, dict(model_args or {}))
        if rope_bfloat16:
            if not isinstance(getattr(self.network, "rope", None), RotaryEmbeddingDinoV3):
                raise ValueError(
                    f"encoder.rope_bfloat16=true needs DINOv3's rotary positions, which {model} has not; set it to false"
                )
            self._round_periods()
        self.hub_id = hub_id or self.network.pretrained_cfg.get("hf_hub_id")
        check_layers(self.layers, len(self.network.blocks))
        if pretrained:
            self.load_published(read_weights(checkpoint, self.hub_id, revision), str(checkpoint or self.hub_id))
        self.freeze()

    def _build(self, model: str, act: str | None, norm_eps: float | None, arguments: dict[str, Any]) -> Any:
        if not timm.is_model(model):
            near = timm.list_models(f"*{model.split('.', maxsplit=1)[0].rsplit('_', maxsplit=1)[-1]}*")[:8]
            raise ValueError(
                f"encoder.model={model!r} is unknown to timm; near: {', '.join(near) or 'see timm.list_models()'}"
            )
        if act is not None:
            if act not in ACTIVATIONS:
                raise ValueError(f"encoder.act={act!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
            arguments["act_layer"] = ACTIVATIONS[act]
        if norm_eps is not None:
            arguments["norm_layer"] = partial(nn.LayerNorm, eps=norm_eps)
        if unknown := [name for name in arguments if name not in _MODEL_ARGS]:
            raise ValueError(
                f"encoder.model_args.{unknown[0]} is refused: model_args are sizes and options of the network itself, such as "
                "patch_size, embed_dim, depth and num_heads; weights are named by encoder.checkpoint and encoder.hub_id"
            )
        # No pooling, whatever the classifier used: an encoder keeps all tokens.
        arguments |= {"num_classes": 0, "global_pool": "", "img_size": self.input_size}
        try:
            network: Any = timm.create_model(model, pretrained=False, **arguments)
        except (TypeError, ZeroDivisionError, RuntimeError, AssertionError) as error:
            given = {
                name: value for name, value in arguments.items() if isinstance(value, str | int | float | list | dict)
            }
            raise ValueError(f"encoder.model_args={given} do not suit timm's {model}: {error}") from error
        for name in ("blocks", "norm", "patch_embed", "embed_dim"):
            if not hasattr(network, name):
                raise ValueError(f"encoder.model={model!r} is no vision transformer: it has no {name}")
        self.check_facts(model, network.embed_dim, network.patch_embed.patch_size[0])
        eps = self.final_norm_eps
        if eps is None and norm_eps is not None and self.final_norm == "plain":
            eps = norm_eps  # in case the network has no final norm of its own
        network.norm = make_final_norm(network.norm, self.final_norm, network.embed_dim, eps)
        for unused in ("fc_norm", "head", "head_drop"):
            if hasattr(network, unused):
                setattr(network, unused, nn.Identity())
        return network

    def load_published(self, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
        """Loads weights in timm's, transformers' or DINOv3's naming, strictly; resizes a position table of another size.

        Raises:
            ValueError: Keys or shapes do not match (lists them all), or rotary periods or biases that the network lacks.
        """
        own = self.network.state_dict()
        named = to_timm(state)
        if PERIODS in named:
            self._check_periods(named.pop(PERIODS), source)
        without = [key for key in named if key.endswith(("attn.q_bias", "attn.v_bias")) and key not in own]
        if any(named[key].any() for key in without):
            raise ValueError(
                f"{source} has biases of queries and values, which {self.model_name} has not; "
                f"choose timm's model that has them, such as encoder.model={self.model_name.split('.')[0]}_qkvb"
            )
        kept = {
            key: value
            for key, value in named.items()
            if key in own or not (key.startswith(_UNUSED) or key in without)  # all-zero biases have no effect
        }
        prefix = 0 if getattr(self.network, "no_embed_class", False) else self.network.num_prefix_tokens
        self.load_network(kept, prefix, source, assign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TimmEncoder:
        moved: TimmEncoder = super()._apply(fn, recurse)
        if self.network_options["rope_bfloat16"]:
            self._round_periods()  # timm recomputes them when the dtype changes
        return moved

    def _round_periods(self) -> None:
        """Rounds the rotary periods to bfloat16 and recomputes cached positions from them."""
        rope = self.network.rope
        rope.eval()  # in training mode the coordinates could be randomised
        rope.periods.copy_(rope.periods.bfloat16())
        if rope.pos_embed_cached is not None:
            rope.pos_embed_cached.copy_(rope.get_embed(list(self.network.patch_embed.grid_size)))

    def _check_periods(self, periods: Tensor, source: str) -> None:
        """Compares the rotary periods in a DINOv3 file with the network's.

        Raises:
            ValueError: The network has none, or different ones.
        """
        rope = getattr(self.network, "rope", None)
        own: Tensor = rope.periods if isinstance(rope, RotaryEmbeddingDinoV3) else torch.empty(0)  # type: ignore[assignment]
        if own.shape == periods.shape and torch.allclose(periods.float(), own.cpu(), rtol=1e-5, atol=0):
            return
        rounded = self.network_options["rope_bfloat16"]
        raise ValueError(
            f"{source}: the rotary periods {periods.tolist()} are not the network's {own.tolist()} with "
            f"encoder.rope_bfloat16={str(rounded).lower()}; try {str(not rounded).lower()}, or another encoder.model"
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The base class's, plus the network's options."""
        return super().identity | {"pos_antialias": self.pos_antialias} | self.network_options

    @property
    def has_class_token(self) -> bool:  # type: ignore[override]
        """Whether the network has a class token, which is then its first token."""
        return getattr(self.network, "cls_token", None) is not None

    def layer_tokens(self, pixels: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
        """The blocks' outputs after the norm set by ``final_norm``."""
        chosen = check_layers(layers, len(self.network.blocks))
        asked = self._class_tokens is not None
        outputs: list[Any] = self.network.forward_intermediates(
            *(pixels, chosen, asked), norm=True, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        if self._class_tokens is None:
            return outputs
        self._class_tokens.append(outputs[-1][1][:, 0])
        return [tokens for tokens, _ in outputs]


def tiny_encoder(
    input_size: int = 32, channels: int = 32, stride: int = 8, depth: int = 2, seed: int = 0
) -> TimmEncoder:
    """A small encoder with random weights, for tests and experiments without downloads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TimmEncoder(
            "vit_tiny_patch16_224",
            channels=channels,
            stride=stride,
            input_size=input_size,
            pretrained=False,
            model_args={"patch_size": stride, "embed_dim": channels, "depth": depth, "num_heads": 2},
        )
