"""What every notebook says on the tiny dataset: stored pages, against which nbval compares each run.

    make pages        # renew them, then read `git diff tests/expected`

A stored page holds a notebook's outputs without pictures; its cells are those of `notebooks/`, so a cell that was changed is
compared with what it said before. Numbers count to two decimals, small ones to two digits (`sanitize.cfg`), so that another processor's rounding is
no difference, and neither are progress bars, times and folders.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from tests.conftest import chapters, make_dataset, make_encoder, make_project

FOLDER = Path(__file__).with_name("expected")
SANITIZE = FOLDER / "sanitize.cfg"
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = ("image/png", "image/jpeg", "image/gif", "image/svg+xml")


def expect(project: Path) -> None:
    """Put the stored outputs into a project's notebooks. Raises KeyError for a cell that has none."""
    for name in chapters():
        path = project / "notebooks" / f"{name}.ipynb"
        page, stored = nbformat.read(path, as_version=4), nbformat.read(FOLDER / path.name, as_version=4)
        said = {cell.id: cell for cell in stored.cells if cell.cell_type == "code"}
        for cell in page.cells:
            if cell.cell_type == "code":
                if cell.id not in said:
                    raise KeyError(f"{name}, {cell.id}: nothing is stored that it should say; make pages")
                cell.outputs, cell.execution_count = said[cell.id].outputs, said[cell.id].execution_count
        nbformat.write(page, path)


def nbval(notebooks: str) -> list[str]:
    """The command that runs a notebook, or a folder of them, and compares what they say."""
    compare = ["--nbval", f"--nbval-sanitize-with={SANITIZE}", "--nbval-cell-timeout=600"]
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *compare, notebooks]


def store(project: Path, name: str) -> None:
    """Run a notebook of `project` and keep what it says."""
    page = nbformat.read(project / "notebooks" / f"{name}.ipynb", as_version=4)
    NotebookClient(page, resources={"metadata": {"path": str(project / "notebooks")}}, timeout=600).execute()
    page.metadata.pop("widgets", None)
    for cell in page.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            for kind in PICTURES:
                output.get("data", {}).pop(kind, None)
            if WIDGET in output.get("data", {}):
                output.data[WIDGET]["model_id"] = "not compared"  # another one every time
    page.cells = [cell for cell in page.cells if cell.cell_type == "code"]
    nbformat.write(page, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny = make_project(root / "p", make_dataset(root / "dataset"), make_encoder(root / "clip"))
        for chapter in chapters():
            print(chapter, file=sys.stderr)
            store(tiny, chapter)
    for left in set(FOLDER.glob("*.ipynb")) - {FOLDER / f"{name}.ipynb" for name in chapters()}:
        left.unlink()
