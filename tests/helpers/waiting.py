"""Waiting for what another process does, and an actor that others wait for."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def wait_until(condition: Callable[[], object], *, seconds: float = 60, said: str = "it did not come to be") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


class Holds:
    """An actor that has the CPUs that it was given."""

    def ready(self) -> bool:
        return True


@contextmanager
def all_cpus_held_until(said: str) -> Iterator[list[str]]:
    """An actor has every CPU of the cluster until the log of `cluster.session` has a line with these words, or for a
    minute; the lines that had them."""
    import ray

    from cluster.session import free_room

    cpus = int(ray.cluster_resources()["CPU"])
    wait_until(lambda: free_room(cpus=1, gpus=0) == cpus)
    holder = ray.remote(Holds).options(num_cpus=cpus).remote()
    ray.get(holder.ready.remote())
    wait_until(lambda: free_room(cpus=1, gpus=0) == 0)
    lines: list[str] = []

    class Releases(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if said in record.getMessage():
                lines.append(record.getMessage())
                ray.kill(holder)

    log, handler = logging.getLogger("cluster.session"), Releases()
    level, latest = log.level, threading.Timer(60, ray.kill, [holder])
    latest.start()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        latest.cancel()
        log.removeHandler(handler)
        log.setLevel(level)
        ray.kill(holder)
