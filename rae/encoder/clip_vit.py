"""CLIP's image tower through open_clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rae.encoder.base import Encoder, check_layers
from rae.encoder.convert import to_open_clip
from rae.io.hub import read_weights
from rae.io.tensors import load_strict
from rae.layers import resize_position_table

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_UNUSED = ("ln_post.", "proj", "attn_pool.")


class ClipEncoder(Encoder):
    """The vision transformer of a CLIP model; pooling and projection are left out.

    Args:
        model: Name of the open_clip architecture, e.g. ``ViT-L-14``; ``ViT-L-14-quickgelu`` for OpenAI's weights.
        channels: See :class:`~rae.encoder.base.Encoder`.
        stride: See :class:`~rae.encoder.base.Encoder`.
        input_size: See :class:`~rae.encoder.base.Encoder`.
        mean: See :class:`~rae.encoder.base.Encoder`.
        std: See :class:`~rae.encoder.base.Encoder`.
        layers: See :class:`~rae.encoder.base.Encoder`.
        reduce: See :class:`~rae.encoder.base.Encoder`.
        dtype: See :class:`~rae.encoder.base.Encoder`.
        pretrained: Whether weights are loaded; False leaves random ones.
        checkpoint: Local weight file in open_clip's or timm's naming.
        hub_id: Hub repository of such a file.
        revision: Branch, tag or commit of that repository.
        pos_antialias: Whether the position table is resized with antialiasing.

    Raises:
        ValueError: Unknown model, facts that differ from the network's, or weights that do not fit.
        FileNotFoundError: The weights cannot be had.
    """

    def __init__(
        self,
        model: str,
        channels: int,
        stride: int,
        input_size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        layers: Sequence[int] | None = None,
        reduce: str = "sum",
        dtype: str | None = None,
        pretrained: bool = True,
        checkpoint: str | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
        pos_antialias: bool = True,
    ) -> None:
        super().__init__(channels, stride, input_size, mean, std, layers, reduce, dtype)

        import open_clip  # noqa: PLC0415 (it brings transformers along: seconds and 150 MB that other encoders do without)

        if model not in open_clip.list_models():
            raise ValueError(f"encoder.model={model!r} is unknown to open_clip; see open_clip.list_models()")
        self.model_name = model
        self.hub_id = hub_id
        self.pos_antialias = pos_antialias
        device = torch.get_default_device()  # open_clip would move it to the CPU, from the meta device too
        network = open_clip.create_model(model, pretrained=None, force_image_size=input_size, device=device).visual
        if not hasattr(network, "transformer"):
            raise ValueError(f"encoder.model={model!r} is no vision transformer of open_clip's own")
        facts = {"channels": network.conv1.out_channels, "stride": network.patch_size[0]}
        for name, value in facts.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"encoder.{name}={getattr(self, name)} differs from {model}'s {value}; set it to {value}"
                )
        network.ln_post = nn.LayerNorm(channels, eps=network.ln_post.eps, elementwise_affine=False)
        network.proj = network.attn_pool = None
        self.network = network
        self._published_table: Tensor | None = None
        check_layers(self.layers, len(network.transformer.resblocks))
        if pretrained:
            self.load_published(read_weights(checkpoint, hub_id, revision), str(checkpoint or hub_id))
        self.freeze()

    def published_state(self) -> dict[str, Tensor]:
        """The image tower's weights in open_clip's naming, with the position table before it was resized."""
        state = dict(self.network.state_dict())
        return state if self._published_table is None else state | {"positional_embedding": self._published_table}

    def load_published(self, state: Mapping[str, Tensor], source: str, adopt: bool = False) -> None:
        """Loads the image tower of a CLIP state dict in open_clip's or timm's naming, strictly.

        Args:
            state: The weights.
            source: Where they come from, for messages.
            adopt: See :func:`rae.io.tensors.load_strict`.

        Raises:
            ValueError: Keys or shapes that do not fit, all listed.
        """
        kept = {key: value for key, value in to_open_clip(state).items() if not key.startswith(_UNUSED)}
        own = self.network.state_dict()
        self._published_table = None
        if "positional_embedding" in kept and kept["positional_embedding"].shape != own["positional_embedding"].shape:
            self._published_table = kept["positional_embedding"].clone()  # a view would keep the whole file in memory
            table = resize_position_table(kept["positional_embedding"][None], self.grid, 1, self.pos_antialias)
            kept["positional_embedding"] = table[0]
        load_strict(self.network, kept, source, adopt)

    @property
    def identity(self) -> dict[str, Any]:
        """See :attr:`Encoder.identity`."""
        return super().identity | {"model": self.model_name}

    def layer_tokens(self, pixels: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
        """See :meth:`Encoder.layer_tokens`."""
        chosen = check_layers(layers, len(self.network.transformer.resblocks))
        output = self.network.forward_intermediates(
            pixels, indices=chosen, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        tokens: list[Tensor] = [self.network.ln_post(x) for x in output["image_intermediates"]]
        return tokens
