"""The notebooks as pages: their form, and what an override does. Their run under nbval is in `test_pipeline`."""

import ast
import statistics

import nbformat
import pytest

from tests.conftest import ROOT, chapters, run_notebook


def code_cells(name: str):
    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", chapters())
def test_a_page_has_the_form_of_a_page(name):
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith(f"# {name[:2]} · ")
    assert "widgets" not in notebook.metadata
    cells = code_cells(name)
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells]
    assert statistics.median(lines) <= 6 and max(lines) <= 30
    for cell in cells:
        tree = ast.parse(cell.source)  # no magics, no shell lines
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
        assert "chdir" not in cell.source and not any(o.output_type == "error" for o in cell.outputs)


@pytest.mark.parametrize("name", chapters())
def test_the_parameters_cell_holds_the_file_and_the_overrides_only(name):
    tagged = [cell for cell in code_cells(name) if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in tagged] == ['params_file = "params.yaml"\noverrides = {}']


def test_an_override_writes_to_scratch_and_leaves_the_outputs_alone(tmp_path, project):
    import shutil

    copy = shutil.copytree(project, tmp_path / "p", symlinks=True)
    before = (copy / "outputs/metrics/rabc.json").read_bytes()
    run_notebook(copy, "05_compute_rabc", {"rabc.kappa": 0.9})
    assert (copy / "outputs/metrics/rabc.json").read_bytes() == before
    (scratch,) = (copy / "outputs/scratch").glob("*/metrics/rabc.json")
    assert '"kappa": 0.9' in scratch.read_text()
