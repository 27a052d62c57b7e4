"""Configurations of the original project as its YAML files hold them, from what their repository says of them."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from rae.cli.groups import conf_dir

COLLECTION = Path("models")
ENCODERS = {
    "DINOv2-B": ("Dinov2withNorm", "dinov2_path", "facebook/dinov2-with-registers-base", 224),
    "DINOv2-B_512": ("Dinov2withNorm", "dinov2_path", "facebook/dinov2-with-registers-base", 448),
    "SigLIP2-B": ("SigLIP2wNorm", "model_name", "google/siglip2-base-patch16-256", 256),
    "MAE-B": ("MAEwNorm", "model_name", "facebook/vit-mae-base", 256),
}
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def autoencoder(encoder: str = "DINOv2-B", noise: float = 0.0, **parameters) -> dict:
    cls, name, weights, side = ENCODERS[encoder]
    return {
        "target": "stage1.RAE",
        "params": {
            "encoder_cls": cls,
            "encoder_config_path": weights,
            "encoder_input_size": side,
            "encoder_params": {name: weights},
            "decoder_config_path": "configs/decoder/ViTXL",
            "noise_tau": noise,
            "reshape_to_2d": True,
            **parameters,
        },
    }


def transformer(size: str, side: int, cls: str = "stage2.models.DDT.DiTwDDTHead", **parameters) -> dict:
    width, depth, heads = SIZES[size]
    head = cls.endswith("Head")
    sizes = {"hidden_size": [width, 2048], "depth": [depth, 2], "num_heads": [heads, 16]}
    return {
        "target": cls,
        "params": {
            **(sizes if head else {"hidden_size": width, "depth": depth, "num_heads": heads}),
            **{"input_size": side, "patch_size": 1, "in_channels": 768, "mlp_ratio": 4.0, "num_classes": 1000},
            **{
                "class_dropout_prob": 0.1,
                "use_qknorm": False,
                "use_swiglu": True,
                "use_rope": True,
                "use_rmsnorm": True,
            },
            **{"wo_shift": False, "use_pos_embed": True, **parameters},
        },
    }


def misc(side: int) -> dict:
    dimension = 768 * side * side
    return {
        "latent_size": [768, side, side],
        "num_classes": 1000,
        "time_dist_shift_dim": dimension,
        "time_dist_shift_base": 4096,
    }


EULER = {
    "mode": "ODE",
    "params": {"sampling_method": "euler", "num_steps": 50, "atol": 1e-6, "rtol": 1e-3, "reverse": False},
}
OPTIMIZER = {"lr": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.0}
COSINE = {
    "type": "cosine",
    "warmup_epochs": 1,
    "decay_end_epoch": 16,
    "base_lr": 2e-4,
    "final_lr": 2e-5,
    "warmup_from_zero": True,
}
LINEAR = {
    "type": "linear",
    "warmup_epochs": 40,
    "decay_end_epoch": 800,
    "base_lr": 2e-4,
    "final_lr": 2e-5,
    "warmup_from_zero": False,
}


def stage1_training() -> dict:
    return {
        "stage_1": autoencoder(noise=0.8),
        "eval": {
            "eval_interval": 2500,
            "eval_model": True,
            "data_path": "val",
            "reference_npz_path": "val.npz",
            "metrics": ["psnr"],
        },
        "training": {
            **{"epochs": 16, "ema_decay": 0.9978, "global_batch_size": 512, "num_workers": 8, "clip_grad": 0.0},
            **{"log_interval": 100, "checkpoint_interval": 1, "sample_every": 2500},
            **{"optimizer": OPTIMIZER, "scheduler": COSINE},
        },
        "gan": {
            "disc": {
                "arch": {
                    "dino_ckpt_path": "models/discs/dino.pth",
                    "ks": 9,
                    "norm_type": "bn",
                    "using_spec_norm": True,
                    "recipe": "S_8",
                },
                **{"optimizer": OPTIMIZER, "scheduler": COSINE, "augment": {"prob": 1.0, "cutout": 0.0}},
            },
            "loss": {
                **{
                    "disc_loss": "hinge",
                    "gen_loss": "vanilla",
                    "disc_weight": 0.75,
                    "perceptual_weight": 1.0,
                    "disc_start": 8,
                },
                **{"disc_upd_start": 6, "lpips_start": 0, "max_d_weight": 1e4, "disc_updates": 1},
            },
        },
    }


def stage2_training(size: str = "XL") -> dict:
    return {
        "stage_1": autoencoder(pretrained_decoder_path="models/decoder.pt", normalization_stat_path="models/stat.pt"),
        "stage_2": transformer(size, 16),
        "transport": {
            "params": {
                "path_type": "Linear",
                "prediction": "velocity",
                "loss_weight": None,
                "time_dist_type": "logit-normal_0_1",
            }
        },
        "sampler": EULER,
        "guidance": {"method": "cfg", "scale": 1.0, "t_min": 0.0, "t_max": 1.0},
        "misc": misc(16),
        "training": {
            **{
                "epochs": 1400,
                "global_batch_size": 1024,
                "grad_accum_steps": 1,
                "ema_decay": 0.9995,
                "num_workers": 16,
            },
            **{
                "log_interval": 100,
                "checkpoint_interval": 10,
                "sample_every": 2500,
                "clip_grad": 1.0,
                "global_seed": 42,
            },
            **{"optimizer": OPTIMIZER, "scheduler": LINEAR},
        },
    }


def sampling(image: int = 256) -> dict:
    side, encoder = image // 16, {256: "DINOv2-B", 512: "DINOv2-B_512"}[image]
    published = OmegaConf.load(conf_dir() / "model" / f"dit_dh_xl_{image}.yaml")
    published.collection = "models"
    return {
        "stage_1": autoencoder(
            encoder,
            pretrained_decoder_path=published.decoder_checkpoint,
            normalization_stat_path=published.latent.stats,
        ),
        "stage_2": {**transformer("XL", side), "ckpt": published.checkpoint},
        "transport": {"params": {"path_type": "Linear", "prediction": "velocity", "time_dist_type": "uniform"}},
        "sampler": EULER,
        "guidance": {
            **{"method": "autoguidance", "scale": 1.42 if image == 256 else 1.5, "t-min": 0.0, "t-max": 1.0},
            "guidance_model": {**transformer("S", side), "ckpt": published.guide_checkpoint},
        },
        "misc": misc(side),
    }


def raev2_training(encoder: str = "dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]") -> dict:
    """Stage 2 of RAEv2 in the sections of the first project, with the names that SPEC_RAEV2 and its cases tell."""
    content = stage2_training()
    content["stage_1"] = {
        "target": "stage1.RAE",
        "params": {
            **{"encoder_name": encoder, "resolution": 256, "decoder_config_path": "configs/decoder/ViTXL"},
            **{"pretrained_decoder_path": "models/decoder.pt", "normalization_stat_path": "models/stats.pt"},
        },
    }
    content["stage_2"] = {
        "target": "stage2.models.DiTwDDTHeadIG",
        "params": {
            **{"input_size": 16, "patch_size": [1, 1], "in_channels": 1024, "num_classes": 1000, "mlp_ratio": 4.0},
            **{"hidden_size": [1440, 2048], "depth": [28, 2], "num_heads": [20, 16], "base_model_depth": 8},
            "arch": {"num_t_tokens": 4, "num_c_tokens": 8},
        },
    }
    content["transport"]["params"] = {
        **{"path_type": "Linear", "prediction": "x", "t_eps": 0.05, "time_dist_type": "logit-normal_0_1"},
        **{"base_model_coeff": 1.0, "repa_coeff": 0.0, "cfg_dropout_prob": 0.1},
    }
    content["guidance"] = {"cfg_scale": 1.0, "ig_scale": 1.0}
    content["sampler"] = {"mode": "ODE", "params": {"sampling_method": "euler", "num_steps": 50}}
    content["misc"] |= {"latent_size": [1024, 16, 16], "time_dist_shift_dim": 262144}
    content["training"] |= {"epochs": 80, "optimizer": {"type": "gmuon", **OPTIMIZER}}
    content["training"]["scheduler"] = {**LINEAR, "warmup_epochs": 25, "decay_end_epoch": 50}
    return content
