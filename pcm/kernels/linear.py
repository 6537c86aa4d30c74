"""Linear layers on a CPU by oneDNN's products, which on processors with AVX-512 are a tenth faster than those of torch.

The bias comes with the product instead of as a pass of its own. For decoding, whose products have few rows, a
weight can be laid out once in the order in which the processor wants it, which a product would otherwise do each time:
that makes it 1.3 to 2 times as fast.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Module = TypeVar("Module", bound=nn.Module)

#: torch does not promise to keep these operators.
_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


def _by_onednn(tensor: Tensor) -> bool:
    """float32 on a CPU, and not under autocast, which does not know these operators."""
    return (
        _AVAILABLE
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b; the weight may be a transposed view, or packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (n, out)
        grad_x = _product(grad, weight.t(), None) if needs_x else None
        grad_weight = rows.t() @ x.flatten(0, -2) if needs_weight else None  # here torch's product is the faster one
        return grad_x, grad_weight, rows.sum(dim=0) if ctx.has_bias else None


class Linear(nn.Linear):
    """nn.Linear: (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _by_onednn(x) or not _by_onednn(self.weight):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """What an nn.Linear on a CPU computes in float32, without gradients; a copy of its weight as it is now."""

    def __init__(self, linear: nn.Linear, *, rows: int):
        """`rows`: of a typical input, for which the layout is chosen."""
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _product(x, self._weight, self._bias)


def can_pack(linear: nn.Linear) -> bool:
    """Whether this torch, on this machine, packs this layer, now."""
    return _by_onednn(linear.weight)


def packed(module: Module, *, rows: int) -> Module:
    """`module` for inference: a copy whose linear layers are packed where that is possible and that shares all else."""
    if isinstance(module, nn.Linear):
        return PackedLinear(module, rows=rows) if can_pack(module) else module  # type: ignore[return-value]
    children = {name: packed(child, rows=rows) for name, child in module.named_children()}
    if all(child is getattr(module, name) for name, child in children.items()):
        return module
    result = copy.copy(module)
    result._modules = {**module._modules, **children}
    return result
