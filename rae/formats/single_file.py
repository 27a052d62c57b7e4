"""Merges modules of this library into one Python file, which diffusers loads from a folder without ``rae`` installed.

The file holds all of one module and, from the ``rae`` modules that it imports, the classes, functions and constants that it
needs, verbatim and in import order. Writing it imports nothing, and its content does not depend on the model.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = "rae"
_HEADER = '''"""{title}

Written by rae {version} out of its own modules, for use without it; changes belong there. MIT licence, the rae authors.
"""

from __future__ import annotations
'''


@dataclass(frozen=True, eq=False)
class _Statement:
    """A class, function or constant at the top level of a module."""

    text: str
    meaning: str
    """Its code without comments."""
    uses: frozenset[str]
    """All names in it."""


@dataclass(frozen=True)
class _Module:
    """The top-level names of a module, and where they come from."""

    own: dict[str, _Statement] = field(default_factory=dict)
    """Names defined here, in order."""
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Names imported from ``rae`` -> module, and name in it."""
    others: dict[str, str] = field(default_factory=dict)
    """Names imported from elsewhere -> import statement."""


def single_file(module: str, title: str) -> str:
    """Source of a file that holds a module of this library and everything that it needs from others.

    Args:
        module: Its dotted name.
        title: First line of the file.

    Raises:
        ValueError: Two objects have the same name, or a statement cannot be moved.
    """
    wanted: set[_Statement] = set()
    imports: set[str] = set()
    meant: dict[str, str] = {}  # what each name in the file means

    def bind(name: str, meaning: str, place: str) -> None:
        if meant.setdefault(name, meaning) != meaning:
            raise ValueError(f"{name!r} of {place} is something else elsewhere: give one of the two another name")

    todo = [(module, name) for name in _read(module).own]
    while todo:
        place, name = todo.pop()
        here = _read(place)
        if name in here.ours:
            todo.append(here.ours[name])
        elif name in here.others:
            bind(name, here.others[name], place)
            imports.add(here.others[name])
        elif name in here.own:
            statement = here.own[name]
            bind(name, statement.meaning, place)
            if statement not in wanted:
                wanted.add(statement)
                todo += [(place, used) for used in sorted(statement.uses)]

    parts: list[str] = []
    written: set[str] = set()
    for place in _ordered(module):
        own = [one for one in dict.fromkeys(_read(place).own.values()) if one in wanted and one.meaning not in written]
        written |= {one.meaning for one in own}
        if own:
            parts.append("\n\n\n".join([f"# --- {place} ---", *(one.text for one in own)]))
    head = _HEADER.format(title=title, version=metadata.version(ROOT))
    ordered = sorted(imports, key=lambda text: (text.startswith("from "), text))
    text = "\n".join([head, *ordered, "", "", "\n\n\n".join(parts), ""])
    compile(text, module, "exec")
    return text


@cache
def _read(name: str) -> _Module:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    module, lines, body = _Module(), text.splitlines(), ast.parse(text).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_import(module, name, node)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign):
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
            last: ast.stmt = node
            if following is not None and _is_text(following) and not isinstance(node, ast.ClassDef):
                last = following  # the docstring below a constant
            uses = frozenset(one.id for one in ast.walk(node) if isinstance(one, ast.Name))
            statement = _Statement("\n".join(lines[first - 1 : last.end_lineno]), ast.unparse(node), uses)
            module.own.update(dict.fromkeys(_defined(node), statement))
        elif not _is_text(node):
            raise ValueError(f"{name}, line {node.lineno}: only imports, classes, functions and constants can be moved")
    return module


def _note_import(module: _Module, name: str, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        bound, renamed = alias.asname or alias.name, "" if alias.asname is None else f" as {alias.asname}"
        if isinstance(node, ast.Import):
            module.others[bound.split(".")[0] if not renamed else bound] = f"import {alias.name}{renamed}"
        elif str(node.module).split(".")[0] == ROOT:
            if renamed:
                raise ValueError(f"{name}, line {node.lineno}: a name of our own is imported under another one")
            module.ours[bound] = (str(node.module), alias.name)
        elif node.module != "__future__":
            module.others[bound] = f"from {node.module} import {alias.name}{renamed}"


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name))


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def _ordered(module: str) -> list[str]:
    """The module and those that it imports, each after its own imports."""
    order: dict[str, None] = {}
    for other in dict.fromkeys(place for place, _ in _read(module).ours.values()):
        order |= dict.fromkeys(_ordered(other))
    return [*order, module]
