"""The scrubber without a browser: what its view would send, and what becomes of it."""

import io
import itertools
from dataclasses import replace

import ipywidgets
import nbformat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient
from PIL import Image

from sarm_lib.annotations import Annotation, AnnotationError, Segment, validate
from sarm_lib.corrections import apply, of_now, read_corrections, read_marks, record_correction, record_mark
from sarm_lib.dataset import DatasetError, open_dataset
from sarm_lib.widgets.scrubber import SHORTEST, Scrubber, boundaries, moved, removed, split, unmarked

from .conftest import CAMERAS, LENGTHS, ROOT

NAMES = {"sparse": ["task"], "dense": ["reach", "grasp", "lift"]}


@pytest.fixture(scope="module")
def opened(tiny):
    return open_dataset(tiny)


@pytest.fixture
def annotations(opened) -> list[Annotation]:
    """Of every episode but the last."""
    return [
        Annotation(
            e.index,
            e.length,
            "test",
            (Segment("task", 0, e.length - 1),),
            (Segment("reach", 0, 4), Segment("grasp", 5, 8), Segment("lift", 9, e.length - 1)),
            confidence={"dense": (1.0, 0.3, 0.9)},
        )
        for e in opened.episodes[:-1]
    ]


class View:
    """Stands in for the browser: sends commands, keeps what comes back."""

    def __init__(self, scrubber: Scrubber):
        self.scrubber, self.received = scrubber, []
        scrubber.send = lambda content, buffers=(): self.received.append((content, buffers))

    def __call__(self, command: str, **arguments) -> None:
        self.scrubber._handle_custom_msg({"do": command, **arguments}, [])

    @property
    def dense(self) -> list:
        return self.scrubber.segments["dense"]


@pytest.fixture
def scrubber(opened, annotations, tmp_path) -> Scrubber:
    return Scrubber(opened, annotations, NAMES, order=[3, 0, 7], corrections=tmp_path / "corrections.yaml")


@pytest.fixture
def view(scrubber) -> View:
    return View(scrubber)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_the_state_of_the_shown_episode_arrives_on_axes_of_the_dataset(opened, view):
    view("send_panels", episode=3)
    content, (buffer,) = view.received[-1]
    (spec,) = content["panels"]
    sent = np.frombuffer(buffer, "<f4").reshape(len(spec["names"]), -1)
    np.testing.assert_array_equal(sent.T, opened.states[opened.episodes[3].rows])
    low, high = np.array(spec["domains"]).T
    assert not spec["shared"] and np.all(low < opened.states.min(0)) and np.all(high > opened.states.max(0))
    view("send_panels", episode=0)  # asked for before the person went on
    assert len(view.received) == 1


@pytest.mark.parametrize("names", [["x", "x", "y"], ["x", "y"], {"motors": ["a", "b", "c"]}])
def test_components_without_names_of_their_own_are_numbered(opened, view, monkeypatch, names):
    count = opened.states.shape[1]
    rows = np.random.default_rng(0).normal(size=(len(opened.states), 3)).astype(np.float32)
    rows[:, 2] = 1e17  # constant
    monkeypatch.setattr(type(opened), "states", rows)
    monkeypatch.setitem(opened.features[opened.state_key], "names", names)
    view("send_panels", episode=3)
    (spec,) = view.received[-1][0]["panels"]
    assert spec["names"] == (["a", "b", "c"] if isinstance(names, dict) else ["0", "1", "2"]) and count
    assert view.scrubber.error == ""


def test_a_state_that_cannot_be_shown_leaves_no_other_one_in_sight(opened, view, monkeypatch):
    monkeypatch.setattr(type(opened), "states", property(lambda self: (_ for _ in ()).throw(DatasetError("NaN in 3"))))
    view("send_panels", episode=3)
    assert view.received[-1] == ({"episode": 3, "panels": []}, []) and view.scrubber.error == "NaN in 3"


def test_it_opens_on_the_most_suspicious_episode(opened, annotations, tmp_path):
    reasons = {3: "grasp is short"}
    shown = Scrubber(opened, annotations, NAMES, order=[3, 0], reasons=reasons, corrections=tmp_path / "c.yaml")
    assert (shown.episode, shown.length, shown.frame, shown.head) == (3, 20, 0, "dense")
    assert shown.picker == [[3, "grasp is short"], [0, ""]]
    assert shown.cameras == ["top", "side"]
    assert shown.segments["dense"] == [["reach", 0, 4], ["grasp", 5, 8], ["lift", 9, 19]]
    assert shown.boundaries["dense"] == [[5, 2, 7, 0, 1, 0.3], [9, 7, 18, 1, 2, 0.9]]
    assert not (tmp_path / "c.yaml").exists()  # looking writes nothing
    assert repr(shown) == "Scrubber: 2 episodes to verify, into c.yaml"


def test_frames_arrive_as_one_jpeg_a_camera(view, opened):
    view("send_frame", episode=3, frame=11)
    ((content, images),) = view.received
    assert content == {"episode": 3, "frame": 11, "error": ""}
    for key, image in zip(CAMERAS, images, strict=True):
        truth = next(itertools.islice(opened.iterate_frames(key, (opened.episodes[3],)), 11, None))[1]
        shown = np.asarray(Image.open(io.BytesIO(image)), dtype=int)
        assert shown.shape == truth.shape and np.abs(shown - truth).mean() < 20  # noise, in a JPEG
    view("send_frame", episode=0, frame=2)  # asked for before the person went on to episode 3
    assert len(view.received) == 1


def test_a_frame_that_cannot_be_read_is_an_error_beside_it(view):
    view("send_frame", episode=3, frame=20)
    ((content, images),) = view.received
    assert "episode 3" in content["error"] and "no frame 20" in content["error"] and images == [b"", b""]


def test_a_camera_that_cannot_be_read_leaves_the_others(view, scrubber, monkeypatch):
    read = scrubber._reader.read

    def one_is_gone(episode, key, frame):
        if key == CAMERAS[0]:
            raise DatasetError(f"episode {episode.index}, {key}: the file is missing")
        return read(episode, key, frame)

    monkeypatch.setattr(scrubber._reader, "read", one_is_gone)
    view("send_frame", episode=3, frame=2)
    ((content, images),) = view.received
    assert f"{CAMERAS[0]}: the file is missing" in content["error"] and CAMERAS[1] not in content["error"]
    assert images[0] == b"" and Image.open(io.BytesIO(images[1])).size == (32, 32)


def test_no_frame_is_in_the_state(view, scrubber):
    view("send_frame", episode=3, frame=11)
    state = {k: v for k, v in scrubber.get_state().items() if k not in ("_esm", "_css")}
    assert len(repr(state)) < 4000


def test_what_cannot_be_shown_is_refused(opened, annotations, tmp_path):
    for arguments in ({}, {"corrections": tmp_path / "c", "marks": tmp_path / "m"}):
        with pytest.raises(ValueError, match="either corrections"):
            Scrubber(opened, annotations, NAMES, **arguments)
    with pytest.raises(ValueError, match=r"no episodes \[99\]"):
        Scrubber(opened, annotations, NAMES, order=[99], corrections=tmp_path / "c")
    with pytest.raises(ValueError, match="no episode to show"):
        Scrubber(opened, [], NAMES, corrections=tmp_path / "c")
    (tmp_path / "broken.yaml").write_text("]")
    with pytest.raises(AnnotationError, match="not YAML"):
        Scrubber(opened, annotations, NAMES, corrections=tmp_path / "broken.yaml")


def test_the_position_is_remembered_for_the_episode_that_is_shown(view, scrubber):
    view("rest", episode=3, frame=11)
    assert scrubber.frame == 11
    view("show_episode", episode=0)
    view("rest", episode=3, frame=12)  # sent before the person went on
    assert scrubber.frame == 0
    scrubber.look_at(99)
    assert view.received[-1][0] == {"go": LENGTHS[0] - 1}


# --- edits ------------------------------------------------------------------------------------------------------------


def test_select_nudge_and_undo(view, scrubber):
    view("select", step=1, frame=0)
    assert scrubber.selected == 0 and view.received[-1][0] == {"go": 5}
    view("nudge", by=1)
    assert view.dense[:2] == [["reach", 0, 5], ["grasp", 6, 8]] and view.received[-1][0] == {"go": 6}
    view("nudge", by=10)  # only as far as the neighbour allows
    assert view.dense[:2] == [["reach", 0, 6], ["grasp", 7, 8]]
    assert scrubber.states == {"3": "edited"}
    view("undo")
    view("undo")
    assert view.dense[:2] == [["reach", 0, 4], ["grasp", 5, 8]] and scrubber.states == {}
    view("undo")
    assert "nothing to undo" in scrubber.error
    view("nudge", by=1)
    assert "no boundary is selected" in scrubber.error
    view("select", step=-1, frame=12)
    assert scrubber.selected == 1 and scrubber.error == ""
    view("select", step=1, frame=12)
    assert scrubber.selected == 1  # there is none after it
    view("select", step=-1, frame=12)
    assert scrubber.selected == 0


def test_drag(view, scrubber):
    view("activate", head="sparse")
    view("move", head="dense", boundary=1, at=15)
    assert view.dense == [["reach", 0, 4], ["grasp", 5, 14], ["lift", 15, 19]]
    assert (scrubber.head, scrubber.selected) == ("dense", 1)
    view("move", head="dense", boundary=1, at=400)
    assert view.dense[-1] == ["lift", 18, 19]
    view("move", head="dense", boundary=7, at=3)
    assert "no boundary 7" in scrubber.error


def test_split_rename_and_merge(view, scrubber):
    view("split", frame=12)
    assert view.dense == [["reach", 0, 4], ["grasp", 5, 8], ["lift", 9, 11], ["lift", 12, 19]]
    assert scrubber.selected == 2
    view("rename", frame=12, number=1)
    assert view.dense[-1] == ["reach", 12, 19]
    view("split", frame=14)
    assert view.dense[-2:] == [["reach", 12, 13], ["grasp", 14, 19]]  # what follows usually
    view("merge")
    assert view.dense[-1] == ["reach", 12, 19] and scrubber.selected == -1
    view("merge")
    assert "no boundary is selected" in scrubber.error
    view("split", frame=1)
    assert "too near to an end of 'reach' (0 to 4)" in scrubber.error
    view("rename", frame=3, number=4)
    assert "no number 4" in scrubber.error


def test_gaps_have_two_boundaries_and_close():
    segments = (Segment("a", 2, 5), Segment("b", 8, 11))
    found = boundaries(segments, 14)
    assert [(b.at, b.low, b.high) for b in found] == [(2, 0, 4), (6, 4, 8), (8, 6, 10), (12, 10, 14)]
    assert moved(segments, found[1], 99) == (Segment("a", 2, 7), Segment("b", 8, 11))
    assert removed(segments, found[2]) == (Segment("a", 2, 5), Segment("b", 6, 11))
    assert removed(segments, found[0]) == (Segment("a", 0, 5), Segment("b", 8, 11))
    assert removed(segments, found[3]) == (Segment("a", 2, 5), Segment("b", 8, 13))
    with pytest.raises(AnnotationError, match="frame 6 lies in no segment"):
        split(segments, 6, ["a", "b"])


@settings(max_examples=200, deadline=None)
@given(st.integers(4, 60), st.lists(st.tuples(st.sampled_from("msx"), st.integers(-5, 70), st.integers(0, 9))))
def test_no_edit_makes_an_invalid_annotation(length, edits):
    names = ["a", "b", "c"]
    segments = split(unmarked(names, length), length // 2, names)
    for kind, frame, which in edits:
        found = boundaries(segments, length)
        try:
            if kind == "s":
                segments = split(segments, frame, names)
            elif found:
                boundary = found[which % len(found)]
                segments = moved(segments, boundary, frame) if kind == "m" else removed(segments, boundary)
        except AnnotationError:
            pass
        validate(Annotation(0, length, "test", None, segments), {"dense": names}, length)
        assert all(s.end - s.start + 1 >= SHORTEST for s in segments)


def test_edits_stay_as_a_draft_while_other_episodes_are_shown(view, scrubber):
    view("move", head="dense", boundary=0, at=6)
    view("show_episode", episode=0)
    assert (scrubber.episode, scrubber.length, scrubber.frame, scrubber.selected) == (0, 14, 0, -1)
    assert view.dense[0] == ["reach", 0, 4] and scrubber.states == {"3": "edited"}
    view("show_episode", episode=3)
    assert view.dense[0] == ["reach", 0, 5]
    view("undo")
    assert view.dense[0] == ["reach", 0, 4]


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_unsaved_edits_are_there_when_the_cell_runs_again(view, scrubber, opened, annotations, tmp_path):
    given = {"order": [3, 0, 7], "corrections": tmp_path / "corrections.yaml"}
    view("show_episode", episode=0)
    view("move", head="dense", boundary=0, at=3)
    again = Scrubber(opened, annotations, NAMES, **given)
    assert again.episode == 0 and again.segments["dense"][0] == ["reach", 0, 2] and again.states == {"0": "edited"}
    View(again)("undo")
    assert again.segments["dense"] == [["reach", 0, 4], ["grasp", 5, 8], ["lift", 9, 13]]
    assert Scrubber(opened, annotations, NAMES, **given).states == {}
    # what was edited is another annotation now: the draft is of what is gone
    view("move", head="dense", boundary=0, at=3)
    changed = [replace(a, dense=(Segment("reach", 0, a.length - 1),), confidence=None) for a in annotations]
    after = Scrubber(opened, changed, NAMES, **given)
    assert after.episode == 3 and after.states == {}


def test_a_still_of_what_is_shown(scrubber):
    assert scrubber.still().width > 600


def test_accept_fix_and_reject_are_written(view, scrubber, opened, tmp_path):
    path = tmp_path / "corrections.yaml"
    view("accept", why="fine")
    assert scrubber.states == {"3": "accepted"} and "written to corrections.yaml" in scrubber.status
    view("show_episode", episode=0)
    view("move", head="dense", boundary=0, at=6)
    view("fix", why="late")
    view("show_episode", episode=7)
    view("reject")
    assert scrubber.states == {"0": "fixed", "3": "accepted", "7": "rejected"}
    fix, accept, reject = read_corrections(path, opened)
    assert (accept.episode, accept.verdict, accept.why, accept.segments) == (3, "accept", "fine", {})
    assert (fix.verdict, fix.why, list(fix.segments)) == ("fix", "late", ["dense"])  # sparse is as it was annotated
    assert fix.segments["dense"][:2] == (Segment("reach", 0, 5), Segment("grasp", 6, 8))
    assert fix.was["dense"][0] == Segment("reach", 0, 4)
    assert (reject.episode, reject.verdict, reject.was) == (7, "reject", {})


def test_comments_in_the_file_stay(view, scrubber, tmp_path):
    path = tmp_path / "corrections.yaml"
    view("accept")
    path.write_text("# looked at by two of us\n" + path.read_text())
    view("show_episode", episode=0)
    view("move", head="dense", boundary=0, at=6)
    view("fix")
    assert path.read_text().startswith("# looked at by two of us\n")


def test_the_file_is_shown_when_the_cell_runs_again(view, scrubber, opened, annotations, tmp_path):
    view("move", head="dense", boundary=0, at=6)
    view("fix", why="late")
    again = Scrubber(opened, annotations, NAMES, order=[3, 0, 7], corrections=tmp_path / "corrections.yaml")
    assert again.episode == 0 and again.states == {"3": "fixed"}  # the first without a verdict
    view = View(again)
    view("show_episode", episode=3)
    assert view.dense[0] == ["reach", 0, 5] and again.why == "late"
    view("undo")  # the annotation itself: accepting it is another verdict
    assert view.dense[0] == ["reach", 0, 4] and again.states == {"3": "fixed, edited"}
    view("accept")
    assert again.states == {"3": "accepted"}
    view("withdraw")
    assert again.states == {} and read_corrections(tmp_path / "corrections.yaml", opened) == []
    view("withdraw")
    assert "says nothing about episode 3" in again.error


def test_withdrawing_a_fix_keeps_its_segments_as_a_draft(view, scrubber):
    view("move", head="dense", boundary=0, at=6)
    view("fix")
    view("withdraw")
    assert scrubber.states == {"3": "edited"} and view.dense[0] == ["reach", 0, 5]


def test_a_rejection_that_is_withdrawn_gives_the_fix_back(view, scrubber, opened, annotations, tmp_path):
    view("move", head="dense", boundary=0, at=7)
    view("fix", why="it slips")
    view("reject", why="blurred")
    assert scrubber.states["3"] == "rejected" and view.dense[0] == ["reach", 0, 6]
    again = View(Scrubber(opened, annotations, NAMES, order=[3, 0, 7], corrections=tmp_path / "corrections.yaml"))
    for seen in (view, again):  # also in one that was opened on it, where the annotation is shown
        seen("show_episode", episode=3)
        seen("withdraw")
        assert "no longer rejected; its fix holds again" in seen.scrubber.status, seen.scrubber.error
        assert seen.scrubber.states["3"] == "fixed" and seen.dense[0] == ["reach", 0, 6]
        (correction,) = read_corrections(tmp_path / "corrections.yaml", opened)
        assert correction.verdict == "fix" and correction.segments["dense"][0].end == 6 and correction.why == ""
        seen("reject")


def test_a_withdrawal_in_one_mode_leaves_what_is_shown_as_a_draft(opened, tmp_path):
    """A fix of the other head stays, and has nothing to say here."""
    path, length = tmp_path / "corrections.yaml", opened.episodes[3].length
    halves = (Segment("first", 0, 6), Segment("then", 7, length - 1))
    dense = (Segment("reach", 0, 4), Segment("grasp", 5, 8), Segment("lift", 9, length - 1))
    raw = Annotation(3, length, "test", halves, dense)
    moved_half = (Segment("first", 0, 8), Segment("then", 9, length - 1))
    record_correction(path, opened, of_now(raw, "fix", {"sparse": moved_half}))
    whole = replace(raw, sparse=(Segment("task", 0, length - 1),))
    view = View(Scrubber(opened, [whole], NAMES, order=[3], corrections=path))
    view("move", head="dense", boundary=0, at=3)
    view("fix")
    assert view.scrubber.states["3"].startswith("fixed"), view.scrubber.error
    view("withdraw")
    assert view.dense[0] == ["reach", 0, 2] and "stays" in view.scrubber.status, view.scrubber.error
    (left,) = read_corrections(path, opened)
    assert left.segments == {"sparse": moved_half}


def test_an_error_that_nobody_expected_is_shown(view, scrubber, monkeypatch):
    def breaks(*_):
        raise KeyError("gone")

    monkeypatch.setattr("sarm_lib.corrections.record_correction", breaks)
    view("accept")
    assert scrubber.error == "accept was not done: KeyError: 'gone'" and not scrubber.states.get("3")


def test_what_no_longer_fits_is_said(opened, annotations, tmp_path):
    path = tmp_path / "corrections.yaml"
    record_correction(path, opened, of_now(annotations[0], "fix", {"dense": (Segment("reach", 0, 99),)}))
    was = Annotation(1, LENGTHS[1], "test", None, (Segment("reach", 0, LENGTHS[1] - 1),))
    record_correction(path, opened, of_now(was, "accept"))
    scrubber = Scrubber(opened, annotations, NAMES, corrections=path)
    assert scrubber.states == {"0": "unfit", "1": "outdated"}
    scrubber.show_episode(0)
    assert "leaves the episode's 14 frames" in scrubber.status and "cannot be shown" in scrubber.status
    assert scrubber.segments["dense"][0] == ["reach", 0, 4]
    scrubber.show_episode(1)
    assert "look again" in scrubber.status


def test_it_opens_on_corrections_that_no_longer_fit_and_shows_them_as_drafts(opened, annotations, tmp_path):
    """A renamed subtask: the segments of the fix are there to be mended, and the file is as it was until then."""
    path = tmp_path / "corrections.yaml"
    end = LENGTHS[2] - 1
    for episode in (0, 2):
        length = LENGTHS[episode]
        fixed = (Segment("reach", 0, 6), Segment("clasp", 7, 8), Segment("lift", 9, length - 1))
        if episode == 0:
            fixed = (Segment("reach", 0, 6), Segment("lift", 7, length - 1))
        record_correction(path, opened, of_now(annotations[episode], "fix", {"dense": fixed}, why="late"))
    before = path.read_text()
    scrubber = Scrubber(opened, annotations, NAMES, order=[0, 2], corrections=path)
    view = View(scrubber)
    assert scrubber.states == {"0": "fixed", "2": "unfit, edited"} and scrubber.episode == 2
    assert view.dense == [["reach", 0, 6], ["clasp", 7, 8], ["lift", 9, end]] and scrubber.why == "late"
    assert "unknown subtask 'clasp'" in scrubber.status and "shown as a draft" in scrubber.status
    view("fix")
    assert "unknown subtask 'clasp'" in scrubber.error and path.read_text() == before
    view("rename", frame=7, number=2)
    view("fix")
    assert scrubber.states == {"0": "fixed", "2": "fixed"}
    assert read_corrections(path, opened)[1].segments["dense"][1] == Segment("grasp", 7, 8)
    assert Scrubber(opened, annotations, NAMES, order=[0, 2], corrections=path).states == scrubber.states


def test_verdicts_that_contradict_what_is_shown_are_refused(view, scrubber, tmp_path):
    view("fix")
    assert "nothing differs" in scrubber.error
    view("move", head="dense", boundary=0, at=6)
    view("accept")
    assert "differs from the annotation" in scrubber.error and scrubber.states == {"3": "edited"}
    view("show_episode", episode=7)
    view("accept")
    assert "no annotation to accept" in scrubber.error
    assert not (tmp_path / "corrections.yaml").exists()


def test_a_file_that_cannot_be_written_loses_nothing(view, scrubber, tmp_path):
    view("move", head="dense", boundary=0, at=6)
    (tmp_path / "corrections.yaml").write_text("]")
    view("fix")
    assert "not YAML" in scrubber.error and (tmp_path / "corrections.yaml").read_text() == "]"
    assert view.dense[0] == ["reach", 0, 5] and scrubber.states == {"3": "edited"}
    (tmp_path / "corrections.yaml").unlink()
    view("fix")
    assert scrubber.error == "" and scrubber.states == {"3": "fixed"}
    (tmp_path / "corrections.yaml").write_text("]")
    view("withdraw")
    assert "not YAML" in scrubber.error and scrubber.states == {"3": "fixed"}


def test_an_invalid_annotation_is_never_written(opened, tmp_path):
    """Segments that came in invalid: edits keep them, the gate refuses them."""
    bad = Annotation(2, 16, "test", (Segment("task", 0, 15),), (Segment("unheard of", 0, 15),))
    scrubber = Scrubber(opened, [bad], NAMES, corrections=tmp_path / "corrections.yaml")
    view = View(scrubber)
    view("split", frame=8)
    view("fix")
    assert "unknown subtask 'unheard of'" in scrubber.error and not (tmp_path / "corrections.yaml").exists()
    view("rename", frame=3, number=2)
    view("fix")
    assert scrubber.states == {"2": "fixed"}


def test_unknown_commands_do_nothing(view, scrubber):
    for command in ("close", "_record", "__init__", None):
        view(command)
        assert "unknown command" in scrubber.error


# --- marks ------------------------------------------------------------------------------------------------------------


def test_marking_starts_with_one_segment_and_every_boundary_is_a_persons(opened, annotations, tmp_path):
    path = tmp_path / "marks.yaml"
    scrubber = Scrubber(opened, [], NAMES, order=[3, 0], marks=path)
    view = View(scrubber)
    assert scrubber.mode == "mark" and view.dense == [["", 0, 19]]
    for refused in ("accept", "reject"):
        view(refused)
        assert scrubber.error
    for frame in (5, 13, 16):  # as notebook 01 says: step to where the next one begins, and split
        view("split", frame=frame)
    view("rename", frame=16, number=1)  # it fails, and tries again
    view("fix", why="by eye")
    assert scrubber.states == {"3": "marked"}
    (mark,) = read_marks(path, opened, NAMES)
    assert [(s.subtask, s.start, s.end) for s in mark.dense] == [
        ("reach", 0, 4),
        ("grasp", 5, 12),
        ("lift", 13, 15),
        ("reach", 16, 19),
    ]
    assert mark.provenance["why"] == "by eye"

    again = Scrubber(opened, [], NAMES, order=[3, 0], marks=path)
    assert again.episode == 0 and again.states == {"3": "marked"}
    again.show_episode(3)
    assert again.segments["dense"][0] == ["reach", 0, 4]
    View(again)("withdraw")
    assert read_marks(path, opened, NAMES) == []


def test_what_nobody_said_is_not_saved(opened, annotations, tmp_path):
    """A stray `f` on what is one segment because nobody has split it, in both modes."""
    for way, state in (("marks", "marked"), ("corrections", "fixed")):
        path = tmp_path / f"{way}.yaml"
        scrubber = Scrubber(opened, [], NAMES, order=[3, 0], **{way: path})
        view = View(scrubber)
        for edit in ({"command": "split", "frame": 5}, {"command": "rename", "frame": 5, "number": 2}):
            view("fix")
            assert "nobody has said where dense subtasks begin" in scrubber.error and not path.exists()
            view(**edit)
            view("undo")
        view("fix")
        assert "nobody has said" in scrubber.error and not path.exists()
        view("split", frame=5)
        view("rename", frame=0, number=1)  # it is named so already
        view("undo")
        view("fix")
        assert "nobody has said" in scrubber.error and not path.exists()
        view("split", frame=5)
        view("fix")
        assert scrubber.states == {"3": state} and path.exists()


def test_an_episode_of_one_subtask_can_be_marked_by_saying_so(opened, tmp_path):
    """It is named; where the vocabulary has one name there is nothing to say."""
    path = tmp_path / "marks.yaml"
    view = View(Scrubber(opened, [], NAMES, order=[3, 0], marks=path))
    view("rename", frame=0, number=1)
    assert view.scrubber.states == {"3": "edited"} and view.dense == [["reach", 0, 19]]
    scrubber = Scrubber(opened, [], NAMES, order=[3, 0], marks=path)  # a cell that runs again
    view = View(scrubber)
    assert view.dense == [["reach", 0, 19]]
    view("fix")
    assert scrubber.states == {"3": "marked"}
    view("show_episode", episode=0)
    view("fix")
    assert "nobody has said" in scrubber.error, "of another episode nothing was said"
    one = Scrubber(opened, [], {"dense": ["fold"]}, order=[3], marks=tmp_path / "one.yaml")
    View(one)("fix")
    assert one.states == {"3": "marked"}


def test_a_boundary_is_put_where_the_playhead_is(view, scrubber):
    view("put", frame=12)
    assert "no boundary is selected" in scrubber.error
    view("select", step=1, frame=0)
    before = view.dense
    view("put", frame=before[0][2] + 3)
    assert view.dense[0] == [before[0][0], 0, before[0][2] + 2] and view.dense[1][1] == before[0][2] + 3
    put = view.dense
    for frame in (0, put[1][2] + 1):  # in front of the episode's second frame, and behind the next boundary
        view("put", frame=frame)
        assert "can be put at frames" in scrubber.error and view.dense == put


def test_marking_starts_with_what_the_annotator_says(opened, annotations, tmp_path):
    path = tmp_path / "marks.yaml"
    scrubber = Scrubber(opened, annotations, NAMES, order=[3, 7], marks=path)
    view = View(scrubber)
    assert view.dense == [["reach", 0, 4], ["grasp", 5, 8], ["lift", 9, 19]]
    assert scrubber.boundaries["dense"][0][-1] == 0.3  # and how sure it is
    view("fix")  # a person looked, and it is right
    view("show_episode", episode=7)
    assert len(view.dense) == 1  # not annotated
    (mark,) = read_marks(path, opened, NAMES)
    assert (mark.episode, mark.dense) == (3, annotations[3].dense)


# --- without a browser ------------------------------------------------------------------------------------------------


def test_an_executed_notebook_goes_on_and_stays_small(tiny):
    source = f"""
from sarm_lib.dataset import open_dataset
from sarm_lib.widgets.scrubber import Scrubber
Scrubber(open_dataset({str(tiny)!r}), [], {{"dense": ["reach", "grasp"]}}, marks="marks.yaml")"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    (output,) = notebook.cells[0].outputs
    assert output.data["text/plain"] == "Scrubber: 8 episodes to mark, into marks.yaml"
    assert set(output.data) == {"text/plain", "application/vnd.jupyter.widget-view+json", "image/png"}  # a still
    assert len(nbformat.writes(notebook)) < 300_000


def test_marks_that_lack_a_head_are_shown_and_completed(opened, tmp_path):
    path, whole = tmp_path / "marks.yaml", {"sparse": ["near", "far"], "dense": NAMES["dense"]}
    length = opened.episodes[3].length
    dense = (Segment("reach", 0, 4), Segment("grasp", 5, 8), Segment("lift", 9, length - 1))
    record_mark(path, opened, Annotation(3, length, "manual", None, dense))
    scrubber = Scrubber(opened, [], whole, order=[0, 3], marks=path)
    view = View(scrubber)
    scrubber.show_episode(3)
    assert (
        view.dense == [[s.subtask, s.start, s.end] for s in dense] and "nothing is marked for sparse" in scrubber.status
    )
    view("fix")
    assert "nobody has said where sparse subtasks begin" in scrubber.error and read_marks(path, opened, whole) == []
    view("activate", head="sparse")
    view("split", frame=6)
    view("fix")
    (mark,) = read_marks(path, opened, whole)
    assert mark.sparse[1].start == 6 and mark.dense == dense


BOTH = {"sparse": ["near", "far"], "dense": NAMES["dense"]}


def in_both(opened, episode):
    length = opened.episodes[episode].length
    dense = (Segment("reach", 0, 4), Segment("grasp", 5, 8), Segment("lift", 9, length - 1))
    return Annotation(episode, length, "test", (Segment("near", 0, 5), Segment("far", 6, length - 1)), dense)


@pytest.mark.parametrize(("way", "state"), [("marks", "marked"), ("corrections", "fixed")])
def test_a_head_that_nobody_touched_is_not_saved_with_the_other(opened, tmp_path, way, state):
    path = tmp_path / "said.yaml"
    scrubber = Scrubber(opened, [], BOTH, order=[3, 0], **{way: path})
    view = View(scrubber)
    view("split", frame=5)
    view("fix")
    assert "nobody has said where sparse subtasks begin" in scrubber.error and not path.exists()
    view("activate", head="sparse")
    view("split", frame=6)
    view("fix")
    assert scrubber.states == {"3": state} and not scrubber.error
    again = Scrubber(opened, [], BOTH, order=[3, 0], **{way: path})  # what was said is not asked for twice
    again.show_episode(3)
    View(again)("move", head="dense", boundary=0, at=6)
    View(again)("fix")
    assert not again.error and again.segments["sparse"][1][1] == 6


def test_a_boundary_that_heads_share_and_one_leaves_is_said(opened, tmp_path):
    dense = in_both(opened, 3).dense
    shared = replace(in_both(opened, 3), sparse=(Segment("near", 0, 8), Segment("far", 9, dense[-1].end)))
    scrubber = Scrubber(opened, [shared], BOTH, order=[3], corrections=tmp_path / "c.yaml")
    view = View(scrubber)
    view("move", head="dense", boundary=0, at=4)
    assert not scrubber.status, "only dense changes there"
    view("move", head="dense", boundary=1, at=11)
    left = "sparse still changes at frame 9, where dense did too"
    assert left in scrubber.status
    view("fix")
    assert scrubber.states == {"3": "fixed"} and left in scrubber.status
    view("move", head="sparse", boundary=0, at=11)
    assert not scrubber.status


def test_a_fix_of_one_head_waits_for_a_look_once_the_other_has_changed(opened, tmp_path):
    path, seen = tmp_path / "c.yaml", in_both(opened, 3)
    scrubber = Scrubber(opened, [seen], BOTH, order=[3], corrections=path)
    view = View(scrubber)
    view("move", head="dense", boundary=0, at=4)
    view("fix")
    other = replace(seen, sparse=(Segment("near", 0, 15), Segment("far", 16, seen.length - 1)))
    again = Scrubber(opened, [other], BOTH, order=[3], corrections=path)
    assert again.states == {"3": "outdated"} and "the sparse annotation is no longer the one" in again.status
    assert again.segments["dense"][1][1] == 4 and again.segments["sparse"][1][1] == 16
    reviewed = apply([other], read_corrections(path, opened), opened, BOTH)
    assert reviewed.annotations[0].dense[1].start == 4, "the fix itself holds"
    assert [o.outcome for o in reviewed.unsettled] == ["outdated"]
    (same,) = apply([replace(seen, dense=other.dense)], read_corrections(path, opened), opened, BOTH).outcomes
    assert same.outcome == "fixed"


def test_marking_dense_only_says_nothing_of_the_other_head_and_keeps_what_was_said(opened, tmp_path):
    path = tmp_path / "marks.yaml"
    path.write_text("# nothing yet\n")
    record_mark(path, opened, in_both(opened, 3))
    scrubber = Scrubber(opened, [], NAMES, order=[3, 0], marks=path)
    view = View(scrubber)
    for episode in (3, 0):
        scrubber.show_episode(episode)
        if episode == 3:
            view("move", head="dense", boundary=0, at=3)
        else:
            view("split", frame=3)
        view("fix")
        assert scrubber.states[str(episode)] == "marked" and not scrubber.error
    text = path.read_text()
    assert text.startswith("# nothing yet") and "task" not in text
    (mark,) = read_marks(path, opened, BOTH)
    assert mark.episode == 3 and mark.dense[1].start == 3 and mark.sparse == in_both(opened, 3).sparse
    waiting = Scrubber(opened, [], BOTH, order=[0, 3], marks=path)
    assert "nothing is marked for sparse yet" in waiting.status
    path.write_text(text.replace("dense:", "sparse:\n      - [task, 0, 11]\n    dense:", 1))  # as it was written once
    assert len(read_marks(path, opened, NAMES)) == 2


def test_a_fix_of_one_mode_stays_when_another_mode_corrects_or_accepts(opened, annotations, tmp_path):
    path, raw = tmp_path / "corrections.yaml", in_both(opened, 3)
    moved = (Segment("near", 0, 7), Segment("far", 8, raw.length - 1))
    record_correction(path, opened, of_now(raw, "fix", {"sparse": moved}))
    for correct in (
        lambda view: (view("move", head="dense", boundary=0, at=3), view("fix")),
        lambda view: view("accept"),
    ):
        scrubber = Scrubber(opened, annotations, NAMES, order=[3], corrections=path)
        view = View(scrubber)
        if scrubber.states.get("3") == "fixed":
            view("undo")
        correct(view)
        assert scrubber.states["3"] == "fixed" and not scrubber.error
        (said,) = read_corrections(path, opened)
        assert said.verdict == "fix" and said.segments["sparse"] == moved and said.was["sparse"] == raw.sparse
        shown = {head: [[s.subtask, s.start, s.end] for s in given] for head, given in said.segments.items()}
        (kept,) = apply([raw], [said], opened, BOTH).annotations
        assert kept.sparse == moved and shown["dense"] == view.dense
    assert said.segments["dense"] == annotations[3].dense, "accepted beside the fix of the other head"
    scrubber = Scrubber(opened, [], NAMES, order=[7], corrections=path)  # an episode that nobody annotated
    view = View(scrubber)
    view("split", frame=3)
    view("fix")
    _, said = read_corrections(path, opened)
    assert set(said.segments) == {"dense"} and not said.was


def test_what_was_said_in_both_modes_outlives_a_withdrawal_in_one(opened, annotations, tmp_path):
    marks, path, raw = tmp_path / "marks.yaml", tmp_path / "corrections.yaml", in_both(opened, 3)
    moved = (Segment("near", 0, 7), Segment("far", 8, raw.length - 1))
    record_mark(marks, opened, raw)
    record_correction(path, opened, of_now(raw, "fix", {"sparse": moved, "dense": raw.dense[:1]}))
    for file, shown in (("marks", []), ("corrections", annotations)):
        scrubber = Scrubber(opened, shown, NAMES, order=[3], **{file: marks if file == "marks" else path})
        View(scrubber)("withdraw")
        assert "does not ask about stays" in scrubber.status
    assert "dense" not in marks.read_text() and read_marks(marks, opened, NAMES) == []
    assert "nothing is marked for dense yet" in Scrubber(opened, [], BOTH, order=[3], marks=marks).status
    (said,) = read_corrections(path, opened)
    assert said.segments == {"sparse": moved} and said.was == {"sparse": raw.sparse}
    for file, shown in (("marks", []), ("corrections", [raw])):
        View(Scrubber(opened, shown, BOTH, order=[3], **{file: marks if file == "marks" else path}))("withdraw")
    assert read_corrections(path, opened) == [] and "near" not in marks.read_text()


def test_an_accepted_head_stays_accepted_when_the_other_is_fixed_in_another_mode(opened, annotations, tmp_path):
    path, raw = tmp_path / "corrections.yaml", in_both(opened, 3)
    record_correction(path, opened, of_now(raw, "accept"))
    view = View(Scrubber(opened, annotations, NAMES, order=[3], corrections=path))
    view("move", head="dense", boundary=0, at=3)
    view("fix")
    other = replace(raw, sparse=(Segment("near", 0, 8), Segment("far", 9, raw.length - 1)))
    (kept,) = apply([other], read_corrections(path, opened), opened, BOTH).annotations
    assert kept.sparse == raw.sparse and kept.dense[1].start == 3


def test_a_head_that_is_not_asked_about_is_not_edited(view, scrubber):
    view("activate", head="sparse")
    view("split", frame=5)
    assert "does not ask about sparse segments" in scrubber.error and len(scrubber.segments["sparse"]) == 1


def test_one_stage_has_nothing_to_fix(opened, tmp_path):
    length = opened.episodes[3].length
    raw = Annotation(3, length, "test", (Segment("task", 0, length - 1),), None)
    scrubber = Scrubber(opened, [raw], {"sparse": ["task"]}, order=[3], corrections=tmp_path / "c.yaml")
    view = View(scrubber)
    view("split", frame=5)
    view("fix")
    assert "nothing to fix" in scrubber.error and not (tmp_path / "c.yaml").exists()


def test_two_of_a_name_side_by_side_are_pointed_out_whatever_made_them(view, scrubber):
    view("rename", frame=6, number=1)
    assert "two segments of 'reach' stand side by side" in scrubber.status
    view("rename", frame=6, number=2)
    assert scrubber.status == ""
    view("split", frame=15)  # within the last subtask, which nothing follows
    assert "two segments of 'lift'" in scrubber.status
    view("split", frame=12)  # and another pair of them
    assert "two segments of 'lift'" in scrubber.status
    view("undo")
    assert "two segments of 'lift'" in scrubber.status  # there is one pair left
    view("undo")
    assert scrubber.status == ""
    view("split", frame=2)  # a grasp before the one that is there
    assert "two segments of 'grasp'" in scrubber.status
    view("rename", frame=7, number=3)
    view("rename", frame=12, number=2)
    view("select", step=1, frame=3)
    view("merge")  # what stood between two of a kind is gone
    assert "two segments of 'grasp'" in scrubber.status


def teardown_module():
    ipywidgets.Widget.close_all()
