"""Executed notebooks as HTML pages that open without a network: browsers draw MathML themselves, and a widget, behind
which no kernel stands any more, is what it says of itself in words."""

import ast
import html
import os
import re
from pathlib import Path

import jinja2
import latex2mathml.converter
import nbformat
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from sarm_lib.artifacts import staged
from sarm_lib.live import LINES

# What the page of nbconvert would fetch: require.js for plots of other libraries, MathJax, mermaid.
TEMPLATE = """\
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block input_group -%}
{%- if cell.metadata.folded -%}<details style="margin: 4px 0 4px 72px; font: 13px sans-serif; color: #777"><summary>imports and parameters</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock input_group -%}
{%- block data_png scoped -%}
{{ super() | replace('<img src', '<img alt="' ~ (output.metadata.alt | escape_html) ~ '" src') }}
{%- endblock data_png -%}
"""


def write_html(notebook: Path, written_in: Path) -> Path:
    """Write an executed notebook as `.html` beside it; its links are relative to `written_in`. Returns where it is."""
    page = nbformat.read(notebook, as_version=4)
    page.metadata.pop("widgets", None)  # without their state, the text of widgets is shown
    heading, cells = notebook.stem, []
    for cell in page.cells:
        if cell.cell_type == "markdown":
            heading = next(iter(re.findall(r"^#+ (.*)", cell.source, re.MULTILINE)[-1:]), heading)
        outputs = [output for output in map(_without_bars, cell.get("outputs", [])) if output]
        folded = cell.cell_type == "code" and _only_sets_up(cell.source) and not outputs
        if folded and cells and cells[-1].metadata.get("folded"):  # one fold for all of them
            cells[-1].source += f"\n\n{cell.source}"
            continue
        cell.metadata["folded"] = folded
        for output in outputs:  # what a picture shows, for who does not see it
            output.setdefault("metadata", {})["alt"] = heading
        if cell.cell_type == "code":
            cell.outputs = [_with_films(output) for output in outputs]
        cells.append(cell)
    page.cells = cells
    exporter = _Exporter(embed_images=True, raw_template=TEMPLATE)
    exporter.way_back = os.path.relpath(written_in, notebook.parent)
    text, _ = exporter.from_notebook_node(page, {"metadata": {"name": notebook.stem, "path": str(notebook.parent)}})
    with staged(notebook.with_suffix(".html")) as partial:
        partial.write_text(text)
    return notebook.with_suffix(".html")


def _only_sets_up(source: str) -> bool:
    """Whether a cell imports, or says which parameters, and nothing else: a reader of the page need not see it first."""
    names = {"params_file", "overrides"}
    try:
        lines = ast.parse(source).body
    except SyntaxError:  # somebody's magic
        return False
    for line in lines:
        sets = isinstance(line, ast.Assign) and {getattr(target, "id", "") for target in line.targets} <= names
        if not sets and not isinstance(line, (ast.Import, ast.ImportFrom)):
            return False
    return True


def _without_bars(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """An output without the lines that say how far the work was; None if it was nothing else."""
    if output.get("name") != "stderr":
        return output
    output.text = LINES.sub("", output.text)
    return output if output.text.strip() else None


def _with_films(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output whose moving picture is in the page: nbconvert knows no GIF."""
    if film := output.get("data", {}).pop("image/gif", None):
        output.data["text/html"] = f'<img alt="film" src="data:image/gif;base64,{film}">'
    return output


class _Renderer(IPythonRenderer):
    way_back = "."  # from the page to where its links begin

    def link(self, text: str, url: str, title: str | None = None) -> str:
        if "/" not in url and url.endswith(".ipynb"):  # another chapter: its report is this one's neighbour
            url = url.removesuffix(".ipynb") + ".html"
        elif not url.startswith(("#", "/")) and ":" not in url:
            url = os.path.normpath(f"{self.way_back}/{url}")
        return super().link(text, url, title)

    def block_math(self, body: str) -> str:
        return _mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return _mathml(body, "inline")


def _mathml(latex: str, display: str) -> str:
    try:
        return latex2mathml.converter.convert(latex, display=display)
    except Exception:  # a person's own equation, whatever is wrong with it: shown as it was written
        return f"<code>{html.escape(latex)}</code>"


class _Exporter(HTMLExporter):
    way_back = "."

    @jinja2.pass_context
    def markdown2html(self, context: jinja2.runtime.Context, source: str) -> str:
        renderer = _Renderer(
            escape=False,
            attachments=context.get("cell", {}).get("attachments", {}),
            embed_images=self.embed_images,
            path=context.get("resources", {}).get("metadata", {}).get("path", ""),
        )
        renderer.way_back = self.way_back
        return MarkdownWithMath(renderer=renderer).render(source)
