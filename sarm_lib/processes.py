"""Several processes, a GPU each, that share a stage's work (`sarm_lib.launch`); in a notebook there is one."""

from datetime import timedelta

import torch
from accelerate import PartialState

PATIENCE = timedelta(days=7)  # at a barrier: one may have much more to do than another


def share(device: str | torch.device) -> PartialState:
    """Which of how many processes this is. On GPUs it makes this process's own the current one."""
    if PartialState._shared_state:
        return PartialState()
    return PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)


def own_device(device: str) -> str:
    """The device of this process, where all use the kind `device`: the second of two has cuda:1."""
    return str(share(device).device) if device == "cuda" else device
