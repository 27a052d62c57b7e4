"""The ``--help`` text: config groups, keys and experiments."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from rae.cli.groups import SHARED, chosen_in, command_files, conf_dir, config_groups, documented

GROUPS = {
    "stage": "what to train: 0 your own encoder, 1 the decoder, 2 the diffusion transformer",
    "experiment": "a complete recipe; applied last, so it can override all other groups",
    "model": "a published model, from files that rae-download fetches",
    "encoder": "frozen network whose patch tokens are the latents",
    "latent": "normalisation of the latents",
    "decoder": "network that maps latents back to images",
    "discriminator": "discriminator for the decoder's adversarial loss",
    "loss": "the decoder's loss",
    "condition": "what a denoiser is conditioned on in context: label, text, navigation",
    "text_encoder": "frozen network that encodes captions and prompts",
    "denoiser": "diffusion transformer on the latents",
    "alignment": "auxiliary loss on the tokens of one denoiser block: REPA",
    "flow": "path between data and noise, prediction, training times, shift",
    "guidance": "guidance while sampling",
    "sampler": "solver that goes from noise to data",
    "data": "images",
    "metric": "scores",
    "detector": "frozen network whose features the scores use",
    "training": "the LightningModule and its arguments",
    "optimizer": "optimiser",
    "scheduler": "learning rate over time",
    "trainer": "devices, length, precision: Lightning's Trainer",
    "strategy": "how devices split the work",
    "callbacks": "checkpoints, averages, previews",
    "evaluation": "scores during training, every so many steps or epochs",
    "logger": "where to log curves and images",
    "card": "a GPU's speed and memory, for rae-cost",
    "weights": "the trained model that a command opens",
    "compute": "where a command runs",
    "paths": "folders",
    "debug": "short runs for debugging",
    "hydra": "Hydra itself",
}
"""One line about every folder in ``conf/``."""

_WIDTH = 118
_INDENT = " " * 17
_WIDE = 26  # width of a key with its default


def help_keys(config: str) -> str:
    """Lists a command's own keys, given its root config, with defaults and comments; the model's come first."""
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
    """Fields in the header of every experiment: ``name``, ``about``, ``Size``, ``Hardware``, ``Hours``, ``Expected``, …."""
    found = []
    for file in sorted((conf_dir() / "experiment").glob("*.yaml")):
        head = [line.removeprefix("# ") for line in file.read_text().splitlines() if line.startswith("# ")]
        fields = dict(line.split(": ", 1) for line in head[2:])
        found.append({"name": file.stem, "about": head[1], **fields})
    return found


def list_experiments() -> str:
    """Text that ``rae-train --list`` prints: every experiment with size, hardware, hours and published score."""
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
    """Lists a command's groups with their options, the chosen ones (``choices``, Hydra's record by group) in brackets."""
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
    # Hydra passes the text through string.Template.
    return "\n".join(lines).replace("$", "$$")


def _wrapped(text: str, first: str, others: str) -> list[str]:
    """Wraps a text into lines; ``first`` and ``others`` are the prefixes of the first line and the rest."""
    wrap = textwrap.TextWrapper(_WIDTH, first, others, replace_whitespace=False)
    wrap.break_on_hyphens = wrap.break_long_words = False
    return wrap.wrap(text)


def stages_with(group: str) -> list[str]:
    """Stages whose defaults list names a group."""
    return [file.stem for file in sorted((conf_dir() / "stage").glob("*.yaml")) if group in chosen_in(file)]
