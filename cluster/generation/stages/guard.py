"""A generator's own side of the watch over it: tells the monitor, and ends its process when that is the only way."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from cluster.generation.limits import FaultPolicy
from cluster.generation.stages.asking import ask
from cluster.generation.stages.loading import this_place
from cluster.generation.stages.monitor import ShardFaults, ShardOutcome
from cluster.generation.stages.shard_row import ERRORS_KEPT
from cluster.generation.stages.watchdog import Watchdog
from pcm.errors import InputError, typed_first_line
from pcm.generation.drawing import Guard, Request
from pcm.reasons import NSFW_FLAGGED, USABLE, of_stage

log = logging.getLogger(__name__)

#: With torch.compile, the first batch of a shape is compiled: it gets this many times the timeout.
COMPILING_FACTOR = 4


class RunGuard(Guard):
    """Watches one generator actor. Raises InputError out of the drawing when the monitor says that the run stops.

    A batch over its time ends the process, and so does a device that fails every call. Ray restarts an actor whose
    process ended so, and runs the shard again; an actor that leaves by ray.actor.exit_actor() would stay away.
    """

    def __init__(self, monitor: ActorHandle, policy: FaultPolicy, *, compiles: bool = False) -> None:
        context = ray.get_runtime_context()
        self._monitor = monitor
        self._policy = policy
        self._generator = context.get_actor_id() or "driver"
        self._shard = -1
        self._faults = ShardFaults()
        self._compiles = compiles
        self._shapes: set[int] = set()
        self.errors: list[tuple[int, str]] = []  # (position, error) of the present shard, the first few
        self._watchdog = Watchdog(self._generator, within="isolation.py")
        hung = self._watchdog.last_words()
        if hung:
            log.warning("the process before this one took longer than %g s at %s", policy.batch_timeout, hung)
        _stop_if(self._ask("start", self._generator, this_place(), hung))

    def begin_shard(self, shard: int) -> None:
        stop, self._faults = self._ask("begin_shard", shard)
        _stop_if(stop)
        self._shard = shard
        refused = self._faults.refused.items()
        self.errors = [(position, f"{reason}: {error}") for position, (reason, error) in refused][:ERRORS_KEPT]

    def end_shard(self, drawn: pa.Table | None) -> None:
        """The shard's rows; None of one whose samples are tried again: that they fail once more says nothing new."""
        _stop_if(self._ask("end_shard", self._shard, ShardOutcome() if drawn is None else outcome_of(drawn)))

    @contextmanager
    def drawing(self, requests: Sequence[Request], batch_size: int) -> Iterator[None]:
        positions = [request.position for request in requests]
        _stop_if(self._ask("begin", self._generator, self._shard, positions))
        factor = COMPILING_FACTOR if self._compiles and batch_size not in self._shapes else 1
        drawn = 0
        try:
            with self._watchdog.limit(factor * self._policy.batch_timeout):
                yield
            drawn = len(requests)
            self._shapes.add(batch_size)
        finally:
            self._monitor.end.remote(self._generator, drawn)

    def suspicion(self, request: Request) -> int:
        return self._faults.deaths.get(request.position, 0)

    def refusal(self, request: Request) -> str:
        return self._faults.refused.get(request.position, ("", ""))[0]

    def failed(self, requests: Iterable[Request], reason: str, error: str) -> None:
        positions = [request.position for request in requests]
        self._monitor.failed.remote(len(positions), error)
        if len(self.errors) < ERRORS_KEPT:
            log.warning("shard %d: %s: %s", self._shard, reason, error)
            self.errors += [(position, f"{reason}: {error}") for position in positions][:ERRORS_KEPT]

    def broken(self, requests: Iterable[Request], error: Exception) -> None:
        said = typed_first_line(error)
        positions = [request.position for request in requests]
        self._ask("broken", self._generator, self._shard, positions, said)
        log.warning("shard %d: this process can draw no more (%s); it ends and is restarted", self._shard, said)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)

    def _ask(self, method: str, *arguments: Any) -> Any:
        return ask(self._monitor, method, *arguments)


_ERRORS = frozenset(of_stage("generator"))
_DRAWN = frozenset({*USABLE, *of_stage("picture")})
#: What a safety checker blanks is the caption's fault.
_BLANK = frozenset(of_stage("picture")) - {NSFW_FLAGGED}


def outcome_of(drawn: pa.Table) -> ShardOutcome:
    """What the rows of a drawn shard (reason, attempts) say of the generator."""
    rows = list(zip(drawn["reason"].to_pylist(), drawn["attempts"].to_pylist(), strict=True))
    blank = [(reason, attempts) for reason, attempts in rows if reason in _BLANK]
    return ShardOutcome(
        samples=sum(reason in _DRAWN or reason in _ERRORS for reason, _ in rows),
        failed=len(blank) + sum(reason in _ERRORS for reason, _ in rows),
        blank=len(blank),
        blank_pictures=sum(attempts for _, attempts in blank),
        blank_reason=blank[-1][0] if blank else "",
    )


def _stop_if(reason: str) -> None:
    if reason:
        raise InputError(reason)
