"""Training batches straight from a dataset's Parquet shards, in an order that nothing but (seed, epoch) decides.

The global order of an epoch: the shards are permuted, grouped into windows of `window_shards`, and the rows of a window
are permuted together; the windows follow one another. Global batch b is `order[b * G : (b + 1) * G]`, and rank r of R
takes the r-th of its R equal slices. So

- the batches are the same for any number of workers, and every rank takes the same number of steps (no rank can leave
  the others waiting in an all-reduce);
- step s of epoch e can be resumed at directly: whole windows before it are not even read;
- the last batch, when it is short, is filled up with rows without targets, which weigh nothing in the loss: no row of a
  small dataset is lost, and all steps have one shape.

Ray Data's `streaming_split` gives none of the three: its order follows the scheduling of blocks, an interrupted epoch
starts again at its beginning, and `equal=True` drops the uneven tail. The price is that every rank decodes whole
windows, of which it uses one R-th; the next window is decoded in the background while one is used. A dataset that fits
into `cache_bytes` is decoded once and kept. Features stay float16 until they are on the training device.
"""

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.storage import Store
from pcm.errors import InputError
from pcm.records import FeatureShape
from pcm.vocabulary import Vocabulary

COLUMNS = ("sample_id", "caption", "clip_score", "global_feature", "patch_features")

#: A dataset whose features take at most this many bytes in memory is decoded once.
CACHE_BYTES = 2 << 30

_INDEX_THREADS = 8
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Rows:
    """Decoded rows of a dataset."""

    sample_ids: np.ndarray  # (n,) of str
    captions: np.ndarray  # (n,) of str
    clip_score: np.ndarray  # (n,) float32, raw cosine
    global_feature: np.ndarray  # (n, D) float16
    patch_features: np.ndarray  # (n, N, D_v) float16

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take(self, indices: np.ndarray) -> "Rows":
        return Rows(*(getattr(self, name)[indices] for name in self.__dataclass_fields__))

    @staticmethod
    def concatenate(parts: Sequence["Rows"]) -> "Rows":
        if len(parts) == 1:
            return parts[0]
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in Rows.__dataclass_fields__))


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch; b = G / R rows, the same on every rank and in every step.

    Rows beyond the end of the data repeat the last one with an empty sample id, no targets (all -1) and clip score 0.
    """

    epoch: int
    step: int  # within the epoch, from 0
    sample_ids: tuple[str, ...]
    global_feature: np.ndarray  # (b, D) float16
    patch_features: np.ndarray  # (b, N, D_v) float16
    clip_score: np.ndarray  # (b,) float32
    token_ids: np.ndarray  # (b, T) int64, T at most max_length, the same on every rank
    target_ids: np.ndarray  # (b, T) int64, padded with -1


@dataclass(frozen=True)
class Selection:
    """Which rows of which shards are read: `rows[i]` are the ascending row numbers used of shard `keys[i]`."""

    keys: tuple[str, ...]
    rows: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def part(self, rank: int, num_workers: int) -> "Selection":
        """One worker's share of the shards."""
        return Selection(self.keys[rank::num_workers], self.rows[rank::num_workers])


def split_holdout(
    store: Store, shard_keys: Sequence[str], *, fraction: float, limit: int, seed: int
) -> tuple[Selection, Selection]:
    """(training, held-out) rows: about min(fraction, limit / rows) of the captions are held out.

    Decided by a hash of the seed and the caption, letter case and spacing aside, so that copies of a caption (several
    images of one, duplicates in the corpus) never stand on both sides, whatever the sharding. Reads one column.
    """
    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        captions = list(pool.map(lambda key: read_shard(store, key, ["caption"])["caption"].to_pylist(), shard_keys))
    total = sum(map(len, captions))
    share = min(fraction, limit / max(total, 1))
    held_out = [
        np.fromiter((_unit_hash(seed, text) < share for text in texts), dtype=bool, count=len(texts))
        for texts in captions
    ]
    keys = tuple(shard_keys)
    return (
        Selection(keys, tuple(np.flatnonzero(~mask) for mask in held_out)),
        Selection(keys, tuple(np.flatnonzero(mask) for mask in held_out)),
    )


def _unit_hash(seed: int, caption: str) -> float:
    """A number in [0, 1) that depends on the seed and the words."""
    text = f"{seed}\0{' '.join(caption.lower().split())}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


#: Tables that this process was given, by the path of their shard: the trials of a sweep share them.
_PRELOADED: dict[str, pa.Table] = {}


def preload(tables: Mapping[str, pa.Table]) -> None:
    """Let read_shard answer from these tables, by the path of their shard, as long as this process lives."""
    _PRELOADED.update(tables)


def read_shard(store: Store, key: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of one shard. Raises InputError naming the shard when it cannot be read."""
    if (preloaded := _PRELOADED.get(store.path(key))) is not None:
        return preloaded.select(list(columns))
    try:
        with store.fs.open(store.path(key), "rb") as file:
            return pq.ParquetFile(file, pre_buffer=True).read(columns=list(columns))
    except (OSError, pa.ArrowException) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{store.root}/{key}: cannot be read ({first_line}); run jobs.verify on the dataset"
        ) from error


def read_rows(store: Store, key: str, rows: np.ndarray, features: FeatureShape) -> Rows:
    """The given rows of one shard, decoded."""
    table = read_shard(store, key, COLUMNS)
    count = table.num_rows

    def matrix(name: str) -> np.ndarray:
        values = pa.concat_arrays(table[name].chunks) if table[name].num_chunks != 1 else table[name].chunk(0)
        return values.flatten().to_numpy(zero_copy_only=True).reshape(count, -1)

    decoded = Rows(
        sample_ids=np.array(table["sample_id"].to_pylist(), dtype=object),
        captions=np.array(table["caption"].to_pylist(), dtype=object),
        clip_score=table["clip_score"].to_numpy(),
        global_feature=matrix("global_feature"),
        patch_features=matrix("patch_features").reshape(count, features.num_patches, features.patch_dim),  # (n, N, D_v)
    )
    return decoded if len(rows) == count else decoded.take(rows)


def read_selection(store: Store, selection: Selection, features: FeatureShape) -> Rows:
    """All selected rows at once, in the order of the shards: for selections that fit into memory."""
    empty = Rows(
        sample_ids=np.zeros(0, dtype=object),
        captions=np.zeros(0, dtype=object),
        clip_score=np.zeros(0, np.float32),
        global_feature=np.zeros((0, features.embed_dim), np.float16),
        patch_features=np.zeros((0, features.num_patches, features.patch_dim), np.float16),
    )
    chosen = [(key, rows) for key, rows in zip(selection.keys, selection.rows, strict=True) if len(rows)]
    return Rows.concatenate([read_rows(store, key, rows, features) for key, rows in chosen] or [empty])


@dataclass(frozen=True)
class _Window:
    """The rows of some shards with their token ids."""

    rows: Rows
    token_ids: np.ndarray  # (n, max_length)
    target_ids: np.ndarray  # (n, max_length)


class ShardLoader:
    """Batches of one rank. `epoch(e, start_step=s)` may be called in any order and any number of times.

    `trim` cuts the batch to its longest caption (padding changes no result but costs time on a CPU; a fixed shape suits
    a GPU's compiled kernels). Raises InputError when the selection is empty or the batch cannot be divided evenly.
    """

    def __init__(
        self,
        store: Store,
        selection: Selection,
        *,
        features: FeatureShape,
        vocabulary: Vocabulary,
        batch_size: int,
        max_length: int,
        window_shards: int,
        seed: int,
        rank: int = 0,
        num_workers: int = 1,
        trim: bool = False,
        cache_bytes: int = CACHE_BYTES,
        prefetch: int = 4,
    ) -> None:
        if batch_size % num_workers:
            raise InputError(
                f"batch size {batch_size}: cannot be divided evenly among {num_workers} workers; "
                "change batch_size or --num-workers"
            )
        if not len(selection):
            raise InputError(f"{store.root}: no rows to train on; generate a dataset with stored rows first")
        self._store = store
        self._selection = selection
        self._features = features
        self._vocabulary = vocabulary
        self._batch_size = batch_size
        self._max_length = max_length
        self._window_shards = window_shards
        self._seed = seed
        self._slice = slice(rank * batch_size // num_workers, (rank + 1) * batch_size // num_workers)
        self._trim = trim
        self._prefetch = prefetch
        fits = len(selection) * features.bytes_per_row <= cache_bytes
        self._cache: dict[int, _Window] | None = {} if fits else None
        self.steps_per_epoch = -(-len(selection) // batch_size)

    def epoch(self, epoch: int, *, start_step: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from `start_step` on, made by a background thread."""
        return _in_background(lambda: self._batches(epoch, start_step), depth=self._prefetch)

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        size = self._batch_size
        step = start_step
        carry: _Window | None = None  # fewer than `size` rows that the window before left over
        for window, order in self._windows(epoch, skip=start_step * size):
            used = 0
            if carry is not None:
                used = min(size - len(carry.rows), len(order))
                carry = _joined(carry, _taken(window, order[:used]))
                if len(carry.rows) < size:
                    continue
                yield self._batch(carry, np.arange(size), epoch, step)
                carry, step = None, step + 1
            while len(order) - used >= size:
                yield self._batch(window, order[used : used + size], epoch, step)
                used, step = used + size, step + 1
            if used < len(order):
                carry = _taken(window, order[used:])
        if carry is not None:
            yield self._batch(carry, np.arange(len(carry.rows)), epoch, step)

    def _batch(self, window: _Window, indices: np.ndarray, epoch: int, step: int) -> Batch:
        """This rank's slice of the global batch of these rows of a window, filled up if they are too few."""
        padding = self._batch_size - len(indices)
        real = np.arange(self._batch_size) < len(indices)
        indices = np.concatenate([indices, np.repeat(indices[-1:], padding)])  # (G,)
        length = self._max_length
        if self._trim:
            length = int((window.target_ids[indices] >= 0).sum(axis=1).max())
        indices, real = indices[self._slice], real[self._slice]  # (b,)
        rows = window.rows
        return Batch(
            epoch=epoch,
            step=step,
            sample_ids=tuple(rows.sample_ids[i] if is_real else "" for i, is_real in zip(indices, real, strict=True)),
            global_feature=rows.global_feature[indices],
            patch_features=rows.patch_features[indices],
            clip_score=np.where(real, rows.clip_score[indices], np.float32(0.0)),
            token_ids=window.token_ids[indices, :length],
            target_ids=np.where(real[:, None], window.target_ids[indices, :length], -1),
        )

    def _windows(self, epoch: int, skip: int) -> Iterator[tuple[_Window, np.ndarray]]:
        """(window, order of its rows) of an epoch without its first `skip` rows, one window being read ahead."""
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._selection.keys))
        jobs: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, len(order), self._window_shards):
            shards = order[start : start + self._window_shards]
            # Drawn for skipped windows too, so that a resumed epoch goes on in the same order.
            permutation = random.permutation(sum(len(self._selection.rows[shard]) for shard in shards))
            if skip < len(permutation):
                jobs.append((shards, permutation[skip:]))
            skip = max(0, skip - len(permutation))
        with ThreadPoolExecutor(1) as reader:
            pending = [reader.submit(self._read_window, shards) for shards, _ in jobs[:1]]
            for position, (_, permutation) in enumerate(jobs):
                window = pending.pop().result()
                if position + 1 < len(jobs):
                    pending.append(reader.submit(self._read_window, jobs[position + 1][0]))
                yield window, permutation

    def _read_window(self, shards: np.ndarray) -> _Window:
        return _joined(*(self._shard(int(shard)) for shard in shards if len(self._selection.rows[shard])))

    def _shard(self, shard: int) -> _Window:
        if self._cache is not None and shard in self._cache:
            return self._cache[shard]
        rows = read_rows(self._store, self._selection.keys[shard], self._selection.rows[shard], self._features)
        encoded = [self._vocabulary.encode(caption, self._max_length) for caption in rows.captions]
        window = _Window(
            rows, np.stack([token_ids for token_ids, _ in encoded]), np.stack([target_ids for _, target_ids in encoded])
        )
        if self._cache is not None:
            self._cache[shard] = window
        return window


def _taken(window: _Window, indices: np.ndarray) -> _Window:
    return _Window(window.rows.take(indices), window.token_ids[indices], window.target_ids[indices])


def _joined(*windows: _Window) -> _Window:
    if len(windows) == 1:
        return windows[0]
    return _Window(
        Rows.concatenate([window.rows for window in windows]),
        np.concatenate([window.token_ids for window in windows]),
        np.concatenate([window.target_ids for window in windows]),
    )


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
