"""How a training run proceeds, of the reward model and of the policies alike: its learning rate, and what it will take."""

import math
from dataclasses import dataclass


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine down to a tenth: the factor on the peak rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class Estimate:
    """What training will take, measured with a few steps that are thrown away."""

    parameters: int
    memory: float  # bytes: weights, gradients, AdamW's moments, activations
    seconds_per_step: float
    steps: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, about {self.memory / 1e9:.1f} GB of memory, "
            f"{self.seconds_per_step:.2f} s a step: {self.seconds_per_step * self.steps / 60:.1f} minutes for {self.steps} steps"
        )
