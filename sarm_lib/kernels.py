"""Matrix products with frozen weights on the CPU, by oneDNN, with the activation that follows them in the same pass.

PyTorch leaves float32 products to MKL and runs an activation as a pass of its own over what a product has written, although
it brings oneDNN too, which does both at once (benchmarks/speed.json); the results differ by rounding. oneDNN multiplies by
weights in a layout of its own and would bring them into it for every product: weights that stay may be packed once.
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


class Packed:
    """Weights in oneDNN's layout, rounded where autocast would round them in every product. They must not change.

    float32: pack those too, which pays where few rows are multiplied at a time and hardly does in large batches.
    """

    def __init__(self, float32: bool = False) -> None:
        self.float32, self._kept = float32, {}

    def weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if dtype == torch.float32 and not self.float32:
            return weight
        key = weight.data_ptr(), weight.shape, dtype
        if key not in self._kept:
            self._kept[key] = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous())
        return self._kept[key]


_packed: Packed | None = None  # while `packed_once` is open


@cache
def _has_onednn() -> bool:
    # What torch.compile makes of a linear layer on the CPU.
    named = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    return platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available() and named


@cache
def _has_bf16() -> bool:
    return _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation = "none", residual: Tensor | None = None
) -> Tensor:
    """activation(x (…, N) · weight (M, N)ᵀ + bias (M,)), or without an activation `residual` (…, M) added. Where gradients
    are asked for, PyTorch's own."""
    if not torch.is_grad_enabled() and x.device.type == "cpu" and _has_onednn():
        half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if half and _packed is not None:
            x = x.to(torch.bfloat16)
        supported = _has_bf16() if x.dtype == torch.bfloat16 else x.dtype == torch.float32 and not half
        if supported and _packed is not None:
            weight, bias = _packed.weight(weight, x.dtype), bias.to(x.dtype)
        if supported and bias.dtype == x.dtype:
            product = torch.ops.mkldnn._linear_pointwise
            if residual is not None and residual.dtype == x.dtype == torch.float32:
                return product.binary(x, residual, weight, bias, "add")
            x = product(x, weight, bias, activation, [], "")
            return x if residual is None else residual + x
    x = F.linear(x, weight, bias)
    x = torch.relu(x) if activation == "relu" else F.silu(x) if activation == "swish" else x
    return x if residual is None else residual + x


@contextmanager
def packed_once(weights: Packed | None = None) -> Iterator[None]:
    """Within it, weights are packed once and not for every product. weights: what is kept from one such block to the next."""
    global _packed
    before, _packed = _packed, weights or Packed()
    try:
        yield
    finally:
        _packed = before


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
