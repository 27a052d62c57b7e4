"""Encoder, latent statistics and decoder: properties, closed forms, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from rae.autoencoder import RAE
from rae.decoder import ViTDecoder
from rae.discriminator import DinoDiscriminator
from rae.encoder import ClipEncoder, TimmEncoder, tiny_encoder
from rae.formats.decoder import load_decoder, state_from_ours
from rae.io.hub import HUB_FILES, fetch_weights
from rae.latent import LatentNormalizer, RunningMoments, add_noise
from rae.layers import resize_position_table

TINY = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def encoder(**options) -> TimmEncoder:
    torch.manual_seed(0)
    arguments = {"model": "vit_tiny_patch16_224", "channels": 32, "stride": 8, "input_size": 32, "pretrained": False}
    return TimmEncoder(**(arguments | {"model_args": TINY} | options))


def decoder(**options) -> ViTDecoder:
    torch.manual_seed(0)
    arguments = {"channels": 32, "grid": 4, "width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "patch": 8}
    return ViTDecoder(**(arguments | options))


# --- encoder -----------------------------------------------------------------------------------------------------


def test_encoder_stays_frozen_and_in_evaluation_mode():
    model = encoder()
    model.train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    assert not model(images).requires_grad
    torch.testing.assert_close(copy.deepcopy(model)(images), model(images))


def test_encoder_resizes_straight_to_a_square_without_antialias():
    model, images = encoder(), torch.rand(2, 3, 50, 70)
    resized = F.interpolate(images, (32, 32), mode="bicubic", align_corners=False, antialias=False)
    torch.testing.assert_close(model(images), model(resized))
    assert model(images).shape == (2, 32, 4, 4)


def test_tokens_have_no_mean_and_unit_variance_without_affine():
    latents = encoder()(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(latents.mean(1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.var(1, unbiased=False), torch.ones(2, 4, 4), atol=1e-3, rtol=0)


def test_layers_are_fused():
    images = torch.rand(1, 3, 32, 32)
    first, last = (encoder(layers=[layer])(images) for layer in (0, 2))
    torch.testing.assert_close(encoder(layers=[0, 2], fusion="sum")(images), first + last)
    torch.testing.assert_close(encoder(layers=[0, 2], fusion="mean")(images), (first + last) / 2)
    for layers in ([0, 2], [2, 0]):  # the deepest is averaged over its positions, in whatever order they are listed
        pooled = encoder(layers=layers, fusion="mean_plus_pooled")(images)
        torch.testing.assert_close(pooled, (first + last) / 2 + last.mean((2, 3), keepdim=True))
    shallow = encoder(layers=[0, 2], fusion="mean_plus_pooled", pooled_layer=0)(images)
    torch.testing.assert_close(shallow, (first + last) / 2 + first.mean((2, 3), keepdim=True))
    torch.testing.assert_close(encoder()(images), last)
    torch.testing.assert_close(encoder(fusion="mean")(images), last, atol=0, rtol=0)


def test_the_final_norm_is_plain_the_checkpoints_or_none(tmp_path):
    images = torch.rand(2, 3, 32, 32)
    source = encoder(final_norm="affine")
    state = {key: value + 0.1 * torch.randn_like(value) for key, value in source.network.state_dict().items()}
    save_file(state, tmp_path / "vit.safetensors")
    load = {"pretrained": True, "checkpoint": str(tmp_path / "vit.safetensors")}
    plain, affine, none = (encoder(final_norm=kind, **load)(images) for kind in ("plain", "affine", "none"))
    weight, bias = state["norm.weight"].view(-1, 1, 1), state["norm.bias"].view(-1, 1, 1)
    torch.testing.assert_close(affine, plain * weight + bias)
    normed = F.layer_norm(none.movedim(1, -1), (32,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(plain, normed)
    wide = encoder(final_norm_eps=1.0, **load)(images)
    torch.testing.assert_close(wide, F.layer_norm(none.movedim(1, -1), (32,), eps=1.0).movedim(-1, 1))
    del state["norm.weight"]
    save_file(state, tmp_path / "vit.safetensors")
    with pytest.raises(ValueError, match=r"missing: norm\.weight"):
        encoder(final_norm="affine", **load)


def test_images_are_normalised_before_or_after_they_are_resized():
    model, images = encoder(resize_first=False, interpolation="bilinear"), torch.rand(2, 3, 50, 70)
    pixels = F.interpolate((images - model.image_mean) / model.image_std, (32, 32), mode="bilinear")
    torch.testing.assert_close(model(images).flatten(2).transpose(1, 2), model.tokens(pixels))
    torch.testing.assert_close(model(images), encoder(interpolation="bilinear")(images), atol=1e-4, rtol=1e-4)


# --- DINOv3 ------------------------------------------------------------------------------------------------------

DINOV3 = {"model": "vit_small_patch16_dinov3_qkvb", "stride": 16, "input_size": 64}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def dinov3(**options) -> TimmEncoder:
    return encoder(**({**DINOV3, "model_args": SMALL} | options))


def hub_file(model: TimmEncoder) -> dict[str, torch.Tensor]:
    """The encoder's weights under the names of DINOv3's own files."""
    names = {"reg_token": "storage_tokens", "gamma_": "ls", "fc1_g": "w1", "fc1_x": "w2"}
    state = {"rope_embed.periods": model.network.rope.periods.clone(), "mask_token": torch.zeros(1, 32)}
    for key, value in model.network.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[f"{key}.gamma" if ".ls" in key else key] = value.clone()
    for block in range(2):
        query, value = (state.pop(f"blocks.{block}.attn.{part}_bias", torch.zeros(32)) for part in "qv")
        state[f"blocks.{block}.attn.qkv.bias"] = torch.cat([query, torch.full((32,), 7.0), value])
        state[f"blocks.{block}.attn.qkv.bias_mask"] = torch.cat([torch.ones(32), torch.zeros(32), torch.ones(32)])
    return state


def test_dinov3_reads_its_own_files(tmp_path):
    first = dinov3(rope_bfloat16=True)
    for parameter in first.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state, images, file = hub_file(first), torch.rand(1, 3, 64, 64), str(tmp_path / "dinov3.pt")
    torch.save(state, file)
    again = dinov3(rope_bfloat16=True, pretrained=True, checkpoint=file)
    torch.testing.assert_close(again(images), first(images), atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"periods.*rope_bfloat16=false; try true"):
        dinov3(pretrained=True, checkpoint=file)
    plain = {"model": "vit_small_patch16_dinov3", "rope_bfloat16": True, "pretrained": True, "checkpoint": file}
    with pytest.raises(ValueError, match=r"biases of queries and values.*vit_small_patch16_dinov3_qkvb"):
        dinov3(**plain)
    torch.save(
        {key: value * 0 if "qkv.bias" in key and "mask" not in key else value for key, value in state.items()}, file
    )
    assert "blocks.0.attn.q_bias" not in dinov3(**plain).network.state_dict()
    torch.save({key: value for key, value in state.items() if "mask" not in key}, file)
    with pytest.raises(ValueError, match="keys have biases"):
        dinov3(rope_bfloat16=True, pretrained=True, checkpoint=file)


def test_rotary_positions_do_not_vary_at_random():
    """RAEv2's first stage trained on coordinates that DINOv3 rescales at random in training; an encoder never trains."""
    model, images = dinov3(model_args={**SMALL, "rope_rescale_coords": 2.0}).train(), torch.rand(1, 3, 64, 64)
    assert model.network.rope.aug_active
    torch.testing.assert_close(model(images), dinov3()(images), atol=0, rtol=0)


def test_the_rounded_periods_survive_a_change_of_precision():
    model, exact = dinov3(rope_bfloat16=True), dinov3()
    periods = model.network.rope.periods.clone()
    assert torch.equal(periods, exact.network.rope.periods.bfloat16().float())
    assert not torch.equal(periods, exact.network.rope.periods)
    assert torch.equal(copy.deepcopy(model).bfloat16().float().network.rope.periods, periods)


def test_encoder_precision_is_its_own():
    images = torch.rand(1, 3, 32, 32)
    plain = encoder()(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(encoder()(images), plain, atol=0, rtol=0)
    low = encoder(dtype="bfloat16")(images)
    assert low.dtype == torch.float32
    assert 0 < (low - plain).abs().max() < 0.2


def test_classifier_weights_load_without_their_head(tmp_path):
    import timm

    torch.manual_seed(1)
    classifier = timm.create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=32, global_pool="avg", **TINY
    ).eval()
    torch.save(classifier.state_dict(), tmp_path / "vit.pt")
    model = encoder(pretrained=True, checkpoint=str(tmp_path / "vit.pt"))
    images = torch.rand(2, 3, 32, 32)
    pixels = (images - model.image_mean) / model.image_std
    with torch.no_grad():
        tokens = classifier.forward_features(pixels)[:, 1:]
    expected = F.layer_norm(tokens, (32,), eps=1e-6).transpose(1, 2).reshape(2, 32, 4, 4)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    state = {key: value for key, value in classifier.state_dict().items() if "blocks.1." not in key}
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "vit.pt")
    with pytest.raises(ValueError, match=r"missing: blocks\.1\..*unexpected: extra"):
        encoder(pretrained=True, checkpoint=str(tmp_path / "vit.pt"))


def test_absent_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing.*cache.*encoder\.checkpoint="):
        encoder(pretrained=True, hub_id="nobody/nothing")


def test_without_a_connection_the_other_names_are_looked_up_in_the_cache_alone(monkeypatch, tmp_path):
    asked = []

    def hub(hub_id: str, name: str, revision: str | None, local_files_only: bool) -> str:
        asked.append((name, local_files_only))
        if name == cached:
            return str(tmp_path / name)
        raise LocalEntryNotFoundError(
            "outgoing traffic is off" if local_files_only else "no connection " + 40 * "word "
        )

    monkeypatch.setattr("rae.io.hub.hf_hub_download", hub)
    cached = HUB_FILES[-1]
    assert fetch_weights("owner/name", None, "encoder.checkpoint") == tmp_path / cached
    assert asked == [(name, name != HUB_FILES[0]) for name in HUB_FILES]
    cached = None
    with pytest.raises(FileNotFoundError, match=r"no connection (word )+…\).*encoder.checkpoint=/path/to/file"):
        fetch_weights("owner/name", None, "encoder.checkpoint")


def test_arguments_that_timm_does_not_take_are_refused():
    with pytest.raises(
        ValueError, match=r"discriminator\.model_args=.*global_pool.*do not suit timm's vit_tiny_patch16_224: Only"
    ):
        DinoDiscriminator(
            "vit_tiny_patch16_224", 32, [0], 3, pretrained=False, model_args={**TINY, "global_pool": "a=b"}
        )
    with pytest.raises(ValueError, match=r"encoder\.model_args=.*num_heads': 5.*do not suit timm's .*: dim should be"):
        encoder(model_args={**TINY, "num_heads": 5})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channels": 33}, r"encoder\.channels=33.*32"),
        ({"stride": 4, "input_size": 32}, r"encoder\.stride=4.*8"),
        ({"input_size": 30}, r"input_size=30.*24 and 32"),
        ({"layers": [3]}, r"layers=\[3\].*0 to 2"),
        ({"layers": []}, "layers"),
        ({"fusion": "max"}, "max.*last, sum, mean, mean_plus_pooled"),
        ({"layers": [0, 2]}, r"fusion=last.*layers=\[0, 2\].*fusion=sum"),
        ({"layers": [0, 2], "fusion": "mean", "pooled_layer": 0}, r"pooled_layer=0.*not mean;.*deepest"),
        ({"layers": [0, 2], "fusion": "mean_plus_pooled", "pooled_layer": 1}, r"pooled_layer=1.*\[0, 2\]"),
        ({"final_norm": "rms"}, "final_norm='rms'.*plain, affine, none"),
        ({"final_norm": "none", "final_norm_eps": 1e-5}, "final_norm_eps=1e-05.*null"),
        ({"interpolation": "nearest"}, "nearest.*bicubic or bilinear"),
        ({"rope_bfloat16": True}, "rope_bfloat16=true needs DINOv3.*vit_tiny_patch16_224 has not"),
        ({"act": "relu"}, "relu.*gelu"),
        ({"dtype": "int8"}, "int8.*bfloat16"),
        ({"model": "vit_tinny"}, "vit_tinny"),
    ],
)
def test_wrong_encoder_facts_are_refused(options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        encoder(**options)


def test_wrong_images_are_refused():
    with pytest.raises(ValueError, match=r"uint8.*\(1, 3, 4, 4\)"):
        encoder()(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(1, 4, 32, 32\)"):
        encoder()(torch.zeros(1, 4, 32, 32))


@pytest.mark.parametrize("antialias", [True, False])
def test_position_tables_are_resized_to_the_exact_size(antialias: bool):
    table = torch.randn(1, 1 + 9, 4)
    body = table[:, 1:].reshape(1, 3, 3, 4).permute(0, 3, 1, 2)
    expected = F.interpolate(body, (5, 5), mode="bicubic", align_corners=False, antialias=antialias)
    resized = resize_position_table(table, 5, 1, antialias)
    torch.testing.assert_close(resized[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 25, 4))
    torch.testing.assert_close(resized[:, :1], table[:, :1])


@pytest.mark.slow
def test_clip_encoder_gives_normalised_patch_tokens():
    torch.manual_seed(0)
    model = ClipEncoder("ViT-B-32", channels=768, stride=32, input_size=64, pretrained=False)
    latents = model(torch.rand(1, 3, 64, 64))
    assert latents.shape == (1, 768, 2, 2)
    larger = ClipEncoder("ViT-B-32", channels=768, stride=32, input_size=96, pretrained=False)
    larger.load_published(model.published_state(), "the smaller one")
    assert larger.network.positional_embedding.shape == (10, 768)
    assert larger.weights_hash() == model.weights_hash()  # of the table before it is resized
    torch.testing.assert_close(latents.var(1, unbiased=False), torch.ones(1, 2, 2), atol=1e-3, rtol=0)


# --- latents -----------------------------------------------------------------------------------------------------


def test_normalisation_inverts_and_is_the_identity_without_statistics(tmp_path):
    z = torch.randn(3, 2, 4, 4)
    plain = LatentNormalizer((2, 4, 4))
    torch.testing.assert_close(plain.normalize(z), z, atol=1e-6, rtol=1e-6)
    mean, var = torch.randn(2, 4, 4), torch.rand(2, 4, 4) + 0.1
    model = LatentNormalizer((2, 4, 4), mean, var)
    torch.testing.assert_close(model.normalize(z), (z - mean) / (var + 1e-5).sqrt())
    torch.testing.assert_close(model.denormalize(model.normalize(z)), z, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == {"mean", "var"}
    for content in ({"var": var}, {"mean": None, "var": var}):
        torch.save(content, tmp_path / "stat.pt")
        torch.testing.assert_close(
            LatentNormalizer((2, 4, 4), stats=tmp_path / "stat.pt").normalize(z), z / (var + 1e-5).sqrt()
        )


def test_noise_level_is_one_a_sample():
    z, noise = torch.zeros(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    out = add_noise(z, 0.8, torch.tensor([0.5, 0.25]), noise)
    torch.testing.assert_close(out, torch.stack([0.4 * noise[0], 0.2 * noise[1]]))


@pytest.mark.parametrize("sizes", [[64], [1] * 64, [7, 50, 7]])
def test_moments_do_not_depend_on_batches_or_order(sizes: list[int]):
    data = torch.randn(64, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 + 1000
    parts = []
    for batch in data[torch.randperm(64, generator=torch.Generator().manual_seed(len(sizes)))].split(sizes):
        part = RunningMoments((3, 2, 2))
        part.update(batch)
        parts.append(part)
    whole = parts[0]
    for part in parts[1:]:
        whole.merge(part)
    torch.testing.assert_close(whole.mean, data.double().mean(0), atol=0, rtol=1e-12)
    torch.testing.assert_close(whole.var, data.double().var(0, unbiased=False), atol=0, rtol=1e-9)
    restored = RunningMoments((3, 2, 2))
    restored.load_state_dict(whole.state_dict())
    assert torch.equal(restored.var, whole.var)


@pytest.mark.parametrize(
    ("statistics", "words"),
    [
        ({"mean": torch.zeros(3, 4, 4), "var": torch.ones(3, 4, 4)}, r"\(3, 4, 4\).*\(2, 4, 4\).*rae-stats"),
        ({"var": -torch.ones(2, 4, 4)}, "negative"),
        ({"var": torch.full((2, 4, 4), float("nan"))}, "NaN"),
    ],
)
def test_wrong_statistics_are_refused(statistics: dict, words: str):
    with pytest.raises(ValueError, match=words):
        LatentNormalizer((2, 4, 4), **statistics)


# --- decoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "sizes"), [("b", (768, 12, 12, 3072)), ("l", (1024, 24, 16, 4096)), ("xl", (1152, 28, 16, 4096))]
)
def test_decoder_parameters_follow_from_the_table(size: str, sizes: tuple[int, int, int, int]):
    width, depth, heads, mlp = sizes
    with torch.device("meta"):
        model = ViTDecoder(768, 16, width, depth, heads, mlp)
    block = 4 * width * (width + 1) + 2 * width * mlp + width + mlp + 4 * width
    expected = (768 + 1) * width + width + depth * block + 2 * width + (width + 1) * 768
    assert sum(parameter.numel() for parameter in model.parameters()) == expected, size


def test_a_raw_decoder_draws_the_image_itself():
    z, colours = torch.randn(2, 32, 4, 4), {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    raw = decoder(output="raw", **colours)
    torch.testing.assert_close(raw(z), decoder()(z), atol=0, rtol=0)
    assert raw.arguments["output"] == "raw"
    with pytest.raises(ValueError, match=r"decoder\.output='rgb'.*encoder.*raw"):
        decoder(output="rgb")


def test_decoder_speaks_in_the_encoders_pixels_and_starts_with_a_zero_token():
    z = torch.randn(2, 32, 4, 4)
    plain, scaled = decoder(), decoder(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(scaled(z), plain(z) * scale + shift)
    assert not plain.class_token.any()
    assert plain(z).shape == (2, 3, 32, 32)
    checkpointed = decoder(checkpointing=True)
    for model in (plain, checkpointed):
        model(z).square().mean().backward()
    torch.testing.assert_close(plain.embedding.weight.grad, checkpointed.embedding.weight.grad)


@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_decoder_weights_go_there_and_back(naming: str):
    first, second = decoder(), decoder()
    for parameter in first.parameters():
        parameter.data.normal_()
    load_decoder(second, state_from_ours(first, naming), naming)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("shape", [(1, 31, 4, 4), (1, 32, 4, 5), (32, 4, 4)])
def test_wrong_latents_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="B×32×h×h"):
        decoder()(torch.zeros(shape))


def test_autoencoder_refuses_parts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"decoder\.channels=16.*encoder\.channels=32"):
        RAE(tiny_encoder(), decoder(channels=16))
    with pytest.raises(ValueError, match=r"\(32, 2, 2\).*\(32, 4, 4\)"):
        RAE(tiny_encoder(), decoder(), LatentNormalizer((32, 2, 2)))
