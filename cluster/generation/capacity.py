"""How many generators a cluster has room for, which may have none yet, and work done with the resources of one."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import ray

from cluster.generation.display import Room
from cluster.generation.pools import Pools
from cluster.generation.request import MachineOptions
from cluster.generation.stages.monitor import MAX_FRUITLESS_STARTS
from cluster.gpu_share import gpu_task
from cluster.numbers import duration
from cluster.session import (
    SECONDS_BETWEEN_WAITING_LINES,
    SECONDS_TO_START,
    cluster_cpus,
    cluster_gpus,
    cluster_nodes,
    is_joined,
    labels_text,
    resources_now,
    user_error,
)
from pcm.errors import InputError, typed_first_line
from pcm.line_timer import LineTimer

log = logging.getLogger(__name__)

T = TypeVar("T")

#: As often as a generator tries to load its model.
TRIES = MAX_FRUITLESS_STARTS
FIRST_PAUSE = 1.0  # seconds before another try, with jitter; doubled each time
_LOOKS_A_SECOND = 2


def pools_of_cluster(asked: MachineOptions | None = None, *, device: str) -> Pools:
    """The pools that `asked` names. Where nobody names a number of generators, one for each GPU (or core) that there
    is; where there is none yet, the first machine is asked for and waited for, and then counts with all it has. With a
    node label only nodes with it count.

    Raises InputError for GPUs, or a label, on a machine that has none, to which no others come; there also where
    generators leave no GPU for actors of CLIP alone.
    """
    asked = asked or MachineOptions()
    labels, joined = asked.node_labels, is_joined()
    if not joined and not cluster_nodes(labels):
        raise InputError(
            f"--node-label {labels_text(labels)}: this machine does not have it, and no others come to it; leave it "
            "out, or join a cluster (RAY_ADDRESS) whose nodes have labels"
        )
    if not joined and device == "cuda" and not cluster_gpus():
        raise InputError(
            "cuda: this machine has no GPU, and no other machines come to it; join a cluster with GPUs (RAY_ADDRESS) "
            "or run the same command on a machine with one"
        )
    counted = cluster_gpus if device == "cuda" else cluster_cpus
    if asked.generators is None and not counted(labels):
        one = Pools.of(replace(asked, generators=1), device=device, cpus=cluster_cpus(labels), gpus=0)
        with_generator_resources(_nothing, one, what="generators")
        log.info(
            "one generator for each of the %g %s that have come; --generators N waits for more",
            counted(labels), "GPUs" if device == "cuda" else "CPUs",
        )  # fmt: skip
    pools = Pools.of(asked, device=device, cpus=cluster_cpus(labels), gpus=cluster_gpus(labels))
    if not joined:
        pools.require_room_for_clip(cluster_gpus(labels))
    return pools


@dataclass(frozen=True)
class Result(Generic[T]):
    """What a work gives in the end; before, it gives texts that say what it is doing."""

    value: T


def with_generator_resources(
    work: Callable[..., Iterator[str | Result[T]]], pools: Pools, *arguments: Any, what: str, **named: Any
) -> T:
    """Do a work in one task that reserves what a generator of `pools` reserves; the value of its Result.

    It is begun again, up to TRIES times in all, where its machine is lost or it raises what may pass: a hub's error,
    say, but no InputError of the user's. While it waits for room and while it lasts the log says for what, and
    since when. `what`: of whom the log says so. Raises InputError when no try was any good; StoreFailure where the last
    one met a store that does not answer.
    """
    options = pools.draw_options(1)
    del options["compute"]
    # Ray would begin it again without a word, and behind the texts that were read already.
    task = gpu_task(work, **options, num_returns="streaming", max_retries=0)
    room, pause = Room(pools.generator_takes(), pools.node_labels), FIRST_PAUSE
    for tried in range(1, TRIES + 1):
        try:
            return _followed(task.remote(*arguments, **named), room, what)
        except ray.exceptions.RayError as error:
            if (wrong := user_error(error)) is not None and not wrong.passes:
                raise wrong from None
            if wrong is not None and tried == TRIES:
                raise wrong from None
            said = typed_first_line(getattr(error, "cause", None) or error)
        if tried < TRIES:
            log.warning("%s: failed (%s); trying again (%d of %d)", what, said, tried + 1, TRIES)
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause *= 2
    raise InputError(f"{what}: failed {TRIES} times ({said}); check that machine and the model, then run it again")


def _followed(answers: Any, room: Room, what: str) -> Any:
    """The result of a task. Says what it is doing, or what it waits for."""
    doing, since = "", time.monotonic()
    lines = LineTimer(SECONDS_BETWEEN_WAITING_LINES, at_once=True)
    while True:
        if ray.wait([answers], timeout=1 / _LOOKS_A_SECOND)[0]:
            said = ray.get(next(answers))
            if isinstance(said, Result):
                return said.value
            doing, since = said, time.monotonic()
            log.info("%s: %s", what, doing)
            lines = LineTimer(SECONDS_BETWEEN_WAITING_LINES)
            continue
        lacking = "" if doing else room.lacking(*resources_now(room.labels))
        spent = time.monotonic() - since
        if lacking and lines.due():
            log.info("%s: waiting for a machine, for %s; %s", what, duration(spent), lacking)
        elif doing and lines.due():
            log.info("%s: %s, for %s", what, doing, duration(spent))
        elif spent >= SECONDS_TO_START and lines.due():  # no one node has all of it, or a process starts slowly
            log.info("%s: waiting for one machine with room, and for its start, for %s", what, duration(spent))


def _nothing() -> Iterator[str | Result[None]]:
    yield Result(None)
