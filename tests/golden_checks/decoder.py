"""Cases about the decoder, the discriminator and the adversarial losses."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from rae.decoder import ViTDecoder
from rae.discriminator import DinoDiscriminator
from rae.formats.discriminator import rename_heads
from rae.io.tensors import load_strict
from rae.layers import patchify, tokens_to_grid
from rae.loss import adaptive_weight, discriminator_loss, generator_loss, gradient_at, last_layer_gradient
from tests.golden_checks import Case
from tests.helpers.original_networks import original_decoder


def make_decoder(case: Case) -> ViTDecoder:
    source = case.other(case.config["weights_from"]) if "weights_from" in case.config else case
    return original_decoder(source.config, source.part("weights/"))


@torch.no_grad()
def check_decoder(case: Case) -> dict[str, Tensor]:
    decoder = make_decoder(case)
    computed = {}
    for key, tokens in case.inputs.items():
        image = decoder(tokens_to_grid(tokens))
        suffix = key.removeprefix("tokens")
        computed[f"outputs/image{suffix}"] = image
        computed[f"outputs/logits{suffix}"] = patchify(image, decoder.patch)
    return computed


@torch.no_grad()
def check_discriminator(case: Case) -> dict[str, Tensor]:
    config, recipe = case.config, case.config["recipe"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dino.safetensors"
        save_file(case.part("weights/dino/"), file)
        model = DinoDiscriminator(
            "vit_small_patch8_224.dino",
            image_size=config["img_size"],
            key_depths=recipe["key_depths"],
            kernel=config["ks"],
            norm_eps=config["norm_eps"],
            checkpoint=str(file),
            model_args={
                "patch_size": recipe["patch_size"],
                "embed_dim": recipe["embed_dim"],
                "depth": recipe["depth"],
                "num_heads": recipe["num_heads"],
                "mlp_ratio": recipe["mlp_ratio"],
            },
        )
    load_strict(model.heads, rename_heads(case.part("weights/heads/")), "golden heads")
    image, tall = ((case.inputs[key] + 1) / 2 for key in ("image", "image_tall"))
    computed = {}
    for index, features in enumerate(model.features(image)):
        computed[f"outputs/activation_{index}_first8"] = features[:, :, :8]
    model.eval()
    computed["outputs/logits_eval"] = model(image)
    computed["outputs/logits_eval_tall"] = model(tall)
    model.train()
    for logits, vectors in (
        ("logits_train_first", "after_one_train_forward"),
        ("logits_train_second", "after_two_train_forwards"),
    ):
        computed[f"outputs/{logits}"] = model(image)
        state = model.heads.state_dict()
        for key in case.part(f"outputs/{vectors}/"):
            name = next(iter(rename_heads({key: image})))
            computed[f"outputs/{vectors}/{key}"] = state[name].clone()
    model.eval()
    computed["outputs/logits_eval_after_training"] = model(image)
    return computed


def check_gan_losses(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    real, fake = inputs["logits_real"], inputs["logits_fake"]
    computed = {}
    for reduction in ("mean", "sum"):
        for kind in ("hinge", "vanilla"):
            computed[f"outputs/{kind}_d_{reduction}"] = discriminator_loss(real, fake, kind, reduction)[None]
        computed[f"outputs/vanilla_g_{reduction}"] = generator_loss(fake, reduction)[None]
    decoder = make_decoder(case)
    features = decoder.forward_features(tokens_to_grid(inputs["tokens"])).detach()
    image = decoder.to_image(features)
    leaf = image.detach().requires_grad_()
    rec_loss = (leaf - inputs["target"]).abs().mean()
    gan_loss = generator_loss(F.conv2d(2 * leaf - 1, inputs["kernel"], stride=2))
    weight = decoder.last_layer.weight
    at_rec, at_gan = gradient_at(leaf, rec_loss), gradient_at(leaf, gan_loss)
    rec, gan = (last_layer_gradient(image, weight, at) for at in (at_rec, at_gan))
    maximum, eps = case.config["max_d_weight"], case.config["eps"]
    values = {
        "rec_loss": rec_loss,
        "gan_loss": gan_loss,
        "grad_norm_rec": rec.norm(),
        "grad_norm_gan": gan.norm(),
        "adaptive_weight": adaptive_weight(rec, gan, maximum, eps),
        "adaptive_weight_tiny_gan": adaptive_weight(rec, gan * 1e-5, maximum, eps),
        "adaptive_weight_saturated": adaptive_weight(rec, gan * 1e-7, maximum, eps),
        "adaptive_weight_clamped": adaptive_weight(rec, gan * 1e-7, 0.5, eps),
    }
    return computed | {f"outputs/{key}": value.detach()[None] for key, value in values.items()}


CHECKS = {
    "decoder": check_decoder,
    "discriminator": check_discriminator,
    "gan_losses": check_gan_losses,
}
