"""Comparing annotations: what is identical agrees, what is shifted is off by the shift, a retry is a step back."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm_lib import agreement, charts, dataset, params
from sarm_lib.annotations import Annotation, Finding, Segment

from .conftest import ROOT

NAMES = ["reach", "grasp", "lift"]


def segments(*starts: tuple[int, int], length: int = 40) -> tuple[Segment, ...]:
    """From (index of the subtask, first frame) of each segment."""
    ends = [start - 1 for _, start in starts[1:]] + [length - 1]
    return tuple(Segment(NAMES[k], start, end) for (k, start), end in zip(starts, ends))


def compare(a, b, length=40):
    return agreement.compare(a, b, NAMES, length, fps=10)


labels = st.lists(st.integers(0, 2), min_size=2, max_size=60).map(np.array)


@given(labels)
def test_an_annotation_agrees_with_itself(frames):
    own = agreement.segments_of(frames, NAMES)
    result = compare(own, own, len(frames))
    assert result.agreement == 1 and result.iou == 1 and not result.missed and not result.extra
    assert set(result.errors) <= {0.0} and result.retries_missed == result.retries_extra == 0


@given(labels, labels)
def test_what_one_side_misses_is_extra_on_the_other(a, b):
    length = min(len(a), len(b))
    one, two = agreement.segments_of(a[:length], NAMES), agreement.segments_of(b[:length], NAMES)
    there, back = compare(one, two, length), compare(two, one, length)
    assert there.agreement == back.agreement and there.matched == back.matched
    assert (there.missed, there.extra) == (back.extra, back.missed)
    assert (there.confusion == back.confusion.T).all() and there.confusion.sum() == length


@given(labels)
def test_labels_and_segments_are_two_forms_of_the_same(frames):
    assert (agreement.frame_labels(agreement.segments_of(frames, NAMES), NAMES, len(frames)) == frames).all()


@given(labels, st.integers(2, 5))
def test_no_segment_is_shorter_than_asked(frames, shortest):
    result = agreement.segments_of(frames, NAMES, shortest)
    assert result[0].start == 0 and result[-1].end == len(frames) - 1
    assert len(result) == 1 or all(s.end - s.start + 1 >= shortest for s in result)


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_a_shifted_boundary_is_off_by_the_shift(shift):
    result = compare(segments((0, 0), (1, 20)), segments((0, 0), (1, 20 + shift)))
    assert result.errors == (shift,) and result.agreement == 1 - shift / 40


def test_beyond_the_tolerance_a_boundary_is_missed_and_counts_as_the_tolerance():
    result = compare(segments((0, 0), (1, 20)), segments((0, 0), (1, 26)))
    assert (result.matched, result.missed, result.extra) == (0, 1, 1) and result.errors == (5.0,)


def test_a_retry_is_a_boundary_that_leads_back():
    truth = segments((0, 0), (1, 10), (0, 20), (1, 30))
    found, missed = compare(truth, truth), compare(truth, segments((0, 0), (1, 10)))
    assert (found.retries_matched, found.retries_missed) == (1, 0)
    assert (missed.retries_matched, missed.retries_missed) == (0, 1)
    summary = agreement.summary([found, missed], fps=10)
    assert summary["retries"] == 2 and summary["retry_recall"] == 0.5 and summary["retry_precision"] == 1.0


def test_suspicion_puts_the_worst_first_says_why_and_trusts_people():
    own = segments((0, 0), (1, 20))
    sure = Annotation(1, 40, "propagate", own, None, {"sparse": (1.0, 0.99)})
    unsure = Annotation(2, 40, "propagate", own, None, {"sparse": (1.0, 0.3)})
    marked = Annotation(3, 40, "manual", own, None)
    other = Annotation(2, 40, "keyframes", segments((0, 0), (1, 30)), None)
    doubt = Finding(1, "sparse", "grasp", "unlikely duration", "20 frames, usual are 4")
    given = [[sure, unsure, marked], [doubt], {"keyframes": [other]}, {"sparse": NAMES}]
    table = agreement.suspicion(*given, {"keyframes": {"sparse": 1.0}})
    assert table.index.tolist() == [2, 1, 3] and table.score.tolist() == [0.725, 0.05, 0.0]
    assert "confidence 0.30" in table.why[2] and "keyframes sees 25%" in table.why[2] and "usual are 4" in table.why[1]
    half = agreement.suspicion(*given, {"keyframes": {"sparse": 0.5}})
    assert half.score[2] == pytest.approx(0.7 + 0.1 * 0.5 * 0.25, abs=1e-3)
    none = agreement.suspicion(*given, {"keyframes": {"sparse": 0.0}})
    assert none.score[2] == 0.7 and "keyframes" not in none.why[2]
    given[2], trusted = (
        given[2] | {"vlm-seed-1": [other]},
        {"keyframes": {"sparse": 0.5}, "vlm-seed-1": {"sparse": 1.0}},
    )
    both = agreement.suspicion(*given, trusted)
    assert both.score[2] == pytest.approx(0.7 + 0.1 * 1.5 * 0.25, abs=1e-3) and "vlm-seed-1 sees 25%" in both.why[2]
    accepted = agreement.suspicion(*given, trusted, accepted=[2])
    assert accepted.index.tolist() == [1, 2, 3] and (accepted.score[2], accepted.why[2]) == (0.0, "")


def test_an_annotator_that_had_to_overrule_its_frames_is_suspicious():
    """Boundaries that are certain do not help where frame after frame looks like something else."""
    own, sure = segments((0, 0), (1, 20), (2, 30)), {"sparse": (1.0, 1.0, 1.0)}
    overruled = Annotation(1, 40, "propagate", own, None, sure, doubt={"sparse": (0.02, 0.6, 0.1)})
    agreeing = Annotation(2, 40, "propagate", own, None, sure, doubt={"sparse": (0.02, 0.02, 0.02)})
    table = agreement.suspicion([agreeing, overruled], [], {}, {"sparse": NAMES}, {})
    assert table.score.to_dict() == {1: 0.185, 2: 0.0}  # (20 · 0.02 + 10 · 0.6 + 10 · 0.1) / 40
    assert f"18% of the frames look like another subtask, most of them in '{NAMES[1]}' from frame 20" in table.why[1]


def test_unlikely_durations_and_gaps_are_doubts():
    usual = [
        Annotation(i, 40, "x", (Segment("reach", 0, 9 + i % 3), Segment("grasp", 20, 39)), None) for i in range(30)
    ]
    odd = Annotation(99, 60, "x", (Segment("reach", 0, 39), Segment("grasp", 40, 59)), None)
    found = agreement.doubts([*usual, odd], {"sparse": NAMES})
    assert [(f.episode, f.subtask) for f in found if f.rule == "unlikely duration"] == [(99, "reach")]
    assert [f.episode for f in found if f.rule == "gap"] == list(range(30))


def test_a_subtask_that_is_passed_over_is_a_doubt_and_a_step_back_is_none():
    late, jumps = segments((1, 0), (2, 20)), segments((0, 0), (2, 20), (0, 30))
    whole = segments((0, 0), (1, 10), (2, 20), (1, 30))
    given = [Annotation(e, 40, "x", s, None) for e, s in enumerate((late, jumps, whole))]
    found = [f for f in agreement.doubts(given, {"sparse": NAMES}) if f.rule == "skipped"]
    assert [(f.episode, f.subtask) for f in found] == [(0, "grasp"), (1, "lift")]
    assert "at the beginning, without 'reach'" in str(found[0]) and "right after 'reach', without 'grasp'" in str(
        found[1]
    )


def test_heads_that_contradict_each_other_are_a_doubt():
    vocabulary, dense = {"sparse": ["go", "come"], "dense": NAMES}, segments((0, 0), (1, 10), (2, 20))
    sparse = lambda at: (Segment("go", 0, at - 1), Segment("come", at, 39))  # noqa: E731
    given = [Annotation(e, 40, "x", sparse(at), dense) for e, at in enumerate((20, 20, 21, 30))]
    found = [f for f in agreement.doubts(given, vocabulary) if f.rule == "heads disagree"]
    assert [(f.episode, f.subtask) for f in found] == [(3, "lift")]  # a frame off is a matter of boundaries
    assert "10 frames lie outside of 'come'" in str(found[0])


def test_retries_are_counted_by_where_they_go_from_and_to():
    reference = segments((0, 0), (1, 10), (0, 20), (1, 30), (2, 34), (1, 37))
    said = segments((0, 0), (1, 10), (0, 22), (1, 30))
    pairs = [agreement.compare(reference, other, NAMES, 40, 10) for other in (said, segments((0, 0), (1, 10)))]
    assert pairs[0].steps_back == ((NAMES[1], NAMES[0], 10, True), (NAMES[2], NAMES[1], 3, False))
    table = agreement.by_step(pairs)
    assert table.values.tolist() == [[NAMES[1], NAMES[0], 2, 1], [NAMES[2], NAMES[1], 2, 0]]
    assert (pairs[0].retries_matched, pairs[0].retries_missed) == (1, 1)
    assert agreement.by_step([]).values.tolist() == [] and list(agreement.by_step([])) == [
        "from",
        "to",
        "retries",
        "found",
    ]


def test_retries_are_counted_by_how_long_the_step_back_lasts():
    """Of 0.3 s and of 1 s, at 10 frames a second; what was given up may have lasted as short as it likes."""
    reference = segments((0, 0), (1, 10), (0, 12), (1, 22), (2, 34), (1, 37))
    pairs = [agreement.compare(reference, segments((0, 0), (1, 10), (0, 12), (1, 22)), NAMES, 40, 10)]
    table = agreement.by_length(pairs, 10)
    assert table["0 s"] == table["0.25 s"] == {"retries": 2, "retry_recall": 0.5}
    assert table["0.375 s"] == table["1 s"] == {"retries": 1, "retry_recall": 1.0}
    assert set(map(str, agreement.by_length([], 10).values())) == {"{'retries': 0, 'retry_recall': None}"}


def test_no_length_that_is_taken_for_flicker_takes_a_subtask():
    """Clean episodes of the demo keep all their subtasks."""
    demos = dataset.from_params(params.load(ROOT / "params.yaml"))
    clean = [e for e in demos.episodes if e.group == "clean"]
    stage = demos.truth("stage", "sim.")
    names = [str(i) for i in range(int(stage.max()) + 1)]
    for flicker in agreement.FLICKERS:
        found = agreement.truth(stage, demos, names, flicker)
        assert all([s.subtask for s in found[e.index]] == names for e in clean), flicker


def test_what_the_most_suspicious_episodes_hold():
    wrong = pd.Series({e: float(e == 7) * 30 + 1 for e in range(20)})
    score = pd.Series({e: 0.0 for e in range(20)})
    assert agreement.found_early(score, wrong) == {"episodes": 2, "of": 20, "errors": 0.04}
    score[7] = 0.1
    assert agreement.found_early(score, wrong)["errors"] == 0.64


def test_an_opinion_counts_as_far_as_it_agrees_with_held_out_marks():
    marks = [Annotation(1, 40, "manual", segments((0, 0), (1, 20)), None)]
    names = {"sparse": NAMES}

    def trust(start: int, *marks: Annotation) -> float:
        second = [Annotation(e, 40, "x", segments((0, 0), (1, start)), None) for e in (1, 2)]
        return agreement.trust(second, marks, names, 10)["sparse"]

    assert trust(20, *marks) == 1 and trust(30, *marks) == 0.5  # a = 0.75
    assert trust(38, *marks) == pytest.approx(0.1) and trust(20) == 0.5  # nothing is marked
    upside_down = [Annotation(1, 40, "x", segments((1, 0), (0, 20)), None)]
    assert agreement.trust(upside_down, marks, names, 10) == {"sparse": 0.0}  # worse than a coin counts nothing


def test_how_often_a_confidence_is_right():
    """At 10 frames a second, a boundary one frame off is right and one two frames off is not; starts do not count."""
    own, sure = segments((0, 0), (1, 20), (2, 30)), {"sparse": (0.1, 0.95, 0.999)}
    given = [Annotation(e, 40, "propagate", own, None, sure) for e in (1, 2, 3)]
    true = {1: segments((0, 0), (1, 21), (2, 30)), 2: segments((0, 0), (1, 22), (2, 30)), 4: own}
    found = agreement.reliability(true, given, "sparse", NAMES, 10)
    assert found == {
        "0.9 to 0.99": {"boundaries": 2, "mean_confidence": 0.95, "found": 0.5},
        "0.99 or more": {"boundaries": 2, "mean_confidence": 0.999, "found": 1.0},
    }
    unsure = [Annotation(1, 40, "keyframes", own, None)]
    assert agreement.reliability(true, unsure, "sparse", NAMES, 10) == {}
    assert agreement.not_marked([*unsure, Annotation(2, 40, "manual", own, None)]) == unsure


def test_references_without_an_annotation_are_counted():
    own = segments((0, 0), (1, 20))
    pairs = agreement.compare_all({1: own, 2: own, 3: own}, [Annotation(2, 40, "x", own, None)], "sparse", NAMES, 10)
    assert [c.episode for c in pairs] == [2]
    figures = agreement.summary(pairs, 10, asked=3)
    assert (figures["episodes"], figures["missing"]) == (1, 2)
    assert agreement.summary([], 10, asked=3) == {"episodes": 0, "missing": 3}


def test_what_counts_as_a_retry_hangs_on_the_flicker(tiny):
    """A step back of 0.2 s is a retry by a flicker of 0.1 s; none by one of 0.3 s."""
    from sarm_lib.dataset import open_dataset

    demos = open_dataset(tiny)  # 10 frames a second
    stage = np.zeros(demos.num_frames, dtype=np.float32)
    for e in demos.episodes:
        stage[e.rows][4:] = 1
        stage[e.rows][7:9] = 0
    annotated = []
    for e in demos.episodes:
        own = (Segment("reach", 0, 3), Segment("grasp", 4, e.length - 1))
        annotated.append(Annotation(e.index, e.length, "x", None, own))
    table = agreement.by_flicker(stage, demos, annotated, NAMES)
    scored = [e for e in demos.episodes if e.split != "train"]
    assert list(table) == [f"{flicker:g} s" for flicker in agreement.FLICKERS] and list(table["0.1 s"]) == [
        "val",
        "test",
        "val and test",
    ]
    assert table["0.1 s"]["val and test"] == {"retries": len(scored), "retry_recall": 0.0, "retry_precision": None}
    longer = agreement.truth(stage, demos, NAMES, flicker=0.3)
    assert all(len(longer[e.index]) == 2 for e in demos.episodes)


def test_boundary_errors_are_drawn_as_shares_with_the_missed_ones_apart():
    chart = charts.boundary_errors({"truth": [0, 0, 1, 5], "marks": [5.0]}, 5, "Boundaries").to_dict()
    (rows,) = chart["datasets"].values()
    found = {(r["reference"], r["low"] + 0.5): (r["share"], r["is"]) for r in rows}
    assert found == {
        ("truth", 0): (0.5, "found"),
        ("truth", 1): (0.25, "found"),
        ("truth", 5): (0.25, "missed"),
        ("marks", 5): (1.0, "missed"),
    }


def test_boundaries_in_a_picture_are_no_gaps():
    """Black between white: white alone is the gap between two pictures, grey a stretch without segment."""
    images = np.full((4, 20, 20, 3), 100, dtype=np.uint8)
    rows = {"dense": [("reach", 0, 14), ("grasp", 15, 29)]}
    picture = np.asarray(charts.annotated_episode(images, rows, {"dense": NAMES}, 40, 10, "episode 1"))
    middle, bar = picture[100], picture[-60]
    dark = np.flatnonzero((middle == 0).all(1))
    assert len(dark) and np.ptp(dark) < 4 and abs(dark.mean() - (64 + 15 / 40 * 1216)) < 3
    assert (middle[[dark.min() - 1, dark.max() + 1]] == 255).all()
    assert (bar[-20] == 0xDD).all()  # frames 30 to 39 belong to no segment


def test_subtasks_with_too_few_segments_to_judge_are_named_with_their_number():
    names = {"sparse": ["task"], "dense": NAMES}
    task = (Segment("task", 0, 39),)
    given = [Annotation(i, 40, "x", task, segments((0, 0), (1, 10), (2, 20))) for i in range(19)]
    given.append(Annotation(19, 40, "x", task, segments((0, 0), (1, 10))))
    assert agreement.too_few_to_judge(given, names) == ["dense 'lift' (19)"]
    assert agreement.too_few_to_judge(given[:1], {"dense": NAMES}) == [f"dense {name!r} (1)" for name in NAMES]
