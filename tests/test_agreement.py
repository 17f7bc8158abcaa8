"""Comparing annotations: what is identical agrees, what is shifted is off by the shift, a retry is a step back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm_lib import agreement
from sarm_lib.annotations import Annotation, Finding, Segment

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
    table = agreement.suspicion([sure, unsure, marked], [doubt], [other], {"sparse": NAMES})
    assert table.index.tolist() == [2, 1, 3] and table.score.tolist() == [0.95, 0.5, 0.0]
    assert "confidence 0.30" in table.why[2] and "keyframes sees 25%" in table.why[2] and "usual are 4" in table.why[1]
