"""Cases about encoders, latent statistics and the whole autoencoder."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.encoder import TimmEncoder
from rae.encoder.fusion import fuse
from rae.latent import LatentNormalizer, RunningMoments, add_noise
from tests.golden_checks import Case
from tests.helpers.original_networks import original_decoder


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


def make_dinov3(case: Case, form: str = "hub", exact_periods: bool = False, **options) -> TimmEncoder:
    """The encoder of ``encoder_dinov3_mls``, its weights read from a file as a user's would be."""
    config, vit = case.config, case.config["vit"]
    gated = vit["ffn_layer"].startswith("swiglu")  # two thirds as wide, rounded up to a multiple of 8
    state = case.part(f"weights/{form}/")
    if exact_periods:
        state["rope_embed.periods"] = case.inputs["periods_exact"]
    options = {"input_size": config["resolution"]} | options
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(state, file)
        return TimmEncoder(
            "vit_small_patch16_dinov3_qkvb",
            channels=vit["embed_dim"],
            stride=vit["patch_size"],
            mean=config["image_mean"],
            std=config["image_std"],
            checkpoint=str(file),
            norm_eps=config["norm_eps"],
            rope_bfloat16=not exact_periods,
            model_args={
                "patch_size": vit["patch_size"],
                "embed_dim": vit["embed_dim"],
                "depth": vit["depth"],
                "num_heads": vit["num_heads"],
                "mlp_ratio": vit["ffn_ratio"] * (2 / 3 if gated else 1),
                "swiglu_mlp": gated,
                "swiglu_align_to": 8 if gated else 0,
                "num_reg_tokens": vit["n_storage_tokens"],
                "rope_temperature": vit["pos_embed_rope_base"],
                "qkv_bias": vit["qkv_bias"],
                "init_values": vit["layerscale_init"],
            },
            **options,
        )


@torch.no_grad()
def check_dinov3(case: Case) -> dict[str, Tensor]:
    image, flat = case.inputs["image"], case.inputs["image_flat"]
    several = {"layers": case.config["layers"], "fusion": "mean_plus_pooled"}
    encoder = make_dinov3(case, **several)
    pixels = (image - encoder.image_mean) / encoder.image_std

    def tokens(one: TimmEncoder, images: Tensor) -> Tensor:
        return one(images).flatten(2).transpose(1, 2)

    computed = {
        "tokens_last": tokens(make_dinov3(case), image),
        "tokens_last_affine": tokens(make_dinov3(case, final_norm="affine"), image),
        "tokens_mls": tokens(encoder, image),
        "tokens_mls_flat": tokens(encoder, flat),
        "tokens_mls_exact_periods": tokens(make_dinov3(case, exact_periods=True, **several), image),
        "layer_tokens": torch.stack(encoder.layer_tokens(pixels, case.config["layers"])),
    }
    for form in ("timm", "hf"):
        error = (tokens(make_dinov3(case, form, **several), image) - case.outputs["outputs/tokens_mls"]).abs().max()
        assert error <= case.tolerance["outputs/tokens_mls"], f"tokens_mls from names of {form}"
    return {f"outputs/{key}": value for key, value in computed.items()}


def check_aggregation(case: Case) -> dict[str, Tensor]:
    layers = list(case.inputs["normed_layers"])
    weights, eps = case.part("weights/post_layernorm."), case.config["siglip2_post_norm_eps"]
    blocks = [case.inputs["siglip2_block_outputs"][layer] for layer in case.config["siglip2_layers_in_listed_order"]]
    normed = [F.layer_norm(x, x.shape[-1:], weights["weight"], weights["bias"], eps) for x in blocks]
    return {
        "outputs/dinov3mls": fuse(layers, "mean_plus_pooled"),
        "outputs/dinov2mls": fuse(layers, "mean"),
        "outputs/eupemls": fuse(layers, "sum"),
        "outputs/siglip2mls": fuse(normed, "mean_plus_pooled"),
    }


def check_latent_stats_v2(case: Case) -> dict[str, Tensor]:
    latents, first, second = case.inputs["latents"], case.config["batches"], case.config["merged_with"]
    processes = latents.split([sum(first), sum(second)])
    moments = [RunningMoments(latents.shape[1:]) for _ in processes]
    for part, share, sizes in zip(moments, processes, (first, second), strict=True):
        for batch in share.split(sizes):
            part.update(batch)
    moments[0].merge(moments[1])
    return {"outputs/mean": moments[0].mean.float(), "outputs/var": moments[0].var.float()}


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
    config = case.config
    encoder = make_encoder(
        case.other(config["encoder_weights_from"]),
        "dinov2",
        config["encoder_input_size"],
        "timm",
        config["image_mean"],
        config["image_std"],
    )
    decoder = original_decoder(
        config["decoder"], case.part("weights/decoder."), mean=config["image_mean"], std=config["image_std"]
    )
    return outputs_of(case, encoder, decoder)


@torch.no_grad()
def check_autoencoder_v2(case: Case) -> dict[str, Tensor]:
    config = case.config
    source = case.other(config["encoder_weights_from"])
    encoder = make_dinov3(source, input_size=config["resolution"], layers=config["layers"], fusion="mean_plus_pooled")
    decoder = original_decoder(
        config["decoder"], case.part("weights/decoder."), mean=encoder.mean, std=encoder.std, output="raw"
    )
    return outputs_of(case, encoder, decoder)


def outputs_of(case: Case, encoder: TimmEncoder, decoder: ViTDecoder) -> dict[str, Tensor]:
    """Latents, with and without normalisation and noise, and reconstructions of an autoencoder's images."""
    config, inputs = case.config, case.inputs
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
    "encoder_dinov3_mls": check_dinov3,
    "multi_layer_aggregation": check_aggregation,
    "latent_stats_v2": check_latent_stats_v2,
    "autoencoder_v2": check_autoencoder_v2,
}
