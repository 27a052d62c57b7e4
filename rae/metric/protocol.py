"""The protocol stored with scores: every rule that affects them, and its differences from a published protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rae.metric.generation import PROTOCOLS

_SAMPLES: dict[str, dict[str, Any]] = {
    "adm": {"labels": "balanced", "bytes": "floor", "precision": "32-true"},
    "raev2": {"labels": "balanced", "bytes": "floor"},
    "ours": {"labels": "balanced", "bytes": "floor", "precision": "32-true"},
}
"""The protocols' requirements on samples; for those on the metric, see :data:`rae.metric.generation.PROTOCOLS`."""
_REFERENCES = {"adm": ("adm_imagenet256", "adm_imagenet512"), "raev2": ("jit_imagenet256",)}
"""References used for the published numbers."""


def protocol_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The rules behind scores, from their identity; for a set of metrics, those of every metric by name.

    For samples from files that do not record how they were generated, unknown rules are ``unknown``.
    """
    samples, metric = identity.get("samples") or {}, identity.get("metric") or {}
    rules = {
        "labels": samples.get("label_rule", "unknown"),
        "bytes": samples.get("quantize", "unknown"),
        "precision": samples.get("precision", "unknown"),
        "sampler": samples.get("sampler", "unknown"),
        "evaluations": samples.get("evaluations", "unknown"),
        "guidance": samples.get("guidance", "unknown"),
    }
    if "detector" in metric:
        return {**rules, **_metric_rules(metric, rules)}
    return {**rules, **{name: _metric_rules(one, rules) for name, one in metric.items() if isinstance(one, Mapping)}}


def _metric_rules(metric: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, Any]:
    references = metric.get("references") or {"": metric.get("reference")}
    found: dict[str, Any] = {
        "reference": {name: one and (one.get("name") or one.get("path")) for name, one in references.items()},
        "detector": (metric.get("detector") or {}).get("name"),
        "resize": (metric.get("detector") or {}).get("side", "the detector's own"),
    }
    found |= {name: metric[name] for name in ("split_rule", "split_size", "distance_precision") if name in metric}
    if len(references) == 1:
        found["reference"] = next(iter(found["reference"].values()))
    asked = metric.get("protocol")
    if asked is None:
        return found
    wanted = {**_SAMPLES[asked], **PROTOCOLS[asked]}
    differing = [
        f"{name}: {value} where {asked} has {wanted[name]}"
        for name, value in {**rules, **found}.items()
        if name in wanted and value not in (wanted[name], "unknown")
    ]
    names = found["reference"].values() if isinstance(found["reference"], dict) else [found["reference"]]
    if asked in _REFERENCES and not set(names) & set(_REFERENCES[asked]):
        differing.append(f"reference: {found['reference']} where {asked} has {' or '.join(_REFERENCES[asked])}")
    return {**found, "protocol": asked, "differences": differing}


def in_words(rules: Mapping[str, Any]) -> str:
    """The rules as one line below a table: ``labels balanced, bytes floor, …``; for a set of metrics, those common to all."""
    words = [f"{name} {rules[name]}" for name in ("labels", "bytes", "precision")]
    guidance, counts = rules["guidance"], rules["evaluations"]
    if isinstance(guidance, Mapping):
        words.append(" + ".join(map(_strength, guidance.get("parts", [guidance]))))
    if isinstance(counts, Mapping):
        words.append(f"{sum(counts.get(name, 0) for name in ('denoiser', 'guide'))} evaluations")
    words += [f"{name} {rules[name]}" for name in ("reference", "split_rule") if rules.get(name) is not None]
    return "rules: " + ", ".join(words)


def _strength(guidance: Mapping[str, Any]) -> str:
    """A guidance's kind and scale."""
    kind = str(guidance.get("_target_")).rpartition(".")[2]
    return f"{kind} {guidance['scale']:g}" if "scale" in guidance else kind


def differences(rules: Mapping[str, Any]) -> list[str]:
    """All differences from the requested protocols, one per line."""
    found = [str(line) for line in rules.get("differences", [])]
    for name, inner in rules.items():
        if isinstance(inner, Mapping):
            found += [f"{name}: {line}" for line in inner.get("differences", [])]
    return found
