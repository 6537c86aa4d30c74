"""Linear layers for decoding on a CPU, whose products have few rows.

oneDNN wants a weight in an order of its own, and lays it out anew in every product. Laid out once, a product of some
hundred rows takes 1.3 to 2 times less.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

#: torch does not promise to keep these operators.
_AVAILABLE = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)


class PackedLinear(nn.Linear):
    """An nn.Linear with the same parameters, and a packed copy of its weight as it is now for products in float32
    without gradients.
    """

    def __init__(self, linear: nn.Linear, *, rows: int):
        """`rows`: of a typical input, for which the layout is chosen."""
        super().__init__(linear.in_features, linear.out_features, device="meta")  # takes no memory
        self.weight, self.bias, self.training = linear.weight, linear.bias, linear.training
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.dtype != torch.float32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def can_pack(module: nn.Module) -> bool:
    """Whether this torch, on this machine, packs this layer."""
    return (
        _AVAILABLE
        and type(module) is nn.Linear
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def for_decoding(module: Module, *, rows: int) -> Module:
    """`module` for inference: a copy whose linear layers are packed where that is possible, and that shares all else.

    `rows` are those of a typical input: pictures * beam size. Weights that change afterwards are not seen.
    """
    if can_pack(module):
        return PackedLinear(module, rows=rows)  # type: ignore[arg-type, return-value]
    children = {name: for_decoding(child, rows=rows) for name, child in module.named_children()}
    if all(child is getattr(module, name) for name, child in children.items()):
        return module
    result = copy.copy(module)
    result._modules = {**module._modules, **children}
    return result
