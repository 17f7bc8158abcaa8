"""The scrubber in a headless Chromium on a real JupyterLab: what a person sees and does, down to the file on disk."""

from pathlib import Path

import nbformat
import pytest

from sarm_lib.annotations import Segment
from sarm_lib.corrections import read_corrections
from sarm_lib.dataset import open_dataset, vector_names

from .conftest import LENGTHS
from .lab import CHROMIUM, VIEWPORT, open_notebook, run_cell, shows

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium (apt install chromium, or set SARM_CHROMIUM)")
pytest.importorskip("playwright.sync_api", reason="no playwright (pip install -e .[dev])")

CODE = """\
from pathlib import Path
from sarm_lib.annotations import Annotation, Segment
from sarm_lib.dataset import open_dataset
from sarm_lib.widgets.scrubber import Scrubber
dataset = open_dataset("dataset")
dense = lambda n: (Segment("reach", 0, 4), Segment("grasp", 5, 8), Segment("lift", 9, n - 1))
annotations = [Annotation(e.index, e.length, "test", (Segment("task", 0, e.length - 1),), dense(e.length)) for e in dataset.episodes]
Scrubber(dataset, annotations, {"sparse": ["task"], "dense": ["reach", "grasp", "lift"]}, order=[3, 0, 1], reasons={3: "grasp is short"}, corrections=Path(Path("case").read_text()))"""


@pytest.fixture(scope="module")
def page(lab, browser):
    """A notebook of three cells in Lab, the second of which shows the scrubber."""
    address, folder = lab
    page = browser.new_page(viewport=VIEWPORT)
    open_notebook(page, address, folder.parent, CODE)
    yield page
    page.close()


@pytest.fixture
def path(lab, request) -> Path:
    """Where this test's corrections go."""
    _, folder = lab
    (folder / "case").write_text(f"{request.node.name}.yaml")
    return folder / f"{request.node.name}.yaml"


@pytest.fixture
def scrubber(page, path):
    run_cell(page)
    shows(page, "3:0")
    return page.locator(".sarm-scrubber")


def says(scrubber, text: str) -> None:
    scrubber.locator(".message", has_text=text).wait_for()


def pixels(scrubber) -> list[str]:
    return scrubber.locator("figure canvas").evaluate_all("all => all.map(c => c.toDataURL())")


def saved(lab, path: Path) -> list:
    return read_corrections(path, open_dataset(lab[1] / "dataset"))


def test_it_opens_and_the_slider_shows_another_frame(page, scrubber):
    before = pixels(scrubber)
    assert len(before) == 2 and before[0] != before[1]  # both cameras
    assert scrubber.locator(".reason").inner_text() == "grasp is short"
    slider = scrubber.locator("input[type=range]")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
    frame = int(slider.input_value())
    assert frame > 5
    shows(page, f"3:{frame}")
    after = pixels(scrubber)
    assert after[0] != before[0] and after[1] != before[1]
    page.keyboard.press("Home")
    shows(page, "3:0")
    assert pixels(scrubber) == before


def test_the_state_moves_along_and_a_component_can_be_left_alone(page, scrubber, lab):
    page.locator(".sarm-scrubber[data-panels='3']").wait_for()
    dataset = open_dataset(lab[1] / "dataset")
    shown = dataset.states[dataset.episodes[3].rows]
    names = scrubber.locator(".curve").all_inner_texts()
    assert [text.split()[0] for text in names] == vector_names(dataset, dataset.state_key)
    plot, drawn = scrubber.locator(".plot"), scrubber.locator(".plot canvas")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.click(box["x"] + 7.5 / LENGTHS[3] * box["width"], box["y"] + 10)
    shows(page, "3:7")
    readings = [float(text.replace("−", "-")) for text in scrubber.locator(".curve b").all_inner_texts()]
    assert readings == pytest.approx(shown[7].tolist(), abs=0.006)
    before = drawn.evaluate("canvas => canvas.toDataURL()")
    scrubber.locator(".curve").first.click()
    assert scrubber.locator(".curve.pale").count() == len(names) - 1
    assert drawn.evaluate("canvas => canvas.toDataURL()") != before
    page.keyboard.press("n")
    page.locator(".sarm-scrubber[data-panels='0']").wait_for()
    assert scrubber.locator(".curve.pale").count() == len(names) - 1  # in the next episode too
    scrubber.locator(".curve").first.click()
    assert scrubber.locator(".curve.pale").count() == 0


def test_a_boundary_moved_by_keyboard_is_in_the_file(page, scrubber, path, lab):
    scrubber.focus()
    page.keyboard.press("]")
    shows(page, "3:5")  # at the first boundary
    page.keyboard.press(".")
    shows(page, "3:6")
    page.keyboard.press("ArrowRight")
    shows(page, "3:7")
    page.keyboard.press("b")  # to where the playhead is
    page.keyboard.press("f")
    says(scrubber, f"fixed, written to {path.name}")
    (correction,) = saved(lab, path)
    assert (correction.episode, correction.verdict, list(correction.segments)) == (3, "fix", ["dense"])
    end = LENGTHS[3] - 1
    assert correction.segments["dense"] == (Segment("reach", 0, 6), Segment("grasp", 7, 8), Segment("lift", 9, end))
    assert correction.was["dense"][0] == Segment("reach", 0, 4)

    run_cell(page)  # the file is the state: the next undecided episode comes first, the fix is still there
    page.locator(".sarm-scrubber[data-episode='0']").wait_for()
    scrubber.locator("select").select_option("3")
    page.locator(".sarm-scrubber[data-state='fixed']").wait_for()
    assert "reach: frames 0 to 6" in scrubber.locator(".segment").nth(1).get_attribute("title")


def test_keys_of_other_keyboards(page, scrubber):
    """German and Mac brackets come with AltGr and Option, Shift and the comma key is ; there, and caps lock may be on."""
    scrubber.focus()

    def press(**event) -> bool:
        """Whether the widget took it."""
        return not scrubber.evaluate(
            "(root, event) => root.dispatchEvent(new KeyboardEvent('keydown', "
            "{ ...event, bubbles: true, cancelable: true }))",
            event,
        )

    assert press(key="]", code="Digit9", ctrlKey=True, altKey=True)
    shows(page, "3:5")
    assert press(key="]", code="Digit6", altKey=True)
    shows(page, "3:9")
    assert press(key=":", code="Period", shiftKey=True)
    shows(page, "3:18")  # ten frames on, as far as the segment goes
    assert press(key="U", code="KeyU")
    assert press(key="[", code="Digit8", ctrlKey=True, altKey=True)
    assert not press(key="[", code="BracketLeft", ctrlKey=True), "the browser's own"
    assert not press(key="f", code="KeyF", altKey=True) and not press(key="å", code="KeyA", altKey=True)


def test_a_boundary_dragged_with_the_mouse(page, scrubber, path, lab):
    bar = scrubber.locator(".bar").nth(1)
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()

    def at(frame: float) -> float:
        return box["x"] + frame / LENGTHS[3] * box["width"]

    y = box["y"] + box["height"] / 2
    page.mouse.move(at(9), y)
    page.mouse.down()
    page.mouse.move(at(12), y, steps=4)
    shows(page, "3:12")  # the frame follows the mouse
    page.mouse.move(at(15), y, steps=4)
    page.mouse.up()
    page.locator(".sarm-scrubber[data-state='edited']").wait_for()
    assert "grasp: frames 5 to 14" in scrubber.locator(".segment").nth(2).get_attribute("title")
    scrubber.locator(".why").fill("axd")  # letters in the field are no commands
    scrubber.locator("select").select_option("0")
    page.locator(".sarm-scrubber[data-episode='0']").wait_for()
    assert scrubber.locator(".why").input_value() == ""
    scrubber.locator("select").select_option("3")  # what was typed and not saved waits, as the edits do
    page.locator(".sarm-scrubber[data-episode='3']").wait_for()
    assert scrubber.locator(".why").input_value() == "axd"
    scrubber.get_by_role("button", name="save fix").click()
    says(scrubber, "fixed, written")
    (correction,) = saved(lab, path)
    assert [s.start for s in correction.segments["dense"]] == [0, 5, 15]
    assert correction.why == "axd"


def test_two_quick_presses_go_two_episodes_on(page, scrubber):
    """The second comes before the kernel has answered the first."""
    press = "root => %s.forEach(key => root.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true })))"
    scrubber.evaluate(press % "['n', 'n']")
    shows(page, "1:0")  # of 3, 0, 1
    assert scrubber.locator("select").input_value() == "1"
    scrubber.evaluate(press % "['n', 'p', 'p', 'p', 'p']")  # beyond the last, back to the first and beyond it
    shows(page, "3:0")


def test_what_is_not_saved_is_counted(page, scrubber):
    scrubber.focus()
    assert scrubber.locator(".quiet").first.inner_text() == "1 of 3, 0 done"
    page.keyboard.press("]")
    page.keyboard.press(".")
    page.locator(".sarm-scrubber[data-state='edited']").wait_for()
    assert scrubber.locator(".quiet").first.inner_text() == "1 of 3, 0 done, 1 edited and not saved"


def test_playing_reaches_the_last_frame(page, scrubber):
    scrubber.focus()
    page.keyboard.press("Space")
    shows(page, f"3:{LENGTHS[3] - 1}")
    scrubber.get_by_role("button", name="▶").wait_for()  # and stops there


def test_keys_of_the_widget_do_not_edit_the_notebook(page, scrubber, path, lab):
    scrubber.locator(".time").click()
    for key in (
        "a",
        "b",
        "d",
        "d",
        "x",
        "c",
        "v",
        "z",
        "m",
        "y",
        "r",
        "1",
        "Shift+M",
        "0",
        "0",
        "Enter",
        "Shift+Enter",
    ):
        page.keyboard.press(key)
    page.keyboard.press("n")
    page.locator(".sarm-scrubber[data-episode='0']").wait_for()  # so all of them have arrived
    assert saved(lab, path)[0].verdict == "reject"
    assert page.locator(".jp-Cell").count() == 3

    stored = lab[1] / "scrub.ipynb"
    page.keyboard.press("Control+s")  # with Ctrl, keys are Lab's as ever
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    after = nbformat.read(stored, as_version=4)
    assert [(c.cell_type, c.source) for c in after.cells] == [
        ("markdown", "above"),
        ("code", CODE),
        ("markdown", "below"),
    ]
    assert stored.stat().st_size < 100_000 and "image/jpeg" not in stored.read_text()

    page.locator(".jp-CodeCell .cm-content").first.click()  # outside of it, such a key does: this test can fail
    page.locator(".jp-Notebook.jp-mod-editMode").wait_for()
    page.keyboard.press("Escape")
    page.locator(".jp-Notebook.jp-mod-commandMode").wait_for()
    page.keyboard.press("b")
    page.wait_for_function("() => document.querySelectorAll('.jp-Cell').length === 4")
