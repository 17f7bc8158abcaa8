"""Matrix products with frozen weights on the CPU, by oneDNN, with the activation that follows them in the same pass.

PyTorch leaves float32 products to MKL and runs an activation as a pass of its own over what a product has written, although
it brings oneDNN too, which does both at once (benchmarks/speed.json); the results differ by rounding.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["none", "relu", "swish"]
SLOPE = 1.702  # QuickGELU(x) = x · sigmoid(1.702 x) = swish(1.702 x) / 1.702

_rounded: dict[tuple[int, torch.Size], Tensor] | None = None  # weights in bfloat16, while `rounded_once` is open


@cache
def _has_onednn() -> bool:
    named = hasattr(torch.ops.mkldnn, "_linear_pointwise")  # what torch.compile makes of a linear layer on the CPU
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available() and named


@cache
def _has_bf16() -> bool:
    return _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation = "none") -> Tensor:
    """activation(x (…, N) · weight (M, N)ᵀ + bias (M,)). Where gradients are asked for, PyTorch's own."""
    if not torch.is_grad_enabled() and x.device.type == "cpu" and _has_onednn():
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if half and _rounded is not None:
            x, weight, bias = x.to(torch.bfloat16), _round(weight), _round(bias)
        supported = _has_bf16() if x.dtype == torch.bfloat16 else x.dtype == torch.float32 and not half
        if supported and x.dtype == weight.dtype:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
    x = F.linear(x, weight, bias)
    return torch.relu(x) if activation == "relu" else F.silu(x) if activation == "swish" else x


@contextmanager
def rounded_once() -> Iterator[None]:
    """Within it, weights that autocast would round to bfloat16 in every product are rounded once. They must not change."""
    global _rounded
    before, _rounded = _rounded, {}
    try:
        yield
    finally:
        _rounded = before


def _round(weight: Tensor) -> Tensor:
    key = weight.data_ptr(), weight.shape
    if key not in _rounded:
        _rounded[key] = weight.to(torch.bfloat16)
    return _rounded[key]


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained."""

    def forward(self, x: Tensor, activation: Activation = "none") -> Tensor:
        if self.bias is None:
            return F.linear(x, self.weight)
        return linear(x, self.weight, self.bias, activation)


class FrozenQuickGELU(nn.Module):
    """CLIP's two-layer perceptron, whose activation is part of its first product."""

    def __init__(self, first: FrozenLinear, second: FrozenLinear) -> None:
        super().__init__()
        self.first, self.second = first, second
        first.weight.data *= SLOPE
        first.bias.data *= SLOPE
        second.weight.data /= SLOPE

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x, "swish"))


def freeze(module: nn.Module) -> nn.Module:
    """No gradients, and the faster product in every linear layer."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FrozenLinear
    return module.eval().requires_grad_(False)
