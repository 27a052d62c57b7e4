"""Cases about encoders, latent statistics and the whole autoencoder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rae.autoencoder import RAE
from rae.encoder import TimmEncoder
from rae.formats.decoder import decoder_from_original
from rae.latent import LatentNormalizer, RunningMoments, add_noise
from tests.golden_checks import Case


def make_encoder(
    case: Case, family: str, input_size: int, form: str, mean: list[float] | None = None, std: list[float] | None = None
) -> TimmEncoder:
    """The case's encoder, its weights read from a file as a user's would be."""
    hf, timm = case.config["hf_config"], case.config["timm"]
    width = hf["hidden_size"]
    hidden = hf.get("intermediate_size", width * hf.get("mlp_ratio", 4))
    arguments = {
        "patch_size": hf["patch_size"],
        "embed_dim": width,
        "depth": hf["num_hidden_layers"],
        "num_heads": hf["num_attention_heads"],
        "mlp_ratio": hidden / width,
        "class_token": timm["class_token"],
        "no_embed_class": timm.get("no_embed_class", False),
        "reg_tokens": timm.get("reg_tokens", 0),
        "init_values": timm.get("init_values"),
        "qkv_bias": hf.get("qkv_bias", True),
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(case.part(f"weights/{form}/"), file)
        return TimmEncoder(
            "vit_tiny_patch16_224",
            channels=width,
            stride=hf["patch_size"],
            input_size=input_size,
            mean=mean or [0.0] * 3,
            std=std or [1.0] * 3,
            checkpoint=str(file),
            act="gelu_tanh" if "tanh" in hf["hidden_act"] else "gelu",
            norm_eps=hf["layer_norm_eps"],
            pos_antialias=family == "dinov2",
            model_args=arguments,
        )


def check_encoder(family: str):
    def check(case: Case) -> dict[str, Tensor]:
        computed: dict[str, Tensor] = {}
        for name in ("image", "image_native", "image_flat"):
            image = case.inputs[name]
            tokens = [make_encoder(case, family, image.shape[-1], form).tokens(image) for form in ("hf", "timm")]
            key = name.replace("image", "outputs/tokens")
            computed[key] = tokens[0]
            assert (tokens[1] - case.outputs[key]).abs().max() <= case.tolerance[key], f"{key} from timm's names"
        return computed

    return check


def check_latent_stats(case: Case) -> dict[str, Tensor]:
    latents = case.inputs["latents"]
    moments = RunningMoments(latents.shape[1:])
    for batch in latents.split(case.config["batch"]):
        moments.update(batch)
    mean = moments.mean.float()
    return {
        "outputs/mean": mean,
        "outputs/mean_remainder": (moments.mean - mean.double()).float(),
        "outputs/var": moments.var.float(),
    }


@torch.no_grad()
def check_autoencoder(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    encoder = make_encoder(
        case.other(config["encoder_weights_from"]),
        "dinov2",
        config["encoder_input_size"],
        "timm",
        config["image_mean"],
        config["image_std"],
    )
    decoder = decoder_from_original(
        config["decoder"], case.part("weights/decoder."), mean=config["image_mean"], std=config["image_std"]
    )
    latent = LatentNormalizer(config["latent_shape"], inputs["latent_mean"], inputs["latent_var"], eps=config["eps"])
    model = RAE(encoder, decoder, latent)
    computed = {}
    for key, image in inputs.items():
        if not key.startswith("image_"):
            continue
        computed[f"outputs/latents_{key}"] = model.encode(image)
        computed[f"outputs/reconstruction_{key}"] = model(image)
        raw = encoder(image)
        computed[f"outputs/latents_unnormalised_{key}"] = raw
        if len(image) == len(inputs["noise_uniform"]):
            noise = inputs["noise_normal"].transpose(1, 2).reshape(raw.shape)
            noised = add_noise(raw, config["noise_tau"], inputs["noise_uniform"].flatten(), noise)
            computed[f"outputs/latents_noised_{key}"] = latent.normalize(noised)
    return computed


CHECKS = {
    "encoder_dinov2": check_encoder("dinov2"),
    "encoder_mae": check_encoder("mae"),
    "encoder_siglip2": check_encoder("siglip2"),
    "latent_stats": check_latent_stats,
    "autoencoder": check_autoencoder,
}
