"""Parity with the published implementation: its checkpoints, its data files, and proof that our numbers are its.

The public names are loaded on first use: readers of published files need no model.
"""

import importlib
from typing import Any

_PUBLIC = {
    "load_state_dict": "state_dict",
    "from_official": "state_dict",
    "to_official": "state_dict",
    "verify": "golden",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pcm.official' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pcm.official.{_PUBLIC[name]}"), name)
