"""Stages and progress: Eq 1 (temporal proportions), the targets (k, τ) of a frame, and Eq 2 (progress).

    ᾱ_k = (1/M) Σ_i L_{i,k} / T_i                                                              Eq 1
    τ_t = (t - s_k) / (e_k - s_k)        y = k + τ        φ_t = P_{k-1} + ᾱ_k τ_t               Eq 2

A frame's stage k and its τ are kept apart: the sum y = k + τ cannot tell the last frame of a stage (τ = 1) from the
first of the next. LeRobot's `find_stage_and_tau` returns y; `targets` gives the same values before they are added.
"""

from dataclasses import dataclass

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


def complete(annotation: Annotation, head: str, names: list[str]) -> bool:
    """Whether an episode shows every stage and ends in the last one: it did the whole task."""
    shown = [segment.subtask for segment in annotation.head(head) or ()]
    return set(shown) == set(names) and shown[-1] == names[-1]


def temporal_proportions(annotations: list[Annotation], head: str, names: list[str]) -> np.ndarray:
    """ᾱ (K,) by Eq 1 over all M annotated episodes; an episode without stage k counts 0, a repeated one counts twice."""
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
        raise ValueError(f"no episode has {head} annotations: annotate some first (notebook 01)")
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

    def progress(self, episode: Episode, head: str) -> np.ndarray:
        """Target φ of an episode, (T,) float32."""
        stage, tau = self.stage[head][episode.rows], self.tau[head][episode.rows]
        return progress(stage, tau, np.array(self.proportions[head]))

    @property
    def identity(self) -> str:
        """A name for these labels."""
        arrays = {head: [self.stage[head].tobytes().hex(), self.tau[head].tobytes().hex()] for head in self.stage}
        return digest(arrays, self.stage_names, self.proportions, sorted(self.annotated))
