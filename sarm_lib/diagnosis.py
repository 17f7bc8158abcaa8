"""What RA-BC's weights say about a dataset: are they healthy, will they help, which episodes should a person watch.

Nothing here knows a simulator's truth but `detection`, which compares with it.
"""

import math
import shlex
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sarm_lib import rabc
from sarm_lib.dataset import Dataset, episode_table
from sarm_lib.rabc import RabcWeights
from sarm_lib.statistics import roc_auc

STALLED = 0.25  # of the mean r: below it a robot does not get on
BAD_STRETCH_SECONDS = 0.25  # shorter ones are noise
STEADY = "steady"  # nothing is wrong with an episode
ARRIVED = 0.95  # progress from which an episode counts as done
RISES = 0.5  # what most demonstrations gain from their first frame to their last
LITTLE_TO_GAIN = 0.03  # share of frames in bad stretches below which there is nothing to filter
QUALITY = {"productive": (0,), "recovering": (2,), "bad": (1, 3)}  # values of a simulator's `quality` column


def warnings(statistics: dict[str, float | int], longest: int) -> list[str]:
    """The guide's table of symptoms, in words; empty for a healthy weighting (mean weight in `rabc.HEALTHY`). longest: frames of the
    longest episode that is learned from."""
    found = []
    if statistics["delta_frames"] >= longest:
        found.append(
            f"Δ is {statistics['delta_frames']} frames and no training episode has more than {longest}: no frame has another one so far "
            "behind it, and weights go by what an episode gains to its end; lower rabc.delta_frames"
        )
    if statistics["kappa"] < 0:
        found.append("κ below 0: frames that lose progress count in full; set rabc.kappa to 0 or more")
    if statistics["delta_mean"] <= 0:
        found.append("delta mean ≤ 0: predicted progress does not rise; look at the reward model (notebook 04) first")
    if statistics["delta_std"] < 1e-6:
        found.append("delta std ≈ 0: every frame looks alike, so there is nothing to weight")
    if statistics["mean_weight"] > 0.95:
        found.append(
            "mean weight ≈ 1: κ is too low and RA-BC is plain behaviour cloning; raise rabc.kappa towards delta mean"
        )
    elif statistics["mean_weight"] > rabc.HEALTHY[1]:
        found.append("mean weight above 0.8: RA-BC changes little; raise rabc.kappa towards delta mean + delta std")
    elif statistics["mean_weight"] < rabc.HEALTHY[0]:
        found.append(
            "mean weight below 0.3: few frames are left to learn from; lower rabc.kappa, or another Δ where none helps"
        )
    return found


def kappa_table(weights: RabcWeights, train: list[int], chosen: float | str, fps: float) -> pd.DataFrame:
    """What every rule for κ, and less than the rules give, would do to the frames of `train`: κ, mean weight, shares of weight
    0 and 1, and the mean weight in and outside of bad stretches: the more they differ, the more is filtered."""
    rows = np.concatenate(_episodes(weights, train))
    bad = np.concatenate([_in_stretches(weights, mine, fps) for mine in _episodes(weights, train)])
    known = np.isfinite(weights.delta[rows])  # LeRobot's file may say nothing of a frame
    delta, bad, statistics = weights.delta[rows][known], bad[known], (weights.delta_mean, weights.delta_std)
    names, judged = ("mean", "mean+std", "mean+2std", "mean_weight=0.5", "quantile=0.6"), weights.judged(train)
    rules = {rule: rabc.kappa_of(rule, judged, *statistics, weights.epsilon) for rule in names}
    rules[str(chosen)] = weights.kappa
    less, table = {"0": 0.0, "mean / 4": weights.delta_mean / 4, "mean / 2": weights.delta_mean / 2}, {}
    for rule, kappa in ((less if weights.delta_mean > 0 else {}) | rules).items():
        weight = rabc.weights(delta, *statistics, kappa, weights.epsilon)
        table[f"{rule} (in use)" if rule == str(chosen) else rule] = {
            "κ": kappa,
            "mean weight": weight.mean(),
            "weight 0": (weight == 0).mean(),
            "weight 1": (weight == 1).mean(),
            "in bad stretches": weight[bad].mean() if bad.any() else math.nan,
            "elsewhere": weight[~bad].mean(),
        }
    return pd.DataFrame(table).T


@dataclass(frozen=True)
class Verdict:
    """Whether RA-BC is likely to help, and why."""

    likely: bool
    because: str

    def __str__(self) -> str:
        return f"RA-BC is {'likely' if self.likely else 'unlikely'} to help here: {self.because}"


def verdict(weights: RabcWeights, phi: np.ndarray, train: list[int], fps: float) -> Verdict:
    """Is there something to filter, and does φ (N,) behave like progress? Judged on the frames of `train`, without any truth.

    Weights and bad stretches both come from φ: whether it is right about the frames, no figure of it can say.
    """
    statistics = weights.statistics(train)
    if statistics["delta_mean"] <= 0 or statistics["delta_std"] < 1e-6:
        return Verdict(False, "predicted progress does not rise, so the reward model says nothing about frames")
    if statistics["mean_weight"] > 0.95:
        return Verdict(False, f"κ = {weights.kappa:.3g} lets {statistics['mean_weight']:.0%} through; raise it first")
    gains = np.array([phi[rows[-1]] - phi[rows[0]] for rows in _episodes(weights, train)])
    if (rising := (gains > RISES).mean()) < 0.5:
        return Verdict(
            False,
            f"predicted progress rises by {RISES} or more in {rising:.0%} of the training episodes only: demonstrations come "
            "further than that, so look at the reward model first (notebook 04)",
        )
    mine = np.isin(weights.episode_index, train)
    bad = np.concatenate([_in_stretches(weights, rows, fps) for rows in _episodes(weights, train)])
    share, weight = bad.mean(), weights.weight[mine]
    if share < LITTLE_TO_GAIN:
        return Verdict(
            False,
            f"only {share:.1%} of the training frames stand still or go back for {BAD_STRETCH_SECONDS} s or more: these "
            "demonstrations are consistent, and there is little to filter",
        )
    kept = weight[~bad].mean()
    return Verdict(
        True,
        f"{share:.0%} of the training frames stand still or go back for {BAD_STRETCH_SECONDS} s or more; their mean weight is "
        f"{weight[bad].mean():.2f}, that of the others {kept:.2f}. Provided that φ is right about them: look at the "
        "frames below",
    )


def _episodes(weights: RabcWeights, episodes: list[int]) -> list[np.ndarray]:
    """Rows of the weights, an array an episode."""
    starts = np.flatnonzero(np.r_[True, np.diff(weights.episode_index) != 0])
    ends = np.r_[starts[1:], len(weights.episode_index)]
    wanted = set(episodes)
    return [np.arange(a, b) for a, b in zip(starts, ends, strict=True) if weights.episode_index[a] in wanted]


def stretches(mask: np.ndarray, shortest: int) -> list[tuple[int, int]]:
    """First and last index of every run of True of at least so many."""
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False]))
    return [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= shortest]


def _in_stretches(weights: RabcWeights, rows: np.ndarray, fps: float) -> np.ndarray:
    """Which frames of an episode (T,) are in a bad stretch."""
    found = np.zeros(len(rows), dtype=bool)
    slow = weights.delta[rows] < STALLED * weights.delta_mean
    for first, last in stretches(slow, math.ceil(BAD_STRETCH_SECONDS * fps)):
        found[first : last + 1] = True
    return found


def ranking(weights: RabcWeights, dataset: Dataset, episodes: list[int], phi: np.ndarray) -> pd.DataFrame:
    """Episodes by mean weight, the worst first: which to watch, and why. phi (N,): progress in the order of `weights`.

    Columns: episode, group, seconds, mean_weight, weight_0 (share), stalled (share in bad stretches), final_progress, why.
    """
    table = episode_table(dataset).set_index("episode")
    rows = []
    for mine in _episodes(weights, episodes):
        episode, bad = int(weights.episode_index[mine[0]]), _in_stretches(weights, mine, dataset.fps)
        rows.append(
            {
                "episode": episode,
                "group": table.group[episode],
                "seconds": round(len(mine) / dataset.fps, 2),
                "mean_weight": round(float(weights.weight[mine].mean()), 4),
                "weight_0": round(float((weights.weight[mine] == 0).mean()), 4),
                "stalled": round(float(bad.mean()), 4),
                "final_progress": round(float(phi[mine[-1]]), 4),
                "why": _why(weights, mine, bad, phi, dataset.fps),
            }
        )
    return pd.DataFrame(rows).sort_values(["mean_weight", "episode"], ignore_index=True)


def _why(weights: RabcWeights, rows: np.ndarray, bad: np.ndarray, phi: np.ndarray, fps: float) -> str:
    said = []
    for first, last in stretches(bad, 1):
        change = float(phi[rows[min(last + weights.delta_frames, len(rows) - 1)]] - phi[rows[first]])
        if phi[rows[first]] >= ARRIVED and change >= -0.02:  # what is done gains nothing more
            continue
        what = "goes back" if change < -0.02 else "stands still"
        said.append(f"{what} at {first / fps:.1f}-{(last + 1) / fps:.1f} s ({change:+.2f})")
    if phi[rows[-1]] < 0.9:
        said.append(f"ends at {phi[rows[-1]]:.2f}")
    return "; ".join(said) or STEADY


def worth_leaving_out(ranking: pd.DataFrame, share: float = 0.1) -> list[int]:
    """The worst episodes of a `ranking` that something is wrong with, a `share` of them at most."""
    worst = ranking.head(round(share * len(ranking)))
    return worst[worst.why != STEADY].episode.tolist()


def delete_command(dataset: Dataset, episodes: list[int], folder: str | None = None) -> str:
    """LeRobot's command that writes the dataset without these episodes. folder: of a local dataset, beside which the copy
    goes; without it, into LeRobot's cache."""
    repo_id, quoted = dataset.lerobot_metadata.repo_id, shlex.quote
    root = f"--root={quoted(folder)} --new_root={quoted(f'{folder}_filtered')} " if folder else ""
    return (
        f"lerobot-edit-dataset --repo_id={repo_id} {root}--new_repo_id={repo_id}_filtered --operation.type=delete_episodes "
        f"--operation.episode_indices='{sorted(episodes)}'"
    )


def extremes(
    weights: RabcWeights, episodes: list[int], phi: np.ndarray, count: int, stages: dict[str, float] | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames that lose and gain most in Δ, one an episode: `episode`, `frame`, `later` (Δ on, within the episode),
    `delta`, `weight` and the reason. stages: ᾱ of the stages that φ is made of, by name and in order, if they are known."""
    lightest, heaviest = [], []
    names, edges = list(stages or {}), np.cumsum(list((stages or {}).values()))[:-1]
    for rows in _episodes(weights, episodes):
        whole = rows[: max(1, len(rows) - weights.delta_frames)]  # the frames behind share the last full window
        whole = whole[np.isfinite(weights.delta[whole])]  # LeRobot's file may say nothing of a frame
        if not len(whole):
            continue
        for kept, row in (
            (lightest, whole[weights.delta[whole].argmin()]),
            (heaviest, whole[weights.delta[whole].argmax()]),
        ):
            later = min(row + weights.delta_frames, rows[-1])
            kept.append(
                {
                    "episode": int(weights.episode_index[row]),
                    "frame": int(weights.frame_index[row]),
                    "later": int(weights.frame_index[later]),
                    "delta": float(weights.delta[row]),
                    "weight": float(weights.weight[row]),
                    "why": _gain(phi[row], phi[later], names, edges),
                }
            )
    columns = ["episode", "frame", "later", "delta", "weight", "why"]
    light, heavy = (
        pd.DataFrame(kept, columns=columns).sort_values("delta", ignore_index=True) for kept in (lightest, heaviest)
    )
    return light.head(count), heavy.iloc[::-1].head(count).reset_index(drop=True)


def _gain(before: float, after: float, stages: list[str], edges: np.ndarray) -> str:
    """What becomes of φ, in words, with the stages that it lies in (Eq 2 read backwards) where there are several."""
    said = f"progress {before:.2f} to {after:.2f}"
    if len(stages) < 2:
        return said
    first, last = (stages[int(np.searchsorted(edges, phi, side="right"))] for phi in (before, after))
    return f"{said}, in {first!r}" if first == last else f"{said}, from {first!r} to {last!r}"


def detection(weights: RabcWeights, quality: np.ndarray, groups: np.ndarray) -> pd.DataFrame:
    """How well low weight finds bad frames, all together and by group: a simulator's `quality` (N,) and group (N,) of the
    weights' frames.

    Bad is what was injected or dead, held against productive frames; recovery makes progress and stands apart.
    auc_delta, auc_weight: ROC area of r and of w; zero_precision, zero_recall: of weight 0; zero_recovering: its share of the recovering frames; weight_*: mean weights. Raises
    ValueError for a quality that `QUALITY` does not name.
    """
    unknown = set(np.unique(quality)) - {value for values in QUALITY.values() for value in values}
    if unknown:
        raise ValueError(
            f"base.truth_prefix: quality has values {', '.join(f'{v:g}' for v in sorted(unknown))}; 0 is productive, 1 injected, 2 "
            "recovering, 3 dead. Set base.truth_prefix to null if the column means something else"
        )
    rows = {}
    for group in ["all", *sorted(set(groups.tolist()))]:
        mine = np.ones(len(groups), dtype=bool) if group == "all" else groups == group
        label = {name: mine & np.isin(quality, values) for name, values in QUALITY.items()}
        judged = label["productive"] | label["bad"]
        good, zero, recovering = label["productive"][judged], weights.weight[judged] == 0, label["recovering"]
        row = {
            "frames": int(mine.sum()),
            "bad": int(label["bad"].sum()),
            "auc_delta": roc_auc(weights.delta[judged], good),
            "auc_weight": roc_auc(weights.weight[judged], good),
            "zero_precision": float((~good)[zero].mean()) if zero.any() else math.nan,
            "zero_recall": float(zero[~good].mean()) if (~good).any() else math.nan,
            "zero_recovering": float((weights.weight[recovering] == 0).mean()) if recovering.any() else math.nan,
        }
        row |= {f"weight_{n}": float(weights.weight[m].mean()) if m.any() else math.nan for n, m in label.items()}
        rows[group] = row
    return pd.DataFrame(rows).T


def figures(table: pd.DataFrame) -> dict[str, dict[str, float]]:
    """A table of figures as JSON has it: rounded, without what is not there."""
    return {
        str(name): {key: round(float(value), 4) for key, value in row.items() if not pd.isna(value)}
        for name, row in table.iterrows()
    }
