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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

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

_READ_THREADS = 4


@dataclass(frozen=True)
class Part:
    """Rows of one dataset and how often they come: `weight` times an epoch.

    A view's rows may have weights of their own: they multiply. With a fraction f in the weight, round(f * rows)
    rows come once more, in each epoch the next ones of a fixed random round trip through the rows: over the epochs
    every row gets its turn equally often.
    """

    store: Store
    selection: Selection
    weight: float = 1.0
    cache: ShardCache | None = None

    def read_shard(self, shard: int, features: FeatureShape) -> Rows:
        """The selected rows of one shard."""
        stored, numbers = self.selection.shards[shard], self.selection.rows[shard]
        if self.cache is not None:
            return self.cache.read_rows(self.store, stored, numbers, features)
        return read_rows(self.store, stored, numbers, features, in_place=True)

    def places(self, shard: int) -> np.ndarray:
        """Positions among the selected rows of one shard, each as often as its own weight says."""
        places = np.arange(len(self.selection.rows[shard]))
        return places if self.selection.weights is None else np.repeat(places, self.selection.weights[shard])

    @property
    def rows(self) -> int:
        """Selected rows, each counted as often as its own weight says."""
        weights = self.selection.weights
        return len(self.selection) if weights is None else int(sum(each.sum() for each in weights))

    @property
    def rows_per_epoch(self) -> int:
        return int(self.weight) * self.rows + round(self.weight % 1 * self.rows)


@dataclass(frozen=True)
class _Piece:
    """Some rows of one shard in the order of the epoch: positions among the shard's selected rows."""

    part: int
    shard: int
    order: np.ndarray


class ShardLoader:
    """Batches of one rank. `epoch(e, start_step=s)` may be called in any order and any number of times.

    `lanes` is lowered to the next divisor of the batch size. Raises InputError when there is nothing to read.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shape: BatchShape,
        vocabulary: Vocabulary,
        *,
        lanes: int,
        seed: int,
        cache_bytes: int = TrainRequest.cache_bytes,
        prefetch: int = 4,
    ) -> None:
        batch_size = shape.batch_size
        rows = sum(part.rows_per_epoch for part in parts)
        if not rows:
            named = ", ".join(part.store.root for part in parts)
            raise InputError(f"{named}: no rows to train on; loosen the filters or generate a dataset with stored rows")
        self._parts = tuple(parts)
        self._shape = shape
        self._vocabulary = vocabulary
        self._lanes = next(lanes for lanes in range(min(lanes, batch_size), 0, -1) if batch_size % lanes == 0)
        self._seed = seed
        self._prefetch = prefetch
        fits = sum(len(part.selection) for part in parts) * shape.bytes_per_row <= cache_bytes
        self._cache: dict[tuple[int, int], Decoded] | None = {} if fits else None
        self.rows_per_epoch = rows
        self.steps_per_epoch = -(-rows // batch_size)

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from `start_step` on, made by a background thread."""
        return in_background(lambda: self._batches(epoch, start_step), depth=self._prefetch)

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        share = self._shape.batch_size // self._lanes  # rows of a lane in a batch
        lanes = _lanes(self._order(epoch), self._lanes)
        touched = range(self._shape.slice.start // share, (self._shape.slice.stop - 1) // share + 1)
        with ThreadPoolExecutor(_READ_THREADS, "shard-reader") as readers:
            streams = [
                _Lane(_without(lanes[lane], start_step * share), lambda piece: readers.submit(self._decoded, piece))
                for lane in touched
            ]
            for step in range(start_step, self.steps_per_epoch):
                batch = OpenBatch(self._shape)
                for lane, stream in zip(touched, streams, strict=True):
                    position = lane * share
                    for decoded, indices in stream.take(share):
                        batch.put(position, decoded, indices)
                        position += len(indices)
                yield batch.close(epoch=epoch, step=step, last=step + 1 == self.steps_per_epoch)

    def _order(self, epoch: int) -> list[_Piece]:
        """All rows of an epoch: every shard's rows together, shards and rows permuted."""
        pieces = []
        for number, part in enumerate(self._parts):
            places = [part.places(shard) for shard in range(len(part.selection.rows))]
            sizes = [len(each) for each in places]
            for _ in range(int(part.weight)):
                pieces += [_Piece(number, shard, each) for shard, each in enumerate(places) if len(each)]
            extra = part.rows_per_epoch - int(part.weight) * sum(sizes)
            if extra:
                round_trip = np.random.default_rng([self._seed, number]).permutation(sum(sizes))
                turn = np.sort(round_trip[(epoch * extra + np.arange(extra)) % len(round_trip)])
                starts = np.cumsum([0, *sizes])
                bounds = np.searchsorted(turn, starts)
                pieces += [
                    _Piece(number, shard, places[shard][turn[first:last] - starts[shard]])
                    for shard, (first, last) in enumerate(itertools.pairwise(bounds))
                    if last > first
                ]
        random = np.random.default_rng([self._seed, epoch])
        shuffled = [pieces[index] for index in random.permutation(len(pieces))]
        return [_Piece(piece.part, piece.shard, random.permutation(piece.order)) for piece in shuffled]

    def _decoded(self, piece: _Piece) -> Decoded:
        place = (piece.part, piece.shard)
        if self._cache is not None and place in self._cache:
            return self._cache[place]
        part = self._parts[piece.part]
        rows = part.read_shard(piece.shard, self._shape.features)
        decoded = Decoded.of(
            f"{part.store.root}/{part.selection.shards[piece.shard].key}", rows, self._vocabulary, self._shape
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

    def __init__(self, pieces: Sequence[_Piece], read: Callable[[_Piece], "Future[Decoded]"]) -> None:
        self._waiting = iter(pieces)
        self._read = read
        self._next = self._ahead()
        self._order = np.zeros(0, np.int64)
        self._current: Decoded | None = None

    def _ahead(self) -> "tuple[_Piece, Future[Decoded]] | None":
        piece = next(self._waiting, None)
        return None if piece is None else (piece, self._read(piece))

    def take(self, count: int) -> Iterator[tuple[Decoded, np.ndarray]]:
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
