"""What a figure shows, said in a sentence by the numbers it was drawn from."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from sarm_lib.statistics import roc_auc

FEW = 5  # rollouts of one outcome: with fewer, how well it is told from the other is not known


def confused(shares: pd.DataFrame) -> str:
    """Of shares of frames by stage (rows) and by what was said (columns): the hardest stage, and what it is taken for."""
    own = pd.Series({name: shares.loc[name, name] for name in shares.index if shares.loc[name].sum() > 0})
    if own.empty:
        return "no frames to tell stages by"
    if own.min() == 1:
        return "no frame of any stage is taken for another"
    hardest = own.idxmin()
    others = shares.loc[hardest].drop(hardest)
    said = f"hardest: {hardest!r}, {own[hardest]:.0%} of its frames recognised"
    if len(others) and others.max() > 0:
        said += f", {others.max():.0%} taken for {others.idxmax()!r}"
    return said + (f"; easiest: {own.idxmax()!r} ({own.max():.0%})" if len(own) > 1 else "")


def extremes(values: Mapping[str, float] | pd.Series, what: str, digits: int = 3) -> str:
    """The highest and the lowest of named values."""
    values = pd.Series(values, dtype=float).dropna()
    if values.empty:
        return f"no {what} to compare"
    ends = [
        f"{word} {what}: {name} ({values[name]:.{digits}f})"
        for word, name in (("highest", values.idxmax()), ("lowest", values.idxmin()))
    ]
    return "; ".join(ends if len(values) > 1 else [f"{what}: {values.index[0]} ({values.iloc[0]:.{digits}f})"])


def suspicion(correlation: float | None) -> str:
    """Of the rank correlation of suspicion with the share of frames that are wrong: may one rely on it?"""
    if correlation is None:
        return "rank correlation: there is nothing to compare with"
    helps = (
        "the suspicious are worth a look first"
        if correlation >= 0.3
        else "too little to rely on: look by kind of episode"
    )
    return f"rank correlation: {correlation}: {helps}"


def soft_weights(weight: np.ndarray) -> str:
    """Where the weights (N,) of frames that are neither dropped nor counted in full lie."""
    soft = weight[(weight > 0) & (weight < 1)]
    if not len(soft):
        return "no weight lies between 0 and 1"
    return (
        f"those between have weights from {soft.min():.2f} to {soft.max():.2f}; the mean of all is {weight.mean():.2f}"
    )


def detection(row: Mapping[str, float]) -> str:
    """Of a row of `diagnosis.detection`: what the weights do to bad frames, and what they let through."""
    if not row["bad"]:
        return "the simulator calls no frame bad"
    zero = f"weight 0 falls on {row['zero_recall']:.0%} of the bad ones and is right in {row['zero_precision']:.0%}"
    return (
        f"the simulator calls {row['bad'] / row['frames']:.0%} of these frames bad: their mean weight is {row['weight_bad']:.2f}, that "
        f"of productive ones {row['weight_productive']:.2f}; {zero if row['zero_recall'] else 'weight 0 falls on none of the bad ones'}"
    )


def final_progress(final: np.ndarray, succeeded: np.ndarray, high: float = 0.9) -> str:
    """Of the last φ (n,) of rollouts and whether they succeeded (n,): does the reward model tell them apart?"""
    if succeeded.all() or not succeeded.any():
        return f"all {len(final)} rollouts ended alike: there is nothing to tell apart"
    said = (
        f"final progress against true success: ROC area {roc_auc(final, succeeded):.3f} ({succeeded.sum()} succeeded, "
        f"{(~succeeded).sum()} failed, and {(final[~succeeded] > high).sum()} of these end above {high})"
    )
    return said + (". So few of one kind say little" if min(succeeded.sum(), (~succeeded).sum()) < FEW else "")
