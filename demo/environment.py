"""The demo's robot as a Gymnasium environment, for policies trained on the demo: `demo.environment:AssemblyEnv`.

Observations carry LeRobot's names: `pixels` (a picture of each camera) and `agent_pos`. A picture is rendered when it is
looked at, because a policy that acts in chunks looks at few, and rendering is most of a rollout's cost.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np

from demo.demonstrations import MAX_FRAMES
from demo.simulator import FPS, IMAGE_SIZE, TASK, AssemblySimulator

CAMERAS = ("front", "wrist")


class Pixels(Mapping):
    """Both cameras' pictures of the present moment, (128, 128, 3) uint8, rendered when the first of them is read."""

    def __init__(self, sim: AssemblySimulator) -> None:
        self._sim, self._views = sim, None

    def __getitem__(self, camera: str) -> np.ndarray:
        if self._views is None:
            if self._sim is None:
                raise RuntimeError("the simulator has moved on: look at the pictures before the next step")
            self._views = self._sim.render()
        return self._views[camera]

    def __iter__(self) -> Iterator[str]:
        return iter(CAMERAS)

    def __len__(self) -> int:
        return len(CAMERAS)

    def expire(self) -> None:
        """The moment is over; what was not looked at can no longer be."""
        self._sim = None


class AssemblyEnv(gymnasium.Env):
    """Meta-World's `assembly-v3` at 40 Hz. The seed places the peg; an episode ends at success or after 140 frames.

    reward 1 at success, else 0; `info["is_success"]` as LeRobot expects it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012  (Gymnasium's own form)
    render_mode = "rgb_array"
    task = task_description = TASK  # LeRobot asks for both
    observation_space = gymnasium.spaces.Dict(
        {
            "pixels": gymnasium.spaces.Dict(
                {c: gymnasium.spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8) for c in CAMERAS}
            ),
            "agent_pos": gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32),
        }
    )
    action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)
    _max_episode_steps = MAX_FRAMES

    def __init__(self) -> None:
        self.sim = AssemblySimulator()
        self._pixels: Pixels | None = None

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self.sim.reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        self._frame = 0
        return self._observe(), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.sim.step(action)
        self._frame += 1
        success = self.sim.scene().success
        truncated = not success and self._frame >= self._max_episode_steps - 1  # the first frame counts too
        return self._observe(), float(success), success, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        return np.concatenate([self._pixels[camera] for camera in CAMERAS], axis=1)

    def _observe(self) -> dict[str, Any]:
        if self._pixels is not None:
            self._pixels.expire()
        self._pixels = Pixels(self.sim)
        return {"pixels": self._pixels, "agent_pos": self.sim.observe()}
