"""The order of the library: a unit imports only units that stand before it in ORDER, and no modules form a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rae"
MATERIALS = ["rng", "io", "image", "layers", "condition"]
PARTS = ["flow", "loss", "latent", "encoder", "decoder", "denoiser", "discriminator", "metric", "data"]
ORDER = [
    *MATERIALS,
    *PARTS,
    "autoencoder",
    "prompts",
    "generator",
    "formats",
    "training",
    "jobs",
    "cost",
    "report",
    "cpu",
    "cli",
]
ORDER += ["commands", "app", "demo"]
THIRD_PARTY = {
    "lightning": {"data", "training", "jobs", "cli", "commands", "demo"},
    "pytorch_lightning": set(),  # the old name of lightning.pytorch
    "hydra": {"cli", "commands"},
    "omegaconf": {"cli", "jobs", "commands", "app", "demo"},
    "wandb": set(),
}
"""Which units may import a package; the others may not."""

FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or not path.name.startswith("__"))


def unit(path: Path) -> str:
    """The folder or file directly below rae/ that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Dotted names of all that a file imports, at the top, inside functions or for types alone."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def allowed(importer: str, other: str) -> bool:
    """Whether one unit may import another: what stands before it, and parts never each other."""
    if importer == other:
        return True
    return ORDER.index(other) < ORDER.index(importer) and not {importer, other} <= set(PARTS)


def module(path: Path) -> str:
    return path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def circles() -> list[set[str]]:
    """Sets of modules that import one another; what a package's ``__init__`` gathers makes none."""
    known = {module(path): path for path in FILES}
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    edges: dict[str, set[str]] = {}
    for name, path in known.items():
        found = edges.setdefault(name, set())
        for target in imported(path):
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name and target not in packages and name not in packages:
                found.add(target)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for other in edges[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    reach = {name: reached(name) for name in edges}
    return [{other for other in reach[name] if name in reach[other]} for name in edges if name in reach[name]]


def test_every_unit_has_its_place():
    assert {unit(path) for path in FILES} == set(ORDER)
    assert len(FILES) > 100


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_only_what_stands_before(path):
    own = unit(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "rae" and len(parts) > 1:
            assert allowed(own, parts[1]), f"{own} must not import rae.{parts[1]}"
        if parts[0] in THIRD_PARTY:
            assert own in THIRD_PARTY[parts[0]], f"{own} must not import {parts[0]}"


def test_no_modules_form_a_circle():
    assert circles() == []


def test_few_imports_stand_inside_functions():
    """Optional packages, and those that few need and that are slow."""
    inside = []
    for path in FILES:
        functions = [
            n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        inside += [path.name for f in functions for n in ast.walk(f) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert len(inside) <= 5, inside


@pytest.mark.parametrize("path", sorted(ROOT.rglob("__init__.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_init_files_list_public_names_and_nothing_else(path):
    lazily = path == ROOT / "__init__.py"  # hands out the public face without importing it
    for node in ast.parse(path.read_text()).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and [target.id for target in node.targets] == ["__all__"]
        assert docstring or names or isinstance(node, ast.ImportFrom) or lazily, ast.unparse(node)


def test_tests_lie_in_folders_of_the_library():
    shared = {"helpers", "golden", "golden_checks", "benchmarks", "attacks", "xla"}
    folders = {path.parent.name for path in Path(__file__).parent.glob("*/*.py")} - shared
    assert folders <= {path.name for path in ROOT.iterdir() if path.is_dir()}
