"""Matrix products with frozen weights on the CPU, by oneDNN, with the activation that follows them in the same pass.

PyTorch leaves float32 products to MKL and runs an activation as a pass of its own over what a product has written, although
it brings oneDNN too, which does both at once (benchmarks/speed.json); the results differ by rounding. oneDNN multiplies by
weights in a layout of its own and would bring them into it for every product: weights that stay are packed once.
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

Packed = dict[tuple[int, torch.Size, torch.dtype], Tensor]
_packed: Packed | None = None  # weights as oneDNN multiplies by them, while `packed_once` is open


@cache
def _has_onednn() -> bool:
    # What torch.compile makes of a linear layer on the CPU.
    named = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available() and named


@cache
def _has_bf16() -> bool:
    return _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation = "none") -> Tensor:
    """activation(x (…, N) · weight (M, N)ᵀ + bias (M,)). Where gradients are asked for, PyTorch's own."""
    if not torch.is_grad_enabled() and x.device.type == "cpu" and _has_onednn():
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if half and _packed is not None:
            x = x.to(torch.bfloat16)
        supported = _has_bf16() if x.dtype == torch.bfloat16 else x.dtype == torch.float32 and not half
        if supported and _packed is not None:
            weight, bias = _pack(weight, x.dtype), bias.to(x.dtype)
        if supported and bias.dtype == x.dtype:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")
    x = F.linear(x, weight, bias)
    return torch.relu(x) if activation == "relu" else F.silu(x) if activation == "swish" else x


@contextmanager
def packed_once(weights: Packed | None = None) -> Iterator[None]:
    """Within it, weights are packed once, and rounded once where autocast would round them in every product. They must not
    change. weights: what is kept from one such block to the next."""
    global _packed
    before, _packed = _packed, {} if weights is None else weights
    try:
        yield
    finally:
        _packed = before


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    key = weight.data_ptr(), weight.shape, dtype
    if key not in _packed:
        _packed[key] = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())
    return _packed[key]


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
