"""What a run's driver tells the monitor while generators work: what only the driver and the cluster know."""

import logging
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle

from cluster.generation.stages.claims import UNKNOWN_SECONDS
from cluster.generation.stages.monitor import ANSWER_SECONDS, MAX_IN_HAND
from cluster.numbers import duration
from cluster.ray_autoscaler_internals import nodes_are_coming
from cluster.session import cluster_nodes
from pcm.errors import typed_first_line
from pcm.line_timer import LineTimer

log = logging.getLogger(__name__)

#: How often the monitor is asked what it wants to know, and how often a wait is told of.
TICK_SECONDS, SECONDS_BETWEEN_LINES = 1.0, 30.0


@contextmanager
def attended(
    monitor: ActorHandle, left: set[int], generators: int, scorers: int, labels: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Answer the monitor as long as a pass goes on, in a thread. `left`: shards that are not stored, as it changes.

    It is told which nodes with these `labels` are there. A monitor whose process died is told what is left: without it
    nobody gets a shard. While all that have started are left out it is told that nodes are coming, if they are, and the
    log says what is waited for. The log names each actor that is left out.
    """
    over = threading.Event()
    named: set[str] = set()

    def attend() -> None:
        waiting: LineTimer | None = None
        late_after = math.inf
        while not over.wait(TICK_SECONDS):
            try:
                monitor.nodes.remote(cluster_nodes(labels))
                asked: Any = [monitor.wants.remote(), monitor.left_out.remote(), monitor.late_after.remote()]
                (wants_pass, hopeless), left_out, late = ray.get(asked, timeout=ANSWER_SECONDS)
                late_after = late if math.isfinite(late) else late_after
                if wants_pass:
                    shards = sorted(left)
                    in_hand = min(len(shards), MAX_IN_HAND * generators)
                    begun: Any = monitor.begin_pass.remote(shards, generators, scorers, in_hand, late_after)
                    ray.get(begun, timeout=ANSWER_SECONDS)
                    lost_after = late_after if math.isfinite(late_after) else UNKNOWN_SECONDS
                    log.warning(
                        "the monitor's process died; it knows again what is left: %d shards; %d may be in work, and "
                        "are given out again where they are not stored within %s",
                        len(shards), in_hand, duration(lost_after),
                    )  # fmt: skip
                waiting = _waiting_line(monitor, hopeless, waiting)
                for said in sorted(set(left_out) - named):
                    named.add(said)
                    log.warning("an actor is left out, and others do its share: %s", said)
            except Exception as error:  # a run does not stop for it; the next tick asks again
                log.debug("the monitor is not attended: %s", error)

    thread = threading.Thread(target=attend, name="attendant", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * ANSWER_SECONDS)


def _waiting_line(monitor: ActorHandle, hopeless: str, since: LineTimer | None) -> LineTimer | None:
    """The wait for nodes on which somebody can draw, told now and then; None where nobody waits."""
    if not hopeless:
        return None
    timer = since or LineTimer(SECONDS_BETWEEN_LINES, at_once=True)
    try:
        coming = nodes_are_coming()
        nodes = "; nodes are coming" if coming else ", and no node is coming"
    except Exception as error:  # private parts of Ray say it, which may change: the wait is told of all the same
        coming, nodes = False, f", and Ray does not say whether nodes are coming ({typed_first_line(error)})"
    if coming:
        monitor.nodes_are_coming.remote()
    if timer.due():
        log.warning("nobody can work: %s%s (waited %s)", hopeless, nodes, duration(timer.elapsed))
    return timer
