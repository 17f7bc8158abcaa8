"""The reward model's checkpoint, in LeRobot's format where LeRobot can compute the model.

A model that LeRobot can express (centred window, one camera, 512-wide features) is saved as type `sarm`, with the keys
and the configuration of `SARMRewardModel`; any other carries the type `sarm_lib`, which LeRobot refuses. Beside it lies
`sarm_lib.json`: encoder, state statistics, dataset and window, so that a model is always fed with its own.
"""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from sarm_lib.artifacts import (
    PROVENANCE,
    REWARD_MODEL,
    checkpoint_digest,
    read_json,
    staged,
    write_json,
    write_json_lines,
)
from sarm_lib.model import HEADS, Sarm, SarmSpec
from sarm_lib.windows import WindowSpec

WEIGHTS, CONFIG, OURS = REWARD_MODEL
LOG = "log.jsonl"
LAST = "last"
LEROBOT_WIDTH = 512
CLIP = "openai/clip-vit-base-patch32"  # LeRobot's only encoder


@dataclass(frozen=True)
class RewardModel:
    """A SARM with what it needs to score frames: its encoder's name and its own state statistics."""

    sarm: Sarm
    image_keys: tuple[str, ...]
    state_key: str
    state_mean: np.ndarray  # (S,)
    state_std: np.ndarray  # (S,)
    encoder: str
    encoder_identity: str | None  # LeRobot's checkpoints name neither this
    fingerprint: str | None  # nor the dataset they were trained on
    checkpoint: str | None = None  # digest of the files that it was loaded from
    made_from: dict = field(default_factory=dict)  # as they say it; LeRobot's do not

    @property
    def spec(self) -> SarmSpec:
        return self.sarm.spec

    def stages(self, head: str) -> dict[str, float]:
        """ᾱ of every stage of a head, by name and in order."""
        return dict(zip(self.spec.stage_names[head], self.spec.proportions[head], strict=True))

    def normalise(self, states: np.ndarray) -> np.ndarray:
        """(N, S) states in the units the model was trained with."""
        return ((states - self.state_mean) / (self.state_std + 1e-8)).astype(np.float32)


def save_reward_model(
    model: RewardModel, folder: Path, provenance: dict, log: list[dict], last: dict[str, Tensor] | None = None
) -> None:
    """Write the checkpoint folder in one move: the model, its training log and, in `last/`, the weights of the last step
    as a checkpoint of their own."""
    with staged(folder) as partial:
        _write(model, partial, model.sarm.state_dict())
        if last is not None:
            _write(model, partial / LAST, last)
        write_json_lines(partial / LOG, log)
        write_json(partial / PROVENANCE, provenance)


def _write(model: RewardModel, folder: Path, weights: dict[str, Tensor]) -> None:
    folder.mkdir()
    save_file({k: v.contiguous().cpu() for k, v in weights.items()}, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors writes 0600
    if expressible(model.spec):
        _lerobot_config(model).save_pretrained(folder)
    else:
        write_json(folder / CONFIG, {"type": "sarm_lib"})
    ours = {
        "spec": asdict(model.spec),
        "image_keys": model.image_keys,
        "state_key": model.state_key,
        "state_mean": [float(x) for x in model.state_mean],
        "state_std": [float(x) for x in model.state_std],
        "encoder": model.encoder,
        "encoder_identity": model.encoder_identity,
        "fingerprint": model.fingerprint,
    }
    write_json(folder / OURS, ours)


def load_reward_model(path: str | Path, device: str = "cpu") -> RewardModel:
    """Load a checkpoint of ours or of LeRobot's from a folder or the Hub.

    Raises FileNotFoundError for a folder without one, ValueError for what is no SARM, RuntimeError for keys that do not match.
    """
    folder = _locate(path)
    if not (folder / WEIGHTS).exists() or not (folder / CONFIG).exists():
        raise FileNotFoundError(f"{path} holds no {WEIGHTS} and {CONFIG}: not a reward model")
    model = _described(folder) if (folder / OURS).exists() else _from_lerobot(folder)
    model.sarm.load_state_dict(load_file(folder / WEIGHTS), strict=True)
    model.sarm.to(device).eval()
    made_from = read_json(folder / PROVENANCE) if (folder / PROVENANCE).exists() else {}
    return replace(model, checkpoint=checkpoint_digest(folder), made_from=made_from)


def _locate(path: str | Path) -> Path:
    """A local folder, or the files of a Hub repository."""
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))


def _described(folder: Path) -> RewardModel:
    """An empty model as `sarm_lib.json` describes it."""
    ours = read_json(folder / OURS)
    spec = {"inputs": SarmSpec.inputs, **ours["spec"], "window": WindowSpec(**ours["spec"]["window"])}
    spec["inputs"] = tuple(spec["inputs"])
    return RewardModel(
        Sarm(SarmSpec(**spec)),
        tuple(ours["image_keys"]),
        ours["state_key"],
        np.array(ours["state_mean"], dtype=np.float32),
        np.array(ours["state_std"], dtype=np.float32),
        ours["encoder"],
        ours["encoder_identity"],
        ours["fingerprint"],
    )


def _from_lerobot(folder: Path) -> RewardModel:
    """An empty model as LeRobot's configuration and, for the state's statistics, its saved preprocessor describe it.

    Where no preprocessor lies beside the model the states are taken as they are, as LeRobot does then.
    """
    config = read_json(folder / CONFIG)
    if config.get("type") != "sarm":
        raise ValueError(f"{folder}: a model of type {config.get('type')!r}, not a SARM")
    heads = HEADS if config["annotation_mode"] != "single_stage" else ("sparse",)
    spec = SarmSpec(
        window=WindowSpec("centred", config["n_obs_steps"], config["frame_gap"], config["max_rewind_steps"]),
        stage_names={head: config[f"{head}_subtask_names"] for head in heads},
        proportions={head: config[f"{head}_temporal_proportions"] for head in heads},
        annotation_mode=config["annotation_mode"],
        **{
            name: config[name]
            for name in ("image_dim", "text_dim", "max_state_dim", "hidden_dim", "num_heads", "num_layers", "dropout")
        },
    )
    mean, std, key = np.zeros(1, np.float32), np.ones(1, np.float32), config["state_key"]
    for path in sorted(folder.glob("*normalizer_processor.safetensors")):
        statistics = load_file(path)
        if f"{key}.mean" in statistics and f"{key}.std" in statistics:
            mean, std = (statistics[f"{key}.{name}"].numpy().astype(np.float32) for name in ("mean", "std"))
    return RewardModel(Sarm(spec), (config["image_key"],), key, mean, std, CLIP, None, None)


def reward_model_of(params, device: str) -> tuple[RewardModel, str]:
    """The reward model that stages 04 and 05 score with, and its path as the progress file names it."""
    if named := params.rabc.reward_model_path:
        folder = params.paths.resolve(named)
        return load_reward_model(folder if folder.exists() else named, device), named
    folder = params.paths.read("sarm", "03_train_sarm")
    return load_reward_model(folder, device), os.path.relpath(folder, params.paths.root)


def expressible(spec: SarmSpec) -> bool:
    """Whether LeRobot's SARM can compute what this model computes."""
    widths = {spec.image_dim, spec.text_dim}
    whole = len(spec.inputs) == 2 and spec.num_cameras == 1 and widths == {LEROBOT_WIDTH}
    return whole and spec.window.kind == "centred"


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
