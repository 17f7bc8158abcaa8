"""Decoding a sequence of frames into subtasks: features, the order in which subtasks follow each other, the best path.

Subtasks follow each other as in a hidden Markov model: most often on to the next one, sometimes back to an earlier one
(the robot failed and tries again), hardly ever past one.
"""

from dataclasses import dataclass

import numpy as np

from sarm_lib.dataset import Dataset

NEXT, BACK, SKIP = 1.0, 0.25, 0.02  # pseudo-counts of what may follow a subtask, beside what was seen


@dataclass(frozen=True)
class Chain:
    """log_start (K,) and log_transition (K, K), [from, to]."""

    log_start: np.ndarray
    log_transition: np.ndarray


def chain(labelled: list[np.ndarray], order: np.ndarray) -> Chain:
    """A chain of K states from label sequences, each (T,) int; `order` (K,) ranks the states by the vocabulary."""
    count = len(order)
    seen, starts = np.zeros((count, count)), np.full(count, SKIP)
    starts[np.argmin(order)] += NEXT
    for labels in labelled:
        np.add.at(seen, (labels[:-1], labels[1:]), 1)
        starts[labels[0]] += 1
    step = order[None, :] - order[:, None]
    prior = np.where(step == 1, NEXT, np.where(step < 0, BACK, SKIP))
    np.fill_diagonal(prior, NEXT)
    transition = seen + prior
    return Chain(np.log(starts / starts.sum()), np.log(transition / transition.sum(1, keepdims=True)))


def best_path(log_likelihood: np.ndarray, model: Chain) -> np.ndarray:
    """The most likely states of (T, K) log-likelihoods: (T,) int (Viterbi)."""
    length, count = log_likelihood.shape
    origin = np.zeros((length, count), dtype=np.int64)
    score = model.log_start + log_likelihood[0]
    for t in range(1, length):
        reached = score[:, None] + model.log_transition
        origin[t] = reached.argmax(0)
        score = reached.max(0) + log_likelihood[t]
    path = [int(score.argmax())]
    for t in range(length - 1, 0, -1):
        path.append(int(origin[t, path[-1]]))
    return np.array(path[::-1])


def entries(log_likelihood: np.ndarray, model: Chain) -> np.ndarray:
    """Probability that state k begins at frame t, coming from another state: (T, K) (forward-backward)."""
    length, count = log_likelihood.shape
    forward, backward = np.zeros((length, count)), np.zeros((length, count))
    logsum = np.logaddexp.reduce  # scipy's takes fifteen times as long on so few states
    forward[0] = model.log_start + log_likelihood[0]
    for t in range(1, length):
        forward[t] = logsum(forward[t - 1][:, None] + model.log_transition, axis=0) + log_likelihood[t]
    for t in range(length - 2, -1, -1):
        backward[t] = logsum(model.log_transition + log_likelihood[t + 1] + backward[t + 1], axis=1)
    total = logsum(forward[-1])
    begin = np.zeros((length, count))
    begin[0] = np.exp(forward[0] + backward[0] - total)
    others = model.log_transition.copy()
    np.fill_diagonal(others, -np.inf)
    from_others = logsum(forward[:-1, :, None] + others, axis=1)
    begin[1:] = np.exp(from_others + log_likelihood[1:] + backward[1:] - total)
    return begin


def standardised(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(N, D) with zero mean and unit spread over `rows`; what does not vary is 0."""
    spread = values[rows].std(0)
    return (values - values[rows].mean(0)) / np.where(spread > 1e-8, spread, np.inf)


def velocity(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Change a frame of (N, D) values, within each episode."""
    change = np.zeros_like(values)
    for episode in dataset.episodes:
        if episode.length > 1:
            change[episode.rows] = np.gradient(values[episode.rows], axis=0)
    return change


def about(seconds: float) -> str:
    """How long something on one core takes, roughly."""
    return "seconds, no GPU" if seconds < 45 else f"about {max(1, round(seconds / 60))} min on one core, no GPU"
