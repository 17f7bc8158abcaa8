"""HTML pages of executed notebooks: nothing is fetched, equations are drawn, links lead to the neighbours."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from sarm_lib.reports import write_html


@pytest.fixture
def html(tmp_path) -> str:
    """A page with everything that nbconvert would fetch a library for."""
    prose = "$$\\frac{1}{M}\\sum_i L_i$$ and $\\tau_t$, but `$HOME` and $\\left(x$\n\n"
    links = "[next](01_annotate.ipynb), [formats](../docs/annotations.md#marks), [code](https://example.org/a.ipynb), [up](#top)"
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "Scrubber: 3 episodes"}
    outputs = [
        new_output("display_data", widget),
        new_output("stream", name="stderr", text="scoring: 5% (1 of 20 blocks), 00:10 passed, 03:10 left\n"),
        new_output(
            "stream", name="stderr", text="a: 10% (2 of 20 steps), 00:10 passed, 03:10 left, loss=1\nmind <this>\n"
        ),
        new_output("stream", name="stdout", text="said: 5% (1 of 20 frames), 1 passed, 2 left\n"),
        new_output("display_data", {"image/gif": "R0lGOD", "text/plain": "<IPython.core.display.Image object>"}),
        new_output("display_data", {"image/png": "iVBORw", "text/plain": "alt.Chart(...)"}),
    ]
    cells = [
        new_markdown_cell(f"# A page\n{prose}{links}\n## What <it> does"),
        new_code_cell("import numpy as np"),
        new_code_cell("params_file = 1"),
        new_code_cell("1", outputs=outputs),
        new_code_cell("%matplotlib inline\nimport numpy"),
    ]
    page = new_notebook(cells=cells)
    page.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {"1": {}}, "version_major": 2}}
    (tmp_path / "outputs/reports").mkdir(parents=True)
    nbformat.write(page, tmp_path / "outputs/reports/00_prepare.ipynb")
    written = write_html(tmp_path / "outputs/reports/00_prepare.ipynb", tmp_path / "notebooks")
    assert written == tmp_path / "outputs/reports/00_prepare.html"
    return written.read_text()


def test_nothing_is_fetched(html):
    assert not re.search(r'<(script|link|img|iframe)[^>]+(src|href)="(?!data:)', html) and "import(" not in html
    assert "cdn" not in html.lower().replace("xmlns", "")


def test_equations_are_mathml_and_a_broken_one_stays_as_written(html):
    assert html.count("<math ") == 2 and 'display="block"' in html and "<mfrac>" in html
    assert "<code>$HOME</code>" in html and "<code>\\left(x</code>" in html


def test_links_lead_where_they_should(html):
    assert set(re.findall(r'<a href="([^"]+)"', html)) == {
        "01_annotate.html",
        "../../docs/annotations.md#marks",
        "https://example.org/a.ipynb",
        "#top",
    }


def test_films_play_pictures_say_what_they_are_about_and_imports_are_folded(html):
    assert '<img alt="film" src="data:image/gif;base64,R0lGOD"' in html and "IPython.core.display" not in html
    assert re.search(r'<img alt="What &lt;it&gt; does"[^>]*src="data:image/png;base64,iVBORw', html)
    (folded,) = re.findall(r"<details[^>]*><summary>imports and parameters</summary>(.*?)</details>", html, re.DOTALL)
    assert "params_file" in folded and "film" not in folded


def test_widgets_say_what_they_are_and_bars_are_gone(html):
    assert "Scrubber: 3 episodes" in html and "widget-view" not in html
    assert "blocks)" not in html and "loss=1" not in html
    assert "mind &lt;this&gt;" in html and "said: 5%" in html
