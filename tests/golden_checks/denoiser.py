"""Cases about the denoisers."""

from __future__ import annotations

import torch
from torch import Tensor

from rae.denoiser import Denoiser
from rae.flow import AutoGuidance, ClassifierFreeGuidance
from rae.formats.denoiser import denoiser_from_original
from tests.golden_checks import Case


def models(case: Case) -> tuple[Denoiser, Denoiser | None]:
    """The case's model and its guide, if it has one."""
    prefix = case.config.get("guide_weights_prefix")
    weights = {key: value for key, value in case.tensors.items() if key.startswith("weights/")}
    guide = None
    if prefix:
        guide = denoiser_from_original(case.config["guide"], case.part(prefix))
        weights = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    model = denoiser_from_original(case.config, {k.removeprefix("weights/"): v for k, v in weights.items()})
    return model, guide


@torch.no_grad()
def check_denoiser(case: Case) -> dict[str, Tensor]:
    model, guide = models(case)
    x, t, y = (case.inputs[key] for key in ("x", "t", "y"))
    computed = {"outputs/velocity": model(x, t, y)}
    if guide is not None:
        config = case.config
        computed["outputs/guide_velocity"] = guide(x, t, y)
        label = case.inputs["y_cfg"][: len(x)]
        for key, interval in (("cfg", config["interval"]), ("cfg_whole_interval", (0.0, 1.0))):
            guidance = ClassifierFreeGuidance(config["cfg_scale"], tuple(interval))
            half = guidance(model, label, null_label=model.null_label)(x, t)
            computed[f"outputs/{key}"] = torch.cat(
                [half, half]
            )  # the original returns both halves of its doubled batch
        auto = AutoGuidance(config["autoguidance_scale"], tuple(config["interval"]))
        computed["outputs/autoguidance"] = auto(model, y, guide=guide)(x, t)
    return computed


CHECKS = {"dit_dh": check_denoiser, "lightning_dit": check_denoiser}
