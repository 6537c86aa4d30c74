"""The first epoch of a dataset that is still being made: batches in the order of the plan, as its shards are committed.

An epoch over a finished dataset is shuffled over all of it (cluster.training.data.shuffled); one that begins before
there is a dataset cannot be. Here the shards come as they are planned, each shard's rows permuted, and batch b takes
the rows from b * G on. So the batches are a function of (data, seed) alone - whenever a shard arrives, however many
workers there are - and step s can be resumed at. Every rank reads every shard, which costs little: they arrive at the
speed of generation.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from cluster.dataset.committed import stored_shard
from cluster.dataset.documents import Manifest, Plan, load_manifest
from cluster.dataset.keys import shard_key
from cluster.dataset.rows import read_rows, read_shard, scores_of
from cluster.numbers import duration
from cluster.store.store import Store
from cluster.training.data.batches import Batch, BatchShape, Decoded, OpenBatch, in_background
from cluster.training.data.selection import RowFilter
from pcm.errors import InputError
from pcm.line_timer import LineTimer
from pcm.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

#: Between two looks for the next shard: at first, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0
SECONDS_BETWEEN_LINES = 60.0


class ArrivingShards:
    """Batches of one rank of epoch 0, waiting for the shards of `plan` to be committed."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        row_filter: RowFilter,
        shape: BatchShape,
        vocabulary: Vocabulary,
        *,
        seed: int,
        prefetch: int = 4,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._plan = plan
        self._filter = row_filter
        self._shape = shape
        self._vocabulary = vocabulary
        self._seed = seed
        self._prefetch = prefetch
        self._sleep = sleep

    def batches(self, *, start_step: int = 0) -> Iterator[Batch]:
        """From `start_step` on, made by a background thread; the last one says so."""
        return in_background(lambda: self._batches(start_step), depth=self._prefetch)

    def _batches(self, start_step: int) -> Iterator[Batch]:
        size = self._shape.batch_size
        held: deque[tuple[Decoded, np.ndarray]] = deque()  # rows that wait for their batch
        count, step = 0, start_step
        for decoded, order in self._shards(skip=start_step * size):
            held.append((decoded, order))
            count += len(order)
            while count > size:  # not >=: whether a full batch is the last one is only known with the next row
                yield self._batch(_taken(held, size)).close(epoch=0, step=step, last=False)
                count, step = count - size, step + 1
        if count:
            yield self._batch(_taken(held, count)).close(epoch=0, step=step, last=True)

    def _batch(self, rows: list[tuple[Decoded, np.ndarray]]) -> OpenBatch:
        batch, position = OpenBatch(self._shape), 0
        for decoded, indices in rows:
            batch.put(position, decoded, indices)
            position += len(indices)
        return batch

    def _shards(self, *, skip: int) -> Iterator[tuple[Decoded, np.ndarray]]:
        """The selected rows of every shard in the plan's order, without the first `skip`."""
        for shard in range(self._plan.num_shards):
            self._wait(shard)
            stored = stored_shard(self._store, shard)
            columns = read_shard(self._store, stored, ["caption", "clip_score"], checksum=False)
            chosen, _ = self._filter.masks(columns["caption"].to_pylist(), scores_of(self._store, stored, columns))
            numbers = np.flatnonzero(chosen)
            order = np.random.default_rng([self._seed, 0, shard]).permutation(len(numbers))[skip:]
            skip = max(0, skip - len(numbers))
            if len(order):
                rows = read_rows(self._store, stored, numbers, self._shape.features)
                yield Decoded.of(f"{self._store.root}/{stored.key}", rows, self._vocabulary, self._shape), order

    def _wait(self, shard: int) -> None:
        _until(lambda: self._store.exists(shard_key(shard)), what=f"shard {shard}", sleep=self._sleep)


def finished_manifest(store: Store, plan: Plan, *, sleep: Callable[[float], None] = time.sleep) -> Manifest:
    """The manifest of what `plan` asks for, waited for: it is written soon after the last shard."""
    found: list[Manifest] = []

    def is_there() -> bool:
        try:
            manifest = load_manifest(store)
        except InputError:
            return False
        found.append(manifest)
        return manifest.corpus_fingerprint == plan.corpus_fingerprint

    _until(is_there, what="the manifest", sleep=sleep)
    return found[-1]


def _until(holds: Callable[[], bool], *, what: str, sleep: Callable[[float], None]) -> None:
    pause, timer = FIRST_PAUSE, LineTimer(SECONDS_BETWEEN_LINES)
    while not holds():
        sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)
        if timer.due():
            log.info("training has waited %s for %s", duration(timer.elapsed), what)


def _taken(held: deque[tuple[Decoded, np.ndarray]], count: int) -> list[tuple[Decoded, np.ndarray]]:
    """The first `count` rows, which leave the queue."""
    taken = []
    while count:
        decoded, order = held.popleft()
        taken.append((decoded, order[:count]))
        if len(order) > count:
            held.appendleft((decoded, order[count:]))
        count -= len(taken[-1][1])
    return taken
