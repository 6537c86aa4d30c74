"""Shards given out in turns, by the driver: until all are made, and those that are lost or late once more."""

import json
import logging
from collections import abc, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from threading import Thread
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from cluster.generation.attendant import attended
from cluster.generation.pools import Pools
from cluster.session import user_error
from pcm.errors import InputError, OneLineError

log = logging.getLogger(__name__)

#: Actors have so many seconds to learn that all is stored, before they are stopped.
LAST_TURNS_SECONDS = 10.0

#: One after the other, the class of the actors and what `map_batches` is told of them. The first are TakesTurns.
Stages = Sequence[tuple[type, dict[str, Any]]]


def made_in_turns(
    shards: list[int], stages: Callable[[list[int]], Stages], pools: Pools, monitor: ActorHandle, *, scorers: int
) -> abc.Generator[dict, None, None]:
    """Run shards through the stages until none is missing; yields each shard's stats once it is committed.

    `stages`: for the shards of one pass. `scorers`: actors of CLIP alone at most; they may be those that take turns.

    Raises InputError when a model a user named cannot be loaded by the workers, or when the monitor stops the run.
    """
    while shards:
        missing = set(shards)
        with closing(_one_pass(shards, stages(shards), pools, monitor, scorers)) as made:
            for stats in made:
                missing.discard(stats["shard"])
                yield stats
        shards = _still_missing(shards, missing)


def _still_missing(given_out: list[int], missing: set[int]) -> list[int]:
    """What a pass over these shards has left, in order. Raises InputError when it has made none of them."""
    left = [shard for shard in given_out if shard in missing]
    if len(left) == len(given_out):
        raise InputError(
            f"shard {left[0]} and {len(left) - 1} more were given out and none came back; run the same command again"
        )
    if left:
        log.warning("%d shards were given out and did not come back; they are given out once more", len(left))
    return left


def _one_pass(
    shards: list[int], stages: Stages, pools: Pools, monitor: ActorHandle, scorers: int
) -> abc.Generator[dict, None, None]:
    """A few shards may not come back."""
    from cluster.ray_data_internals import RowsOf, row_by_row  # Ray Data is loaded after the start of Ray

    takers, scorers = min(pools.generators, len(shards)), min(scorers, len(shards))
    begun: Any = monitor.begin_pass.remote(shards, takers, scorers)
    # One pipeline for the whole run, however many shards: to start another is to load every model again.
    turns = range(pools.turns(len(shards)))
    pipeline = row_by_row(pa.table({"turn": pa.array(turns, pa.int64())}))
    block: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    for actor, options in stages:
        pipeline = pipeline.map_batches(actor, **options, **block)
    ray.get(begun)  # asked for above: its process starts beside those that Ray Data starts
    left = set(shards)
    try:
        attending = attended(monitor, left, takers, scorers, pools.node_labels)
        with attending, closing(RowsOf(pipeline)) as rows:
            for stored in rows:
                stats = json.loads(stored["stats"])
                monitor.committed.remote(stats["shard"])
                if stats["shard"] in left:
                    left.remove(stats["shard"])
                    yield stats
                if not left:
                    _let_turns_end(rows, monitor)
                    break
    except ray.exceptions.RayError as error:
        raise user_error(error) or error from None


def _let_turns_end(rows: Iterator[dict], monitor: ActorHandle) -> None:
    """Turns that are left have nothing to make, and end. An actor that makes what is stored now, or loads, is not
    waited for; nor is one for long whose answer was lost with a link: Ray may take minutes to ask again.

    Raises InputError where one of them stops the run, for too many failures, say.
    """
    if ray.get(monitor.busy.remote()):
        return
    said: list[OneLineError] = []

    def end() -> None:
        try:
            deque(rows, maxlen=0)
        except Exception as error:
            if (stop := user_error(error)) is not None:  # all else matters no more: everything is stored
                said.append(stop)

    last = Thread(target=end, name="last turns", daemon=True)
    last.start()
    last.join(LAST_TURNS_SECONDS)
    if said:
        raise said[0]
