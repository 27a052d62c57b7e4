"""What ``--help`` says of the config groups."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from rae.cli.groups import SHARED, chosen_in, command_files, conf_dir, config_groups, documented

GROUPS = {
    "stage": "what is trained: 0 an encoder of your own, 1 the decoder, 2 the diffusion transformer",
    "experiment": "a complete recipe; chosen last, so that it may change all others",
    "model": "a published model, from the files that rae-download fetches",
    "encoder": "frozen network whose patch tokens are the latents",
    "latent": "normalisation of the latents",
    "decoder": "network from latents back to images",
    "discriminator": "adversary of the decoder",
    "loss": "loss of the decoder",
    "condition": "what a denoiser is told in context: label, text, navigation",
    "text_encoder": "frozen network that makes features of captions and prompts",
    "denoiser": "diffusion transformer on the latents",
    "alignment": "further loss of the denoiser on the tokens of one block: REPA",
    "flow": "path between data and noise, prediction, training times, shift",
    "guidance": "guidance of the samples",
    "sampler": "solver that goes from noise to data",
    "data": "images",
    "metric": "scores",
    "detector": "frozen network in whose features the scores are computed",
    "training": "the LightningModule and its arguments",
    "optimizer": "optimiser",
    "scheduler": "learning rate over time",
    "trainer": "devices, length, precision: Lightning's Trainer",
    "strategy": "how devices share the work",
    "callbacks": "checkpoints, averages, previews",
    "evaluation": "scores while training, at steps or epochs",
    "logger": "where curves and pictures go",
    "card": "what a card can do, for rae-cost",
    "weights": "the trained model of a command",
    "compute": "where a command runs",
    "paths": "folders",
    "debug": "short runs that look for faults",
    "hydra": "Hydra itself",
}
"""One line on every folder in ``conf/``."""

_WIDTH = 118
_INDENT = " " * 17
_WIDE = 26  # of a key with its default


def help_keys(config: str) -> str:
    """Lists the own keys of a command, by its root config, with defaults and what comments say; the model's come first."""
    keys: dict[str, tuple[bool, str]] = {}
    for file in command_files(config):
        for key, default, comment in documented(file):
            if comment:
                line = f"{key}={default}".ljust(_WIDE) + f"  {comment}"
                keys.setdefault(key, (file.parent.name != "weights", line))
    lines = []
    for _, line in sorted(keys.values(), key=lambda one: one[0]):
        lines += _wrapped(line, "  ", " " * (_WIDE + 4))
    return "\n".join(lines).replace("$", "$$")


def experiments() -> list[dict[str, str]]:
    """What the header of every experiment says: ``name``, ``about``, ``Size``, ``Hardware``, ``Hours``, ``Expected``, …"""
    found = []
    for file in sorted((conf_dir() / "experiment").glob("*.yaml")):
        head = [line.removeprefix("# ") for line in file.read_text().splitlines() if line.startswith("# ")]
        fields = dict(line.split(": ", 1) for line in head[2:])
        found.append({"name": file.stem, "about": head[1], **fields})
    return found


def list_experiments() -> str:
    """What ``rae-train --list`` prints: every experiment with size, hardware, hours and published score."""
    lines = ["rae-train experiment=NAME trains one of these; the commands are in conf/experiment/NAME.yaml.", ""]
    for one in experiments():
        lines += [
            f"{one['name']:<32} {one['about']}",
            f"    {one['Size']}; {one['Hardware'].rstrip('.')}",
            f"    time: {one['Hours'].rstrip('.')}",
            f"    expected: {one['Expected'].rstrip('.')}",
        ]
    return "\n".join(lines)


def help_groups(choices: Mapping[str, object]) -> str:
    """Lists the groups of a command with their choices, those made (``choices`` by group, Hydra's record) in brackets."""
    available = config_groups()
    chosen = {group.split("@")[0]: choice for group, choice in choices.items() if "hydra/" not in group}
    lines = []
    for group, description in GROUPS.items():
        elsewhere = stages_with(group) if "stage" in chosen and group not in chosen else []
        if group not in available or group in SHARED or not (group in chosen or elsewhere):
            continue
        lines.append(f"  {group:<14} {description}" + (f" (with stage={elsewhere[0]})" if elsewhere else ""))
        options = [f"[{option}]" if option == str(chosen.get(group)) else option for option in available[group]]
        lines += _wrapped("  ".join(options), _INDENT, _INDENT)
    # Hydra puts the text through string.Template.
    return "\n".join(lines).replace("$", "$$")


def _wrapped(text: str, first: str, others: str) -> list[str]:
    """The lines of a text, with what the first one and the others begin with."""
    wrap = textwrap.TextWrapper(_WIDTH, first, others, replace_whitespace=False)
    wrap.break_on_hyphens = wrap.break_long_words = False
    return wrap.wrap(text)


def stages_with(group: str) -> list[str]:
    """The stages whose defaults list names a group."""
    return [file.stem for file in sorted((conf_dir() / "stage").glob("*.yaml")) if group in chosen_in(file)]
