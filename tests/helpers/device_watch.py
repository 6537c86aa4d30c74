"""What of a computation would not stay on the device, found without one: everything on torch's `meta` device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DeviceWatch(TorchDispatchMode):
    """Remembers operations that mix a tensor of the host with those of the device, or copy from it to the host.

    A number of the host (a tensor without dimensions) may take part: it is given to the kernel. Whatever asks for a
    value of a `meta` tensor, as `.item()` and `if tensor:` do, raises by itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stray: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.is_meta for tensor in given)
        from_host = [tensor for tensor in given if not tensor.is_meta and tensor.dim()]
        to_host = [tensor for tensor in made if not tensor.is_meta]
        copies = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
        if on_device and (to_host or (from_host and not copies)):
            self.stray.append(str(func))
        return output
