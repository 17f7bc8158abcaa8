"""Matrix products with frozen weights on the CPU, by oneDNN.

PyTorch leaves float32 products to MKL, although it brings oneDNN too. On an AMD processor oneDNN was a tenth faster (LOG.md);
the results differ by rounding.
"""

import platform
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@cache
def _has_onednn() -> bool:
    named = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile makes of a linear layer on the CPU
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available() and named


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (…, N) · weight (M, N)ᵀ + bias (M,). Where gradients are asked for, PyTorch's own."""
    frozen = not torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if frozen and not torch.is_autocast_enabled("cpu") and _has_onednn():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if self.bias is None else linear(x, self.weight, self.bias)


def freeze(module: nn.Module) -> nn.Module:
    """No gradients, and the faster product in every linear layer."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FrozenLinear
    return module.eval().requires_grad_(False)
