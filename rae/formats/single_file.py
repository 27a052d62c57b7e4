"""One Python file out of several modules of this library: what diffusers loads from a folder, where ``rae`` is not installed.

The file holds all of one module and, of the modules below ``rae`` that it imports, the classes, functions and constants that it
needs, word for word and in the order of the imports. Nothing is imported to write it, and nothing depends on the model.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = "rae"
_HEADER = '''"""{title}

Written by rae {version} out of its own modules, for use without it; changes belong there. MIT licence, the rae authors.
"""

from __future__ import annotations
'''


@dataclass
class _Module:
    """The names that a module binds at its top, and where they come from."""

    name: str
    lines: list[str]
    own: dict[str, int] = field(default_factory=dict)
    """Number of the statement that defines a name."""
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Module below ``rae`` and name there, of an imported name."""
    others: dict[str, str] = field(default_factory=dict)
    """Import statement of a name from elsewhere."""
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)
    """First and last line of a statement."""
    uses: dict[int, set[str]] = field(default_factory=dict)
    """All names in a statement."""
    meanings: dict[int, str] = field(default_factory=dict)
    """A statement without comments."""
    imports: list[str] = field(default_factory=list)
    """Modules below ``rae`` that it imports, in their order."""


def single_file(module: str, title: str) -> str:
    """The text of a file that holds a module of this library with all that it needs of others.

    Args:
        module: Its dotted name.
        title: First line of the file.

    Raises:
        ValueError: Two things of one name, or a statement that cannot be moved.
    """
    found: dict[str, _Module] = {}
    wanted: dict[str, set[int]] = {}
    imports: dict[str, str] = {}
    meant: dict[str, str] = {}  # what each name of the file stands for

    def known(name: str) -> _Module:
        if name not in found:
            found[name] = _read(name)
        return found[name]

    def bind(name: str, meaning: str, place: str) -> None:
        if meant.setdefault(name, meaning) != meaning:
            raise ValueError(f"{name!r} of {place} is something else elsewhere: give one of the two another name")

    todo = [(module, name) for name in known(module).own]
    while todo:
        place, name = todo.pop()
        here = known(place)
        if name in here.ours:
            todo.append(here.ours[name])
        elif name in here.others:
            bind(name, here.others[name], place)
            imports[name] = here.others[name]
        elif name in here.own:
            number = here.own[name]
            bind(name, here.meanings[number], place)
            if number not in wanted.setdefault(place, set()):
                wanted[place].add(number)
                todo += [(place, used) for used in sorted(here.uses[number])]

    parts: list[str] = []
    written: set[str] = set()
    for place in _ordered(module, known):
        here = known(place)
        own = [number for number in sorted(wanted.get(place, ())) if here.meanings[number] not in written]
        written |= {here.meanings[number] for number in own}
        texts = [_text(here, number) for number in own]
        if texts:
            parts.append("\n\n\n".join([f"# --- {place} ---", *texts]))
    head = _HEADER.format(title=title, version=metadata.version(ROOT))
    text = "\n".join([head, *_sorted_imports(imports), "", "", "\n\n\n".join(parts), ""])
    compile(text, module, "exec")
    return text


def _read(name: str) -> _Module:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text(encoding="utf-8")
    module = _Module(name, text.splitlines())
    body = ast.parse(text).body
    for number, node in enumerate(body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            _note_import(module, node)
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign):
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
            last = node.end_lineno or first
            if number + 1 < len(body) and _is_text(body[number + 1]) and not isinstance(node, ast.ClassDef):
                last = body[number + 1].end_lineno or last  # what is said below a constant
            module.spans[number] = (first, last)
            module.meanings[number] = ast.unparse(node)
            module.uses[number] = {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
            module.own.update(dict.fromkeys(_defined(node), number))
        elif not _is_text(node):
            raise ValueError(f"{name}, line {node.lineno}: only imports, classes, functions and constants can be moved")
    return module


def _note_import(module: _Module, node: ast.Import | ast.ImportFrom) -> None:
    for alias in node.names:
        bound, renamed = alias.asname or alias.name, "" if alias.asname is None else f" as {alias.asname}"
        if isinstance(node, ast.Import):
            module.others[bound.split(".")[0] if not renamed else bound] = f"import {alias.name}{renamed}"
        elif str(node.module).split(".")[0] == ROOT:
            if renamed:
                raise ValueError(f"{module.name}, line {node.lineno}: a name of our own is imported under another one")
            module.ours[bound] = (str(node.module), alias.name)
            module.imports.append(str(node.module))
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


def _text(module: _Module, number: int) -> str:
    first, last = module.spans[number]
    return "\n".join(module.lines[first - 1 : last])


def _ordered(module: str, known: Callable[[str], _Module]) -> list[str]:
    """Modules in an order in which each stands behind those that it imports."""
    order: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for other in known(name).imports:
                visit(other)
            order[name] = None

    seen: set[str] = set()
    visit(module)
    return list(order)


def _sorted_imports(imports: dict[str, str]) -> list[str]:
    plain = sorted({text for text in imports.values() if text.startswith("import ")})
    return [*plain, *sorted({text for text in imports.values() if text.startswith("from ")})]
