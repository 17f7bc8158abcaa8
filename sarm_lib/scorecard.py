"""How good a reward model is on held-out episodes: every metric's formula, and its bootstrap interval over episodes.

With frames t = 1..T of an episode, predicted progress φ̂ and target progress φ:

mse_target_{head}       mean_t (φ̂_t - φ_t)²
mae_target_{head}       mean_t |φ̂_t - φ_t|
stage_accuracy_{head}   share of frames whose predicted stage is the target's
voc                     value-order correlation: Spearman's ρ between φ̂_t and t

An episode gives one value a metric. A group's figure is the mean over its episodes, `_low` and `_high` the 95 %
percentile interval of that mean when episodes are drawn with replacement. `time_linear` is the baseline that knows only
the clock, φ̂_t = (t - 1)/(T - 1): it has the best voc there is and, where the target is linear, no error at all.
"""

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

BOOTSTRAP, SEED, DIGITS = 2000, 0, 6


def episode_metrics(
    predicted: np.ndarray,
    target: np.ndarray,
    head: str,
    stage: np.ndarray | None = None,
    target_stage: np.ndarray | None = None,
) -> dict[str, float]:
    """Metrics of one episode from φ̂ (T,), φ (T,) and, where there are stages, k̂ (T,) and k (T,)."""
    error = predicted.astype(np.float64) - target
    metrics = {
        f"mse_target_{head}": float(np.mean(error**2)),
        f"mae_target_{head}": float(np.mean(np.abs(error))),
        "voc": value_order_correlation(predicted),
    }
    if stage is not None:
        metrics[f"stage_accuracy_{head}"] = float(np.mean(stage == target_stage))
    return metrics


def value_order_correlation(progress: np.ndarray) -> float:
    """Spearman's ρ of progress (T,) with time; 0 for a constant prediction."""
    if len(progress) < 2 or np.ptp(progress) == 0:
        return 0.0
    return float(spearmanr(progress, np.arange(len(progress))).statistic)


def time_linear(length: int) -> np.ndarray:
    """The clock as progress, (T,)."""
    return np.linspace(0, 1, length) if length > 1 else np.zeros(1)


def of_episodes(episodes, labels, heads: tuple[str, ...], scores: dict) -> dict[str, dict[str, dict[str, float]]]:
    """The card of `scores` ({(episode, head): Scores}) and of the clock: card[row][kind][metric]."""
    rows: dict[str, list[dict[str, float]]] = {"sarm": [], "time_linear": []}
    for episode in episodes:
        model, clock = {}, {}
        for head in heads:
            result, target = scores[episode.index, head], labels.progress(episode, head)
            stages = (
                (result.stage, labels.stage[head][episode.rows]) if len(labels.stage_names[head]) > 1 else (None, None)
            )
            model |= episode_metrics(result.progress, target, head, *stages)
            clock |= episode_metrics(time_linear(episode.length), target, head)
        rows["sarm"].append(model)
        rows["time_linear"].append(clock)
    groups = [episode.group for episode in episodes]
    return {row: summarise(metrics, groups) for row, metrics in rows.items()}


def summarise(metrics: list[dict[str, float]], groups: list[str]) -> dict[str, dict[str, float]]:
    """Per group and for `all`: each metric with `_low` and `_high`; `episodes` counts them."""
    card = {}
    for group in ["all", *sorted(set(groups) - {"all"})]:
        members = [m for m, g in zip(metrics, groups, strict=True) if group in ("all", g)]
        card[group] = {"episodes": len(members)}
        for name in members[0]:
            values = np.array([member[name] for member in members])
            low, high = bootstrap_interval(values)
            card[group] |= {name: round(float(values.mean()), DIGITS), f"{name}_low": low, f"{name}_high": high}
    return card


def table(card: dict, metrics: list[str]) -> pd.DataFrame:
    """A card as a table: a row a row and kind, the `metrics` as columns."""
    rows = [(row, kind, *(values[m] for m in metrics)) for row, kinds in card.items() for kind, values in kinds.items()]
    return pd.DataFrame(rows, columns=["row", "kind", *metrics]).round(4)


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of the mean of `values` (M,)."""
    draws = np.random.default_rng(SEED).integers(0, len(values), (BOOTSTRAP, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return round(float(low), DIGITS), round(float(high), DIGITS)
