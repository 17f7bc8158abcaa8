"""Stages and progress: Eq 1 (temporal proportions), the targets (k, τ) of a frame, and Eq 2 (progress).

    ᾱ_k = (1/M) Σ_i L_{i,k} / T_i                                                              Eq 1
    τ_t = (t - s_k) / (e_k - s_k)        y = k + τ        φ_t = P_{k-1} + ᾱ_k τ_t               Eq 2

A frame's stage k and its τ are kept apart: the sum y = k + τ cannot tell the last frame of a stage (τ = 1) from the
first of the next. LeRobot's `find_stage_and_tau` returns y; `targets` gives the same values before they are added.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from sarm_lib.annotations import Annotation, Segment
from sarm_lib.artifacts import digest
from sarm_lib.dataset import Episode


def targets(segments: tuple[Segment, ...], names: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Stage k (T,) int64 and within-stage progress τ (T,) float32 of each frame.

    Before the first segment τ = 0 of its stage; in a gap and after the last segment τ = 1 of the stage before. A segment
    of a single frame has τ = 1, and a subtask that recurs starts again at τ = 0. Raises KeyError for an unknown subtask
    (`annotations.validate` names it first).
    """
    index = {name: k for k, name in enumerate(names)}
    stage = np.full(length, index[segments[0].subtask], dtype=np.int64)
    tau = np.zeros(length, dtype=np.float32)
    for segment in segments:
        duration = segment.end - segment.start
        inside = np.arange(duration + 1)
        stage[segment.start :] = index[segment.subtask]
        tau[segment.start :] = 1.0
        tau[segment.start : segment.end + 1] = inside / duration if duration else 1.0
    return stage, tau


def given_up(segments: tuple[Segment, ...], names: list[str], length: int) -> np.ndarray:
    """Frames (T,) bool of segments that end without their subtask being done: a step back follows, or the episode's end.

    Their e_k is not the end of the subtask, so that Eq 2's clock says nothing about how far it came; where the last stage is
    the last segment it counts as done. Frames of a gap belong to the segment before it.
    """
    index, found = {name: k for k, name in enumerate(names)}, np.zeros(length, dtype=bool)
    following = [index[segment.subtask] for segment in segments[1:]] + [
        len(names) if segments[-1].subtask == names[-1] else -1
    ]
    for segment, after in zip(segments, following, strict=True):
        found[segment.start :] = after <= index[segment.subtask]
    return found


def complete(annotation: Annotation, stage_names: dict[str, list[str]]) -> bool:
    """Whether an episode shows every stage of every head and ends in the last one: it did the whole task."""
    shown = {head: [segment.subtask for segment in annotation.head(head) or ()] for head in stage_names}
    return all(set(shown[head]) == set(names) and shown[head][-1] == names[-1] for head, names in stage_names.items())


def counted(
    annotations: list[Annotation], stage_names: dict[str, list[str]], rule: str
) -> tuple[list[Annotation], str]:
    """The episodes whose ᾱ counts by `rule`, `complete` or `all`, and the rule in words; the same ones for every head.

    Where none is complete all count, and the words say so.
    """
    whole = [annotation for annotation in annotations if complete(annotation, stage_names)]
    if rule == "complete" and whole:
        return whole, "complete"
    return annotations, "all" if rule == "all" else "all, as none is complete"


def temporal_proportions(annotations: list[Annotation], head: str, names: list[str]) -> np.ndarray:
    """ᾱ (K,) by Eq 1 over M annotated episodes; an episode without stage k counts 0, a repeated one counts twice.

    The paper sums over all episodes, which all do the task. Where some fail, `counted` says over which: an episode that
    stops half-way would make the first stages larger than they are.
    """
    shares = []
    for annotation in annotations:
        segments = annotation.head(head)
        if segments is None:
            continue
        frames = np.zeros(len(names))
        for segment in segments:
            frames[names.index(segment.subtask)] += segment.end - segment.start + 1
        shares.append(frames / annotation.length)
    if not shares:
        raise ValueError(
            f"no episode with {head} annotations is there to count: annotate some training episodes (notebook 01), or, where "
            "all of them are rejected, take some rejections back (notebook 02)"
        )
    return np.mean(shares, axis=0)


def progress(stage: np.ndarray, tau: np.ndarray, proportions: np.ndarray) -> np.ndarray:
    """φ by Eq 2 in [0, 1], of the shape of `stage` and `tau`; `proportions` (K,) are scaled to sum to 1."""
    share = np.asarray(proportions, dtype=np.float64) / np.sum(proportions)
    before = np.concatenate([[0.0], np.cumsum(share)])[:-1]
    return np.clip(before[stage] + share[stage] * tau, 0.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class Labels:
    """Targets of every frame (N rows) by head, and what turns them into progress."""

    stage: dict[str, np.ndarray]  # (N,) int64
    tau: dict[str, np.ndarray]  # (N,) float32
    stage_names: dict[str, list[str]]
    proportions: dict[str, list[float]]
    annotated: frozenset[int]  # episodes
    given_up: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # (N,) bool, see `given_up`; none where a head is missing

    def progress(self, episode: Episode, head: str) -> np.ndarray:
        """Target φ of an episode, (T,) float32."""
        stage, tau = self.stage[head][episode.rows], self.tau[head][episode.rows]
        return progress(stage, tau, np.array(self.proportions[head]))

    @property
    def identity(self) -> str:
        """A name for these labels."""
        arrays = {head: [self.stage[head].tobytes().hex(), self.tau[head].tobytes().hex()] for head in self.stage}
        undone = {head: np.flatnonzero(frames).tolist() for head, frames in self.given_up.items()}
        return digest(arrays, self.stage_names, self.proportions, sorted(self.annotated), undone)


def drawn_out(labels: Labels, episodes: Sequence[Episode], factor: float) -> dict[str, np.ndarray]:
    """A head: (N,) bool, frames of segments that last more than `factor` times what their subtask usually takes.

    What it usually takes is the median over the training segments in which it was done. A much longer one holds a pause, a
    slip or a detour, and Eq 2's clock runs on through it: its τ says how much time went by and not how far the robot came.
    """
    found = {}
    for head, stage in labels.stage.items():
        undone = labels.given_up.get(head, np.zeros(len(stage), dtype=bool))
        usual: dict[int, list[int]] = {}
        segments = []
        for e in episodes:
            for rows, duration in _segments(stage[e.rows], labels.tau[head][e.rows], e.row):
                if e.index in labels.annotated:
                    segments.append((rows, duration))
                    if e.split == "train" and not undone[rows.start]:
                        usual.setdefault(stage[rows.start], []).append(duration)
        longest = {k: factor * np.median(durations) for k, durations in usual.items()}
        found[head] = np.zeros(len(stage), dtype=bool)
        for rows, duration in segments:
            found[head][rows] = duration > longest.get(stage[rows.start], np.inf)
    return found


def _segments(stage: np.ndarray, tau: np.ndarray, row: int) -> list[tuple[slice, int]]:
    """Segments of an episode from `row` on, given its targets (T,): the rows that take their stage from it, and its duration.

    A gap, and what follows the last segment, belongs to the segment before it and does not make it longer; nor does what
    precedes the first one.
    """
    edges, found = np.flatnonzero((np.diff(stage) != 0) | (np.diff(tau) < 0)) + 1, []
    for a, b in pairwise([0, *edges.tolist(), len(stage)]):
        end = int((tau[a:b] >= 1).argmax())
        start = max(int((tau[a:b] > 0).argmax()) - 1, 0)
        found.append((slice(row + a, row + b), end - start + 1))
    return found


def complete_episodes(labels: Labels, episodes: Sequence[Episode]) -> set[int]:
    """Annotated episodes that show every stage of every head and end in the last one: they did the whole task."""

    def whole(episode: Episode, head: str) -> bool:
        stage, count = labels.stage[head][episode.rows], len(labels.stage_names[head])
        return len(set(stage)) == count and stage[-1] == count - 1

    heads = list(labels.stage_names)
    return {e.index for e in episodes if e.index in labels.annotated and all(whole(e, head) for head in heads)}


def nesting(labels: Labels, episodes: Sequence[Episode]) -> np.ndarray:
    """The sparse stage that most annotated frames of each dense stage carry, (K_dense,) int64."""
    counts = np.zeros([len(labels.stage_names[head]) for head in ("dense", "sparse")], dtype=np.int64)
    for episode in episodes:
        if episode.index in labels.annotated:
            np.add.at(counts, (labels.stage["dense"][episode.rows], labels.stage["sparse"][episode.rows]), 1)
    return counts.argmax(1)
