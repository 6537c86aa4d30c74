"""Drawing datasets: `generate(GenerateRequest(corpus=..., out=...))`. Loaded on first use: Ray takes seconds."""

import importlib
from typing import Any

_PUBLIC = {"GenerateRequest": "cluster.generation.request", "generate": "cluster.generation.make"}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cluster.generation' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
