"""Which frames a sample sees: the observation window around a frame, and the rewind appended to it in training.

A window is a row of frame indices within an episode, clamped to its bounds:

centred   t - n/2·g … t … t + n/2·g      the guide's: n = `n_obs_steps` beside the current frame, half of them ahead
past      0, t - (n-1)·g … t             the paper's: the first frame and n frames up to the current one, usable online

Rewind (training only) appends up to `max_rewind_steps` frames that walk back from the window's last frame, so that the
model sees progress being lost. Image, state and target of a position are always those of the same frame.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sarm_lib.encoder import Embeddings


@dataclass(frozen=True)
class WindowSpec:
    """Form of the observation window; `frame_gap` g is in frames."""

    kind: Literal["centred", "past"]
    n_obs_steps: int
    frame_gap: int
    max_rewind_steps: int

    @property
    def length(self) -> int:
        """Frames of the observation window, without the rewind."""
        return 1 + self.n_obs_steps

    @property
    def padded_length(self) -> int:
        return self.length + self.max_rewind_steps

    @property
    def position(self) -> int:
        """Where the current frame stands in the window: predictions are read there."""
        return self.n_obs_steps // 2 if self.kind == "centred" else self.n_obs_steps

    def observed(self, frames: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Windows of `frames` (B,) in episodes of `lengths` (B,): (B, 1 + n) frame indices within the episode."""
        steps = np.arange(self.length) - self.position
        window = frames[:, None] + steps * self.frame_gap
        if self.kind == "past":
            window[:, 0] = 0
        return np.clip(window, 0, lengths[:, None] - 1)

    def rewind_room(self, window: np.ndarray) -> np.ndarray:
        """How many rewind steps there is history for, (B,), given observed windows (B, 1 + n)."""
        return np.minimum(window[:, -1] // self.frame_gap, self.max_rewind_steps)

    def with_rewind(self, window: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Append `steps` (B,) rewind frames: padded windows (B, 1 + n + R) and their valid lengths (B,).

        Positions beyond the valid length repeat the first frame; no loss and no attention sees them.
        """
        back = window[:, -1:] - np.arange(1, self.max_rewind_steps + 1) * self.frame_gap
        back = np.where(np.arange(self.max_rewind_steps) < steps[:, None], back, 0)
        return np.concatenate([window, back], axis=1), self.length + steps

    # LeRobot's rewind, a defect to compare with: its images walk back from the current frame, its targets from before the
    # window.

    def lerobot_rewind_room(self, frames: np.ndarray) -> np.ndarray:
        """How many rewind steps LeRobot has history for, (B,): only before the whole window."""
        return np.clip((frames - self.position * self.frame_gap) // self.frame_gap, 0, self.max_rewind_steps)

    def with_lerobot_rewind(
        self, frames: np.ndarray, window: np.ndarray, steps: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Padded windows (B, 1 + n + R) of the frames that are seen and of those whose targets are learned, valid lengths."""
        back = np.arange(1, self.max_rewind_steps + 1) * self.frame_gap
        inside = np.arange(self.max_rewind_steps) < steps[:, None]
        seen, targets = (
            np.concatenate([window, np.where(inside, np.maximum(start[:, None] - back, 0), 0)], axis=1)
            for start in (frames, frames - self.position * self.frame_gap)
        )
        return seen, targets, self.length + steps


class Windows(NamedTuple):
    """A batch of B windows of T positions from C cameras."""

    images: Tensor  # (B, C, T, E) image embeddings
    text: Tensor  # (B, E) task embeddings
    state: Tensor  # (B, T, S) normalised, padded to `max_state_dim`
    lengths: Tensor  # (B,) valid positions

    def showing(self, inputs: tuple[str, ...]) -> "Windows":
        """The same with zeros in place of `images` or `state`, where a model is not shown them."""
        images = self.images if "images" in inputs else torch.zeros_like(self.images)
        return self._replace(images=images, state=self.state if "state" in inputs else torch.zeros_like(self.state))

    def to(self, device: torch.device) -> "Windows":
        return Windows(*(tensor.to(device, non_blocking=True) for tensor in self))

    @property
    def valid(self) -> Tensor:
        """(B, T) bool: positions that are not padding."""
        return torch.arange(self.images.shape[2], device=self.lengths.device) < self.lengths[:, None]


@dataclass(frozen=True)
class FrameStore:
    """Everything a window is gathered from, one row a frame of the dataset."""

    embeddings: Embeddings
    image_keys: tuple[str, ...]
    states: Tensor  # (N, S) normalised and padded
    task_index: np.ndarray  # (N,)
    start: np.ndarray  # (N,) first row of the frame's episode
    length: np.ndarray  # (N,) frames of the frame's episode
    inputs: tuple[str, ...] = ("images", "state")  # what a model is shown; the others are zeros

    def task_texts(self, rows: np.ndarray) -> Tensor:
        """Embeddings (B, E) of the tasks of frames `rows` (B,)."""
        return torch.from_numpy(self.embeddings.tasks[self.task_index[rows]])

    def gather(self, rows: np.ndarray, lengths: np.ndarray, text: Tensor) -> Windows:
        """Windows of dataset rows (B, T), of which `lengths` (B,) are valid, with texts (B, E)."""
        images, state = self.embeddings.gather(rows, self.image_keys), self.states[torch.from_numpy(rows)]
        return Windows(images, text, state, torch.from_numpy(lengths)).showing(self.inputs)


def pad_state(state: Tensor, width: int) -> Tensor:
    """Pad with zeros or truncate the last dimension to `width`."""
    return F.pad(state, (0, width - state.shape[-1]))  # negative padding truncates
