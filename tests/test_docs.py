"""What is written about the code agrees with it: READMEs, the page for the original's users, docstrings."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from docs.pages import pages
from rae.cli.errors import compose
from rae.cli.groups import config_groups
from tests.helpers.guides import commands
from tests.test_imports import PARTS, imported

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rae"
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE, PACKAGE / "metric" / "functional"})
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*(folder / "README.md" for folder in FOLDERS), ROOT / "conf/README.md", ROOT / "tests/README.md", *GUIDES]
SOURCES = sorted(PACKAGE.rglob("*.py"))
OTHERS = {"app.py", "config.yaml", "evaluator.py", "original.yaml"}  # files of runs, of other projects, and examples


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_name_files_that_exist(page):
    text = page.read_text()
    for file in re.findall(r"`([\w/.-]+\.(?:py|yaml|md))`", text):
        places = [page.parent / file, ROOT / file, ROOT / "conf" / file, PACKAGE / file, *PACKAGE.glob(f"*/{file}")]
        example = file in OTHERS or re.match(r"src/|ours/|mine|myconf/", file) or re.search("NAME|/N.yaml|stageN", file)
        assert example or any(place.exists() for place in places), f"{name(page)} names {file}, which does not exist"


@pytest.mark.parametrize("folder", FOLDERS, ids=name)
def test_readmes_name_every_file_of_their_folder(folder):
    text = (folder / "README.md").read_text()
    for file in folder.glob("[!_]*.py"):
        assert f"`{file.name}`" in text, f"{name(folder)}/README.md says nothing of {file.name}"


def test_every_group_is_on_the_page_of_conf():
    named = set(re.findall(r"`([\w/]+)`", (ROOT / "conf/README.md").read_text()))
    assert set(config_groups()) <= named


@pytest.mark.parametrize("part", [part for part in PARTS if (PACKAGE / part).is_dir()])
def test_readmes_say_what_their_folder_imports(part):
    """Of this library, where they name anything of it."""
    folder = PACKAGE / part
    sentence = re.search(r"\bimports? (?:[^.]|\.\w)*\.", (folder / "README.md").read_text())
    said = set(re.findall(r"`rae\.(\w+)", sentence[0])) if sentence else set()
    names = (name.split(".") for path in folder.rglob("*.py") for name in imported(path))
    assert not said or said == {name[1] for name in names if name[0] == "rae"} - {part}


def test_the_readme_is_two_screens_and_links_every_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    site = (ROOT / ".mkdocs.yml").read_text()
    for page in GUIDES[1:]:
        assert f"docs/{page.name}" in "\n".join(lines), page.name
        assert f": {page.name}\n" in site, page.name


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_generated_pages_are_what_their_script_writes():
    for title, text in pages().items():
        assert (ROOT / "docs" / title).read_text() == text, f"python docs/pages.py writes docs/{title} anew"


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[] if page.name == "README.md" else [pytest.mark.slow]) for page in GUIDES],
    ids=name,
)
def test_commands_on_the_pages_compose(page):
    scripts = re.findall(r"^(rae-[a-z-]+) = ", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for command in commands(page):
        program, *given = shlex.split(command.text.replace(" …", "").replace("…", "x"))
        assert program in scripts, command
        if program not in ("rae-convert", "rae-demo") and not any(
            word.startswith("--") or word == "-m" for word in given
        ):
            compose(program.removeprefix("rae-").replace("-", "_"), given)


def test_choices_on_the_page_exist():
    groups = config_groups()
    for group, choice in re.findall(r"`([a-z/@]+)=(\w+)`", (ROOT / "docs/from_original.md").read_text()):
        if group in groups:
            assert choice in groups[group], f"{group}={choice}"


@pytest.mark.slow
def test_the_table_of_weights_is_that_of_the_models():
    page = (ROOT / "docs/models.md").read_text()
    for model in config_groups()["model"]:
        row = next(line for line in page.splitlines() if f"| `{model}` |" in line)
        cfg = compose("sample", [f"model={model}"])
        assert f"`{Path(cfg.checkpoint).relative_to('models')}`" in row
        if cfg.guide_checkpoint is not None:
            assert f"`{Path(cfg.guide_checkpoint).relative_to('models')}`" in page
        header = (ROOT / f"conf/model/{model}.yaml").read_text().splitlines()[2]
        assert cfg.licence in row
        for score in re.findall(r"(?:FID-50k|dB|PSNR) (\d+\.\d+)", header):
            assert score in row
        shown = set(re.findall(r"`(\w+)`", page[page.index("## Licences") :]))
    assert set(config_groups()["encoder"]) - shown == {"digits", "digits_small", "pictures", "timm"}


def test_citation_names_the_version_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    for key, field in {"title": "name", "version": "version", "license": "license"}.items():
        assert f'\n{field} = "{cited[key]}"\n' in project
    assert cited["preferred-citation"]["url"] in project


# --- docstrings --------------------------------------------------------------------------------------------------


def public(path: Path) -> list[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public classes, functions and methods of a file."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((node.name, node))
            inner = node.body if isinstance(node, ast.ClassDef) else []
            found += [
                (f"{node.name}.{one.name}", one)
                for one in inner
                if isinstance(one, ast.FunctionDef) and not one.name.startswith("_")
            ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_arguments_that_are_described_are_there(path):
    """A docstring with a list of arguments lists no others than the function, or the class's constructor, has, and all of them."""
    for title, node in public(path):
        text = ast.get_docstring(node)
        assert text, f"{title} has no docstring"
        listed = re.search(r"^Args:\n((?: +.*\n?|\n)+)", text, re.MULTILINE)
        if listed is None:
            continue
        described = set(re.findall(r"^    \*{0,2}(\w+)(?: \(.*\))?:", listed[1], re.MULTILINE))
        made = node
        if isinstance(node, ast.ClassDef):
            made = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
        if made is None:  # inherits its constructor, or is a dataclass
            continue
        arguments = {one.arg for one in [*made.args.posonlyargs, *made.args.args, *made.args.kwonlyargs]} - {
            "self",
            "cls",
        }
        arguments |= {one.arg for one in (made.args.vararg, made.args.kwarg) if one is not None}
        assert described == arguments, f"{title}: {sorted(described ^ arguments)}"
