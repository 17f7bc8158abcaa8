"""`demo.environment:AssemblyEnv` for `lerobot-eval`."""

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from demo.environment import CAMERAS, AssemblyEnv
from demo.simulator import FPS, IMAGE_SIZE, TASK


def _features() -> dict[str, PolicyFeature]:
    return {
        ACTION: PolicyFeature(FeatureType.ACTION, AssemblyEnv.action_space.shape),
        "agent_pos": PolicyFeature(FeatureType.STATE, AssemblyEnv.observation_space["agent_pos"].shape),
        **{f"pixels/{camera}": PolicyFeature(FeatureType.VISUAL, (IMAGE_SIZE, IMAGE_SIZE, 3)) for camera in CAMERAS},
    }


def _names() -> dict[str, str]:
    return {
        ACTION: ACTION,
        "agent_pos": OBS_STATE,
        **{f"pixels/{camera}": f"{OBS_IMAGES}.{camera}" for camera in CAMERAS},
    }


@EnvConfig.register_subclass("assembly")
@dataclass
class AssemblyEnvConfig(EnvConfig):
    """`demo.environment:AssemblyEnv` for `lerobot-eval`: the seeds are those of `evaluate`."""

    task: str | None = TASK
    fps: int = FPS
    features: dict[str, PolicyFeature] = field(default_factory=_features)
    features_map: dict[str, str] = field(default_factory=_names)

    @property
    def gym_id(self) -> str:
        return "demo/Assembly-v0"

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        return {}


gymnasium.register(AssemblyEnvConfig().gym_id, AssemblyEnv)
