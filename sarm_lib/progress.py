"""Progress φ of every frame by a reward model, and the file that carries it: `sarm_progress.parquet`.

The file has LeRobot's columns (`index`, `episode_index`, `frame_index`, `progress_sparse`, `progress_dense`) and, in its
schema metadata, what made it: LeRobot's `reward_model_path`, the checkpoint's digest and the dataset's fingerprint.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sarm_lib.artifacts import PARQUET_KEY, code_digest, digest, read_provenance, remove, staged
from sarm_lib.checkpoint import RewardModel
from sarm_lib.dataset import Dataset, Episode
from sarm_lib.encoder import Embeddings, Precision
from sarm_lib.kernels import packed_once
from sarm_lib.live import bar
from sarm_lib.model import Sarm
from sarm_lib.processes import share
from sarm_lib.stages import Labels, progress
from sarm_lib.windows import FrameStore, pad_state

log = logging.getLogger("sarm")

BLOCK = 4096  # frames


@dataclass(frozen=True)
class Scores:
    """What one head says of n frames."""

    progress: np.ndarray  # (n,) float32, φ
    stage: np.ndarray  # (n,) int64
    tau: np.ndarray  # (n,) float32
    probabilities: np.ndarray  # (n, K) float32


def frame_store(dataset: Dataset, embeddings: Embeddings, model: RewardModel) -> FrameStore:
    """What `model` scores frames from: its own cameras, and states in its own units.

    Raises ValueError when the embeddings come from another encoder than the model was trained on.
    """
    if model.encoder_identity and model.encoder_identity != embeddings.encoder_identity:
        raise ValueError(
            f"the reward model was trained on embeddings of {model.encoder}, these are of {embeddings.encoder}: "
            "set prepare.encoder to the model's and run 00_prepare"
        )
    if model.spec.image_dim != embeddings.width:
        raise ValueError(
            f"the reward model reads embeddings of width {model.spec.image_dim}, these have {embeddings.width}: set "
            f"prepare.encoder to {model.encoder} and run 00_prepare"
        )
    if model.encoder != embeddings.encoder and not model.encoder_identity:
        log.warning(
            "the reward model was trained with %s; these embeddings are of %s", model.encoder, embeddings.encoder
        )
    missing = set(model.image_keys) - set(embeddings.cameras)
    if missing:
        raise ValueError(
            f"the reward model sees {', '.join(missing)}, which is not encoded: add it to prepare.image_keys and run 00_prepare"
        )
    if model.state_key not in dataset.features:
        raise ValueError(f"the reward model reads {model.state_key!r}, which this dataset does not have")
    lengths = np.array([episode.length for episode in dataset.episodes])
    starts = np.array([episode.row for episode in dataset.episodes])
    states = torch.from_numpy(model.normalise(dataset.vectors(model.state_key)))
    return FrameStore(
        embeddings,
        model.image_keys,
        pad_state(states, model.spec.max_state_dim),
        dataset.frames.task_index.to_numpy(),
        np.repeat(starts, lengths),
        np.repeat(lengths, lengths),
        model.spec.inputs,
    )


@packed_once()
@torch.inference_mode()
def score(
    sarm: Sarm,
    store: FrameStore,
    rows: np.ndarray,
    heads: Sequence[str],
    batch_size: int = 256,
    quiet: bool = True,
    text: torch.Tensor | None = None,
    precision: Precision = "fp32",
) -> dict[str, Scores]:
    """Predict stage, τ and φ of the frames `rows` (n,) with each of `heads`; `text` (E,) is said instead of their tasks.

    precision: of the transformers' matrix products.
    """
    window, parts = sarm.spec.window, {head: [] for head in heads}
    device = next(sarm.parameters()).device
    sarm.eval()
    for first in bar(range(0, len(rows), batch_size), desc="scoring", unit="batch", quiet=quiet):
        batch = rows[first : first + batch_size]
        start, length = store.start[batch], store.length[batch]
        frames = window.observed(batch - start, length) + start[:, None]
        said = store.task_texts(batch) if text is None else text.expand(len(batch), -1)
        windows = store.gather(frames, np.full(len(batch), window.length), said).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            predictions = sarm.predict(windows, heads, window.position)
        for head, (probabilities, stage, tau) in predictions.items():
            columns = probabilities.float(), stage, tau.float()
            parts[head].append([tensor[:, 0].cpu().numpy() for tensor in columns])
    found = {}
    for head, columns in parts.items():
        probabilities, stage, tau = (np.concatenate(column) for column in zip(*columns, strict=True))
        phi = progress(stage, tau, np.array(sarm.spec.proportions[head]))
        found[head] = Scores(phi, stage, tau, probabilities)
    return found


def score_episodes(
    sarm: Sarm,
    store: FrameStore,
    episodes: Sequence[Episode],
    heads: Sequence[str],
    stride: int = 1,
    batch_size: int = 256,
    quiet: bool = True,
    text: torch.Tensor | None = None,
    precision: Precision = "fp32",
) -> dict[tuple[int, str], Scores]:
    """Scores of every frame of some episodes, by episode and head.

    With a `stride`, every n-th and the last frame of an episode are predicted and the rest is interpolated (φ, τ and
    probabilities linearly, the stage from the nearest predicted frame).
    """
    found = {}
    for block in blocks(episodes):
        asked = [np.unique(np.append(np.arange(0, e.length, stride), e.length - 1)) for e in block]
        rows = np.concatenate([episode.row + frames for episode, frames in zip(block, asked, strict=True)])
        ends = np.cumsum([len(frames) for frames in asked])
        for head, of_all in score(sarm, store, rows, heads, batch_size, quiet, text, precision).items():
            for episode, frames, end in zip(block, asked, ends, strict=True):
                mine = Scores(*(getattr(of_all, field.name)[end - len(frames) : end] for field in fields(Scores)))
                found[episode.index, head] = mine if stride == 1 else _interpolated(mine, frames, episode.length)
    return found


def blocks(episodes: Sequence[Episode], frames: int = BLOCK) -> list[list[Episode]]:
    """Episodes in order, in blocks of at least so many frames. A batch never crosses a block, so that scores are the same
    to the bit however many processes, of as many threads each, share the blocks."""
    found, room = [], 0
    for episode in episodes:
        if room <= 0:
            found.append([])
            room = frames
        found[-1].append(episode)
        room -= episode.length
    return found


def _interpolated(scores: Scores, asked: np.ndarray, length: int) -> Scores:
    """Scores of frames `asked` (n,), spread over all `length` frames."""
    frames = np.arange(length)
    nearest = np.searchsorted((asked[1:] + asked[:-1]) / 2, frames)
    line = lambda values: np.interp(frames, asked, values).astype(np.float32)  # noqa: E731
    probabilities = np.stack([line(column) for column in scores.probabilities.T], axis=1)
    return Scores(line(scores.progress), scores.stage[nearest], line(scores.tau), probabilities)


def errors(
    scores: dict[tuple[int, str], Scores], labels: Labels, episodes: list[Episode], heads: tuple[str, ...]
) -> pd.DataFrame:
    """Mean squared error of φ against the target, a row an episode and a column a head."""
    table = {
        h: [float(np.mean((scores[e.index, h].progress - labels.progress(e, h)) ** 2)) for e in episodes] for h in heads
    }
    return pd.DataFrame(table, index=pd.Index([e.index for e in episodes], name="episode"))


def ensure_progress(
    path: Path, params, dataset: Dataset, embeddings: Embeddings, model: RewardModel, reward_model_path: str
) -> str:
    """Make `path` the progress of `dataset` by `model`, unless it is that already. Returns which it was, in words.

    Several processes (`sarm_lib.launch`) share the blocks of episodes; a block that is done is kept, so that a stopped run
    goes on.
    """
    heads = model.spec.heads if params.rabc.head_mode == "both" else (params.rabc.head_mode,)
    if not set(heads) <= set(model.spec.heads):
        raise ValueError(
            f"rabc.head_mode: {reward_model_path} has no {heads[0]} head, only {', '.join(model.spec.heads)}"
        )
    provenance = {
        "reward_model_path": reward_model_path,
        "checkpoint": model.checkpoint,
        "fingerprint": embeddings.fingerprint,
        "encoder_identity": embeddings.encoder_identity,
        "episodes": [episode.index for episode in dataset.episodes],
        "heads": list(heads),
        "stride": params.rabc.stride,
        "precision": params.rabc.precision,
        "code": code_digest("progress"),
    }
    if path.exists() and read_provenance(path) == provenance:
        return f"kept the progress of {dataset.num_frames:,} frames that this model gave before"
    store = frame_store(dataset, embeddings, model)
    stride, batch_size = params.rabc.stride, params.rabc.batch_size
    processes = share(next(model.sarm.parameters()).device)
    work, todo = params.paths.write(f"work/progress-{digest(provenance)}"), list(enumerate(blocks(dataset.episodes)))
    mine = todo[processes.process_index :: processes.num_processes]
    for number, block in bar(mine, desc="scoring", unit="block"):
        if (work / f"{number}.npz").exists():
            continue
        scores = score_episodes(model.sarm, store, block, heads, stride, batch_size, precision=params.rabc.precision)
        found = {head: np.concatenate([scores[e.index, head].progress for e in block]) for head in heads}
        with staged(work / f"{number}.npz") as partial, partial.open("wb") as file:
            np.savez(file, **found)
    processes.wait_for_everyone()
    if processes.is_main_process:
        whole = {head: np.full(dataset.num_frames, np.nan, dtype=np.float32) for head in heads}
        for number, block in todo:
            rows = slice(block[0].rows.start, block[-1].rows.stop)
            with np.load(work / f"{number}.npz") as part:  # which holds its file open until it is closed
                for head in heads:
                    whole[head][rows] = part[head]
        write_progress(path, dataset, whole, provenance)
        remove(work)
    processes.wait_for_everyone()
    return f"scored {dataset.num_frames:,} frames"


def without_gaps(phi: np.ndarray, episode_index: np.ndarray) -> np.ndarray:
    """φ (N,) for pictures: frames that a file of LeRobot's says nothing of lie on the line between their neighbours in the
    episode; 0 where it says nothing of the whole episode."""
    filled = phi.copy()
    for episode in np.unique(episode_index[~np.isfinite(phi)]):
        rows = np.flatnonzero(episode_index == episode)
        known = np.isfinite(phi[rows])
        filled[rows] = np.interp(rows, rows[known], phi[rows[known]]) if known.any() else 0.0
    return filled


def write_progress(path: Path, dataset: Dataset, progress_of: dict[str, np.ndarray], provenance: dict) -> None:
    """Write `sarm_progress.parquet`. provenance: `reward_model_path` and whatever else made the values.

    Raises ValueError for a value that is not finite: no NaN ever becomes a weight.
    """
    frames = dataset.frames
    table = {name: pa.array(frames[name].to_numpy(), pa.int64()) for name in ("index", "episode_index", "frame_index")}
    for head, values in progress_of.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            where = frames.iloc[bad[0]]
            raise ValueError(
                f"progress of {len(bad)} frames is not finite, first in episode {int(where.episode_index)} at frame "
                f"{int(where.frame_index)}: look at its state and embedding (notebook 00)"
            )
        table[f"progress_{head}"] = pa.array(values, pa.float32())
    metadata = {
        b"reward_model_path": str(provenance["reward_model_path"]).encode(),
        PARQUET_KEY: json.dumps(provenance, sort_keys=True).encode(),
    }
    with staged(path) as partial:
        pq.write_table(pa.table(table).replace_schema_metadata(metadata), partial)
