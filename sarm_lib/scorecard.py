"""How good a reward model is on held-out episodes: every metric's formula, and its bootstrap interval over episodes.

Of an episode with frames t = 1..T: predicted progress φ̂, stage k̂ and its probability p̂; progress φ* of the annotations'
targets; progress φ and stage k of the truth where a simulator gives them, of the annotations otherwise. Metrics without
a head in their name are those of the finest head.

mse_target_{head}        mean_t (φ̂ - φ*)²
mae_target_{head}        mean_t |φ̂ - φ*|
mse_truth, mae_truth     the same against φ of the truth; left out without one
stage_accuracy_{head}    share of frames with k̂ = k
voc                      value-order correlation: Spearman's ρ of φ̂ and t
retry_order              on episodes that go back to an earlier stage: Spearman's ρ of φ̂ and φ
pause_rmse               root of mean (φ̂_t - φ̂_s)² over the frames t of pauses, s the first of its pause. A pause is a stretch
                         of `PAUSE_SECONDS` or more in which the truth moves by `PAUSE_SPAN` or less; left out without one
success_auc              area under the ROC curve of φ̂_T, successes against failures
false_progress           on failures: mean_t max(0, φ̂ - φ)
wrong_instruction        mean_t (φ̂ - φ̂'), φ̂' under the text of another task: how far progress falls, more is better
paraphrase_shift         mean_t |φ̂ - φ̂''|, φ̂'' under the task in other words: less is better
stage_calibration_error  Σ_b n_b/n |share of frames with k̂ = k - mean p̂| over `BINS` equal bins b of p̂

A figure is the mean over a group's episodes that have the metric (success_auc and stage_calibration_error pool them);
`_low` and `_high` are its 95 % percentile interval when episodes are drawn with replacement; a metric that a row or a
group does not have is missing. `time_linear` is the row that knows only the clock, φ̂_t = (t - 1)/(T - 1): it has the best voc there is, which
therefore never stands alone. `targets` is the row that says what the annotations say: what a model gains against a truth
by following them perfectly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from sarm_lib import agreement
from sarm_lib.artifacts import read_json
from sarm_lib.checkpoint import RewardModel
from sarm_lib.dataset import Dataset, Episode
from sarm_lib.encoder import Encoder
from sarm_lib.progress import Scores, score_episodes
from sarm_lib.stages import Labels, complete_episodes, nesting
from sarm_lib.windows import FrameStore

BOOTSTRAP, SEED, DIGITS, BINS = 2000, 0, 5, 10
PAUSE_SECONDS, PAUSE_SPAN = 0.5, 0.02

METRICS = (
    "stage_accuracy_sparse",
    "stage_accuracy_dense",
    "mse_target_sparse",
    "mse_target_dense",
    "mae_target_sparse",
    "mae_target_dense",
    "mse_truth",
    "mae_truth",
    "voc",
    "retry_order",
    "pause_rmse",
    "success_auc",
    "false_progress",
    "wrong_instruction",
    "paraphrase_shift",
    "stage_calibration_error",
)

Card = dict[str, dict[str, float | int]]  # kind: metric: figure


@dataclass(frozen=True)
class Reference:
    """What the predictions of one episode are held against; progress arrays are (T,) float32, stages (T,) int64."""

    group: str
    fps: float
    success: bool
    target: dict[str, np.ndarray]  # a head: φ*
    stage: dict[str, np.ndarray]  # a head of more than one stage: k
    truth: np.ndarray | None  # φ of a simulator

    @property
    def finest(self) -> str:
        return list(self.target)[-1]

    @property
    def progress(self) -> np.ndarray:
        """φ: the truth's where there is one."""
        return self.target[self.finest] if self.truth is None else self.truth

    @property
    def retries(self) -> bool:
        """Whether it goes back to an earlier stage."""
        return self.finest in self.stage and bool((np.diff(self.stage[self.finest]) < 0).any())


@dataclass(frozen=True)
class Predicted:
    """What a row says of one episode. A row of one progress only (the clock, `single_stage`) has it for every head."""

    scores: dict[str, Scores]
    other_tasks: list[np.ndarray] = field(default_factory=list)  # φ̂' (T,) of the finest head, a text each
    paraphrases: list[np.ndarray] = field(default_factory=list)  # φ̂'' (T,)

    def of(self, head: str) -> Scores:
        return self.scores.get(head) or self.finest

    @property
    def finest(self) -> Scores:
        return list(self.scores.values())[-1]


def references(
    dataset: Dataset, labels: Labels, episodes: Sequence[Episode], truth_prefix: str | None = None
) -> list[Reference]:
    """What `episodes` are measured against: a simulator's `stage`, `progress` and `success`, annotations otherwise.

    The truth is of the dense stages and gives the sparse ones too: a dense stage belongs to the sparse stage that most of
    its annotated training frames carry. Raises DatasetError for stages that the vocabulary does not have.
    """
    stage, true_stage = dict(labels.stage), dataset.truth("stage", truth_prefix)
    if true_stage is not None and "dense" in stage:
        names, stage["dense"] = labels.stage_names["dense"], stage["dense"].copy()
        segments = agreement.truth(true_stage, dataset, names)
        for e in dataset.episodes:
            stage["dense"][e.rows] = agreement.frame_labels(segments[e.index], names, e.length)
        stage["sparse"] = nesting(labels, dataset.split("train"))[stage["dense"]]
    truth, success = (dataset.truth(name, truth_prefix) for name in ("progress", "success"))
    done = complete_episodes(labels, episodes)
    return [
        Reference(
            group=e.group,
            fps=dataset.fps,
            success=e.index in done if success is None else bool(success[e.rows].any()),
            target={head: labels.progress(e, head) for head in labels.stage_names},
            stage={head: stage[head][e.rows] for head, names in labels.stage_names.items() if len(names) > 1},
            truth=None if truth is None else truth[e.rows].astype(np.float32),
        )
        for e in episodes
    ]


@dataclass(frozen=True)
class Instructions:
    """What a model is told instead of a task, by the task's number: embeddings (n, E) of texts."""

    others: Mapping[int, torch.Tensor]  # of other tasks
    paraphrases: Mapping[int, torch.Tensor]  # of the same one


def instructions(settings, tasks: Sequence[str], clip: Encoder) -> Instructions:
    """As `params.visualize` names them; in a dataset of several tasks each is also an other one to the rest."""
    others = {task: [*settings.other_tasks, *(other for other in tasks if other and other != task)] for task in tasks}
    number = {task: i for i, task in enumerate(tasks) if task}
    return Instructions(
        {i: clip.texts(others[task]) for task, i in number.items() if others[task]},
        {i: clip.texts(settings.paraphrases[task]) for task, i in number.items() if settings.paraphrases.get(task)},
    )


def require_stages(model: RewardModel, labels: Labels, name: str) -> None:
    """Raises ValueError where the stages of a model, such as somebody else's, are not those of the annotations."""
    for head in model.spec.heads:
        said, annotated = model.spec.stage_names[head], labels.stage_names.get(head)
        if said != annotated:
            raise ValueError(
                f"{name} knows the {head} stages {said}, the annotations {annotated or 'none'}: they cannot be compared. Annotate "
                "with its stages and in its base.annotation_mode, or go on with 05, which needs no annotations"
            )


def predictions(
    model: RewardModel,
    store: FrameStore,
    episodes: Sequence[Episode],
    stride: int = 1,
    instead: Instructions | None = None,
    quiet: bool = True,
) -> list[Predicted]:
    """What a model says of `episodes`, told their own task, and told what is said `instead`."""
    heads, instead = model.spec.heads, instead or Instructions({}, {})

    def told(texts: Mapping[int, torch.Tensor]) -> dict[int, list[np.ndarray]]:
        found: dict[int, list[np.ndarray]] = {e.index: [] for e in episodes}
        for task, embedded in texts.items():
            mine = [e for e in episodes if store.task_index[e.row] == task]
            for text in embedded if mine else ():
                given = model.sarm, store, mine, heads[-1:], stride
                for (i, _), scores in score_episodes(*given, quiet=quiet, text=text).items():
                    found[i].append(scores.progress)
        return found

    scores = score_episodes(model.sarm, store, episodes, heads, stride, quiet=quiet)
    others, rephrased = told(instead.others), told(instead.paraphrases)
    return [
        Predicted({head: scores[e.index, head] for head in heads}, others[e.index], rephrased[e.index])
        for e in episodes
    ]


def time_linear(episodes: Sequence[Episode]) -> list[Predicted]:
    """The row that knows only the clock."""
    return [Predicted({"sparse": clock(e.length)}) for e in episodes]


def targets(labels: Labels, episodes: Sequence[Episode]) -> list[Predicted]:
    """The row that says what the annotations say: what following them perfectly is worth against a truth."""

    def scores(episode: Episode, head: str) -> Scores:
        stage = labels.stage[head][episode.rows]
        certain = np.eye(len(labels.stage_names[head]), dtype=np.float32)[stage]
        return Scores(labels.progress(episode, head), stage, labels.tau[head][episode.rows], certain)

    return [Predicted({head: scores(episode, head) for head in labels.stage_names}) for episode in episodes]


def card(references: Sequence[Reference], predicted: Sequence[Predicted]) -> Card:
    """One row of the scorecard: a group and `all`: every metric with its interval; `episodes` counts them."""
    pairs, found = list(zip(references, predicted, strict=True)), {}
    for group in ["all", *sorted({r.group for r in references} - {"all"})]:
        members = [pair for pair in pairs if group in ("all", pair[0].group)]
        found[group] = {"episodes": len(members)} | _figures(members)
    return found


def _text(values: Mapping[str, float], metric: str, interval: bool = True) -> str:
    if metric not in values:
        return "–"
    digits = 4 if metric.startswith("mse") else 3
    low, high = values[metric + "_low"], values[metric + "_high"]
    return f"{values[metric]:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if interval else "")


ROWS = {
    "sarm": "as params.yaml says",
    "targets": "no model: its annotations, followed perfectly",
    "time_linear": "no model: the clock",
    "single_stage": "no annotations: one stage",
    "no_repeats": "each subtask once, of successful episodes only",
    "state_only": "no pictures",
    "images_only": "no state",
    "images_only_all_cameras": "no state, every camera",
    "all_cameras": "every camera",
    "window_past": "a window into the past: usable online",
    "window_centred": "a window into past and future",
    "learn_given_up": "the clock of failed tries is learned",
    "learn_drawn_out": "the clock of drawn-out segments is learned",
    "no_rewind": "no rewinding in training",
    "lerobot_augmentation": "LeRobot's augmentation and loss",
    "lerobot_recipe": "LeRobot's augmentation and loss, both clocks learned",
}


def table(cards: dict[str, Card], metrics: Sequence[str], gaps: pd.DataFrame | None = None) -> pd.DataFrame:
    """The rows of a scorecard over all episodes, with some of the metrics, each with its interval as text; gaps: their
    `differences`, beside which stands in words what a row changes."""
    metrics = [m for m in metrics if any(m in of["all"] for of in cards.values())]
    found = pd.DataFrame({m: {row: _text(of["all"], m) for row, of in cards.items()} for m in metrics}, list(cards))
    if gaps is not None:
        texts = {row: f"{gap.difference:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]" for row, gap in gaps.iterrows()}
        found.insert(0, "what differs", [ROWS.get(row, "") for row in cards])
        found.insert(2, "difference", [texts.get(row, "–") for row in cards])
    return found.rename_axis("row")


def sheet(of_row: Card) -> pd.DataFrame:
    """One row of a scorecard as text, a metric a line: over all episodes with its interval, and of every kind."""
    known = [metric for metric in METRICS if metric in of_row["all"]]
    return pd.DataFrame(
        {kind: [_text(values, metric, kind == "all") for metric in known] for kind, values in of_row.items()},
        index=known,
    )


def test_episodes(dataset: Dataset, labels: Labels) -> list[Episode]:
    """The annotated test episodes. Raises ValueError where there are none."""
    found = [episode for episode in dataset.split("test") if episode.index in labels.annotated]
    if not found:
        raise ValueError(
            "no test episode is annotated: annotate some (annotate.episodes), or mark some (notebook 01), and run 01 and 02 again"
        )
    return found


def main_metric(of_row: Card) -> str:
    """How far off progress is: from the truth, or from the finest head's target where a dataset has no truth."""
    return next(m for m in ("mse_truth", "mse_target_dense", "mse_target_sparse") if m in of_row["all"])


def values(references: Sequence[Reference], predicted: Sequence[Predicted], metric: str) -> list[float]:
    """A metric of each of M episodes that is averaged over them."""
    return [round(_of_episode(*pair)[metric], DIGITS + 1) for pair in zip(references, predicted, strict=True)]


def differences(values: Mapping[str, Sequence[float]], to: str = "sarm") -> pd.DataFrame:
    """By how much the mean of each row's values, (M,) one an episode, is above that of the row `to`, with its bootstrap
    interval over episodes: paired, so that what makes an episode hard for all rows does not blur it."""
    found = {}
    for row, mine in values.items():
        gap = np.asarray(mine) - np.asarray(values[to])
        low, high = np.percentile(_mean(gap)(_drawn(len(gap))), [2.5, 97.5])
        found[row] = {"difference": gap.mean(), "low": low, "high": high}
    return pd.DataFrame(found).T


@dataclass(frozen=True)
class Ablations:
    """What `make scorecard` left."""

    cards: dict[str, Card] = field(default_factory=dict)
    metric: str = ""  # the main one
    episodes: list[int] = field(default_factory=list)  # the test episodes that it was measured on
    values: dict[str, list[float]] = field(default_factory=dict)  # a row: the main metric of each of them
    made_from: dict = field(default_factory=dict)

    def paired(self, metric: str, episodes: Sequence[Episode]) -> dict[str, list[float]]:
        """The values of the rows, if they are of this metric and of these episodes."""
        same = (metric, [e.index for e in episodes]) == (self.metric, self.episodes)
        return self.values if same else {}


def ablations(path: Path, fingerprint: str) -> Ablations:
    """The rows that `make scorecard` left, if they were made on this dataset."""
    made = read_json(path) if path.exists() else {}
    same = made.get("made_from", {}).get("fingerprint") == fingerprint
    return (
        Ablations(*(made[key] for key in ("rows", "metric", "episodes", "values", "made_from")))
        if same
        else Ablations()
    )


def left_out(cards: dict[str, Card]) -> list[str]:
    """Metrics that the dataset does not allow: no row has them."""
    return [m for m in METRICS if all(m not in of["all"] for of in cards.values())]


def confusion(true: np.ndarray, said: np.ndarray, names: Sequence[str]) -> pd.DataFrame:
    """Share of the frames of each stage (rows) by the stage that was predicted (columns), from stages (n,)."""
    counts = np.zeros((len(names), len(names)))
    np.add.at(counts, (true, said), 1)
    return pd.DataFrame(counts / np.maximum(counts.sum(1, keepdims=True), 1), index=names, columns=names)


# --- metrics of one episode ---------------------------------------------------------------------------------------------


def rank_correlation(values: np.ndarray, order: np.ndarray) -> float:
    """Spearman's ρ of two arrays (T,); 0 where one of them is constant."""
    if len(values) < 2 or np.ptp(values) == 0 or np.ptp(order) == 0:
        return 0.0
    return float(spearmanr(values, order).statistic)


def pauses(truth: np.ndarray, fps: float) -> list[slice]:
    """Stretches of `PAUSE_SECONDS` or more in which progress (T,) moves by `PAUSE_SPAN` or less, from the first on."""
    found, start, shortest = [], 0, round(PAUSE_SECONDS * fps)
    while start + shortest <= len(truth):
        spans = np.maximum.accumulate(truth[start:]) - np.minimum.accumulate(truth[start:])
        length = int(np.searchsorted(spans, PAUSE_SPAN + 1e-6, side="right"))
        if length >= shortest:
            found.append(slice(start, start + length))
        start += length if length >= shortest else 1
    return found


def _of_episode(reference: Reference, predicted: Predicted) -> dict[str, float]:
    """Metrics of one episode that are averaged; those that do not apply are missing."""
    scores, known = predicted.finest, {}
    progress = scores.progress.astype(np.float64)
    for head, target in reference.target.items():
        error = predicted.of(head).progress.astype(np.float64) - target
        known |= {f"mse_target_{head}": np.mean(error**2), f"mae_target_{head}": np.mean(np.abs(error))}
    for head, stage in reference.stage.items():
        if _has_stages(predicted, head):
            known[f"stage_accuracy_{head}"] = np.mean(predicted.scores[head].stage == stage)
    known["voc"] = rank_correlation(progress, np.arange(len(progress)))
    if reference.retries:
        known["retry_order"] = rank_correlation(progress, reference.progress)
    if not reference.success:
        known["false_progress"] = np.mean(np.maximum(progress - reference.progress, 0))
    if reference.truth is not None:
        error = progress - reference.truth
        known |= {"mse_truth": np.mean(error**2), "mae_truth": np.mean(np.abs(error))}
        still = pauses(reference.truth, reference.fps)
        if still:
            drift = np.concatenate([progress[pause] - progress[pause.start] for pause in still])
            known["pause_rmse"] = np.sqrt(np.mean(drift**2))
    if predicted.other_tasks:
        known["wrong_instruction"] = np.mean([progress - other for other in predicted.other_tasks])
    if predicted.paraphrases:
        known["paraphrase_shift"] = np.mean([np.abs(progress - other) for other in predicted.paraphrases])
    return {name: float(value) for name, value in known.items()}


def _has_stages(predicted: Predicted, head: str) -> bool:
    return head in predicted.scores and predicted.scores[head].probabilities.shape[1] > 1


def _calibration_bins(reference: Reference, predicted: Predicted) -> np.ndarray:
    """(BINS, 3) frames, frames whose stage is right, sum of p̂."""
    bins, head = np.zeros((BINS, 3)), reference.finest
    if head in reference.stage and _has_stages(predicted, head):
        scores = predicted.scores[head]
        p = scores.probabilities.max(1).astype(np.float64)
        right = scores.stage == reference.stage[head]
        np.add.at(bins, np.minimum((p * BINS).astype(int), BINS - 1), np.stack([np.ones_like(p), right, p], axis=1))
    return bins


# --- metrics of a group, and their intervals ----------------------------------------------------------------------------

# A statistic takes how often each of M episodes is drawn, (D, M), and gives (D,) figures, NaN where there is none.
Statistic = Callable[[np.ndarray], np.ndarray]


def _figures(members: Sequence[tuple[Reference, Predicted]]) -> dict[str, float]:
    values = pd.DataFrame([_of_episode(*pair) for pair in members]).reindex(columns=METRICS)
    statistics: dict[str, Statistic] = {m: _mean(values[m].to_numpy(np.float64)) for m in METRICS}
    final = np.array([p.finest.progress[-1] for _, p in members], dtype=np.float64)
    statistics["success_auc"] = _auc(final, np.array([r.success for r, _ in members]))
    statistics["stage_calibration_error"] = _calibration(np.stack([_calibration_bins(*pair) for pair in members]))
    counts, found = _drawn(len(members)), {}
    for name, statistic in statistics.items():
        figure, drawn = float(statistic(np.ones((1, len(members))))[0]), statistic(counts)
        if np.isnan(figure):
            continue
        low, high = np.nanpercentile(drawn, [2.5, 97.5])
        for key, value in ((name, figure), (f"{name}_low", low), (f"{name}_high", high)):
            found[key] = round(float(value), DIGITS)
    return found


def _drawn(episodes: int) -> np.ndarray:
    """How often each of so many episodes is drawn in every bootstrap sample, (BOOTSTRAP, episodes)."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(episodes, np.full(episodes, 1 / episodes), BOOTSTRAP).astype(np.float64)


def _mean(values: np.ndarray) -> Statistic:
    known = ~np.isnan(values)
    return lambda counts: _ratio(counts[:, known] @ values[known], counts[:, known].sum(1))


def _auc(final: np.ndarray, success: np.ndarray) -> Statistic:
    good, bad = final[success][:, None], final[~success][None]
    wins = (good > bad) + 0.5 * (good == bad)

    def statistic(counts: np.ndarray) -> np.ndarray:
        of_good, of_bad = counts[:, success], counts[:, ~success]
        return _ratio(((of_good @ wins) * of_bad).sum(1), of_good.sum(1) * of_bad.sum(1))

    return statistic


def _calibration(bins: np.ndarray) -> Statistic:
    def statistic(counts: np.ndarray) -> np.ndarray:
        frames, right, said = np.moveaxis(np.tensordot(counts, bins, axes=1), 2, 0)
        return _ratio(np.abs(right - said).sum(1), frames.sum(1))

    return statistic


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)


def clock(length: int) -> Scores:
    """The clock of an episode as progress and τ of a single stage."""
    progress = np.linspace(0, 1, length, dtype=np.float32) if length > 1 else np.zeros(1, np.float32)
    return Scores(progress, np.zeros(length, np.int64), progress, np.ones((length, 1), np.float32))
