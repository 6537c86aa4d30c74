"""Work in pieces, each of which puts its result on the store: in this process, or as tasks on Ray.

In any order, and on a GPU where a piece asks for one. Where results are handed back, in order: cluster.shard_work.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ray

from cluster.numbers import duration
from cluster.releases import check_releases
from cluster.session import user_error
from pcm.line_timer import LineTimer

log = logging.getLogger(__name__)

#: Tasks that Ray knows of at once: more than run, and no more than it holds easily.
_SUBMITTED = 1000


class Tasks(Protocol):
    """Who does the work."""

    def share(self, value: Any) -> Any:
        """A large argument of many calls, to be given in its place."""

    def run(self, function: Callable[..., None], calls: Sequence[tuple], *, what: str, on_device: bool = False) -> None:
        """Call a function of a module with each of these arguments, in any order. on_device: it computes on a GPU, if
        there are any. Raises what a call raises first."""


class InThisProcess:
    """One call after the other."""

    def share(self, value: Any) -> Any:
        return value

    def run(self, function: Callable[..., None], calls: Sequence[tuple], *, what: str, on_device: bool = False) -> None:
        progress = _Progress(what, len(calls))
        for call in calls:
            function(*call)
            progress.done()


class OnRay:
    """Tasks on Ray, which runs as many at once as it has room for and repeats those whose machine is lost."""

    def __init__(self, *, gpus: bool) -> None:
        self._gpus = gpus

    def share(self, value: Any) -> Any:
        return ray.put(value)

    def run(self, function: Callable[..., None], calls: Sequence[tuple], *, what: str, on_device: bool = False) -> None:
        gpus = 1 if self._gpus and on_device else 0
        # A process does many pieces, so that it loads a text tower or a sentence model once. It keeps that on its GPU
        # until the job ends.
        task: Any = ray.remote(_seconds_of).options(name=what, num_cpus=1, num_gpus=gpus, max_retries=3)
        progress = _Progress(what, len(calls))
        waiting = iter(calls)
        running: list[Any] = [task.remote(function, *call) for call, _ in zip(waiting, range(_SUBMITTED), strict=False)]
        try:
            while running:
                finished, running = ray.wait(running, num_returns=1)
                progress.began(ray.get(finished[0]))
                progress.done()
                running += [task.remote(function, *call) for call, _ in zip(waiting, range(1), strict=False)]
        except ray.exceptions.RayError as error:
            for reference in running:
                ray.cancel(reference, force=True)
            raise user_error(error) or error from None


def _seconds_of(function: Callable[..., None], *call: Any) -> float:
    check_releases()
    started = time.monotonic()
    function(*call)
    return time.monotonic() - started


class _Progress:
    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._made = what, total, 0
        self._timer = LineTimer()
        if total:
            log.info("%s: %d pieces", what, total)

    def began(self, seconds_ago: float) -> None:
        """A piece that is done now: the wait for machines before the first one says nothing of what is left."""
        self._timer.began(seconds_ago)

    def done(self) -> None:
        self._made += 1
        if self._timer.due():
            left = (self._total - self._made) * self._timer.elapsed / self._made
            log.info("%s: %d of %d pieces, %s left", self._what, self._made, self._total, duration(left))
