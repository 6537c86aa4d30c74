"""Training batches straight from Parquet shards, in an order that nothing but (data, seed, epoch) decides.

The order of an epoch: all shards are permuted, the rows of each are permuted, and the resulting sequence of rows is cut
into G equal stretches, the lanes, one for each row of a batch. Every second lane is gone through backwards. A batch
takes the next row of every lane, so it mixes the rows of G random parts of the data. Rank r of R takes the r-th of the
R equal slices of each batch, which is the r-th part of the whole sequence. So

- the batches are the same for any number of workers, and every rank takes the same number of steps (no rank can leave
  the others waiting in an all-reduce);
- every shard is read by one rank, once; where the sequence is cut for two ranks, by two: S + R - 1 reads of S shards at
  most. Two lanes of a rank that share a shard begin, or end, with it at the same step, for one of them goes backwards;
- step s of epoch e can be resumed at directly: shards before it are not even read;
- the last batch, when it is short, is filled up with rows without targets, which weigh nothing in the loss: no row of a
  small dataset is lost, and all steps have one shape;
- nothing is made of a row before its shard is read: what a rank holds of an epoch grows with the shards, not the rows.

The price is memory: a rank holds a shard for each row of its slice. Where these are more than `window_bytes`, it keeps
parts of them and reads a shard once a part; the batches stay the same.

Ray Data's `streaming_split` gives none of the first four: its order follows the scheduling of blocks, an interrupted
epoch starts again at its beginning, and `equal=True` drops the uneven tail. The next shard of a lane is read while the
rest of one is used. Data that fits into `cache_bytes` is decoded once and kept in memory; with a `ShardCache` any data
is decoded once a machine.
"""

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import gcd

import numpy as np

from cluster.dataset.rows import Rows, read_rows
from cluster.store.store import Store
from cluster.training.data.batches import Batch, BatchShape, Decoded, OpenBatch, in_background
from cluster.training.data.selection import Selection
from cluster.training.data.shard_cache import ShardCache
from cluster.training.request import TrainRequest
from pcm.errors import InputError
from pcm.records import FeatureShape
from pcm.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

#: Version of the rule above and of which captions are held out (cluster.training.data.selection): a run records it, and
#: goes on only by the rule by which it began. 1: eight lanes, and another hash of the captions.
ROW_ORDER = 2

_READ_THREADS = 4
#: A lane asks for its next shard when so much of one is left.
_AHEAD = 0.25
#: Rows whose turns are counted at once.
_COUNTED = 1 << 22


@dataclass(frozen=True)
class Part:
    """Rows of one dataset and how often they come: `weight` times an epoch.

    A view's rows may have weights of their own: they multiply. With a fraction f in the weight, round(f * rows)
    rows come once more, in each epoch the next ones of a fixed round trip through the rows: over the epochs every row
    gets its turn equally often.
    """

    store: Store
    selection: Selection
    weight: float = 1.0
    cache: ShardCache | None = None

    def read_shard(self, shard: int, features: FeatureShape, positions: np.ndarray | None = None) -> Rows:
        """The selected rows of one shard; with `positions` those at these, ascending, among them."""
        stored, numbers = self.selection.shards[shard], self.selection.rows[shard]
        if positions is not None:
            numbers = numbers[positions]
        if self.cache is not None:
            return self.cache.read_rows(self.store, stored, numbers, features)
        return read_rows(self.store, stored, numbers, features, in_place=True)

    def positions(self, shard: int) -> np.ndarray:
        """Positions among the selected rows of one shard, each as often as its own weight says."""
        positions = np.arange(len(self.selection.rows[shard]))
        return positions if self.selection.weights is None else np.repeat(positions, self.selection.weights[shard])

    def sizes(self) -> np.ndarray:
        """(shards,) selected rows of each, each counted as often as its own weight says."""
        weights = self.selection.weights
        if weights is None:
            return self.selection.sizes
        return np.array([each.sum() for each in weights], np.int64)


@dataclass(frozen=True)
class _RoundTrip:
    """Which rows of a part come once more in which epoch: `extra` of its `rows`, each time the next ones.

    Row i has place i * stride modulo rows on the trip. The stride is near the golden section of the rows, so those of
    an epoch are spread evenly, and has no divisor in common with them, so each has a place of its own.
    """

    rows: int
    extra: int

    @property
    def stride(self) -> int:
        golden = max(1, round(0.6180339887498949 * self.rows))
        return next(stride for stride in range(golden, golden + self.rows + 1) if gcd(stride, self.rows) == 1)

    def has_turn(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """(n,) of bool for (n,) row numbers."""
        return (rows * self.stride - epoch * self.extra % self.rows) % self.rows < self.extra

    def sizes(self, starts: np.ndarray, epoch: int) -> np.ndarray:
        """How many rows of each shard have their turn; `starts`: (shards + 1,) first row of each, and the end."""
        counts, first = np.zeros(len(starts) - 1, np.int64), 0
        while first < len(counts):
            last = max(first + 1, int(np.searchsorted(starts, starts[first] + _COUNTED, side="right")) - 1)
            turns = np.cumsum([0, *self.has_turn(np.arange(starts[first], starts[last]), epoch)])
            counts[first:last] = np.diff(turns[starts[first : last + 1] - starts[first]])
            first = last
        return counts


@dataclass(frozen=True)
class _Order:
    """An epoch's pieces one after another: all rows of one shard of one part, or those that have their turn.

    copy: the how manieth time a shard comes. starts: (pieces + 1,) first row of each among the epoch's, and their end.
    """

    part: np.ndarray
    shard: np.ndarray
    copy: np.ndarray
    starts: np.ndarray

    def between(self, first: int, last: int) -> range:
        """The pieces that hold the epoch's rows from `first` to before `last`."""
        if first >= last:
            return range(0)
        start = int(np.searchsorted(self.starts, first, side="right")) - 1
        return range(start, int(np.searchsorted(self.starts, last, side="left")))


@dataclass(frozen=True)
class _Piece:
    """Rows of one shard in the order in which they are taken: positions among those of its selected rows that are
    `held`, or among all of them."""

    part: int
    shard: int
    order: np.ndarray
    held: np.ndarray | None = None


class ShardLoader:
    """Batches of one rank. `epoch(e, start_step=s)` may be called in any order and any number of times.

    Raises InputError when there is nothing to read.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shape: BatchShape,
        vocabulary: Vocabulary,
        *,
        seed: int,
        cache_bytes: int = TrainRequest.cache_bytes,
        window_bytes: int = TrainRequest.window_bytes,
        prefetch: int = 4,
    ) -> None:
        self._parts = tuple(parts)
        self._starts = [np.concatenate([[0], np.cumsum(part.sizes())]) for part in parts]
        self._trips = [
            _RoundTrip(int(starts[-1]), round(part.weight % 1 * int(starts[-1])))
            for part, starts in zip(parts, self._starts, strict=True)
        ]
        for part, trip in zip(parts, self._trips, strict=True):
            if trip.rows and not (int(part.weight) or trip.extra):
                raise InputError(
                    f"--data {part.store.root}={part.weight:g}: of its {trip.rows} rows none would come in an epoch; "
                    f"give a weight of at least {1 / trip.rows:.2g}"
                )
        rows = sum(int(part.weight) * trip.rows + trip.extra for part, trip in zip(parts, self._trips, strict=True))
        if not rows:
            named = ", ".join(part.store.root for part in parts)
            raise InputError(f"{named}: no rows to train on; loosen the filters or generate a dataset with stored rows")
        self._shape = shape
        self._vocabulary = vocabulary
        self._seed = seed
        self._prefetch = prefetch
        fits = sum(len(part.selection) for part in parts) * shape.bytes_per_row <= cache_bytes
        self._cache: dict[tuple[int, int], Decoded] | None = {} if fits else None
        self._largest = max(int(np.diff(starts).max(initial=0)) for starts in self._starts)  # rows of a shard
        self._held_rows = self._rows_held_of_a_shard(window_bytes)
        self.rows_per_epoch = rows
        self.steps_per_epoch = -(-rows // shape.batch_size)

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from `start_step` on, made by a background thread."""
        return in_background(lambda: self._batches(epoch, start_step), depth=self._prefetch)

    def lanes(self, epoch: int, *, start_step: int = 0) -> list[Iterator[_Piece]]:
        """What each of this rank's lanes takes of an epoch, from `start_step` on, in order. Nothing is read for it."""
        order = self._order(epoch)
        return [self._pieces(order, epoch, lane, start_step) for lane in self._shape.slice]

    def shards(self, epoch: int) -> set[tuple[int, int]]:
        """(part, shard) of all that this rank reads in an epoch."""
        order, mine = self._order(epoch), self._shape.slice
        pieces = list(order.between(self._cut(mine.start), self._cut(mine.stop)))
        return set(zip(order.part[pieces].tolist(), order.shard[pieces].tolist(), strict=True))

    def _cut(self, lane: int) -> int:
        """The first of the epoch's rows that a lane has."""
        return self.rows_per_epoch * lane // self._shape.batch_size

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(_READ_THREADS, "shard-reader") as readers:
            read = _Reads(lambda piece: readers.submit(self._decoded, piece))
            ahead = int(_AHEAD * min(self._largest, self._held_rows or self._largest))
            streams = [_Lane(pieces, read, ahead=ahead) for pieces in self.lanes(epoch, start_step=start_step)]
            for step in range(start_step, self.steps_per_epoch):
                batch = OpenBatch(self._shape)
                for position, stream in zip(self._shape.slice, streams, strict=True):
                    if (row := stream.next()) is not None:
                        batch.put(position, *row)
                yield batch.close(epoch=epoch, step=step, last=step + 1 == self.steps_per_epoch)

    def _order(self, epoch: int) -> _Order:
        found: list[tuple[np.ndarray, ...]] = []  # part, shard, copy, rows
        for number, (part, starts, trip) in enumerate(zip(self._parts, self._starts, self._trips, strict=True)):
            sizes = [np.diff(starts)] * int(part.weight)
            sizes += [trip.sizes(starts, epoch)] if trip.extra else []
            for copy, each in enumerate(sizes):
                shards = np.flatnonzero(each).astype(np.int32)
                found.append((np.full_like(shards, number), shards, np.full_like(shards, copy), each[shards]))
        part_of, shard_of, copy_of, rows = (np.concatenate(columns) for columns in zip(*found, strict=True))
        turn = np.random.default_rng([self._seed, epoch]).permutation(len(rows))
        return _Order(part_of[turn], shard_of[turn], copy_of[turn], np.concatenate([[0], np.cumsum(rows[turn])]))

    def _pieces(self, order: _Order, epoch: int, lane: int, start_step: int) -> Iterator[_Piece]:
        first, last = self._cut(lane), self._cut(lane + 1)
        is_backwards = lane % 2 == 1
        first, last = (first, last - start_step) if is_backwards else (first + start_step, last)
        pieces = order.between(first, last)
        for piece in reversed(pieces) if is_backwards else pieces:
            start = order.starts[piece]
            rows = self._rows(order, epoch, piece)[max(first - start, 0) : last - start]
            part, shard = int(order.part[piece]), int(order.shard[piece])
            yield from self._held(_Piece(part, shard, rows[::-1] if is_backwards else rows))

    def _rows(self, order: _Order, epoch: int, piece: int) -> np.ndarray:
        """The rows of a piece in the epoch's order, as positions among the shard's selected rows."""
        number, shard, copy = (int(each[piece]) for each in (order.part, order.shard, order.copy))
        part, starts = self._parts[number], self._starts[number]
        positions = part.positions(shard)
        if copy == int(part.weight):
            positions = positions[self._trips[number].has_turn(np.arange(starts[shard], starts[shard + 1]), epoch)]
        return np.random.default_rng([self._seed, epoch, number, shard, copy]).permutation(positions)

    def _held(self, piece: _Piece) -> Iterator[_Piece]:
        """The piece, or in place of it some that take no more memory than there is."""
        if self._held_rows is None:
            yield piece
            return
        for start in range(0, len(piece.order), self._held_rows):
            rows = piece.order[start : start + self._held_rows]
            held = np.unique(rows)
            yield _Piece(piece.part, piece.shard, np.searchsorted(held, rows), held)

    def _rows_held_of_a_shard(self, window_bytes: int) -> int | None:
        """How many rows of a shard a lane keeps; None: all."""
        held = len(self._shape.slice) * (1 + _AHEAD) * self._shape.bytes_per_row
        if self._cache is not None or self._largest * held <= window_bytes:
            return None
        rows = max(1, int(window_bytes / held))
        if self._shape.rank == 0:
            log.warning(
                "a worker mixes %d shards, %.1f GB, more than --window-bytes: each shard is read %d times; give more "
                "workers or more --window-bytes",
                len(self._shape.slice), self._largest * held / 1e9, -(-self._largest // rows),
            )  # fmt: skip
        return rows

    def _decoded(self, piece: _Piece) -> Decoded:
        key = (piece.part, piece.shard)
        if self._cache is not None and key in self._cache:
            return self._cache[key]
        part = self._parts[piece.part]
        rows = part.read_shard(piece.shard, self._shape.features, piece.held)
        decoded = Decoded.of(
            f"{part.store.root}/{part.selection.shards[piece.shard].key}", rows, self._vocabulary, self._shape
        )
        if self._cache is not None:
            self._cache[key] = decoded
        return decoded


class _Reads:
    """Reads that are under way or whose rows are still in use: the lanes of a rank share them."""

    def __init__(self, read: Callable[[_Piece], "Future[Decoded]"]) -> None:
        self._read = read
        self._in_use: weakref.WeakValueDictionary[tuple[int, int], Future[Decoded]] = weakref.WeakValueDictionary()

    def __call__(self, piece: _Piece) -> "Future[Decoded]":
        if piece.held is not None:
            return self._read(piece)
        key = (piece.part, piece.shard)
        if (future := self._in_use.get(key)) is None:
            self._in_use[key] = future = self._read(piece)
        return future


class _Lane:
    """The rows of a lane in order; its next shard is read when `ahead` rows of one are left."""

    def __init__(self, pieces: Iterator[_Piece], read: Callable[[_Piece], "Future[Decoded]"], *, ahead: int) -> None:
        self._pieces = pieces
        self._read = read
        self._ahead = ahead
        self._order, self._taken = np.zeros(0, np.int64), 0
        self._current: Future[Decoded] | None = None
        self._next = self._following()

    def _following(self) -> "tuple[_Piece, Future[Decoded]] | None":
        piece = next(self._pieces, None)
        return None if piece is None else (piece, self._read(piece))

    def next(self) -> tuple[Decoded, np.ndarray] | None:
        """The next row: its shard and, (1,), its position there. None: there are no more."""
        if self._taken == len(self._order):
            self._current = None  # its memory is free
            if self._next is None:
                return None
            piece, self._current = self._next
            self._order, self._taken, self._next = piece.order, 0, None
        assert self._current is not None
        self._taken += 1
        if self._next is None and len(self._order) - self._taken <= self._ahead:
            self._next = self._following()
        return self._current.result(), self._order[self._taken - 1 : self._taken]
