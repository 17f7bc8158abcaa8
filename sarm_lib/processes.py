"""Several processes, a GPU each, that share a stage's work (`sarm_lib.launch`); in a notebook there is one."""

from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

PATIENCE = timedelta(days=7)  # at a barrier: one may have much more to do than another


def share(device: str | torch.device) -> PartialState:
    """Which of how many processes this is. On GPUs it makes this process's own the current one."""
    if PartialState._shared_state:
        return PartialState()
    return PartialState(cpu=torch.device(device).type == "cpu", timeout=PATIENCE)


def new_accelerator(precision: str, device: str, **more) -> Accelerator:
    """For one process or many, in a `precision` of `params.yaml`: fp32, bf16, or auto. more: what `Accelerator` takes beside."""
    bf16 = precision == "bf16" or (precision == "auto" and device == "cuda" and torch.cuda.is_bf16_supported())
    mixed = "bf16" if bf16 else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed:
        AcceleratorState._reset_state()  # of an earlier training in this notebook, which has ended
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed, **more)


def own_device(device: str) -> str:
    """The device of this process, where all use the kind `device`: the second of two has cuda:1."""
    return str(share(device).device) if device == "cuda" else device
