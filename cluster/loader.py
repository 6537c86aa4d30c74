"""Training batches straight from Parquet shards, in an order that nothing but (data, seed, epoch) decides.

The order of an epoch: all shards are permuted, the rows of each are permuted, and the resulting sequence of rows is cut
into `lanes` equal stretches. A batch of G rows takes the next G / lanes rows of every lane, so it always mixes the rows
of that many random places of the data. Rank r of R takes the r-th of the R equal slices of each batch. So

- the batches are the same for any number of workers, and every rank takes the same number of steps (no rank can leave
  the others waiting in an all-reduce);
- a rank reads only the lanes that its slice touches: as long as R divides the number of lanes, every shard is read by
  one rank (a shard that a cut goes through by two), not by all;
- step s of epoch e can be resumed at directly: shards before it are not even read;
- the last batch, when it is short, is filled up with rows without targets, which weigh nothing in the loss: no row of a
  small dataset is lost, and all steps have one shape.

Ray Data's `streaming_split` gives none of the four: its order follows the scheduling of blocks, an interrupted epoch
starts again at its beginning, and `equal=True` drops the uneven tail. The next shard of every lane is read while one is
used. Data that fits into `cache_bytes` is decoded once and kept in memory; with a `ShardCache` any data is decoded once
a machine.
"""

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cluster.rows import Rows, read_rows
from cluster.selection import Selection
from cluster.shard_cache import ShardCache
from cluster.storage import Store
from pcm.errors import InputError
from pcm.records import FeatureShape
from pcm.vocabulary import Vocabulary

#: Selections whose features take at most this many bytes in memory are decoded once.
CACHE_BYTES = 2 << 30

_READ_THREADS = 4
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Part:
    """Rows of one dataset and how often they come: `weight` times an epoch.

    With a fraction f in the weight, round(f * rows) rows come once more, in each epoch the next ones of a fixed random
    round trip through the rows: over the epochs every row gets its turn equally often.
    """

    store: Store
    selection: Selection
    weight: float = 1.0
    cache: ShardCache | None = None

    def read_shard(self, shard: int, features: FeatureShape) -> Rows:
        """The selected rows of one shard."""
        key, numbers = self.selection.keys[shard], self.selection.rows[shard]
        return (self.cache.read_rows if self.cache else read_rows)(self.store, key, numbers, features)

    @property
    def rows_per_epoch(self) -> int:
        rows = len(self.selection)
        return int(self.weight) * rows + round(self.weight % 1 * rows)


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch; b = G / R rows, the same on every rank and in every step.

    Rows beyond the end of the data have an empty sample id, zero features, no targets (all -1) and clip score 0.
    """

    epoch: int
    step: int  # within the epoch, from 0
    sample_ids: tuple[str, ...]
    global_feature: np.ndarray  # (b, D) float16
    patch_features: np.ndarray  # (b, N, D_v) float16
    clip_score: np.ndarray  # (b,) float32
    token_ids: np.ndarray  # (b, T) int64, T = max_length
    target_ids: np.ndarray  # (b, T) int64, padded with -1


@dataclass(frozen=True)
class _Piece:
    """Some rows of one shard in the order of the epoch: positions among the shard's selected rows."""

    part: int
    shard: int
    order: np.ndarray


@dataclass(frozen=True)
class _Decoded:
    """The selected rows of one shard with their token ids."""

    rows: Rows
    token_ids: np.ndarray  # (n, T)
    target_ids: np.ndarray  # (n, T)


class ShardLoader:
    """Batches of one rank. `epoch(e, start_step=s)` may be called in any order and any number of times.

    `lanes` is lowered to the next divisor of the batch size. Raises InputError when there is nothing to read or the
    batch cannot be divided evenly.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        features: FeatureShape,
        vocabulary: Vocabulary,
        batch_size: int,
        max_length: int,
        lanes: int,
        seed: int,
        rank: int = 0,
        num_workers: int = 1,
        cache_bytes: int = CACHE_BYTES,
        prefetch: int = 4,
    ) -> None:
        if batch_size % num_workers:
            raise InputError(
                f"batch size {batch_size}: cannot be divided evenly among {num_workers} workers; "
                "change batch_size or --num-workers"
            )
        rows = sum(part.rows_per_epoch for part in parts)
        if not rows:
            named = ", ".join(part.store.root for part in parts)
            raise InputError(f"{named}: no rows to train on; loosen the filters or generate a dataset with stored rows")
        self._parts = tuple(parts)
        self._features = features
        self._vocabulary = vocabulary
        self._batch_size = batch_size
        self._max_length = max_length
        self._lanes = next(lanes for lanes in range(min(lanes, batch_size), 0, -1) if batch_size % lanes == 0)
        self._seed = seed
        self._slice = range(rank * batch_size // num_workers, (rank + 1) * batch_size // num_workers)
        self._prefetch = prefetch
        fits = sum(len(part.selection) for part in parts) * features.bytes_per_row <= cache_bytes
        self._cache: dict[tuple[int, int], _Decoded] | None = {} if fits else None
        self.rows_per_epoch = rows
        self.steps_per_epoch = -(-rows // batch_size)

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from `start_step` on, made by a background thread."""
        return _in_background(lambda: self._batches(epoch, start_step), depth=self._prefetch)

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        share = self._batch_size // self._lanes  # rows of a lane in a batch
        lanes = _lanes(self._order(epoch), self._lanes)
        touched = range(self._slice.start // share, (self._slice.stop - 1) // share + 1)
        with ThreadPoolExecutor(_READ_THREADS, "shard-reader") as readers:
            streams = [
                _Lane(_without(lanes[lane], start_step * share), lambda piece: readers.submit(self._decoded, piece))
                for lane in touched
            ]
            for step in range(start_step, self.steps_per_epoch):
                batch = self._blank(epoch, step)
                sample_ids = [""] * len(self._slice)
                for lane, stream in zip(touched, streams, strict=True):
                    position = lane * share - self._slice.start  # of the lane's first row in this rank's slice
                    for decoded, indices in stream.take(share):
                        first = max(0, -position)  # rows before the slice are another rank's, as are those after it
                        mine = indices[first : max(first, len(self._slice) - position)]
                        _fill(batch, sample_ids, position + first, decoded, mine)
                        position += len(indices)
                yield Batch(epoch, step, tuple(sample_ids), **batch)

    def _order(self, epoch: int) -> list[_Piece]:
        """All rows of an epoch: every shard's rows together, shards and rows permuted."""
        pieces = []
        for number, part in enumerate(self._parts):
            sizes = [len(rows) for rows in part.selection.rows]
            for _ in range(int(part.weight)):
                pieces += [_Piece(number, shard, np.arange(size)) for shard, size in enumerate(sizes) if size]
            extra = part.rows_per_epoch - int(part.weight) * sum(sizes)
            if extra:
                round_trip = np.random.default_rng([self._seed, number]).permutation(sum(sizes))
                turn = np.sort(round_trip[(epoch * extra + np.arange(extra)) % len(round_trip)])
                starts = np.cumsum([0, *sizes])
                bounds = np.searchsorted(turn, starts)
                pieces += [
                    _Piece(number, shard, turn[first:last] - starts[shard])
                    for shard, (first, last) in enumerate(itertools.pairwise(bounds))
                    if last > first
                ]
        random = np.random.default_rng([self._seed, epoch])
        shuffled = [pieces[index] for index in random.permutation(len(pieces))]
        return [_Piece(piece.part, piece.shard, random.permutation(piece.order)) for piece in shuffled]

    def _blank(self, epoch: int, step: int) -> dict[str, np.ndarray]:
        rows, features = len(self._slice), self._features
        return {
            "global_feature": np.zeros((rows, features.embed_dim), np.float16),
            "patch_features": np.zeros((rows, features.num_patches, features.patch_dim), np.float16),
            "clip_score": np.zeros(rows, np.float32),
            "token_ids": np.zeros((rows, self._max_length), np.int64),
            "target_ids": np.full((rows, self._max_length), -1, np.int64),
        }

    def _decoded(self, piece: _Piece) -> _Decoded:
        place = (piece.part, piece.shard)
        if self._cache is not None and place in self._cache:
            return self._cache[place]
        rows = self._parts[piece.part].read_shard(piece.shard, self._features)
        encoded = [self._vocabulary.encode(caption, self._max_length) for caption in rows.captions]
        decoded = _Decoded(
            rows, np.stack([token_ids for token_ids, _ in encoded]), np.stack([target_ids for _, target_ids in encoded])
        )
        if self._cache is not None:
            self._cache[place] = decoded
        return decoded


def _lanes(order: Sequence[_Piece], lanes: int) -> list[list[_Piece]]:
    """The sequence of rows cut into stretches whose lengths differ by one row at most."""
    rows = sum(len(piece.order) for piece in order)
    cuts = [rows * lane // lanes for lane in range(lanes + 1)]
    result: list[list[_Piece]] = [[] for _ in range(lanes)]
    start = 0
    for piece in order:
        end = start + len(piece.order)
        lane = int(np.searchsorted(cuts, start, side="right")) - 1
        while start < end:
            stop = min(end, cuts[lane + 1])
            if stop > start:
                taken = piece.order[len(piece.order) - (end - start) : len(piece.order) - (end - stop)]
                result[lane].append(_Piece(piece.part, piece.shard, taken))
            start, lane = stop, lane + 1
    return result


def _without(pieces: Sequence[_Piece], skip: int) -> list[_Piece]:
    """A lane without its first `skip` rows."""
    rest = []
    for piece in pieces:
        if skip < len(piece.order):
            rest.append(_Piece(piece.part, piece.shard, piece.order[skip:]))
        skip = max(0, skip - len(piece.order))
    return rest


class _Lane:
    """The rows of a lane in order; one shard is read ahead."""

    def __init__(self, pieces: Sequence[_Piece], read: Callable[[_Piece], "Future[_Decoded]"]) -> None:
        self._waiting = iter(pieces)
        self._read = read
        self._next = self._ahead()
        self._order = np.zeros(0, np.int64)
        self._current: _Decoded | None = None

    def _ahead(self) -> "tuple[_Piece, Future[_Decoded]] | None":
        piece = next(self._waiting, None)
        return None if piece is None else (piece, self._read(piece))

    def take(self, count: int) -> Iterator[tuple[_Decoded, np.ndarray]]:
        """The next `count` rows, or as many as there are left: (shard, positions in it)."""
        while count:
            if not len(self._order):
                self._current = None  # its memory is free before the next shard but one is read
                if self._next is None:
                    return
                piece, future = self._next
                self._current, self._order = future.result(), piece.order
                self._next = self._ahead()
            assert self._current is not None
            taken, self._order = self._order[:count], self._order[count:]
            count -= len(taken)
            yield self._current, taken


def _fill(
    batch: dict[str, np.ndarray], sample_ids: list[str], position: int, decoded: _Decoded, indices: np.ndarray
) -> None:
    """Copy rows of a shard into a batch, from its row `position` on."""
    if not len(indices):
        return
    place = slice(position, position + len(indices))
    rows = decoded.rows
    sample_ids[place] = rows.sample_ids[indices]
    for name in ("global_feature", "patch_features", "clip_score"):
        np.take(getattr(rows, name), indices, axis=0, out=batch[name][place], mode="clip")
    batch["token_ids"][place] = decoded.token_ids[indices]
    batch["target_ids"][place] = decoded.target_ids[indices]


_END = object()


def _in_background(make: Callable[[], Iterator[_Item]], *, depth: int) -> Iterator[_Item]:
    """The items of `make()`, at most `depth` of them made ahead in a thread that ends with the iteration.

    An exception in the thread is raised here, after the items before it.
    """
    items: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in make():
                put(item)
                if stopped.is_set():
                    return
            put(_END)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, name="shard-loader", daemon=True).start()
    try:
        while (item := items.get()) is not _END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
