"""One job at a time works on a place: it has the place's name on its cluster, and on its machine the folder's lock.

Two that train into one folder would write over each other's checkpoints, and two that make a dataset would each store
what the other has stored. Ray gives a name to one actor, and takes it back when that actor's driver is gone, however it
ended; the system does so with the lock of a process. So nothing is left behind, and nothing is to be deleted by hand.

The lock is for jobs with a Ray of their own each, and lies on the folder itself. Jobs of two clusters know of each
other neither on an object store nor on a folder that machines share.
"""

import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.numbers import duration
from cluster.store.retries import with_retries
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.line_timer import LineTimer

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What a job does there, for the line of another one.
MAKES, TRAINS = "makes this dataset", "trains into it"

_NAMESPACE = "pcm jobs"
_PAUSE_SECONDS, _SECONDS_BETWEEN_LINES = 0.5, 60.0
#: So long a job that does not wait gives one that was just ended: Ray and the system must notice it first.
PATIENCE_SECONDS = 10.0
_HOW_TO_END = "`ray job stop` where it was submitted, else SIGTERM to its driver"


class _Taken(Exception):
    """Another job has the place; the message says of what it is one."""


class _Holder:
    """An actor that has a name, and nothing to do."""


def _start_holder(**named: str) -> ActorHandle:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here, **named}
    actor: Any = ray.remote(**options)(_Holder)  # Ray's overloads know no options given as a dict
    return actor.remote()


@contextmanager
def only_job(
    store: Store, does: str, *, waits: bool, start: Callable[..., ActorHandle] = _start_holder
) -> Iterator[tuple[ActorHandle, bool]]:
    """Be the only job that works at `store`, which is made where it is a folder; Ray must be running. The actor that
    has the place's name, and whether another job was waited for.

    does: what a job does there, as in "another job on this cluster trains into it". waits: for the other's end, with a
    line now and then; else InputError is raised. start: called with a name and a namespace, of an actor that the job
    needs anyway.
    """
    with ExitStack() as held:

        def take_name() -> ActorHandle:
            try:
                holder = start(name=_name(store), namespace=_NAMESPACE)
            except ActorAlreadyExistsError:
                raise _Taken("cluster") from None
            held.callback(ray.kill, holder)
            return holder

        holder, waited_for_name = _when_free(store, does, take_name, waits=waits)
        _, waited_for_lock = _when_free(store, does, lambda: held.enter_context(_locked(store)), waits=waits)
        yield holder, waited_for_name or waited_for_lock


def _when_free(store: Store, does: str, take: Callable[[], T], *, waits: bool) -> tuple[T, bool]:
    """(what `take` gives, whether it was taken at first)."""
    timer, waited = LineTimer(_SECONDS_BETWEEN_LINES, at_once=True), False
    while True:
        try:
            return take(), waited
        except _Taken as taken:
            waited = True
            another = f"{store.root}: another job on this {taken} {does}"
            if waits and timer.due():
                log.warning(
                    "%s; waiting for its end, for %s so far (to end it yourself: %s)",
                    another, duration(timer.elapsed), _HOW_TO_END,
                )  # fmt: skip
            if not waits and timer.elapsed >= PATIENCE_SECONDS:
                raise InputError(f"{another}; wait for its end, or end it ({_HOW_TO_END})") from None
        except GetTimeoutError:  # Ray is busy, and does not say whether there is one
            pass
        time.sleep(_PAUSE_SECONDS)


def _name(store: Store) -> str:
    """Of a local path too: one that several machines see is the same folder on each."""
    return f"job at {hashlib.sha256(place(store).encode()).hexdigest()}"


def place(store: Store) -> str:
    """The same however a local folder is spelled."""
    return os.path.realpath(store.prefix) if store.is_local else store.address


@contextmanager
def _locked(store: Store) -> Iterator[None]:
    """Hold the lock of a local folder; where its file system has none, go on without. Raises _Taken."""
    if not store.is_local:
        yield
        return
    folder = with_retries(lambda: _opened(store.prefix), place=store.root)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Taken("machine") from None
        except OSError:
            pass
        yield
    finally:
        with suppress(OSError):  # a process that was forked meanwhile has the lock, too: closing would not free it
            fcntl.flock(folder, fcntl.LOCK_UN)
        os.close(folder)


def _opened(folder: str) -> int:
    """Its descriptor, which programs that this process starts do not inherit."""
    os.makedirs(folder, exist_ok=True)
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
