"""Every notebook in a real JupyterLab: all cells run, nothing fails, and every widget and every chart is there."""

import json
import re
import shutil

import nbformat
import pytest

from .conftest import chapters
from .lab import CHROMIUM, TOKEN, VIEWPORT, jupyter_lab

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium (apt install chromium, or set SARM_CHROMIUM)")
pytest.importorskip("playwright.sync_api", reason="no playwright (pip install -e .[dev])")

WIDGET, CHART = "application/vnd.jupyter.widget-view+json", "application/vnd.vegalite.v5+json"
# Of a page, once nothing waits or runs any more: the numbers beside the code cells.
FINISHED = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent);
  return prompts.length > 0 && prompts.every(p => /\\[\\d+\\]/.test(p));
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, project):
    """(address, folder of the project) of a JupyterLab on a tiny project whose stages have run."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(project, folder / "work", symlinks=True)
    # without windowing every cell is in the page, whether it has been scrolled to or not
    settings = folder / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))
    with jupyter_lab(folder, "--LabApp.expose_app_in_browser=True") as address:
        yield address, folder / "work"


@pytest.mark.parametrize("name", chapters())
def test_a_notebook_runs_in_jupyterlab(name, lab, browser):
    address, work = lab
    page, complaints = browser.new_page(viewport=VIEWPORT), []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.set_default_timeout(300_000)
    page.goto(f"{address}lab/tree/notebooks/{name}.ipynb?token={TOKEN}&reset")
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").wait_for()
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(FINISHED)
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")

    saved = nbformat.read(work / f"notebooks/{name}.ipynb", as_version=4)
    outputs = [output for cell in saved.cells if cell.cell_type == "code" for output in cell.outputs]
    errors = [f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"]
    assert not errors and not complaints
    assert [c.execution_count for c in saved.cells if c.cell_type == "code"]
    kinds = [set(output.get("data", {})) for output in outputs]
    shown = page.locator(".jp-OutputArea-output.lm-Panel")
    assert shown.count() == sum(WIDGET in kind for kind in kinds)
    for i in range(shown.count()):
        assert shown.nth(i).bounding_box()["height"] > 20
    assert not page.get_by_text(re.compile("Error (displaying|creating|rendering)|Javascript Error")).count()
    assert page.locator(".jp-RenderedVegaCommon5 canvas").count() == sum(CHART in kind for kind in kinds)
    pictures = page.locator(".jp-RenderedImage img").evaluate_all("all => all.map(img => img.naturalWidth)")
    assert (
        len(pictures) >= sum("image/png" in kind and CHART not in kind for kind in kinds)
        and min(pictures, default=1) > 0
    )
    page.evaluate("() => jupyterapp.commands.execute('notebook:shutdown-kernel')")
    page.close()


def test_a_clicked_episode_shows_its_curves(lab, browser):
    """In the chart of all episodes; the picture that a saved page shows stays where it is."""
    address, _ = lab
    page = browser.new_page(viewport=VIEWPORT)
    page.set_default_timeout(120_000)
    page.goto(f"{address}lab/tree/notebooks/05_compute_rabc.ipynb?token={TOKEN}&reset")
    canvas = page.locator(".jp-RenderedVegaCommon5 canvas")  # drawn from what was saved: no kernel has run yet
    canvas.scroll_into_view_if_needed()
    box, before = canvas.bounding_box(), canvas.evaluate("c => c.toDataURL()")
    for dx in range(60, int(box["width"]) - 60, 4):  # along the dots' panel, until one is hit
        for dy in range(50, 150, 8):
            page.mouse.click(box["x"] + dx, box["y"] + dy)
        if canvas.evaluate("c => c.toDataURL()") != before:
            break
    assert canvas.evaluate("c => c.toDataURL()") != before
    page.close()
