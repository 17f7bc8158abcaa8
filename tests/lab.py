"""A real JupyterLab and a notebook in it, for a headless Chromium: tests of the scrubber and its benchmark drive it."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
CHROMIUM = os.environ.get("SARM_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
TOKEN = "scrubber"
VIEWPORT = {"width": 1280, "height": 900}


@contextmanager
def jupyter_lab(folder: Path, *more: str) -> Iterator[str]:
    """Address of a JupyterLab process on `folder`/work; it reads and writes nothing outside of `folder`."""
    (folder / "work").mkdir(parents=True, exist_ok=True)
    settings = folder / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    watched = {name: value for name, value in os.environ.items() if name not in ("SARM_HEADLESS", "TQDM_DISABLE")}
    env = watched | {"HOME": str(folder), "IPYTHONDIR": str(folder / "ipython"), "PYTHONPATH": str(ROOT)}
    for name in ("CONFIG", "DATA", "RUNTIME"):
        env[f"JUPYTER_{name}_DIR"] = str(folder / name.lower())
    for name in ("SETTINGS", "WORKSPACES"):
        env[f"JUPYTERLAB_{name}_DIR"] = str(folder / name.lower())
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={TOKEN}"]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={folder / 'work'}", *more]
    with (folder / "lab.log").open("w") as log:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield _wait_for_server(process, folder)
    finally:
        process.terminate()
        try:
            process.wait(60)  # a kernel that is just starting is waited for
        except subprocess.TimeoutExpired:
            process.kill()  # kernels without a server end themselves
            process.wait()


def _wait_for_server(process: subprocess.Popen, folder: Path) -> str:
    """The server's address once it answers; it writes it into its runtime folder."""
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        for path in (folder / "runtime").glob("jpserver-*.json"):
            try:
                address = json.loads(path.read_text())["url"]
                urllib.request.urlopen(f"{address}api/status?token={TOKEN}", timeout=10)
                return address
            except (OSError, ValueError):
                pass
        time.sleep(0.1)
    raise RuntimeError(f"JupyterLab did not start:\n{(folder / 'lab.log').read_text()[-3000:]}")


def open_notebook(page, address: str, folder: Path, code: str, name: str = "scrub.ipynb") -> None:
    """Open a notebook of three cells, the second of which is `code`."""
    cells = [
        nbformat.v4.new_markdown_cell("above"),
        nbformat.v4.new_code_cell(code),
        nbformat.v4.new_markdown_cell("below"),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / "work" / name)
    page.set_default_timeout(120_000)
    page.goto(f"{address}lab/tree/{name}?token={TOKEN}&reset")


def run_cell(page, widget: str = "sarm-scrubber") -> None:
    """Run the notebook's code, and forget the widget that it showed before."""
    page.locator(f".{widget}").evaluate_all("all => all.forEach(element => element.remove())")
    # before that, Lab asks which kernel it should start
    page.locator(".jp-StatusBar-TextItem", has_text="| Idle").wait_for()
    page.locator(".jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Control+Enter")


def shows(page, frame: str, widget: str = "sarm-scrubber") -> None:
    """Wait until the pictures are those of `episode:frame`."""
    page.locator(f".{widget}[data-shown='{frame}']").wait_for()
