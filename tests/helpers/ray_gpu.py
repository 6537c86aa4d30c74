"""A Ray with a GPU that may not be there."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import ray


@contextmanager
def ray_told_of_a_gpu(*, num_cpus: int) -> Iterator[None]:
    """Ray on this machine with one GPU by its own account, in place of that of other tests."""
    ray.shutdown()
    ray.init("local", num_cpus=num_cpus, num_gpus=1, include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()
