"""The simulator behind LeRobot's interface of a real robot, for `lerobot-rollout`.

It moves by one frame an action, has nothing to calibrate, and goes on after success: LeRobot stops it when the time is over.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from demo.environment import CAMERAS, AssemblyEnv
from demo.simulator import IMAGE_SIZE

STATE = ("x.pos", "y.pos", "z.pos", "gripper.pos")  # LeRobot passes on what is named a position or a velocity
MOTION = ("x.vel", "y.vel", "z.vel", "gripper.vel")


@RobotConfig.register_subclass("assembly")
@dataclass
class AssemblyRobotConfig(RobotConfig):
    """seed: where the peg stands."""

    seed: int = 0


class AssemblyRobot(Robot):
    """The simulated robot as `lerobot-rollout` drives a real one, without anything to calibrate."""

    config_class, name = AssemblyRobotConfig, "assembly"

    def __init__(self, config: AssemblyRobotConfig) -> None:
        super().__init__(config)
        self.seed, self.env, self.seen = config.seed, None, None
        self.cameras = dict.fromkeys(CAMERAS)
        self.success = False

    @property
    def observation_features(self) -> dict[str, Any]:
        return {**dict.fromkeys(STATE, float), **dict.fromkeys(CAMERAS, (IMAGE_SIZE, IMAGE_SIZE, 3))}

    @property
    def action_features(self) -> dict[str, type]:
        return dict.fromkeys(MOTION, float)

    @property
    def is_connected(self) -> bool:
        return self.env is not None

    @property
    def is_calibrated(self) -> bool:
        return True

    def calibrate(self) -> None:
        pass

    def configure(self) -> None:
        pass

    def connect(self, calibrate: bool = True) -> None:
        self.env = AssemblyEnv()
        self.seen, _ = self.env.reset(seed=self.seed)

    def get_observation(self) -> dict[str, Any]:
        state = map(float, self.seen["agent_pos"])
        return {**dict(zip(STATE, state, strict=True)), **{c: self.seen["pixels"][c] for c in CAMERAS}}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        self.seen, *_, info = self.env.step(np.array([action[name] for name in MOTION], dtype=np.float32))
        self.success |= info["is_success"]
        return action

    def disconnect(self) -> None:
        print("The nut is on the peg." if self.success else "The nut is not on the peg.")
        self.env.close()
        self.env = None
