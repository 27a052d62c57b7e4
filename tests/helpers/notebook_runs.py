"""Executes notebooks; as a script it writes them with their outputs, which is how the committed ones were made.

``python -m tests.helpers.notebook_runs notebooks/1_tour.ipynb … [--folder FOLDER]`` works in FOLDER, else in a temporary one.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LONGEST = 900  # seconds of one notebook's longest cell


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs, executed by this interpreter in a folder.

    Raises:
        CellExecutionError: A cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the commands do, see rae.cli.main
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([known] if known else [])])  # the kernel inherits it
    try:
        client = NotebookClient(
            notebook,
            timeout=LONGEST,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute()
    finally:
        if known is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = known
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Leaves one kind of every picture, in 64 colours: what GitHub is to show needs no more, and takes a quarter of the room."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            data.pop("image/jpeg", None)
            if "image/png" in data:
                image = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
                image = image.quantize(64, dither=Image.Dither.NONE)
                file = io.BytesIO()
                image.save(file, format="PNG", optimize=True)
                data["image/png"] = base64.b64encode(file.getvalue()).decode()


def main() -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for path in arguments.notebooks:
            start = time.perf_counter()
            notebook = execute(path, arguments.folder or Path(temporary))
            seconds = time.perf_counter() - start
            shrink(notebook)
            nbformat.write(notebook, path)
            print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
