"""CLIP's image tower through open_clip."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rae.encoder.base import Precision
from rae.encoder.convert import to_open_clip
from rae.encoder.fusion import check_layers, make_final_norm
from rae.encoder.transformer import TransformerEncoder
from rae.io.hub import read_weights

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_UNUSED = ("ln_post.", "proj", "attn_pool.")


class ClipEncoder(TransformerEncoder):
    """The vision transformer of a CLIP model, without pooling and projection.

    Arguments beside those of :class:`~rae.encoder.base.Encoder`:
        model: Name of the open_clip architecture, e.g. ``ViT-L-14``; ``ViT-L-14-quickgelu`` for OpenAI's weights.
        pretrained: Whether to load weights; False keeps random ones.
        checkpoint: Local weight file in open_clip's or timm's naming.
        hub_id: Hub repository with such a file.
        revision: Branch, tag or commit of that repository.
        pos_antialias: Whether the position table is resized with antialiasing.
        final_norm: ``plain``, ``affine`` or ``none``, see :func:`rae.encoder.fusion.make_final_norm`.
        final_norm_eps: Its epsilon; None for the network's own.

    Raises:
        ValueError: Unknown model, ``channels`` or ``stride`` unlike the network's, or weights that do not fit.
        FileNotFoundError: The weights cannot be found.
    """

    table_name = "positional_embedding"

    def __init__(
        self,
        model: str,
        channels: int,
        stride: int,
        input_size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        layers: Sequence[int] | None = None,
        fusion: str = "last",
        dtype: Precision | None = None,
        pretrained: bool = True,
        checkpoint: str | None = None,
        hub_id: str | None = None,
        revision: str | None = None,
        pos_antialias: bool = True,
        pooled_layer: int | None = None,
        resize_first: bool = True,
        interpolation: str = "bicubic",
        final_norm: str = "plain",
        final_norm_eps: float | None = None,
    ) -> None:
        super().__init__(
            channels, stride, input_size, mean, std, layers, fusion, dtype, pooled_layer, resize_first, interpolation
        )

        import open_clip  # noqa: PLC0415 (imports transformers: seconds and 150 MB that other encoders do not need)

        if model not in open_clip.list_models():
            raise ValueError(f"encoder.model={model!r} is unknown to open_clip; see open_clip.list_models()")
        self.model_name = model
        self.hub_id = hub_id
        self.pos_antialias = pos_antialias
        device = torch.get_default_device()  # open_clip would move it to the CPU, from the meta device too
        network = open_clip.create_model(model, pretrained=None, force_image_size=input_size, device=device).visual
        if not hasattr(network, "transformer"):
            raise ValueError(f"encoder.model={model!r} is no vision transformer of open_clip's own")
        self.check_facts(model, network.conv1.out_channels, network.patch_size[0])
        self.final_norm, self.final_norm_eps = final_norm, final_norm_eps
        network.ln_post = make_final_norm(network.ln_post, final_norm, channels, final_norm_eps)
        network.proj = network.attn_pool = None
        self.network = network
        check_layers(self.layers, len(network.transformer.resblocks))
        if pretrained:
            self.load_published(read_weights(checkpoint, hub_id, revision), str(checkpoint or hub_id))
        self.freeze()

    def load_published(self, state: Mapping[str, Tensor], source: str, assign: bool = False) -> None:
        """Loads the image tower of a CLIP state dict in open_clip's or timm's naming, strictly."""
        own = self.network.state_dict()
        kept = {key: value for key, value in to_open_clip(state).items() if key in own or not key.startswith(_UNUSED)}
        self.load_network(kept, 1, source, assign)

    def layer_tokens(self, pixels: Tensor, layers: Sequence[int] | None) -> list[Tensor]:
        """The blocks' outputs after ``ln_post``, as set by ``final_norm``."""
        chosen = check_layers(layers, len(self.network.transformer.resblocks))
        output = self.network.forward_intermediates(
            pixels, indices=chosen, stop_early=True, output_fmt="NLC", intermediates_only=True
        )
        tokens: list[Tensor] = [self.network.ln_post(x) for x in output["image_intermediates"]]
        return tokens
