"""How a training run proceeds, of the reward model and of the policies alike: its learning rate, the average of its weights,
and what it will take."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth: the factor on the peak rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Average:
    """The moving average of the weights that are trained, which is what is kept and acts. decay: 0 keeps the last ones."""

    def __init__(self, trainable: list[nn.Parameter], decay: float) -> None:
        self.trainable, self.decay, self.updates = trainable, decay, 0
        self.kept = [p.detach().clone() for p in trainable] if decay else []

    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, self.updates / (self.updates + 9))  # the untrained weights are soon forgotten
        if self.kept:
            get_ema_multi_avg_fn(decay)(self.kept, self.trainable, self.updates)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the place of the weights that learn, and these in its place: no third copy is held."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, kept in zip(self.trainable, self.kept):
            live = parameter.detach().clone()
            parameter.copy_(kept)
            kept.copy_(live)

    def save_live(self, path: Path) -> None:
        """The weights that learn, beside a checkpoint that holds their average."""
        if self.kept:
            save_file({str(i): p.detach() for i, p in enumerate(self.trainable)}, path)

    @torch.no_grad()
    def resume(self, path: Path, step: int) -> None:
        """Take the weights in place for the average, and those of `path` for the ones that learn."""
        self.updates = step
        if self.kept:
            self.kept = [p.detach().clone() for p in self.trainable]
            live = load_file(path)
            for i, parameter in enumerate(self.trainable):
                parameter.copy_(live[str(i)])


@dataclass(frozen=True)
class Estimate:
    """What training will take, measured with a few steps that are thrown away."""

    parameters: int
    memory: float  # bytes: weights, gradients, AdamW's moments, the average of the weights, activations
    seconds_per_step: float
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, about {self.memory / 1e9:.1f} GB of memory, "
            f"{self.seconds_per_step:.2f} s a step: {self.seconds_per_step * self.steps / 60:.1f} minutes for {self.steps} steps"
        )
