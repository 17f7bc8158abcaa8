"""Progress while the robot moves: one observation in, φ and stage out, in constant time and memory.

For models of a `past` window, which needs no future. `OnlineScorer` gives what stage 05 gives of the same frames;
`ProgressReward` makes of it a dense reward for reinforcement learning.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from torch import Tensor

from sarm_lib.checkpoint import RewardModel
from sarm_lib.encoder import Encoder
from sarm_lib.kernels import Packed, packed_once
from sarm_lib.stages import progress
from sarm_lib.windows import Windows, pad_state


class Progress(NamedTuple):
    """What one head says of the current frame. probabilities: (K,) of the stages."""

    progress: float  # φ in [0, 1]
    stage: str
    tau: float
    probabilities: np.ndarray


class OnlineScorer:
    """Scores an episode frame by frame, at the frame rate that the model was trained at.

    Remembers the first frame and as many of the last ones as the window spans. Raises ValueError for a model that needs
    frames of the future, or whose embeddings come from another encoder.
    """

    def __init__(self, model: RewardModel, encoder: Encoder, task: str) -> None:
        window = model.spec.window
        if window.kind != "past":
            raise ValueError(
                f"a {window.kind} window looks ahead: for progress while the robot moves train with sarm.window: past"
            )
        if model.encoder_identity and model.encoder_identity != encoder.identity:
            raise ValueError(f"the reward model was trained on embeddings of {model.encoder}, not of {encoder.name}")
        self.model, self.encoder = model, encoder
        self._packed = Packed(float32=True)
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=(window.n_obs_steps - 1) * window.frame_gap + 1)
        self.reset(task)

    def reset(self, task: str | None = None) -> None:
        """Begin an episode, of another task where one is named."""
        if task is not None:
            self._text = self.encoder.texts([task])
        self._recent.clear()
        self._first: tuple[Tensor, Tensor] | None = None
        self._frame = -1

    @torch.inference_mode()
    def step(self, images: Mapping[str, np.ndarray], state: np.ndarray) -> dict[str, Progress]:
        """What each head says of the next frame.

        images: (H, W, 3) uint8 of every camera in `model.image_keys`. state: (S,) as the dataset has it.
        """
        missing = [key for key in self.model.image_keys if key not in images]
        if missing:
            raise ValueError(f"no image of {', '.join(missing)}; there are {', '.join(images)}")
        spec, sarm = self.model.spec, self.model.sarm.eval()
        embeddings = torch.cat([self.encoder.images(np.asarray(images[key])[None]) for key in self.model.image_keys])
        normalised = self.model.normalise(np.asarray(state, dtype=np.float32)[None])[0]
        self._recent.append((embeddings, pad_state(torch.from_numpy(normalised), spec.max_state_dim)))
        self._first, self._frame = self._first or self._recent[-1], self._frame + 1

        window = spec.window.observed(np.array([self._frame]), np.array([self._frame + 1]))[0]
        oldest = self._frame + 1 - len(self._recent)
        seen = [self._recent[frame - oldest] if frame >= oldest else self._first for frame in window]
        images_seen, states = (torch.stack(part) for part in zip(*seen, strict=True))
        device = next(sarm.parameters()).device
        shown = Windows(images_seen.transpose(0, 1)[None], self._text, states[None], torch.tensor([len(window)]))
        shown = shown.showing(spec.inputs).to(device)
        found = {}
        with packed_once(self._packed):
            predictions = sarm.predict(shown, spec.heads, spec.window.position)
        for head, prediction in predictions.items():
            probabilities, stage, tau = (tensor[0, 0].cpu().numpy() for tensor in prediction)
            phi = progress(stage[None], tau[None], np.array(spec.proportions[head]))[0]
            found[head] = Progress(float(phi), spec.stage_names[head][int(stage)], float(tau), probabilities)
        return found


Observe = Callable[[Any], tuple[Mapping[str, np.ndarray], np.ndarray]]


class ProgressReward(gymnasium.Wrapper):
    """Adds the gain in progress to an environment's reward:

        r'_t = r_t + weight · (discount · φ_{t+1} - φ_t)

    With the learner's own discount this is potential-based shaping (Ng et al., 1999), except that the progress of the last
    frame stays with the learner: a reward for how far it came.
    `info["sarm"]` holds what every head says. The environment has to step at the model's frame rate.

    observe: the images (a camera's name: (H, W, 3) uint8) and the state (S,) of an observation. head: whose progress
    counts; the finest if not said.
    """

    def __init__(
        self,
        env: gymnasium.Env,
        scorer: OnlineScorer,
        observe: Observe,
        weight: float = 1.0,
        discount: float = 1.0,
        head: str | None = None,
    ) -> None:
        super().__init__(env)
        self.scorer, self.observe, self.weight, self.discount = scorer, observe, weight, discount
        self.head = head or scorer.model.spec.heads[-1]

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(**options)
        self.scorer.reset()
        return observation, info | self._score(observation)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        before, found = self._progress, self._score(observation)
        shaped = float(reward) + self.weight * (self.discount * self._progress - before)
        return observation, shaped, terminated, truncated, info | found

    def _score(self, observation: Any) -> dict[str, dict[str, Progress]]:
        found = self.scorer.step(*self.observe(observation))
        self._progress = found[self.head].progress
        return {"sarm": found}
