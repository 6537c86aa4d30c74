"""Benchmarks that run as a training worker does."""

import os
import sys

from cluster.training.ray_trainer import MEMORY_KEPT


def as_worker(module: str) -> None:
    """Begin again with the environment in which jobs.train starts its workers, unless this process has it: the C
    library reads it when a process starts.
    """
    if not MEMORY_KEPT.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **MEMORY_KEPT})
