"""The layers of the library: a module imports only what stands below it (see LEVELS)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rae"
LEVELS = [
    {"layers", "flow", "loss", "metric", "latent", "rng", "weights", "image", "hub", "describe", "parts"},
    {"encoder", "decoder", "denoiser", "discriminator"},
    {"autoencoder", "generator", "checkpoint", "cost"},
    {"data", "training"},
    {"cli"},
]
SHARED = {"layers", "rng", "weights", "image", "hub", "describe", "parts"}  # leaves that anyone may import
FOR_NETWORKS = SHARED | {"latent"}  # leaves that networks may import
THIRD_PARTY = {
    "lightning": {"data", "training", "cli"},
    "pytorch_lightning": set(),  # the old name of lightning.pytorch
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "wandb": set(),
}
"""Which units may import a package; the others may not."""

FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def unit(path: Path) -> str:
    """The folder or file directly below rae/ that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def level(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def imported(path: Path) -> list[str]:
    """Dotted names of all modules that a file imports, at the top or inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def allowed(importer: str, other: str) -> bool:
    here, there = level(importer), level(other)
    if importer == other:
        return True
    if here == 0:
        return there == 0 and other in SHARED
    if here == 1:
        return there == 0 and other in FOR_NETWORKS
    return there < here or (there == here and importer != "cli")


def test_every_unit_has_a_level():
    units = {unit(path) for path in FILES}
    assert units == set().union(*LEVELS) & units
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_only_what_stands_below(path):
    own = unit(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "rae" and len(parts) > 1:
            assert allowed(own, parts[1]), f"{own} must not import rae.{parts[1]}"
        if parts[0] in THIRD_PARTY:
            assert own in THIRD_PARTY[parts[0]], f"{own} must not import {parts[0]}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("__init__.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_init_files_list_public_names_and_nothing_else(path):
    lazily = path == ROOT / "__init__.py"  # may hand out the command line's functions without importing them
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["__all__"]
        assert docstring or names or isinstance(node, ast.ImportFrom) or lazily, ast.unparse(node)
