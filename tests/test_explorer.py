"""The explorer: what its view would send and get, and what a person sees in a headless Chromium on JupyterLab."""

import io
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ipywidgets
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

from sarm_lib.charts import PREDICTED, STAGE_COLOURS, TARGET
from sarm_lib.dataset import Episode, open_dataset
from sarm_lib.progress import Scores
from sarm_lib.rabc import RabcWeights
from sarm_lib.stages import Labels
from sarm_lib.widgets.explorer import Explorer, of_scores, of_weights, picture, save_film
from sarm_lib.widgets.panels import Panel, on_one_axis, packed

from . import lab as in_lab
from .conftest import LENGTHS, ROOT
from .lab import CHROMIUM, VIEWPORT, open_notebook

STAGES = ["reach", "grasp", "lift"]


@pytest.fixture(scope="module")
def opened(tiny):
    return open_dataset(tiny)


@pytest.fixture(autouse=True)
def nowhere():
    """No test goes on where another one left its explorer."""
    Explorer.PLACES.clear()


def ramp(episode) -> list[Panel]:
    return [Panel("φ", {"up": np.linspace(0, 1, episode.length), "down": np.linspace(1, 0, episode.length)})]


class View:
    """Stands in for the browser: sends commands, keeps what comes back."""

    def __init__(self, explorer: Explorer):
        self.explorer, self.received = explorer, []
        explorer.send = lambda content, buffers=(): self.received.append((content, buffers))

    def __call__(self, command: str, **arguments):
        self.explorer._handle_custom_msg({"do": command, **arguments}, [])
        return self.received[-1] if self.received else None


def values(spec: dict, buffer: bytes) -> np.ndarray:
    return np.frombuffer(buffer, "<f4").reshape(len(spec["names"]), -1)


# --- messages ---------------------------------------------------------------------------------------------------------


def test_it_opens_on_the_first_of_the_order(opened):
    explorer = Explorer(opened, ramp, order=list(np.array([3, 0])), reasons={3: "large error"})
    assert (explorer.episode, explorer.length, explorer.frame, explorer.error) == (3, 20, 0, "")
    assert explorer.picker == [[3, "large error"], [0, ""]] and explorer.cameras == ["top", "side"]
    assert repr(explorer) == "Explorer: 2 episodes with φ"
    assert [row[0] for row in Explorer(opened, ramp).picker] == list(range(8))


def test_values_arrive_as_float32_of_the_shown_episode(opened):
    view = View(Explorer(opened, ramp, order=[3, 0]))
    content, (buffer,) = view("send_panels", episode=3)
    assert content["episode"] == 3
    (spec,) = content["panels"]
    assert spec == {
        "title": "φ",
        "kind": "lines",
        "names": ["up", "down"],
        "colours": list(STAGE_COLOURS[:2]),
        "dashed": [],
        "domains": [[0, 1], [0, 1]],
        "shared": True,
    }
    np.testing.assert_array_equal(values(spec, buffer)[0], np.linspace(0, 1, 20, dtype="f4"))
    view("show_episode", episode=0)
    view("send_panels", episode=3)  # asked for before the person went on
    assert len(view.received) == 1
    content, (buffer,) = view("send_panels", episode=0)
    assert values(content["panels"][0], buffer).shape == (2, LENGTHS[0])


def test_only_the_shown_episode_is_asked_for_its_panels(opened):
    asked = []

    def panels(episode):
        asked.append(episode.index)
        return ramp(episode)

    view = View(Explorer(opened, panels, order=[3, 0, 7]))
    view("send_panels", episode=3)
    view("send_frame", episode=3, frame=2)
    assert asked == [3]
    view("show_episode", episode=7)
    assert asked == [3, 7]


def test_frames_arrive_as_one_jpeg_a_camera(opened):
    view = View(Explorer(opened, ramp, order=[3, 0]))
    content, images = view("send_frame", episode=3, frame=11)
    assert content == {"episode": 3, "frame": 11, "error": ""} and len(images) == 2
    assert np.asarray(Image.open(io.BytesIO(images[0]))).shape == (32, 32, 3)
    view("send_frame", episode=0, frame=2)
    assert len(view.received) == 1
    content, images = view("send_frame", episode=3, frame=20)
    assert "no frame 20" in content["error"] and images == [b"", b""]


def test_messages_may_come_in_several_threads(opened):
    """JupyterLab 4.4 opens a subshell for widgets; what it sends before that is ready runs in the main thread."""
    view = View(Explorer(opened, ramp, order=[3]))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda frame: view("send_frame", episode=3, frame=frame), [19, 0, 11, 3, 17, 7] * 10))
    assert view.explorer.error == "" and len(view.received) == 60
    assert all(not content["error"] and len(images) == 2 for content, images in view.received)


def test_the_state_holds_neither_frames_nor_values(opened):
    explorer = Explorer(opened, ramp)
    view = View(explorer)
    view("send_frame", episode=0, frame=1)
    view("send_panels", episode=0)
    state = {k: v for k, v in explorer.get_state().items() if k not in ("_esm", "_css")}
    assert len(repr(state)) < 2000
    assert len(explorer._esm) + len(explorer._css) < 40_000


def test_a_cell_that_runs_again_goes_on_where_it_was(opened):
    view = View(Explorer(opened, ramp, order=[3, 0]))
    view("show_episode", episode=0)
    view("rest", episode=3, frame=12)  # sent before the person went on
    view("rest", episode=0, frame=5)
    again = Explorer(opened, ramp, order=[3, 0])
    assert (again.episode, again.frame) == (0, 5)
    other = Explorer(opened, ramp, order=[0, 3])  # another order is another question
    assert (other.episode, other.frame) == (0, 0)
    view = View(again)
    again.look_at(99)
    assert view.received == [({"go": LENGTHS[0] - 1}, ())]


def test_unknown_commands_do_nothing(opened):
    view = View(Explorer(opened, ramp))
    for command in ("close", "_packed", None):
        view(command)
        assert "unknown command" in view.explorer.error


# --- what is wrong is an error that says where ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("panel", "said"),
    [
        (Panel("φ", {"up": np.zeros(19)}), r"episode 3, panel 'φ', curve 'up': values \(19,\) for 20 frames"),
        (Panel("φ", {"up": np.zeros((20, 1))}), r"curve 'up': values \(20, 1\)"),
        (Panel("φ", {"up": [0.0] * 18 + [np.nan] * 2}), "'up': 2 values are not finite, first at frame 18"),
        (Panel("φ", {"up": [np.inf] * 20}), "20 values are not finite"),
        (Panel("p", {"a": np.full(20, -0.1)}, "areas"), "episode 3, panel 'p', curve 'a': below 0 at frame 0"),
        (Panel("φ", {}), "0 curves"),
        (Panel("φ", {"up": np.zeros(20)}, colours=["red", "blue"]), "1 curves and 2 colours"),
        (Panel("φ", {"up": np.zeros(20)}, dashed=("down",)), "dashed names down"),
        (Panel("φ", {"up": np.zeros(20)}, "bars"), "kind is lines or areas, not 'bars'"),
        (Panel("φ", {"up": np.zeros(20)}, domain=(1, 1)), "domain 1 to 1"),
        (Panel("x", {"up": np.zeros(20)}, own=np.array([0, 1])), r"1 lines, and axes of their own \(2,\)"),
        (Panel("x", {"up": np.zeros(20)}, "areas", own=np.array([[0, 1]])), "1 areas, and axes of their own"),
    ],
)
def test_a_panel_that_is_not_right(opened, panel, said):
    with pytest.raises(ValueError, match=said):
        Explorer(opened, lambda episode: [panel], order=[3])


def test_panels_that_fail_later_are_told_in_the_view_and_the_frames_are_shown(opened):
    def panels(episode):
        return ramp(episode) if episode.index == 3 else [Panel("φ", {"up": np.zeros(2)})]

    view = View(Explorer(opened, panels, order=[3, 0]))
    view("show_episode", episode=0)
    assert "episode 0, panel 'φ', curve 'up': values (2,)" in view.explorer.error and view.explorer.episode == 0
    assert view("send_panels", episode=0) == ({"episode": 0, "panels": []}, [])
    assert len(view("send_frame", episode=0, frame=1)[1]) == 2
    view("rest", episode=0, frame=1)
    view("show_episode", episode=3)
    assert view.explorer.error == ""

    view("show_episode", episode=0)
    assert Explorer(opened, panels, order=[3, 0]).episode == 3  # and a cell that runs again does not fail there


def test_what_cannot_be_shown_is_refused(opened):
    with pytest.raises(ValueError, match=r"no episodes \[99\]"):
        Explorer(opened, ramp, order=[99])
    with pytest.raises(ValueError, match="no episode to show"):
        Explorer(opened, ramp, order=[])
    with pytest.raises(ValueError, match="episode 0: its panels raise KeyError: 'gone'"):
        Explorer(opened, lambda episode: {}["gone"])


def test_a_line_with_an_axis_of_its_own(opened):
    panel = Panel("x", {"far": np.linspace(100, 300, 20), "flat": np.ones(20)}, own=np.array([[100, 300], [1, 1]]))
    spec, sent = packed(panel, opened.episodes[3])
    assert spec["domains"] == [[90, 310], [0.5, 1.5]] and not spec["shared"]
    np.testing.assert_array_equal(values(spec, sent)[0], np.linspace(100, 300, 20, dtype="f4"))
    picture = on_one_axis(panel)
    assert picture.domain == (0, 1)
    np.testing.assert_allclose(picture.curves["far"], np.linspace(0, 1, 20))
    assert Explorer(opened, lambda episode: [panel], order=[3]).still().size[0] > 0


def test_a_domain_from_the_values(opened):
    def domain(kind, *curves):
        return packed(Panel("x", dict(enumerate(curves)), kind, domain=None), opened.episodes[3])[0]["domains"][0]

    np.testing.assert_allclose(domain("lines", np.linspace(-1, 3, 20)), (-1.2, 3.2))
    assert domain("lines", np.full(20, 4)) == [3.5, 4.5]
    np.testing.assert_allclose(domain("areas", np.full(20, 1), np.full(20, 3)), (0, 4.2))


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(opened):
    """Made-up scores of episodes 0, 3 and 5, the last of which is not annotated."""
    rows, scores = opened.num_frames, {}
    for i in (5, 0, 3):
        one_hot = np.eye(3, dtype="f4")[np.arange(LENGTHS[i]) * 3 // LENGTHS[i]]
        up = np.linspace(0, 1, LENGTHS[i], dtype="f4")
        scores[i, "dense"] = Scores(up, one_hot.argmax(1), up, one_hot)
        scores[i, "sparse"] = Scores(up, one_hot.argmax(1) * 0, up, np.ones((LENGTHS[i], 1), "f4"))
    stage, tau = np.zeros(rows, dtype=int), np.full(rows, 0.5, "f4")
    heads, shares = {"sparse": ["task"], "dense": STAGES}, {"sparse": [1.0], "dense": [0.2, 0.3, 0.5]}
    labels = Labels(dict.fromkeys(heads, stage), dict.fromkeys(heads, tau), heads, shares, frozenset({0, 3}))
    return scores, labels


def test_scores_become_progress_and_stage_probabilities(opened, scored):
    scores, labels = scored
    explorer = of_scores(opened, scores, labels, "dense")
    assert [row[0] for row in explorer.picker] == [0, 3, 5]  # those that are scored
    content, buffers = View(explorer)("send_panels", episode=0)
    progress, stages, action = content["panels"]
    assert action["names"] == ["x", "y"]
    assert progress["names"] == ["predicted", "target"] and progress["dashed"] == ["target"]
    assert progress["colours"] == [PREDICTED, TARGET]
    np.testing.assert_allclose(values(progress, buffers[0])[1], 0.1)
    assert (stages["names"], stages["kind"]) == (STAGES, "areas") and stages["colours"] == list(STAGE_COLOURS[:3])
    np.testing.assert_array_equal(values(stages, buffers[1]).T, scores[0, "dense"].probabilities)

    view = View(explorer)
    view("show_episode", episode=5)  # nobody annotated it: there is no target
    assert view("send_panels", episode=5)[0]["panels"][0]["names"] == ["predicted"]


def test_weights_are_looked_at_with_progress_stage_and_actions(opened):
    frames = opened.frames
    columns = [frames[c].to_numpy() for c in ("index", "episode_index", "frame_index")]
    phi, weight = np.linspace(0, 0.99, len(frames), dtype="f4"), np.linspace(1, 0, len(frames), dtype="f4")
    weights = RabcWeights(*columns, weight, weight, 0.1, 0.1, 4, 0.1, 1e-6)
    stages = {"reach": 0.2, "grasp": 0.3, "lift": 0.5}
    view = View(of_weights(opened, weights, phi, stages, order=[3, 0], reasons={3: "goes back"}))
    content, buffers = view("send_panels", episode=3)
    rows = opened.episodes[3].rows
    progress, stage, weighed, action = (values(s, b) for s, b in zip(content["panels"], buffers, strict=True))
    np.testing.assert_array_equal(progress[0], phi[rows])
    np.testing.assert_array_equal(weighed[0], weight[rows])
    np.testing.assert_array_equal(action, opened.actions[rows].T)
    np.testing.assert_array_equal(stage.argmax(0), np.digitize(phi[rows], [0.2, 0.5]))
    assert stage.sum(0).tolist() == [1] * 20 and content["panels"][3]["names"] == ["x", "y"]
    assert view.explorer.still().height > 600
    assert len(View(of_weights(opened, weights, phi, {}))("send_panels", episode=0)[1]) == 3  # of unknown stages none


def test_a_long_episode_travels_as_its_numbers():
    frames, curve = 10_000, np.zeros(10_000)
    spec, sent = packed(Panel("x", {"a": curve, "b": curve}), Episode(0, frames, 0, 0, "train", "all"))
    assert len(sent) == 2 * frames * 4 and len(str(spec)) < 300


def test_one_stage_needs_no_probabilities(opened, scored):
    explorer = of_scores(opened, *scored, "sparse", order=[3, 0], reasons={3: "drifts"})
    assert repr(explorer) == "Explorer: 2 episodes with progress φ, action" and explorer.picker == [
        [3, "drifts"],
        [0, ""],
    ]
    with pytest.raises(ValueError, match=r"episodes \[1\] have no sparse scores"):
        of_scores(opened, *scored, "sparse", order=[1, 0])


def test_a_still_of_an_episode(opened, scored):
    scores, labels = scored
    for episode in (opened.episodes[3], opened.episodes[5]):  # with and without a target
        still = picture(opened, episode, scores[episode.index, "dense"], labels, "dense", count=3)
        assert still.width > 600 and still.height > 300


def test_a_film_of_an_episode(opened, scored, tmp_path):
    scores, labels = scored
    for episode, most in ((opened.episodes[3], 5), (opened.episodes[5], 99)):  # with and without a target
        save_film(tmp_path / "film.gif", opened, episode, scores[episode.index, "dense"], labels, "dense", most)
        film, shown = Image.open(tmp_path / "film.gif"), []
        for i in range(film.n_frames):
            film.seek(i)
            shown.append(np.asarray(film.convert("RGB")).astype(int))
        assert len(shown) == min(most, episode.length)
        red = [np.argwhere((f[..., 0] > 180) & (f[..., 1] < 120) & (f[..., 2] < 60))[:, 1].mean() for f in shown]
        assert np.all(np.diff(red) > 0)  # the dot on the curve moves on


# --- without a browser ------------------------------------------------------------------------------------------------

CODE = """\
import numpy as np
from sarm_lib.dataset import open_dataset
from sarm_lib.widgets.explorer import Explorer
from sarm_lib.widgets.panels import Panel
def panels(episode):
    t = np.linspace(0, 1, episode.length)
    if episode.index == 1:
        t = t[1:]
    stages = {"reach": (1 - t) / 2, "grasp": t * (1 - t), "lift": t / 2 + (t - 0.5) ** 2 + 0.25}
    return [Panel("progress φ", {"predicted": t, "target": t**2}, dashed=("target",)), Panel("stage", stages, "areas")]
Explorer(open_dataset("dataset"), panels, order=[3, 0, 1], reasons={3: "large error"})"""


def test_an_executed_notebook_goes_on_and_stays_small(tiny):
    source = CODE.replace('"dataset"', repr(str(tiny)))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[0].outputs
    assert output.data["text/plain"] == "Explorer: 3 episodes with progress φ, stage"
    assert set(output.data) == {"text/plain", "application/vnd.jupyter.widget-view+json", "image/png"}  # a still
    assert len(nbformat.writes(notebook)) < 300_000


# --- in a browser -----------------------------------------------------------------------------------------------------

run_cell, shows = (partial(act, widget="sarm-explorer") for act in (in_lab.run_cell, in_lab.shows))
in_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium (apt install chromium, or set SARM_CHROMIUM)")


@pytest.fixture(scope="module")
def page(lab, browser):
    """A notebook of three cells in Lab, the second of which shows the explorer."""
    address, folder = lab
    page = browser.new_page(viewport=VIEWPORT)
    open_notebook(page, address, folder.parent, CODE, "explore.ipynb")
    yield page
    page.close()


@pytest.fixture
def explorer(page):
    run_cell(page)
    explorer = page.locator(".sarm-explorer")
    explorer.locator("select").select_option("3")  # a cell that runs again may show another one
    page.locator(".sarm-explorer[data-panels='3']").wait_for()
    explorer.focus()
    page.keyboard.press("Home")
    shows(page, "3:0")
    return explorer


def pixels(explorer) -> list[str]:
    return explorer.locator("canvas").evaluate_all("all => all.map(c => c.toDataURL())")


def left(locator) -> float:
    return float(locator.evaluate("element => element.style.left").removesuffix("%"))


@in_browser
def test_frame_readout_and_playheads_move_together(page, explorer):
    before = pixels(explorer)
    assert len(before) == 4 and len(set(before)) == 4  # two cameras, two panels
    assert explorer.locator(".reason").inner_text() == "large error"
    plot = explorer.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 2.5 / 20 * box["width"], box["y"] + 10)
    page.mouse.down()
    page.mouse.move(box["x"] + 15.5 / 20 * box["width"], box["y"] + 10, steps=4)
    page.mouse.up()
    shows(page, "3:15")
    after = pixels(explorer)
    assert after[0] != before[0] and after[1] != before[1] and after[2:] == before[2:]  # curves are drawn once
    assert explorer.locator("input[type=range]").input_value() == "15"
    heads = explorer.locator(".playhead")
    assert [left(heads.nth(i)) for i in range(2)] == pytest.approx([77.5, 77.5])
    assert explorer.locator(".time").inner_text() == "15 of 19 · 1.50 s · lift"
    assert explorer.locator(".tag").inner_text() == "1.50 s · lift"
    t = 15 / 19
    shown = explorer.locator(".curve b").all_inner_texts()
    stages = [(1 - t) / 2, t * (1 - t), t / 2 + (t - 0.5) ** 2 + 0.25]
    assert [float(text) for text in shown] == pytest.approx([t, t**2, *stages], abs=0.006)
    assert explorer.locator(".curve.most").inner_text().startswith("lift")


@in_browser
def test_keys_play_and_zoom(page, explorer):
    for key, frame in (("End", 19), ("ArrowLeft", 18), ("Shift+ArrowLeft", 8), ("Home", 0), ("ArrowRight", 1)):
        page.keyboard.press(key)
        shows(page, f"3:{frame}")
    page.keyboard.press("Space")
    shows(page, "3:19")
    explorer.get_by_role("button", name="▶").wait_for()  # and stops there
    page.keyboard.press("d")
    page.keyboard.press("d")
    page.keyboard.press("n")
    page.locator(".sarm-explorer[data-panels='0']").wait_for()
    assert page.locator(".jp-Cell").count() == 3  # d d deletes a cell elsewhere
    page.keyboard.press("p")
    page.locator(".sarm-explorer[data-panels='3']").wait_for()


@in_browser
def test_an_episode_whose_panels_fail_can_be_looked_at_and_left(page, explorer):
    explorer.locator("select").select_option("1")
    shows(page, "1:0")
    explorer.locator(".message.error", has_text="episode 1, panel 'progress φ', curve 'predicted'").wait_for()
    explorer.locator(".plot").first.wait_for(state="detached")  # the message may come first
    page.keyboard.press("p")
    page.locator(".sarm-explorer[data-panels='0']").wait_for()
    assert explorer.locator(".message").inner_text() == "" and explorer.locator(".plot").count() == 2


@in_browser
def test_the_place_survives_a_rerun_and_the_notebook_stays_small(page, explorer, lab):
    explorer.locator("select").select_option("0")
    page.locator(".sarm-explorer[data-panels='0']").wait_for()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    shows(page, "0:4")
    page.wait_for_timeout(300)  # until the view has come to rest
    run_cell(page)
    shows(page, "0:4")
    page.keyboard.press("Control+s")
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    stored = lab[1] / "explore.ipynb"
    assert stored.stat().st_size < 100_000 and "image/jpeg" not in stored.read_text()


@in_browser
def test_it_fits_a_small_window(page, explorer):
    page.set_viewport_size({"width": 640, "height": 480})
    page.wait_for_timeout(300)
    wide = explorer.evaluate("e => [e.scrollWidth, e.clientWidth, e.getBoundingClientRect().height]")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert wide[0] <= wide[1] and wide[2] <= 480


def teardown_module():
    ipywidgets.Widget.close_all()
