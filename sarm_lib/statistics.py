"""Figures that several chapters share: rates and areas, and how sure one may be of them."""

import math

import numpy as np
from scipy.stats import rankdata

BOOTSTRAP = 10_000


def roc_auc(score: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive (bool (N,)) scores (N,) higher than a negative; ties count half. NaN
    where there are none of either."""
    above, below = int(positive.sum()), int((~positive).sum())
    if not above or not below:
        return math.nan
    return float((rankdata(score)[positive].sum() - above * (above + 1) / 2) / (above * below))


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    if not trials:
        return math.nan, math.nan
    rate, spread = successes / trials, z * z / trials
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> dict[str, float]:
    """How much more often `ours` succeeds than `theirs`, with a bootstrap 95 % interval.

    Both (K, N) bool: K training seeds, the same in both, by N starts, the same in both. Training seeds and starts are drawn
    with replacement, the same for both sides.
    """
    paired = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    trained, started = paired.shape
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(trained, np.full(trained, 1 / trained), BOOTSTRAP) / trained
    starts = rng.multinomial(started, np.full(started, 1 / started), BOOTSTRAP) / started
    low, high = np.percentile(np.einsum("dk,kn,dn->d", seeds, paired, starts, optimize=True), [2.5, 97.5])
    found = {"difference": paired.mean(), "difference_low": low, "difference_high": high}
    return {name: round(float(value), 6) for name, value in found.items()}
