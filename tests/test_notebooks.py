"""The notebooks: parsed and looked at in the fast suite, executed in the slow one."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from docs.pages import notebooks, repository
from tests.helpers.notebook_runs import NOTEBOOKS, execute

LARGEST = 400_000  # bytes
MACHINE = re.compile(r"/(?:work|root|tmp|home|Users)/|0x[0-9a-f]{6,}")
"""What says on which machine, or in which process, a notebook was executed."""

BAR = re.compile(r"\r\w+: .*?it/s\]")
"""A bar of progress."""


def named(path: Path) -> str:
    return path.stem


def outputs_of(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def kinds(notebook):
    """Of every code cell its source and the kinds of its results; streams may come in any number of pieces."""
    return [
        (cell.source, sorted({kind for output in cell.outputs for kind in output.get("data", {})} - {"image/jpeg"}))
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_all_notebooks_are_there():
    names = ["1_tour", "2_training", "3_sampling_and_guidance", "4_your_encoder_and_data", "5_evaluation"]
    names += ["6_raev2", "7_text", "8_fewer_epochs_fewer_steps"]
    assert [path.stem for path in NOTEBOOKS] == names
    readme = (NOTEBOOKS[0].parent / "README.md").read_text()
    assert all(f"({name}.ipynb)" in readme for name in names)


def test_they_open_in_colab_where_the_project_has_an_address():
    assert notebooks(repository()) == {path.name: path.read_text() for path in NOTEBOOKS}, "python docs/pages.py"
    for name, text in notebooks("https://github.com/someone/rae").items():
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        badge, install = notebook.cells[:2]
        assert f"(https://colab.research.google.com/github/someone/rae/blob/main/notebooks/{name})" in badge.source
        assert "rae[demo] @ git+https://github.com/someone/rae" in install.source
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_committed_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs_of(notebook) if output.output_type == "error"]
    assert not [output for output in outputs_of(notebook) if output.get("name") == "stderr"]
    pictures = [output for output in outputs_of(notebook) if "image/png" in output.get("data", {})]
    assert pictures or path.stem == "5_evaluation"
    texts = [cell.source for cell in notebook.cells]
    texts += [
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for output in outputs_of(notebook)
    ]
    assert not MACHINE.findall("\n".join(texts))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All notebooks in one folder, as a reader has them: the small model is trained once."""
    return tmp_path_factory.mktemp("notebooks")


SHORTER = {
    "6_raev2": ("STEPS, SEEDS = (200, 400), (0, 1, 2)", "STEPS, SEEDS = (10, 20), (0, 1)"),
    "7_text": (
        'STEPS = {"encoder": 150, "stage1": 250, "stage2": 900}',
        'STEPS = {"encoder": 5, "stage1": 5, "stage2": 10}',
    ),
    "8_fewer_epochs_fewer_steps": (
        "STEPS, SEEDS = (200, 400, 600), (0, 1)",
        "STEPS, SEEDS = (2, 4, 6), (0,)",
    ),
}
"""What is trained more briefly here than for the committed outputs: the line, and what stands in its place."""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_notebooks_execute(path, folder, tmp_path):
    committed = nbformat.read(path, as_version=4)
    for cell in committed.cells:
        if path.stem in SHORTER:
            cell.source = cell.source.replace(*SHORTER[path.stem])
    assert path.stem not in SHORTER or SHORTER[path.stem][1] in "".join(cell.source for cell in committed.cells)
    nbformat.write(committed, tmp_path / path.name)
    notebook = execute(tmp_path / path.name, folder)
    said = "".join(output.text for output in outputs_of(notebook) if output.get("name") == "stderr")
    assert not BAR.sub("", said).strip()  # where this takes longer than two seconds, there is a bar
    assert kinds(notebook) == kinds(committed)
