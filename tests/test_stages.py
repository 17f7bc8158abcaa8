"""Eq 1, the targets and Eq 2: LeRobot's values where both define them, and what the equations promise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sarm_lib.annotations import Annotation, Segment
from sarm_lib.dataset import Episode
from sarm_lib.stages import Labels, counted, drawn_out, given_up, progress, targets, temporal_proportions

NAMES = ["reach", "grasp", "lift", "carry"]


@st.composite
def episodes(draw, repeats: bool = False):
    """Segments that neither touch nor leave gaps, over a whole episode."""
    names = (
        draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6)) if repeats else NAMES[: draw(st.integers(2, 4))]
    )
    lengths = [draw(st.integers(2, 30)) for _ in names]
    ends = np.cumsum(lengths)
    return tuple(Segment(n, int(e - k), int(e) - 1) for n, k, e in zip(names, lengths, ends, strict=True)), int(
        ends[-1]
    )


@given(episodes())
def test_targets_are_lerobot_s_before_they_are_added(episode):
    from lerobot.rewards.sarm.sarm_utils import find_stage_and_tau

    segments, length = episode
    columns = [[s.subtask for s in segments], [s.start for s in segments], [s.end for s in segments]]
    stage, tau = targets(segments, NAMES, length)
    theirs = [find_stage_and_tau(t, length, *columns, NAMES, {}) for t in range(length)]
    assert stage.tolist() == [k for k, _ in theirs]
    np.testing.assert_allclose(tau, [x for _, x in theirs], atol=1e-6)


@given(episodes(repeats=True))
def test_tau_runs_from_0_to_1_in_every_segment_also_in_a_repeated_one(episode):
    segments, length = episode
    stage, tau = targets(segments, NAMES, length)
    for s in segments:
        assert (stage[s.start : s.end + 1] == NAMES.index(s.subtask)).all()
        np.testing.assert_allclose(tau[s.start : s.end + 1], np.linspace(0, 1, s.end - s.start + 1), atol=1e-6)


def test_gaps_edges_and_single_frames():
    stage, tau = targets((Segment("grasp", 2, 4), Segment("lift", 7, 7)), NAMES, 10)
    assert stage.tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    assert tau.tolist() == [0, 0, 0, 0.5, 1, 1, 1, 1, 1, 1]


@given(st.lists(episodes(repeats=True), min_size=1, max_size=5))
def test_proportions_count_every_episode_and_every_repeat(drawn):
    annotations = [Annotation(i, length, "test", segments, None) for i, (segments, length) in enumerate(drawn)]
    shares = temporal_proportions(annotations, "sparse", NAMES)
    by_hand = [
        [sum(s.end - s.start + 1 for s in seg if s.subtask == n) / length for n in NAMES] for seg, length in drawn
    ]
    np.testing.assert_allclose(shares, np.mean(by_hand, axis=0))
    assert shares.sum() == pytest.approx(1)


def test_only_episodes_that_are_complete_in_every_head_count():
    """An episode may be complete in one head and stop short in the other."""
    names = {"sparse": ["pick", "place"], "dense": ["reach", "lift", "lower"]}

    def episode(index: int, dense: list[str]) -> Annotation:
        rows = tuple(Segment(name, 10 * i, 10 * i + 9) for i, name in enumerate(dense))
        sparse = (Segment("pick", 0, 9), Segment("place", 10, 10 * len(dense) - 1))
        return Annotation(index, 10 * len(dense), "test", sparse, rows)

    whole, failed = episode(0, ["reach", "lift", "reach", "lift", "lower"]), episode(1, ["reach", "lift"])
    undone = episode(2, ["reach", "lift", "lower", "reach"])
    assert counted([whole, failed, undone], names, "complete") == ([whole], "complete")
    assert counted([whole, failed], names, "all") == ([whole, failed], "all")
    assert counted([failed, undone], names, "complete") == ([failed, undone], "all, as none is complete")


@given(
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=8).map(np.array),
    positions=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.998)), min_size=1, max_size=20),
)
def test_progress_is_lerobot_s_and_rises_with_stage_and_tau(shares, positions):
    from lerobot.rewards.sarm.sarm_utils import normalize_stage_tau

    stage = np.array([min(int(k * len(shares)), len(shares) - 1) for k, _ in positions])
    tau = np.array([t for _, t in positions], dtype=np.float32)
    ours = progress(stage, tau, shares)
    theirs = normalize_stage_tau(torch.from_numpy(stage + tau), temporal_proportions=shares.tolist()).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    order = np.lexsort((tau, stage))
    assert (np.diff(ours[order]) >= -1e-6).all() and 0 <= ours.min() and ours.max() <= 1


def test_the_end_of_a_stage_is_the_start_of_the_next_and_the_last_ends_at_one():
    shares = np.array([0.2, 0.5, 0.3])
    np.testing.assert_allclose(progress(np.array([0, 1, 1, 2]), np.array([1.0, 0, 1, 1]), shares), [0.2, 0.2, 0.7, 1.0])


@pytest.mark.parametrize(
    ("shown", "undone"),
    [
        ("reach lift lower", ""),  # the whole task
        ("reach lift", "lift"),  # it ends before the last stage
        ("reach lift reach lift lower", "lift"),  # a step back: the first try
        ("reach lift lift lower", "lift"),  # tried again without a step back
        ("reach lift lower reach", "lower reach"),
        ("lift lower", ""),  # begins late
    ],
)
def test_a_try_that_is_given_up_is_known_by_what_follows(shown, undone):
    names = ["reach", "lift", "lower"]
    segments = tuple(Segment(name, 5 * i, 5 * i + 3) for i, name in enumerate(shown.split()))  # a gap of one frame each
    frames = given_up(segments, names, 5 * len(segments))
    by_segment = frames.reshape(-1, 5)
    assert (by_segment.all(1) | ~by_segment.any(1)).all(), "a gap belongs to the segment before it"
    assert " ".join(s.subtask for s, up in zip(segments, by_segment[:, 0], strict=True) if up) == undone


def test_a_drawn_out_segment_is_known_by_what_its_subtask_usually_takes():
    """By the training segments in which it was done alone: neither failed tries nor other splits say what is usual."""
    names = {"dense": ["reach", "lift"]}
    plans = [
        ("train", "reach 10 lift 6"),
        ("train", "reach 12 lift 6"),
        ("train", "reach 11 lift 10 reach 30 lift 6"),  # lift is tried in vain, and reach takes long then
        ("val", "reach 17 lift 9"),
        ("val", "reach 16 lift 10"),
        ("test", "reach 11 gap 20 lift 6 gap 20"),  # a gap makes no segment longer
        ("test", "reach 11 lift 5 lift 20 gap 3 lift 5"),  # one after the other, each of its own
        ("test", "reach 1 lift 1 gap 30"),
    ]
    # usual: 11.5 frames of reach, 6 of lift; so more than 17.25 and more than 9 are long
    long = {(2, "lift", 10), (2, "reach", 30), (4, "lift", 10), (6, "lift", 20)}
    episodes, targets_of, undone, expected = [], [], [], []
    for i, (split, plan) in enumerate(plans):
        shown, start, segments = plan.split(), 0, []
        for name, duration in zip(shown[::2], map(int, shown[1::2]), strict=True):
            if name != "gap":
                segments.append(Segment(name, start, start + duration - 1))
                this = (i, name, duration) in long
            start += duration
            expected += [this] * duration  # a gap has the stage of the segment before it
        row = len(expected) - start
        episodes.append(Episode(i, start, row, row, split, "all"))
        targets_of.append(targets(tuple(segments), names["dense"], start))
        undone.append(given_up(tuple(segments), names["dense"], start))
    stage, tau = map(np.concatenate, zip(*targets_of, strict=True))
    every, shares = frozenset(range(len(plans))), {"dense": [0.6, 0.4]}
    labels = Labels({"dense": stage}, {"dense": tau}, names, shares, every, {"dense": np.concatenate(undone)})
    np.testing.assert_array_equal(drawn_out(labels, episodes, 1.5)["dense"], expected)
