"""RA-BC: from progress φ to a weight for every frame (Eq 6, 8, 9). What the weights say of a dataset: `diagnosis`.

    r_t = φ(o_{t+Δ}) - φ(o_t)                                                                  Eq 6
    w̃_t = clip((r_t - (μ - 2σ)) / (4σ + ε), 0, 1)        μ ← max(μ, 0)                          Eq 8
    w_t = 1{r_t > κ} + 1{0 ≤ r_t ≤ κ} · w̃_t                                                    Eq 9

Vectorised over the file's columns; no frame is looked at alone, and what is needed beside the columns is small.

LeRobot's `RABCWeights` differs in four things, which `lerobot_compat` brings back: r shrinks to 0 towards the end of an
episode, μ and σ come from all episodes, a frame without progress weighs 1, and κ is a number.
"""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sarm_lib.artifacts import PARQUET_KEY, REWARD_MODEL, checkpoint_digest, digest, read_provenance, staged
from sarm_lib.dataset import Dataset

Head = Literal["sparse", "dense"]
HEALTHY = (0.3, 0.8)  # mean weight, by the guide
HELD_OUT = "validation episodes (or training ones, where none is held out), of which the file has none"
ROUNDING = 1e-3  # of half precision, by which progress may leave 0 to 1
FRAME = ("episode_index", "frame_index", "index")  # columns that say which frame a row of a progress file is of
SETTLED = "settled"
BLOCK = 1 << 18  # frames that are looked at together


@dataclass(frozen=True)
class RabcWeights:
    """Weights of N frames, in the order of the progress file, and the statistics that made them."""

    index: np.ndarray  # (N,) global frame index
    episode_index: np.ndarray  # (N,)
    frame_index: np.ndarray  # (N,)
    delta: np.ndarray  # (N,) float32, r of Eq 6
    weight: np.ndarray  # (N,) float32 in [0, 1]
    delta_mean: float  # μ over the training episodes that last longer than Δ, not below 0
    delta_std: float  # σ, not below ε
    delta_frames: int
    kappa: float
    epsilon: float
    kappa_rule: float | str | None = None  # that κ came from, `auto` resolved
    because: str = ""  # why this rule, where it was `auto`

    def of(self, rows: np.ndarray) -> "RabcWeights":
        """Of some frames alone, with the same μ, σ and κ."""
        columns = ("index", "episode_index", "frame_index", "delta", "weight")
        return replace(self, **{name: getattr(self, name)[rows] for name in columns})

    def judged(self, episodes: list[int]) -> np.ndarray:
        """r of the frames of `episodes` that μ, σ and a rule for κ look at (`telling`)."""
        delta = self.delta[telling(self.episode_index, np.isin(self.episode_index, episodes), self.delta_frames)]
        return delta[np.isfinite(delta)]  # LeRobot's file may say nothing of a frame

    def statistics(self, episodes: list[int]) -> dict[str, float | int]:
        """The guide's diagnostics over the frames of `episodes`."""
        mine, delta = np.isin(self.episode_index, episodes), self.judged(episodes)
        weight = self.weight[mine]
        return {
            "delta_frames": self.delta_frames,
            "kappa": round(self.kappa, 6),
            "epsilon": self.epsilon,
            "delta_mean": round(float(delta.mean()), 6),
            "delta_std": round(float(delta.std()), 6),
            "mean_weight": round(float(weight.mean()), 6),
            "num_frames": int(mine.sum()),
            "num_zero": int((weight == 0).sum()),
            "num_full": int((weight == 1).sum()),
        }


def deltas(progress: np.ndarray, episode_index: np.ndarray, delta_frames: int) -> np.ndarray:
    """r (N,) float32 by Eq 6 for frames in the order of their episodes.

    Within Δ of an episode's end there is no o_{t+Δ}. These frames get the r of the last full window, so that the frames
    that finish the task are not worthless; in an episode shorter than Δ that is its whole gain, scaled to Δ.
    """
    starts, found = _starts(episode_index), np.empty(len(progress), dtype=np.float32)
    ends = np.r_[starts[1:], len(progress)]
    for block in np.array_split(
        np.arange(len(starts)), len(progress) // BLOCK + 1
    ):  # whole episodes: bounds the memory
        if not len(block):
            continue
        rows = slice(starts[block[0]], ends[block[-1]])
        lengths = ends[block] - starts[block]
        first, last = np.repeat(starts[block], lengths), np.repeat(ends[block] - 1, lengths)
        frame = np.arange(rows.start, rows.stop)
        frame = np.maximum(np.minimum(frame, last - delta_frames), first)
        horizon = np.minimum(delta_frames, last - first)  # shorter than Δ only where the whole episode is
        found[rows] = (progress[frame + horizon] - progress[frame]) * (delta_frames / np.maximum(horizon, 1))
    return found


def lerobot_deltas(progress: np.ndarray, index: np.ndarray, episode_index: np.ndarray, delta_frames: int) -> np.ndarray:
    """r (N,) float32 as LeRobot looks it up, by `index` in order: in the frame Δ later or in the last one of the episode, so
    that r goes to 0 towards the end; NaN where the file does not have that frame, or has no number for it."""
    last = np.zeros(episode_index.max() + 1, dtype=index.dtype)
    np.maximum.at(last, episode_index, index)
    by_index = np.full(int(index[-1] - index[0]) + 1, np.nan, dtype=progress.dtype)  # else no r would be exactly 0
    by_index[index - index[0]] = progress
    found = np.empty(len(index), dtype=np.float32)
    for start in range(0, len(index), BLOCK):  # bounds the memory
        rows = slice(start, start + BLOCK)
        later = np.minimum(index[rows] + delta_frames, last[episode_index[rows]])
        found[rows] = by_index[later - index[0]] - progress[rows]
    return found


def _starts(episode_index: np.ndarray) -> np.ndarray:
    """The first row of each episode."""
    return np.flatnonzero(np.r_[True, episode_index[1:] != episode_index[:-1]])


def telling(episode_index: np.ndarray, chosen: np.ndarray, delta_frames: int) -> np.ndarray:
    """Which frames μ, σ and κ look at, (N,) bool: those of the `chosen` episodes (N,) bool that last longer than Δ, as the r of a
    shorter one is extrapolated and would be the largest of all; of all chosen ones where none does."""
    starts = _starts(episode_index)
    lengths = np.diff(np.r_[starts, len(episode_index)])
    long = chosen & np.repeat(lengths > delta_frames, lengths)
    return long if long.any() else chosen


def weights(delta: np.ndarray, mean: float, std: float, kappa: float, epsilon: float) -> np.ndarray:
    """w (N,) float32 in [0, 1] by Eq 8 and Eq 9 from r (N,), μ and σ."""
    mean, std = max(mean, 0.0), max(std, epsilon)
    weight = (delta - (mean - 2 * std)) / (4 * std + epsilon)
    np.clip(weight, 0.0, 1.0, out=weight)
    weight[delta < 0] = 0.0
    weight[delta > kappa] = 1.0
    return weight.astype(np.float32, copy=False)


# Rules that set κ from r of the training frames: the guide's three, from medium to very selective, and two that aim.
KAPPA_RULES = ("mean", "mean+std", "mean+2std", "mean_weight=", "quantile=")


def kappa_of(rule: float | str, delta: np.ndarray, mean: float, std: float, epsilon: float) -> float:
    """κ as a number, from r (N,) of the training frames, μ and σ.

    rule: a number; `mean`, `mean+std` or `mean+2std`; `mean_weight=0.5`, the κ that brings the mean weight nearest to that;
    `quantile=0.6`, the r that so many frames do not exceed. No rule gives a κ below 0, which would let pass what loses
    progress. Raises ValueError for any other rule.
    """
    if not isinstance(rule, str):
        return float(rule)
    name, _, value = rule.partition("=")
    if name in ("mean", "mean+std", "mean+2std") and not value:
        return mean + std * {"mean": 0, "mean+std": 1, "mean+2std": 2}[name]
    target = _number(value)
    if name not in ("mean_weight", "quantile") or target is None or not 0 <= target <= 1:
        raise ValueError(
            f"rabc.kappa: {rule!r} is no number and no rule; the rules are {', '.join(KAPPA_RULES[:3])}, mean_weight=0.5 and "
            "quantile=0.6, with a number between 0 and 1"
        )
    if name == "quantile":
        return max(0.0, float(np.quantile(delta, target)))
    # Frames above κ weigh 1, those up to it their soft weight: sorted by r, every κ's mean weight is two cumulative sums.
    ordered = np.sort(delta[delta >= 0]).astype(np.float64)
    soft = np.r_[0.0, np.cumsum(weights(ordered, mean, std, np.inf, epsilon), dtype=np.float64)]
    kappas = np.unique(np.r_[0.0, ordered])
    below = np.searchsorted(ordered, kappas, side="right")
    means = (soft[below] + len(ordered) - below) / len(delta)
    return float(kappas[np.abs(means - target).argmin()])


def mean_weights(delta: np.ndarray, mean: float, std: float, epsilon: float) -> tuple[float, float]:
    """The largest and the smallest mean weight that any κ ≥ 0 gives r (N,): at κ = 0, and where no r exceeds κ."""
    return tuple(float(weights(delta, mean, std, kappa, epsilon).mean()) for kappa in (0.0, np.inf))


def _listed(episode_index: np.ndarray, frame_index: np.ndarray, most: int = 5) -> str:
    """The frames (n,) by episode, the first few of many."""
    said = []
    for episode in np.unique(episode_index)[:most]:
        frames = [str(f) for f in frame_index[episode_index == episode]]
        said.append(f"episode {episode}: {', '.join(frames[:most])}{', …' if len(frames) > most else ''}")
    return "; ".join(said) + ("; …" if len(np.unique(episode_index)) > most else "")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def compute(
    path: Path,
    head: Head,
    delta_frames: int,
    kappa: float | str,
    epsilon: float,
    train_episodes: list[int],
    dataset_fingerprint: str | None = None,
    lerobot_compat: bool = False,
    held_out: list[int] | None = None,
) -> RabcWeights:
    """Weights from a progress file; μ, σ and a rule for κ (`kappa_of`) look at `train_episodes` alone.

    kappa: `auto` takes the rule that is healthy for the `held_out` episodes (`healthy_rule`). lerobot_compat: what LeRobot's
    `RABCWeights` gives of the same file. Raises ValueError for a file of another dataset, without this head, with a value that is
    not finite, or whose episodes have frames twice or not at all, and where `auto` has nothing to look at.
    """
    column = _column(path, head, dataset_fingerprint)
    index, episode_index, frame_index, progress = _in_order(path, ["index", "episode_index", "frame_index", column])
    follows = (index[1:] == index[:-1] + 1) | (episode_index[1:] != episode_index[:-1])
    wrong = np.flatnonzero(~follows)
    if len(wrong) and not lerobot_compat:
        raise ValueError(
            f"{path.name}: frames of an episode are there twice or not at all, after {_listed(episode_index[wrong], frame_index[wrong])}: "
            "Δ would not be so many frames; score the dataset again (notebook 05)"
        )
    if len(wrong):  # of a frame that is there twice LeRobot takes what comes last
        last = np.r_[index[1:] != index[:-1], True]
        index, episode_index, frame_index, progress = (c[last] for c in (index, episode_index, frame_index, progress))
    bad = np.flatnonzero(~np.isfinite(progress))
    if len(bad) and not lerobot_compat:
        raise ValueError(
            f"{path.name}: {column} is not finite in {len(bad)} frames ({_listed(episode_index[bad], frame_index[bad])}): score "
            "these frames again (notebook 05) or delete the episodes"
        )
    if lerobot_compat:
        if np.isinf(progress).any():
            raise ValueError(f"{path.name}: {column} is infinite somewhere, and LeRobot's weights of it are no numbers")
        delta = lerobot_deltas(progress, index, episode_index, delta_frames)
        counted = ~np.isnan(delta)
    else:
        delta = deltas(progress, episode_index, delta_frames)
        starts = _starts(episode_index)
        training = np.repeat(np.isin(episode_index[starts], train_episodes), np.diff(np.r_[starts, len(index)]))
        if not training.any():
            raise ValueError(f"{path.name} has no frame of a training episode")
        counted = telling(episode_index, training, delta_frames)
    seen = delta[counted]
    mean = max(float(seen.mean(dtype=np.float64)), 0.0) if len(seen) else 0.0
    std = max(float(seen.std(dtype=np.float64)), epsilon) if len(seen) else epsilon
    because = ""
    if kappa == "auto":
        starts = _starts(episode_index)
        asked = np.repeat(np.isin(episode_index[starts], held_out or []), np.diff(np.r_[starts, len(index)]))
        r = delta[telling(episode_index, asked, delta_frames)]
        kappa, because = healthy_rule(r[np.isfinite(r)], mean, std, epsilon)
    number = kappa_of(kappa, seen, mean, std, epsilon)
    weight = weights(delta, mean, std, number, epsilon)
    weight[np.isnan(delta)] = 1.0  # only LeRobot's
    columns = index, episode_index, frame_index, delta, weight
    return RabcWeights(*columns, mean, std, delta_frames, number, epsilon, kappa, because)


def _column(path: Path, head: Head, dataset_fingerprint: str | None) -> str:
    """The column of a progress file that a head's progress is in. Raises ValueError for a file of another dataset or head."""
    made = read_provenance(path)
    if dataset_fingerprint and made and made.get("fingerprint") != dataset_fingerprint:
        raise ValueError(
            f"{path.name} is the progress of another dataset ({made.get('fingerprint')}, this one is {dataset_fingerprint}): "
            "run 05_compute_rabc"
        )
    column, names = f"progress_{head}", pq.read_schema(path).names
    if column not in names:
        raise ValueError(
            f"{path.name} has no {column}; it has {', '.join(n for n in names if n.startswith('progress'))}"
        )
    return column


def take_progress(path: Path, params, dataset: Dataset) -> str:
    """Make `path` the progress of this dataset's frames, in their order, by the file that `rabc.progress_path` names: ours or
    LeRobot's, a file here or `hf://datasets/...` as LeRobot takes it. Says what it is.

    Raises ValueError where it is of other frames or not what weights can be made of, and FileNotFoundError.
    """
    named = params.rabc.progress_path
    if named.startswith("hf://"):
        from lerobot.rewards.sarm.rabc import resolve_hf_path  # which loads LeRobot

        source = Path(resolve_hf_path(named))
    else:
        source = params.paths.resolve(named)
    if not source.is_file():
        raise FileNotFoundError(f"rabc.progress_path: there is no file {named}")
    column, said = f"progress_{head_of(params)}", f"rabc.progress_path: {source.name}"
    theirs, ours = _read_progress(source, column), dataset.frames
    made = (read_provenance(source) or {}).get("fingerprint", dataset.fingerprint)
    if made != dataset.fingerprint:
        raise ValueError(
            f"{said} is the progress of another dataset ({made}, {dataset.root.name} is {dataset.fingerprint})"
        )
    index, asked = theirs["index"].to_numpy(), ours["index"].to_numpy()
    order = np.argsort(index, kind="stable")
    row = np.searchsorted(index, asked, "right", sorter=order) - 1  # of a frame that is there twice the last one
    found = (row >= 0) & (index[order[np.maximum(row, 0)]] == asked) if len(index) else np.zeros(len(asked), dtype=bool)
    taken = theirs.take(order[row[found]])
    alike = all(np.array_equal(taken[name].to_numpy(), ours[name].to_numpy()[found]) for name in FRAME)
    more = len(np.unique(index)) > len(asked) and params.base.episodes is None
    if more or not alike or not found.any():
        raise ValueError(
            f"{said} has {len(theirs):,} frames of other episodes than {dataset.root.name} ({len(ours):,} frames): it is the "
            "progress of another dataset"
        )
    if not found.all():
        raise ValueError(f"{said} lacks {_first(~found, ours)}: have every frame scored (by notebook 05: null)")
    values = taken[column].to_numpy()
    wrong = ~((values >= -ROUNDING) & (values <= 1 + ROUNDING)) & ~np.isnan(values)
    if wrong.any():
        raise ValueError(f"{said}: {column} is a number from 0 to 1, and is not in {_first(wrong, ours)}")
    unknown = np.isnan(values)
    if unknown.all():
        raise ValueError(f"{said}: {column} is no number in any frame: have every frame scored (by notebook 05: null)")
    if unknown.any() and not params.rabc.lerobot_compat:
        raise ValueError(
            f"{said}: {column} is no number in {_first(unknown, ours)}: have every frame scored (by notebook 05: null), or set "
            "rabc.lerobot_compat, which gives such frames weight 1 as LeRobot does"
        )
    with staged(path) as partial:
        pq.write_table(taken, partial)
    return f"took the progress of {len(ours):,} frames from {named}"


def _read_progress(source: Path, column: str) -> pa.Table:
    """A progress file that somebody else made. Raises ValueError for one that does not say which frame is which, or has no
    `column` of numbers."""
    said = f"rabc.progress_path: {source.name}"
    try:
        table = pq.read_table(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{said} is no Parquet file ({error})") from error
    if lacking := [name for name in FRAME if name not in table.column_names]:
        raise ValueError(f"{said} has no column {' and no '.join(lacking)}; which frame is which?")
    if column not in table.column_names:
        known = ", ".join(name for name in table.column_names if name.startswith("progress")) or "no progress"
        raise ValueError(f"{said} has no {column}, which rabc.head_mode asks for; it has {known}")
    for name in FRAME:
        if not pa.types.is_integer(kind := table.schema.field(name).type):
            raise ValueError(f"{said}: {name} is {kind}; whole numbers say which frame is which")
    if not pa.types.is_floating(kind := table.schema.field(column).type):
        raise ValueError(f"{said}: {column} is {kind}, not a number from 0 to 1")
    return table


def _first(rows: np.ndarray, frames: pd.DataFrame) -> str:
    """How many frames `rows` (N,) bool are, and where the first one is."""
    where = frames.iloc[int(rows.argmax())]
    return f"{rows.sum():,} of {len(rows):,} frames, first in episode {int(where.episode_index)} at frame {int(where.frame_index)}"


def from_params(path: Path, params, dataset: Dataset, dataset_fingerprint: str | None = None) -> RabcWeights:
    """Weights of a progress file as `params.rabc` asks for them; where it says `auto`, chosen on `held_out` episodes by
    `suggested_delta` and `healthy_rule`, which look at progress and at no label."""
    settings, head, episodes = params.rabc, head_of(params), held_out(dataset)
    delta_frames = settings.delta_frames or params.policy.chunk_size
    if delta_frames == "auto":
        column = _column(path, head, dataset_fingerprint)
        _, episode_index, phi = _in_order(path, ["index", "episode_index", column])
        delta_frames = suggested_delta(phi, episode_index, episodes, dataset.fps, params).frames
        if delta_frames is None:
            raise ValueError(f"rabc.delta_frames: auto needs progress of {HELD_OUT}: set a number of frames, or null")
        del episode_index, phi  # `compute` reads what it needs
    return compute(
        path,
        head,
        delta_frames,
        settings.kappa,
        settings.epsilon,
        [episode.index for episode in dataset.split("train")],
        dataset_fingerprint,
        settings.lerobot_compat,
        episodes,
    )


def held_out(dataset: Dataset) -> list[int]:
    """Episodes on which `auto` chooses: of val, or of train where none is held out, which the reward model knows by heart."""
    return [episode.index for episode in dataset.split("val") or dataset.split("train")]


@dataclass(frozen=True)
class SuggestedDelta:
    """A Δ and why; None where nothing can be said."""

    frames: int | None
    because: str


def suggested_delta(
    phi: np.ndarray, episode_index: np.ndarray, episodes: list[int], fps: float, params
) -> SuggestedDelta:
    """The shortest Δ over which steady progress stands out in `episodes`: long enough that the median episode gains three times
    the jitter of φ (N,) from frame to frame, and a fifth of a second, in which a robot hardly moves; at most a chunk.

    A short Δ sees where a mistake begins and ends; the paper's 25 frames of 90 s tell little apart but noise. Jitter is what
    bends between three frames that were scored (`rabc.stride`, also of a file that somebody else made): those between them lie on
    a line.
    """
    stride, chunk = params.rabc.stride, params.policy.chunk_size
    starts = _starts(episode_index)
    lengths = np.diff(np.r_[starts, len(episode_index)])
    chosen = np.isin(episode_index[starts], episodes)
    mine = np.repeat(chosen, lengths)
    if not np.isfinite(phi[mine]).any():
        return SuggestedDelta(None, f"there is no progress of {HELD_OUT}")
    length = float(np.median(lengths[chosen]))
    at = np.arange(len(phi)) - np.repeat(starts, lengths)  # frame of its episode
    whole = mine & (at >= stride) & (at % stride == 0) & (at + stride < np.repeat(lengths, lengths))
    rows = np.flatnonzero(whole)
    bends = phi[rows + stride] - 2 * phi[rows] + phi[rows - stride]
    bends = bends[np.isfinite(bends)]  # a file of LeRobot's may have gaps
    jitter = float(np.median(np.abs(bends)) / 0.6745 / math.sqrt(6)) if len(bends) else 0.0
    visible, shortest = math.ceil(3 * jitter * length), math.ceil(0.2 * fps)
    frames = int(min(max(visible, shortest), chunk))
    decides = "a fifth of a second, which is the least" if shortest >= visible else "so that progress stands out"
    if max(visible, shortest) > chunk:
        decides = "the policy's chunk, which is the most"
    return SuggestedDelta(
        frames,
        f"{decides}. A median episode of {length:.0f} frames gains {1 / length:.4f} a frame, φ jitters by {jitter:.4f}, and three "
        f"times that takes {visible} frame{'s' * (visible != 1)}; a fifth of a second is {shortest}, a chunk {chunk}",
    )


def healthy_rule(r: np.ndarray, mean: float, std: float, epsilon: float) -> tuple[str, str]:
    """The first of the guide's three rules for κ by which the mean weight of r (N,) is not above the healthy 0.8, where RA-BC
    changes little, or the last one; and why. Raises ValueError where there is no r."""
    if not len(r):
        raise ValueError(f"rabc.kappa: auto needs progress of {HELD_OUT}: set a number or another rule")
    means = {}
    for rule in KAPPA_RULES[:3]:
        means[rule] = float(weights(r, mean, std, kappa_of(rule, r, mean, std, epsilon), epsilon).mean())
        if means[rule] <= HEALTHY[1]:
            break
    said = ", ".join(f"{value:.2f} by `{rule}`" for rule, value in means.items())
    unhealthy = "" if HEALTHY[0] <= means[rule] <= HEALTHY[1] else ", and none of the guide's rules brings it there"
    return rule, f"`auto` finds a mean weight of {said}; {HEALTHY[0]} to {HEALTHY[1]} is healthy{unhealthy}"


def _in_order(path: Path, columns: list[str]) -> list[np.ndarray]:
    """Columns of a Parquet file by ascending `index`, the first of them; nothing is held twice on the way."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        dtypes = [file.schema_arrow.field(name).type.to_pandas_dtype() for name in columns]
        found = [np.empty(file.metadata.num_rows, dtype) for dtype in dtypes]
        for name, values in zip(columns, found, strict=True):  # one after the other: their pages are not held together
            row = 0
            for batch in file.iter_batches(BLOCK, columns=[name]):
                values[row : row + len(batch)] = batch[name].to_numpy(zero_copy_only=False)
                row += len(batch)
            pa.default_memory_pool().release_unused()
    if (found[0][1:] < found[0][:-1]).any():
        order = np.argsort(found[0], kind="stable")
        found = [values[order] for values in found]
    return found


def head_of(params) -> Head:
    """The head whose progress makes the weights."""
    return "sparse" if params.rabc.head_mode == "both" else params.rabc.head_mode


def provenance(params, dataset: Dataset, checkpoint: str | None = None) -> dict[str, str | int | float | bool]:
    """What weights are made from: a file that says otherwise weights nothing. checkpoint: the reward model's."""
    made = {
        "fingerprint": dataset.fingerprint,
        "training_episodes": digest([episode.index for episode in dataset.split("train")]),  # of which μ, σ and κ are
        "head_mode": head_of(params),
        "delta_frames": params.rabc.delta_frames or params.policy.chunk_size,
        "kappa": params.rabc.kappa,
        "epsilon": params.rabc.epsilon,
        "lerobot_compat": params.rabc.lerobot_compat,
    }
    if "auto" in (made["delta_frames"], made["kappa"]):
        made["held_out_episodes"] = digest(held_out(dataset))
    if made["delta_frames"] == "auto":  # which is at most a chunk
        made["chunk_size"], made["stride"] = params.policy.chunk_size, params.rabc.stride
    named = {"reward_model_path": params.rabc.reward_model_path, "progress_path": params.rabc.progress_path}
    return made | {key: value for key, value in {**named, "checkpoint": checkpoint}.items() if value}


def write_weights(path: Path, computed: RabcWeights, made_from: dict[str, str | int | float]) -> None:
    """`rabc_weights.parquet`: index, episode_index, frame_index, delta, weight; and in its metadata `made_from` and what became
    of it (`SETTLED`): Δ in frames, κ, and the rule that gave it."""
    settled = {"delta_frames": computed.delta_frames, "kappa": computed.kappa, "kappa_rule": computed.kappa_rule}
    made_from = made_from | {SETTLED: settled}
    names = ("index", "episode_index", "frame_index", "delta", "weight")
    table = pa.table({name: getattr(computed, name) for name in names})
    with staged(path) as partial:
        pq.write_table(table.replace_schema_metadata({PARQUET_KEY: json.dumps(made_from, sort_keys=True)}), partial)


def weights_digest(path: Path) -> str:
    """Names the weights in a file by its columns, whatever its metadata says of where they come from."""
    table = pq.read_table(path, columns=["index", "delta", "weight"])
    return digest(*(hashlib.sha256(table[name].to_numpy().tobytes()).hexdigest() for name in table.column_names))


def weights_of_rows(path: Path, params, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The weight and the r of every row of `dataset`, (N,) float32 each.

    Raises ValueError for the weights of another dataset, of other training episodes or of other settings, another reward
    model's path among them, and where a frame has none; and where stage 03 has trained another model since.
    """
    try:
        made, wanted = read_provenance(path) or {}, provenance(params, dataset)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path.name} cannot be read ({error}): run 05_compute_rabc again") from error
    differing = [
        f"{key} is {made.get(key)}, not {wanted.get(key)}"
        for key in sorted((wanted | made).keys() - {"checkpoint", SETTLED})
        if made.get(key) != wanted.get(key)
    ]
    if differing:
        raise ValueError(
            f"{path.name} was made from something else ({'; '.join(differing)}): run 05_compute_rabc again"
        )
    ours = params.rabc.reward_model_path is None and params.rabc.progress_path is None
    trained = params.paths.find(f"sarm/{REWARD_MODEL[0]}")
    if ours and trained and checkpoint_digest(trained.parent) != made.get("checkpoint"):
        raise ValueError(
            f"{path.name} is of another reward model than {trained.parent} holds: run 05_compute_rabc again"
        )
    table = pq.read_table(path, columns=["index", "weight", "delta"])
    index, weight = table["index"].to_numpy(), table["weight"].to_numpy()
    wrong = ~((weight >= 0) & (weight <= 1))
    if wrong.any():
        raise ValueError(
            f"{path.name}: {int(wrong.sum())} weights are not between 0 and 1, the first that of the frame with index "
            f"{index[wrong][0]}: run 05_compute_rabc again"
        )
    asked = dataset.frames["index"].to_numpy()
    position = np.searchsorted(index, asked)
    if not len(index) or not np.array_equal(index[np.minimum(position, len(index) - 1)], asked):
        raise ValueError(
            f"{path.name} has no weight for some frames of {dataset.root.name}: run 05_compute_rabc on this dataset"
        )
    return weight[position], table["delta"].to_numpy()[position]
