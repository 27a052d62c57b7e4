"""Cases about the denoisers."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from rae.condition import normalize_action
from rae.denoiser import Denoiser
from rae.encoder.text import hidden_states
from rae.flow import AutoGuidance, ClassifierFreeGuidance, Guidance, InternalGuidance, NoGuidance
from rae.formats.raev2 import from_ours
from tests.golden_checks import Case
from tests.helpers.original_networks import original_denoiser, raev2_denoiser


def models(case: Case) -> tuple[Denoiser, Denoiser | None]:
    """The case's model and its guide, if it has one."""
    prefix = case.config.get("guide_weights_prefix")
    weights = {key: value for key, value in case.tensors.items() if key.startswith("weights/")}
    guide = None
    if prefix:
        guide = original_denoiser(case.config["guide"], case.part(prefix))
        weights = {key: value for key, value in weights.items() if not key.startswith(prefix)}
    model = original_denoiser(case.config, {k.removeprefix("weights/"): v for k, v in weights.items()})
    return model, guide


@torch.no_grad()
def check_denoiser(case: Case) -> dict[str, Tensor]:
    model, guide = models(case)
    x, t, y = (case.inputs[key] for key in ("x", "t", "y"))
    computed = {"outputs/velocity": model(x, t, y)}
    if guide is not None:
        config = case.config
        computed["outputs/guide_velocity"] = guide(x, t, y)
        told = {"label": case.inputs["y_cfg"][: len(x)]}
        for key, interval in (("cfg", config["interval"]), ("cfg_whole_interval", (0.0, 1.0))):
            guidance = ClassifierFreeGuidance(config["cfg_scale"], tuple(interval))
            half = guidance(model, told, null=model.condition.null(told))(x, t)
            computed[f"outputs/{key}"] = torch.cat(
                [half, half]
            )  # the original returns both halves of its doubled batch
        auto = AutoGuidance(config["autoguidance_scale"], tuple(config["interval"]))
        computed["outputs/autoguidance"] = auto(model, {"label": y}, guide=guide)(x, t)
    return computed


def guidances(config: dict) -> dict[str, Guidance]:
    """The guidances of a RAEv2 case, by the names that its outputs have."""
    cfg, cfg_interval = config["cfg_scale"], tuple(config["cfg_interval"])
    scale, interval = config["ig_scale"], tuple(config["ig_interval"])
    return {
        "none": NoGuidance(),
        "cfg": ClassifierFreeGuidance(cfg, cfg_interval),
        "ig": InternalGuidance(scale, interval),
        "ig_cfg": InternalGuidance(scale, interval, None, cfg, cfg_interval),
        "ig_cfg_uncond": InternalGuidance(scale, interval, config.get("uncond_ig_scale"), cfg, cfg_interval),
    }


def told(case: Case) -> dict[str, Tensor]:
    """What the denoiser of a RAEv2 case is told."""
    inputs, kind = case.inputs, case.config.get("condition_type")
    if kind == "text":
        return {"text": inputs["context"], "text_mask": inputs["attn_mask"]}
    if kind == "nwm":
        return {"frames": inputs["context_latents"], "action": inputs["action"], "elapsed": inputs["rel_time"]}
    return {"label": inputs["y"]}


@torch.no_grad()
def check_in_context(case: Case) -> dict[str, Tensor]:
    config, inputs, conditions = case.config, case.inputs, told(case)
    model = raev2_denoiser(config, case.part("weights/"))
    x, t = inputs["x"], inputs["t"]
    null = model.condition.null(conditions)
    both = [model(x, t, base=True, **told) for told in (conditions, null)]
    computed = {
        f"outputs/{name}{suffix}": value
        for suffix, pair in zip(("", "_null"), both, strict=True)
        for name, value in zip(("full", "base"), pair, strict=True)
    }
    assert torch.equal(model(x, t, **conditions), both[0][0])  # the base head changes nothing
    if "cfg_scale" in config:
        for name, guidance in guidances(config).items():
            computed[f"outputs/{name}"] = guidance(model, conditions, null=null)(x, t)
    if "attn_mask" in inputs:
        unmasked = model(x, t, base=True, text=inputs["context"])
        computed |= {f"outputs/{n}_no_mask": v for n, v in zip(("full", "base"), unmasked, strict=True)}
    if "poses" in inputs:
        spacing = config["metric_waypoint_spacing"]
        computed["outputs/normalised_action"] = normalize_action(
            inputs["poses"], spacing, config["action_min"], config["action_max"]
        )
    tables = {key for key in case.part("weights/") if "rope." in key}
    for key, value in from_ours(model).items():
        stored = case.tensors[f"weights/{key}"]
        assert torch.allclose(value, stored, atol=1e-6) if key in tables else torch.equal(value, stored), key
    return computed


def check_text_encoder(case: Case) -> dict[str, Tensor]:
    config = {key: value for key, value in case.config.items() if key not in ("model", "max_length", "padding_side")}
    kind = getattr(transformers, case.config["model"].replace("ForCausalLM", "Config"))
    network = transformers.AutoModel.from_config(kind(**config), dtype=torch.float32).eval()
    weights = {
        key.removeprefix("model."): value for key, value in case.part("weights/").items() if key != "lm_head.weight"
    }
    network.load_state_dict(weights)
    ids = case.inputs["input_ids"]
    mask = ids != case.config["pad_id"]
    return {"outputs/attention_mask": mask, "outputs/features": hidden_states(network, ids, mask)}


CHECKS = {"dit_dh": check_denoiser, "lightning_dit": check_denoiser}
CHECKS |= {"dit_dh_ig": check_in_context, "lightning_dit_ig": check_in_context}
CHECKS["text_encoder"] = check_text_encoder
