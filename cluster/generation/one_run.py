"""One run at a time makes a dataset on a cluster: its monitor has the dataset's name.

Two would each draw all that is missing, and each would store what the other has stored. Ray gives a name to one actor,
and takes it back when that actor's driver is gone, however it ended: so no lock is left behind. Runs on two clusters do
not know of each other.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, GetTimeoutError

from cluster.generation.limits import FaultPolicy
from cluster.generation.stages.monitor import start_monitor
from cluster.store.store import Store
from pcm.line_timer import LineTimer

log = logging.getLogger(__name__)

_NAMESPACE = "pcm runs"
_PAUSE_SECONDS, _SECONDS_BETWEEN_LINES = 1.0, 60.0


@contextmanager
def monitor_of_run(store: Store, policy: FaultPolicy) -> Iterator[tuple[ActorHandle, bool]]:
    """The monitor of the only run that makes the dataset at `store`, and whether another one was waited for."""
    timer, waited = LineTimer(_SECONDS_BETWEEN_LINES, at_once=True), False
    while True:
        try:
            monitor = start_monitor(policy, name=_name(store), namespace=_NAMESPACE)
            break
        except ActorAlreadyExistsError:
            waited = True
        except GetTimeoutError:  # Ray is busy, and does not say whether there is one
            pass
        if timer.due():
            log.warning(
                "%s: another run on this cluster makes this dataset; waiting for its end, for %.0f s so far (to end it "
                "yourself: `ray job stop` where it was submitted, else SIGTERM to its driver)",
                store.root,
                timer.elapsed,
            )
        time.sleep(_PAUSE_SECONDS)
    try:
        yield monitor, waited
    finally:
        ray.kill(monitor)


def _name(store: Store) -> str:
    """Of a local path too: one that several machines see is the same folder on each."""
    return f"monitor of {hashlib.sha256(store.address.encode()).hexdigest()}"
