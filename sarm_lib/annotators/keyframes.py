"""Boundaries from the robot's own signals, without a model and without marks.

A subtask ends where the motion changes: the robot stops or turns, the gripper opens, closes or meets something. Peaks
of that change are the *keyframes* of an episode. The pieces between them are aligned to the ordered vocabulary over all
training episodes together: each subtask is a Gaussian over states and velocities, subtasks follow each other as in a
hidden Markov model (back steps included), and both are fitted in turns. The shortest quarter of the episodes starts, cut
into equal parts of the way that the robot covers, because they waste the least time. Heads are fitted apart and decoded
together: each dense subtask is a part of one sparse subtask, so that the two never contradict each other.

Nothing tells this annotator what the names mean; it only knows their order. Check it against a few marked episodes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.signal import find_peaks

from sarm_lib.agreement import frame_labels, segments_of
from sarm_lib.annotations import SINGLE_STAGE, Annotation, AnnotationError, whole_episode
from sarm_lib.annotators.sequences import Chain, about, best_path, chain, standardised, velocity
from sarm_lib.artifacts import code_digest, digest
from sarm_lib.dataset import Dataset, Episode, rows_of

REACH = 0.1  # seconds before and after a frame over which motion is compared
SHORTEST = 0.1  # seconds between keyframes
PROMINENCE = 0.5  # of a peak, in standard deviations of the change signal
ROUNDS = 15
FITTED = 1e4  # frames a second on one core, for the estimate
FLOOR = 0.1  # least standard deviation of a Gaussian, in standardised units


class KeyframeAnnotator:
    """Annotates any dataset with states. Raises AnnotationError where every training episode is too short for the
    vocabulary, or the states stand still in all of them."""

    def __init__(self, dataset: Dataset, vocabulary: dict[str, list[str]]) -> None:
        self.dataset, self.vocabulary = dataset, vocabulary
        self.identity = {
            "annotator": "keyframes",
            "code": code_digest("annotators.keyframes"),
            "state_key": dataset.state_key,
            "training": digest([episode.index for episode in dataset.split("train")]),
        }

    def estimate(self, episodes: Sequence[Episode]) -> str:
        """How long it will take, roughly."""
        return about(self.dataset.num_frames / FITTED)

    def annotate(self, episodes: Sequence[Episode]) -> Iterator[Annotation]:
        """Fit each head on the training episodes, then decode every episode."""
        signals = motion(self.dataset)
        asked = [head for head, names in self.vocabulary.items() if names != [SINGLE_STAGE]]
        asked.sort(key=lambda head: len(self.vocabulary[head]), reverse=True)  # the finest first
        fitted = {head: self._fit(self.vocabulary[head], signals) for head in asked}
        part_of = self._parts(fitted, signals) if fitted else {}
        for episode in episodes:
            segments = {head: whole_episode(episode) for head in self.vocabulary}
            if asked:
                given = signals[episode.rows]
                evidence = sum(fitted[head].likelihood(given)[:, parts] for head, parts in part_of.items())
                labels = _decode(evidence, keyframes(given, self.dataset.fps), fitted[asked[0]].model)
                finest = self.vocabulary[asked[0]]
                labels = frame_labels(segments_of(labels, finest, shortest=2), finest, episode.length)
                for head, parts in part_of.items():
                    segments[head] = segments_of(parts[labels], self.vocabulary[head])
            yield Annotation(episode.index, episode.length, "keyframes", segments.get("sparse"), segments.get("dense"))

    def _parts(self, fitted: "dict[str, Fitted]", signals: np.ndarray) -> dict[str, np.ndarray]:
        """Head: the subtask (K,) of it that each of the K finest subtasks is a part of, by the frames of training episodes."""
        labels: dict[str, list[np.ndarray]] = {head: [] for head in fitted}
        for episode in self.dataset.split("train"):
            given = signals[episode.rows]
            cuts = keyframes(given, self.dataset.fps)
            for head, fit in fitted.items():
                labels[head].append(_decode(fit.likelihood(given), cuts, fit.model))
        finest, found = next(iter(fitted)), {}
        for head in fitted:
            together = np.zeros([len(self.vocabulary[h]) for h in (finest, head)])
            np.add.at(together, (np.concatenate(labels[finest]), np.concatenate(labels[head])), 1)
            found[head] = in_runs(together)
        return found

    def _fit(self, names: list[str], signals: np.ndarray) -> "Fitted":
        """A head's subtasks, in turns with the labels."""
        count = len(names)
        order = np.arange(count)
        training = [e for e in self.dataset.split("train") if e.length >= 2 * count]  # others cannot show every subtask
        if not training:
            raise AnnotationError(
                f"keyframes: no training episode has {2 * count} frames, which {count} subtasks need; use fewer names"
            )
        if not any(np.ptp(signals[e.rows], axis=0).any() for e in training):
            raise AnnotationError(
                f"keyframes: {self.dataset.state_key} is the same in every frame of each training episode; set base.state_key "
                "to the robot's state, or take another annotator"
            )
        short = sorted(training, key=lambda e: e.length)[: max(1, len(training) // 4)]
        pieces = {e.index: (signals[e.rows], keyframes(signals[e.rows], self.dataset.fps)) for e in training}
        used, labels = short, [_equal_parts(signals[e.rows], count) for e in short]
        model = chain([], order)
        for turn in range(ROUNDS):
            frames = np.concatenate([signals[e.rows] for e in used])
            fit = Fitted(model, *_gaussians(frames, np.concatenate(labels), count))
            used = short if turn < ROUNDS // 3 else training
            labels = [_decode(fit.likelihood(given), cuts, model) for given, cuts in (pieces[e.index] for e in used)]
            model = chain(labels, order)
        return Fitted(model, fit.means, fit.spreads)


@dataclass(frozen=True)
class Fitted:
    """A head's K subtasks: how they follow each other, means (K, D) and standard deviations (K, D)."""

    model: Chain
    means: np.ndarray
    spreads: np.ndarray

    def likelihood(self, signals: np.ndarray) -> np.ndarray:
        """Log-likelihood of every frame of (T, D) by each subtask, (T, K)."""
        z = (signals[:, None, :] - self.means) / self.spreads
        return -0.5 * (z**2).sum(-1) - np.log(self.spreads).sum(-1)


def motion(dataset: Dataset) -> np.ndarray:
    """(N, 2 D) states and their velocities, standardised over the training frames."""
    rows = rows_of(dataset.split("train"))
    states = standardised(dataset.states.astype(np.float64), rows)
    return np.concatenate([states, standardised(velocity(dataset, states), rows)], axis=1)


def keyframes(signals: np.ndarray, fps: float) -> np.ndarray:
    """Frames of an episode at which its motion (T, 2 D) changes most, ascending, without 0."""
    reach = max(1, round(REACH * fps))
    moving = signals[:, signals.shape[1] // 2 :]
    length = len(moving)
    total = np.concatenate([np.zeros((1, moving.shape[1])), np.cumsum(moving, axis=0)])
    at = np.arange(length)
    before, after = np.maximum(at - reach, 0), np.minimum(at + reach, length)
    past = (total[at] - total[before]) / np.maximum(at - before, 1)[:, None]
    future = (total[after] - total[at]) / np.maximum(after - at, 1)[:, None]
    change = np.linalg.norm(future - past, axis=1)
    change[0] = 0
    peaks, _ = find_peaks(change, distance=max(2, round(SHORTEST * fps)), prominence=PROMINENCE * change.std())
    return peaks


def _equal_parts(signals: np.ndarray, count: int) -> np.ndarray:
    """Labels that cut the way which the robot covers into equal parts, (T,)."""
    way = np.cumsum(np.linalg.norm(signals[:, signals.shape[1] // 2 :], axis=1))
    way = way if way[-1] else np.arange(1, len(way) + 1)  # a robot that stands still: equal times
    return np.minimum((way / way[-1] * count).astype(np.int64), count - 1)


def _gaussians(frames: np.ndarray, states: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    means, spreads = np.zeros((count, frames.shape[1])), np.ones((count, frames.shape[1]))
    for k in range(count):
        if (states == k).sum() > 1:  # a subtask that nothing was given to keeps the whole data's spread
            means[k], spreads[k] = frames[states == k].mean(0), np.maximum(frames[states == k].std(0), FLOOR)
    return means, spreads


def _decode(likelihood: np.ndarray, cuts: np.ndarray, model: Chain) -> np.ndarray:
    """Label of every frame (T,) by its log-likelihood (T, K), constant between keyframes."""
    starts = np.concatenate([[0], cuts])
    piece = np.add.reduceat(likelihood, starts, axis=0)
    lengths = np.diff(np.concatenate([starts, [len(likelihood)]]))
    return np.repeat(best_path(piece, model), lengths)


def in_runs(together: np.ndarray) -> np.ndarray:
    """(K,) ascending, from 0 to C - 1 without a gap: which of C coarse subtasks each of K fine ones (K >= C) belongs to, so that
    the most of the frames that the two share, `together` (K, C), lie where they belong."""
    fine, coarse = together.shape
    shared = np.concatenate([np.zeros((1, coarse)), together.cumsum(0)])  # of the first k fine ones
    best, begin = np.full((coarse + 1, fine + 1), -np.inf), np.zeros((coarse + 1, fine + 1), dtype=np.int64)
    best[0, 0] = 0
    for c in range(coarse):
        for end in range(c + 1, fine + 1):
            gain = best[c, :end] + shared[end, c] - shared[:end, c]
            begin[c + 1, end], best[c + 1, end] = gain.argmax(), gain.max()
    found, end = np.zeros(fine, dtype=np.int64), fine
    for c in reversed(range(coarse)):
        found[begin[c + 1, end] : end] = c
        end = begin[c + 1, end]
    return found
