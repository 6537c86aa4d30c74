"""Datasets on a store: their layout, plan, shards and proof.

`from cluster.dataset import read_dataset` gives the rows of a dataset to any Python program.
"""

from typing import Any

__all__ = ["DatasetRow", "read_dataset"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'cluster.dataset' has no attribute {name!r}")
    import cluster.dataset.read  # on first use, so that a job that reads no rows does not wait for it

    return getattr(cluster.dataset.read, name)
