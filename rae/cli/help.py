"""What ``--help`` says of the config groups."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from rae.cli.groups import SHARED, command_files, conf_dir, config_groups

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


_KEY = re.compile(r"^(\w+): (.*?)\s*#\s*(.+)$")


def help_keys(config: str) -> str:
    """Lists a command's own keys, the model's first, with their defaults and what their comments say.

    Args:
        config: Name of its root config in ``conf/``.
    """
    keys: dict[str, tuple[Path, str, str]] = {}
    for file in command_files(config):
        for line in file.read_text().splitlines():
            if found := _KEY.match(line):
                keys.setdefault(found[1], (file, found[2], found[3]))
    lines = []
    for key, (_, value, comment) in sorted(keys.items(), key=lambda one: one[1][0].parent.name != "weights"):
        lines += textwrap.wrap(
            f"{key}={value}".ljust(_WIDE) + f"  {comment}",
            _WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * (_WIDE + 4),
            break_on_hyphens=False,
            break_long_words=False,
            drop_whitespace=True,
            replace_whitespace=False,
        )
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
    """Lists the groups of a command, with their choices.

    Args:
        choices: Hydra's record of the choice made in every group.
    """
    available = config_groups()
    chosen = {group.split("@")[0]: choice for group, choice in choices.items() if "hydra/" not in group}
    lines = []
    for group, description in GROUPS.items():
        if (
            group not in available
            or group in SHARED
            or (group not in chosen and not (elsewhere := _stages_with(group, chosen)))
        ):
            continue
        lines.append(f"  {group:<14} {description}")
        if group not in chosen:
            lines[-1] += f" (with stage={elsewhere[0]})"
        options = [f"[{option}]" if option == str(chosen.get(group)) else option for option in available[group]]
        lines += textwrap.wrap(
            "  ".join(options), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT, break_on_hyphens=False
        )
    # Hydra puts the text through string.Template.
    return "\n".join(lines).replace("$", "$$")


def _stages_with(group: str, chosen: Mapping[str, object]) -> list[str]:
    """The stages, other than the one chosen, that make use of a group; none where the command knows no stages."""
    return stages_with(group) if "stage" in chosen else []


def stages_with(group: str) -> list[str]:
    """The stages whose defaults list names a group."""
    found = []
    for file in sorted((conf_dir() / "stage").glob("*.yaml")):
        stage = OmegaConf.to_container(OmegaConf.load(file))
        defaults = stage.get("defaults", []) if isinstance(stage, dict) else []
        names = {str(name).lstrip("/").split("@")[0] for entry in defaults if isinstance(entry, dict) for name in entry}
        if group in names:
            found.append(file.stem)
    return found
