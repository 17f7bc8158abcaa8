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


def _bonett_price(won: int, lost: int, pairs: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of the difference of two paired rates (Bonett and Price 2012, adjusted Wald): `won` pairs in which only
    the first succeeds, `lost` in which only the second does."""
    first, second = (won + 1) / (pairs + 2), (lost + 1) / (pairs + 2)
    half = z * math.sqrt((first + second - (first - second) ** 2) / (pairs + 2))
    return max(-1.0, first - second - half), min(1.0, first - second + half)


def paired_difference(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> dict[str, float]:
    """How much more often `ours` succeeds than `theirs`, with a 95 % interval.

    Both (K, N) bool: K training seeds, the same in both, by N starts, the same in both. The interval is by bootstrap:
    training seeds and starts are drawn with replacement, the same for both sides. With one training seed it is over starts
    alone, by Bonett and Price's adjusted Wald: few starts on which both do the same would leave a bootstrap no width at all.
    """
    paired = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    trained, started = paired.shape
    if trained == 1:
        low, high = _bonett_price(int((paired > 0).sum()), int((paired < 0).sum()), started)
        return _rounded(paired.mean(), low, high)
    rng = np.random.default_rng(seed)
    seeds = rng.multinomial(trained, np.full(trained, 1 / trained), BOOTSTRAP) / trained
    starts = rng.multinomial(started, np.full(started, 1 / started), BOOTSTRAP) / started
    low, high = np.percentile(np.einsum("dk,kn,dn->d", seeds, paired, starts, optimize=True), [2.5, 97.5])
    return _rounded(paired.mean(), low, high)


def _rounded(difference: float, low: float, high: float) -> dict[str, float]:
    found = {"difference": difference, "difference_low": low, "difference_high": high}
    return {name: round(float(value), 6) for name, value in found.items()}
