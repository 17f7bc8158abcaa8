"""The reward model's checkpoint, in LeRobot's format where LeRobot can compute the model.

A model that LeRobot can express (centred window, one camera, 512-wide features) is saved as type `sarm`, with the keys
and the configuration of `SARMRewardModel`; any other carries the type `sarm_lib`, which LeRobot refuses. Beside it lies
`sarm_lib.json`: encoder, state statistics, dataset and window, so that a model is always fed with its own.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from sarm_lib.artifacts import PROVENANCE, file_digest, read_json, staged, write_json
from sarm_lib.model import HEADS, Sarm, SarmSpec
from sarm_lib.windows import WindowSpec

WEIGHTS = "model.safetensors"
OURS = "sarm_lib.json"
LEROBOT_WIDTH = 512


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
