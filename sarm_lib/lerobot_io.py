"""Our artifacts in LeRobot's formats: the annotated dataset and the reward model's checkpoint.

A model that LeRobot can express (centred window, one camera, 512-wide features) is saved as type `sarm`, with the keys
and the configuration of `SARMRewardModel`; any other carries the type `sarm_lib`, which LeRobot refuses. Beside it lies
`sarm_lib.json`: encoder, state statistics, dataset and window, so that a model is always fed with its own.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file, save_file

from sarm_lib.annotations import Annotation, Segment, columns
from sarm_lib.artifacts import PROVENANCE, file_digest, read_json, staged, write_json
from sarm_lib.dataset import ANNOTATION_MARK, Dataset
from sarm_lib.model import HEADS, Sarm, SarmSpec
from sarm_lib.stages import Labels, targets
from sarm_lib.windows import WindowSpec

WEIGHTS = "model.safetensors"
OURS = "sarm_lib.json"
LEROBOT_WIDTH = 512
MEDIA = ("data", "videos", "images")


# --- the annotated dataset ------------------------------------------------------------------------------------------


def write_annotated_dataset(
    dataset: Dataset, annotations: list[Annotation], proportions: dict[str, dict[str, float]], target: Path
) -> None:
    """Write `target`: a LeRobot dataset with annotation columns and proportions, whose videos are links.

    proportions: a head: {subtask: ᾱ} in stage order.
    """
    table_columns = columns(annotations, dataset, tuple(proportions))
    with staged(target / "meta") as partial:
        shutil.copytree(dataset.root / "meta", partial)
        for path in partial.glob("temporal_proportions_*.json"):
            path.unlink()  # of annotations that the source carried
        for path in sorted(partial.glob("episodes/**/*.parquet")):
            pq.write_table(_with_columns(pq.read_table(path), table_columns), path)
        for head, shares in proportions.items():
            # LeRobot reads the order of the stages from the order of the keys: not sorted.
            (partial / f"temporal_proportions_{head}.json").write_text(json.dumps(shares, indent=2) + "\n")
    link_media(dataset.root, target)


def link_media(source: Path, target: Path) -> None:
    """Link data, videos and images of `source` into `target` (DVC keeps only `target/meta`)."""
    target.mkdir(parents=True, exist_ok=True)
    for name in MEDIA:
        link = target / name
        if link.is_symlink():
            link.unlink()
        if (source / name).is_dir():
            link.symlink_to(os.path.relpath((source / name).resolve(), target.resolve()), target_is_directory=True)


def _with_columns(table: pa.Table, added: dict[str, list]) -> pa.Table:
    """The rows of one episode file with their own annotations: rows are matched by episode index, not by position."""
    rows = table["episode_index"].to_pylist()
    table = table.drop_columns([name for name in table.column_names if ANNOTATION_MARK in name])
    for name, values in added.items():
        assert ANNOTATION_MARK in name
        item = pa.string() if name.endswith("names") else pa.float64() if "times" in name else pa.int64()
        column = pa.array([values[row] for row in rows], pa.list_(item))
        table = table.append_column(name, column)
    return table


def read_labels(folder: Path, dataset: Dataset, heads: tuple[str, ...]) -> Labels:
    """Targets of every frame of `dataset` from an annotated dataset's columns and proportions.

    Frames of an episode without annotation have stage 0 and τ 0 and are not in `annotated`.
    Raises ValueError with the episode and the subtask where an annotation names an unknown one.
    """
    files = sorted((folder / "meta").glob("episodes/**/*.parquet"))
    stage, tau, names, shares = {}, {}, {}, {}
    annotated = {episode.index for episode in dataset.episodes}
    for head in heads:
        proportions = json.loads((folder / f"meta/temporal_proportions_{head}.json").read_text())
        names[head], shares[head] = list(proportions), list(proportions.values())
        stage[head] = np.zeros(dataset.num_frames, dtype=np.int64)
        tau[head] = np.zeros(dataset.num_frames, dtype=np.float32)
        columns = [f"{head}_subtask_{name}" for name in ("names", "start_frames", "end_frames")]
        rows = {
            r["episode_index"]: r
            for f in files
            for r in pq.read_table(f, columns=["episode_index", *columns]).to_pylist()
        }
        for episode in dataset.episodes:
            subtasks, starts, ends = (rows[episode.index][column] for column in columns)
            if not subtasks:
                annotated.discard(episode.index)
                continue
            unknown = set(subtasks) - set(names[head])
            if unknown:
                raise ValueError(
                    f"episode {episode.index}: {head} subtask {sorted(unknown)[0]!r} is not one of {', '.join(names[head])}"
                )
            segments = tuple(map(Segment, subtasks, starts, ends))
            stage[head][episode.rows], tau[head][episode.rows] = targets(segments, names[head], episode.length)
    return Labels(stage, tau, names, shares, frozenset(annotated))


# --- the reward model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardModel:
    """A SARM with what it needs to score frames: its encoder's name and its own state statistics."""

    sarm: Sarm
    image_keys: tuple[str, ...]
    state_key: str
    state_mean: np.ndarray  # (S,)
    state_std: np.ndarray  # (S,)
    encoder: str | None  # None in a LeRobot checkpoint, which always means openai/clip-vit-base-patch32
    encoder_identity: str | None
    fingerprint: str | None  # of the dataset it was trained on

    @property
    def spec(self) -> SarmSpec:
        return self.sarm.spec

    def normalise(self, states: np.ndarray) -> np.ndarray:
        """(N, S) states in the units the model was trained with."""
        return ((states - self.state_mean) / (self.state_std + 1e-8)).astype(np.float32)


def save_reward_model(model: RewardModel, folder: Path, provenance: dict, curve: list[dict]) -> None:
    """Write the checkpoint folder, with its learning curve, in one move."""
    spec = model.spec
    with staged(folder) as partial:
        partial.mkdir()
        save_file({k: v.contiguous().cpu() for k, v in model.sarm.state_dict().items()}, partial / WEIGHTS)
        if expressible(spec):
            _lerobot_config(model).save_pretrained(partial)
        else:
            write_json(partial / "config.json", {"type": "sarm_lib"})
        ours = {
            "spec": asdict(spec),
            "image_keys": model.image_keys,
            "state_key": model.state_key,
            "state_mean": [float(x) for x in model.state_mean],
            "state_std": [float(x) for x in model.state_std],
            "encoder": model.encoder,
            "encoder_identity": model.encoder_identity,
            "fingerprint": model.fingerprint,
        }
        write_json(partial / OURS, ours)
        write_json(partial / "curve.json", curve)
        write_json(partial / PROVENANCE, provenance)


def load_reward_model(folder: Path, device: str = "cpu") -> RewardModel:
    """Load one of our checkpoints. Raises FileNotFoundError or RuntimeError (keys that do not match)."""
    if not (folder / OURS).exists():
        raise FileNotFoundError(f"{folder} holds no {OURS}: not a reward model of stage 03_train_sarm")
    ours = read_json(folder / OURS)
    spec = SarmSpec(**{**ours["spec"], "window": WindowSpec(**ours["spec"]["window"])})
    sarm = Sarm(spec)
    sarm.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    return RewardModel(
        sarm.to(device).eval(),
        tuple(ours["image_keys"]),
        ours["state_key"],
        np.array(ours["state_mean"], dtype=np.float32),
        np.array(ours["state_std"], dtype=np.float32),
        ours["encoder"],
        ours["encoder_identity"],
        ours["fingerprint"],
    )


def reward_model_of(params, device: str) -> tuple[RewardModel, str]:
    """The reward model that stage 05 scores with, and its path as the progress file names it."""
    if params.rabc.reward_model_path:
        folder = params.paths.resolve(params.rabc.reward_model_path)
        return load_reward_model(folder, device), params.rabc.reward_model_path
    folder = params.paths.read("sarm", "03_train_sarm")
    return load_reward_model(folder, device), os.path.relpath(folder, params.paths.root)


def checkpoint_digest(folder: Path) -> str:
    """Names a reward model by its weights and what surrounds them."""
    return file_digest(folder / WEIGHTS)[:16]


def expressible(spec: SarmSpec) -> bool:
    """Whether LeRobot's SARM can compute what this model computes."""
    widths = {spec.image_dim, spec.text_dim}
    return spec.window.kind == "centred" and spec.num_cameras == 1 and widths == {LEROBOT_WIDTH}


def _lerobot_config(model: RewardModel):
    from lerobot.rewards.sarm.configuration_sarm import SARMConfig  # takes LeRobot ten seconds to load

    spec = model.spec
    stages = {head: spec.stage_names.get(head) for head in HEADS}
    return SARMConfig(
        annotation_mode=spec.annotation_mode,
        n_obs_steps=spec.window.n_obs_steps,
        frame_gap=spec.window.frame_gap,
        max_rewind_steps=spec.window.max_rewind_steps,
        image_dim=spec.image_dim,
        text_dim=spec.text_dim,
        hidden_dim=spec.hidden_dim,
        num_heads=spec.num_heads,
        num_layers=spec.num_layers,
        max_state_dim=spec.max_state_dim,
        dropout=spec.dropout,
        num_sparse_stages=spec.num_stages("sparse"),
        sparse_subtask_names=stages["sparse"],
        sparse_temporal_proportions=spec.proportions["sparse"],
        num_dense_stages=len(stages["dense"]) if stages["dense"] else None,
        dense_subtask_names=stages["dense"],
        dense_temporal_proportions=spec.proportions.get("dense"),
        image_key=model.image_keys[0],
        state_key=model.state_key,
        device="cpu",  # a checkpoint loads on any machine
    )
