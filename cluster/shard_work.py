"""The same work on many shards, with the results in order: threads of this process, or tasks on Ray.

Pieces in any order that put their results on the store, or take a GPU: cluster.curation.tasks.
"""

import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cluster.releases import check_releases
from pcm.errors import InputError

if TYPE_CHECKING:  # requests import this module, and --help is to be fast
    from cluster.store.reach import Landmark

log = logging.getLogger(__name__)

Call = TypeVar("Call")
Result = TypeVar("Result")

AUTO, PROCESS, RAY = "auto", "process", "ray"
RUN_ON = (AUTO, PROCESS, RAY)
#: With "auto", Ray from so many samples on: about a minute of one process; Ray's start costs little against that.
MANY_SAMPLES = 100_000

#: Shards of one task, and how many it works on at once: the store answers one while the CPU is busy with the other.
SHARDS_A_TASK, _THREADS_A_TASK = 8, 2
#: Tasks that Ray knows of at once, for each CPU of the cluster and at least: a cluster without nodes starts some.
_TASKS_A_CPU, _LEAST_TASKS = 3, 32


class ShardWork(Protocol):
    """Who does the work."""

    def in_order(self, function: Callable[[Call], Result], calls: Iterable[Call]) -> Iterator[Result]:
        """The result of each call, in order, with a bounded number of them waiting. Raises what a call raises."""


@dataclass(frozen=True)
class InThisProcess:
    """So many calls at once."""

    threads: int

    def in_order(self, function: Callable[[Call], Result], calls: Iterable[Call]) -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(self.threads) as pool:
            try:
                for call in calls:
                    if len(waiting) == 2 * self.threads:
                        yield waiting.popleft().result()
                    waiting.append(pool.submit(function, call))
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


class OnRay:
    """Tasks of SHARDS_A_TASK calls on a cluster that this process has joined; those of a lost machine are repeated.

    `function` travels once to each process; what belongs to one shard goes into its call. A node that does not see one
    of the `landmarks`, perhaps one that has just come, works on nothing: InputError.
    """

    def __init__(self, landmarks: "Sequence[Landmark]" = ()) -> None:
        from cluster.store.reach import local_landmarks

        self._landmarks = local_landmarks(landmarks)

    def in_order(self, function: Callable[[Call], Result], calls: Iterable[Call]) -> Iterator[Result]:
        import ray  # takes seconds, which work in this process saves

        from cluster.session import cluster_cpus, user_error, waiting_for

        task: Any = ray.remote(_call_each).options(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")
        shared = ray.put(function)
        waiting: deque[Any] = deque()
        remaining = iter(calls)
        try:
            with waiting_for(cpus=1, gpus=0):
                while batch := list(itertools.islice(remaining, SHARDS_A_TASK)):
                    most = max(_LEAST_TASKS, _TASKS_A_CPU * int(cluster_cpus()))
                    # What is done is fetched, however many may wait: arguments and results take the head's memory.
                    while waiting and (len(waiting) >= most or ray.wait([waiting[0]], timeout=0)[0]):
                        yield from ray.get(waiting.popleft())
                    waiting.append(task.remote([shared], self._landmarks, batch))
                while waiting:
                    yield from ray.get(waiting.popleft())
        except ray.exceptions.RayError as error:
            raise user_error(error) or error from None
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)


def shard_work(run_on: str, *, samples: int, landmarks: "Sequence[Landmark]", threads: int) -> ShardWork:
    """Who works on a dataset of so many samples; `run_on`: one of RUN_ON. Ray is joined or started if it is to work.

    landmarks: of the stores that are read and written, by which to find whether all nodes see a local folder.
    With "auto" a folder that they do not see is worked on in this process. Raises InputError for it with "ray".
    """
    if run_on == PROCESS or (run_on == AUTO and samples < MANY_SAMPLES):
        return InThisProcess(threads)
    from cluster.session import start_ray
    from cluster.store.reach import blind_nodes, of_one_machine

    start_ray()
    for store, key in landmarks:
        if blind := blind_nodes(store, key):
            said = of_one_machine(store, blind)
            if run_on == RAY:
                raise InputError(f"{said}; give a URI such as s3://BUCKET/NAME, or --run-on {PROCESS}")
            log.info("%s: the work is done in this process", said)
            return InThisProcess(threads)
    return OnRay(landmarks)


def _call_each(function: list[Any], landmarks: "Sequence[Landmark]", calls: Sequence[Any]) -> list[Any]:
    """`function`: its reference, in a list, so that Ray does not read it anew for each task."""
    from cluster.store.reach import check_here

    check_releases()
    check_here(landmarks)
    with ThreadPoolExecutor(_THREADS_A_TASK) as pool:
        return list(pool.map(_fetched(function[0]), calls))


@functools.lru_cache(maxsize=1)
def _fetched(reference: Any) -> Callable[[Any], Any]:
    import ray

    return ray.get(reference)
