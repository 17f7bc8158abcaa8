"""The demo's robot: Meta-World `assembly-v3` at 40 Hz, two cameras, and the simulator's truth about every frame.

The truth (stage, progress, success) is read from the simulator's own state: the positions of hand, nut and peg.
It is recorded in `sim.*` columns for scoring only; nothing in `sarm_lib` may learn from it.
"""

import ctypes.util
import os
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

TASK = "pick up the nut and place it on the peg"
FPS = 40
IMAGE_SIZE = 128
ENV_STEPS_PER_FRAME = 2  # Meta-World steps at 80 Hz; a recorded action is held for two steps

SPARSE_STAGES = ("pick up the nut", "place the nut on the peg")
DENSE_STAGES = (
    "reach the nut handle",
    "grasp the nut",
    "lift the nut",
    "carry the nut above the peg",
    "lower the nut onto the peg",
)
SPARSE_OF_DENSE = (0, 0, 0, 1, 1)

# Offsets of the benchmark's own expert: where the hand has to be, relative to the handle and to the peg (metres).
GRASP_OFFSET = np.array([-0.02, 0.0, 0.0])
PEG_OFFSET = np.array([0.12, 0.0, 0.14])
ALIGNED = 0.02  # xy error below which the expert goes down (handle) or lowers (peg)
HOVER = 0.12  # height of the hand over the handle from which the expert closes the gripper
CARRY_HEIGHT = 0.04  # height error to the carrying plane below which the expert starts to move sideways


@dataclass(frozen=True)
class Scene:
    """One instant of the simulator, in metres. `opening` is the gripper's normalised opening in [0, 1]."""

    hand: np.ndarray  # (3,)
    fingertips: np.ndarray  # (3,)
    handle: np.ndarray  # (3,)
    nut: np.ndarray  # (3,) centre of the ring
    peg: np.ndarray  # (3,) top of the peg
    opening: float
    success: bool

    @property
    def held(self) -> bool:
        """The handle is between the closed fingers."""
        near = np.linalg.norm(self.handle - self.fingertips) < 0.03
        return bool(near and not self.empty and self.opening < 0.7)

    @property
    def empty(self) -> bool:
        """The fingers have closed on nothing (on the handle they stop at about 0.45)."""
        return self.opening < 0.38

    @property
    def stage(self) -> int:
        """Index into `DENSE_STAGES`, from positions alone: a dropped nut takes the episode back to stage 0."""
        above_handle = np.linalg.norm((self.hand - self.handle - GRASP_OFFSET)[:2]) <= ALIGNED
        lifted = self.held and self.nut[2] > 0.03
        if self.success:
            return 4
        if not lifted:
            at_rest = self.handle[2] < 0.05  # not while the nut is falling
            return 1 if at_rest and above_handle and self.hand[2] - self.handle[2] <= HOVER else 0
        to_peg = self.hand - self.peg - PEG_OFFSET
        if np.linalg.norm(to_peg[:2]) <= ALIGNED:
            return 4
        return 3 if to_peg[2] > -CARRY_HEIGHT else 2

    @property
    def remaining(self) -> float:
        """What is left to do in the current stage, as a distance relative to the whole stage (about 1 down to 0)."""
        to_handle, to_peg = self.hand - self.handle - GRASP_OFFSET, self.hand - self.peg - PEG_OFFSET
        if self.success:
            return 0.0
        if self.stage == 0:
            return float(np.linalg.norm(to_handle - [0, 0, 0.1])) / 0.14
        if self.stage == 1:
            closing = np.clip((self.opening - 0.45) / 0.55, 0, 1)
            return float(np.clip(to_handle[2] - 0.05, 0, None) / 0.07 + closing) / 2
        if self.stage == 2:
            return float(-to_peg[2] - CARRY_HEIGHT) / 0.13
        if self.stage == 3:
            start = self.peg[:2] + PEG_OFFSET[:2] - [0.11, 0.6]  # from where the nut is lifted
            return float(np.linalg.norm(to_peg[:2]) - ALIGNED) / float(np.linalg.norm(start) - ALIGNED)
        return float(self.nut[2] - self.peg[2]) / 0.1


class AssemblySimulator:
    """Meta-World's `assembly-v3` with a 40 Hz control loop and the demo's two cameras.

    `reset(seed)` places the peg; `observe()` reads the robot's own state, `scene()` the simulator's truth,
    `render()` both cameras (raises RenderingError where there is no OpenGL). Same seed and actions give the same states on the same machine.
    """

    def __init__(self) -> None:
        choose_gl()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE

        self.env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["assembly-v3-goal-observable"](seed=0)
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True  # the seed places the peg
        self.env.max_path_length = 10_000
        self._success = False

    def reset(self, seed: int) -> None:
        self.env.seed(seed)  # `reset(seed=)` is ignored by Meta-World
        self._raw, _ = self.env.reset()
        self._success = False

    def step(self, action: np.ndarray) -> None:
        """Hold `action` (xyz motion and gripper effort, each in [-1, 1]) for one frame of 1/40 s."""
        for _ in range(ENV_STEPS_PER_FRAME):
            self._raw, *_, info = self.env.step(np.clip(action, -1, 1))
        self._success = bool(info["success"])

    @property
    def expert_observation(self) -> np.ndarray:
        """The 39 numbers that the benchmark's expert acts on."""
        return self._raw

    def observe(self) -> np.ndarray:
        """`observation.state`, (4,) float32: hand position in metres and gripper opening."""
        return self._raw[:4].astype(np.float32)

    def scene(self) -> Scene:
        return Scene(
            hand=self._raw[:3].copy(),
            fingertips=self.env.tcp_center.copy(),
            handle=self._raw[4:7].copy(),
            nut=self.env._get_site_pos("RoundNut").copy(),
            peg=np.array(self.env._target_pos),
            opening=float(self._raw[3]),
            success=self._success,
        )

    @cached_property
    def _renderer(self):
        return _make_renderer(self.env.model)

    def render(self) -> dict[Literal["front", "wrist"], np.ndarray]:
        """Both cameras, each (128, 128, 3) uint8: a close-up of nut and peg, and a view that follows the hand."""
        views = {
            "front": (45, -25, 0.75, np.array([0.1, 0.7, 0.1])),
            "wrist": (100, -40, 0.38, self.env.tcp_center + [-0.06, 0.03, 0.0]),
        }
        return {name: self._render_view(*view) for name, view in views.items()}

    def _render_view(self, azimuth: float, elevation: float, distance: float, lookat: np.ndarray) -> np.ndarray:
        import mujoco

        camera = mujoco.MjvCamera()
        camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        camera.azimuth, camera.elevation, camera.distance = azimuth, elevation, distance
        camera.lookat[:] = lookat
        self._renderer.update_scene(self.env.data, camera)
        pixels = self._renderer.render().reshape(IMAGE_SIZE, 2, IMAGE_SIZE, 2, 3)
        return (pixels.mean(axis=(1, 3)) + 0.5).astype(np.uint8)  # 2x2 averages: cheap antialiasing


class RenderingError(RuntimeError):
    """The simulator cannot render here; the message says what to install."""


GL_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
NO_GL = (
    "Rendering the simulator needs OpenGL, and MUJOCO_GL={} does not work here ({}). On Debian or Ubuntu: apt-get install "
    "libegl1 libgl1-mesa-dri libgles2. Software rendering works too: MUJOCO_GL=osmesa with libosmesa6."
)


def choose_gl() -> None:
    """Choose MuJoCo's OpenGL backend before MuJoCo is first imported, which without its library raises.

    MUJOCO_GL is kept where it is set. Else Linux gets EGL or OSMesa, whichever is installed, and where neither is, none:
    then everything but rendering works. Raises RenderingError where MUJOCO_GL names a library that is not there.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower()
    if asked in GL_LIBRARIES and not _is_installed(asked):
        raise RenderingError(NO_GL.format(asked, f"lib{GL_LIBRARIES[asked]} is not installed"))
    if not asked and sys.platform == "linux":
        os.environ["MUJOCO_GL"] = next(filter(_is_installed, GL_LIBRARIES), "disabled")


def new_expert():
    """The benchmark's own expert: `get_action` takes `expert_observation`."""
    choose_gl()
    from metaworld.policies.sawyer_assembly_v3_policy import SawyerAssemblyV3Policy

    return SawyerAssemblyV3Policy()


def _is_installed(backend: str) -> bool:
    return ctypes.util.find_library(GL_LIBRARIES[backend]) is not None


def _make_renderer(model):
    """A MuJoCo renderer at twice the image size, without shadows and reflections (six times faster)."""
    import mujoco

    model.vis.quality.offsamples = 0
    try:
        renderer = mujoco.Renderer(model, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    except Exception as error:  # MuJoCo raises whatever its GL backend raises
        raise RenderingError(NO_GL.format(os.environ.get("MUJOCO_GL"), f"{type(error).__name__}: {error}")) from error
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return renderer
