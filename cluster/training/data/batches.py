"""A rank's slice of a global training batch, and how it is put together from rows of shards."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cluster.dataset.rows import Rows, not_finite
from pcm.captioners.pcmnet.method import PCMNET
from pcm.errors import InputError
from pcm.records import FeatureShape
from pcm.text.vocabulary import Vocabulary

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch; b = G / R rows, the same on every rank and in every step.

    Rows beyond the end of the data have an empty sample id, zero features, no targets (all -1) and clip score 0.
    """

    epoch: int
    step: int  # within the epoch, from 0
    last: bool  # of the epoch
    sample_ids: tuple[str, ...]
    shards: tuple[str, ...]  # that each row is of: path or URI
    global_feature: np.ndarray  # (b, D) float16
    patch_features: np.ndarray  # (b, N, D_v) float16 or int8
    patch_scale: np.ndarray  # (b, D_v) float16 beside int8, else (b, 0)
    clip_score: np.ndarray  # (b,) float32
    token_ids: np.ndarray  # (b, T) int64, T = max_length
    target_ids: np.ndarray  # (b, T) int64, padded with -1

    @property
    def nbytes(self) -> int:
        """Of its arrays in memory."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def damaged(self) -> list[tuple[str, str]]:
        """(shard, sample id) of the rows that have a NaN or an infinity in their features or score."""
        bad = not_finite(self.global_feature, self.patch_features, self.patch_scale, self.clip_score)
        return [(self.shards[row], self.sample_ids[row]) for row in np.flatnonzero(bad)]


@dataclass(frozen=True)
class Decoded:
    """Rows of one shard with their token ids."""

    shard: str  # path or URI
    rows: Rows
    token_ids: np.ndarray  # (n, T)
    target_ids: np.ndarray  # (n, T)

    @staticmethod
    def of(shard: str, rows: Rows, vocabulary: Vocabulary, shape: "BatchShape") -> "Decoded":
        token_ids, target_ids = PCMNET.encode(rows.captions.tolist(), vocabulary, length=shape.max_length)
        return Decoded(shard, rows.in_8_bits() if shape.int8 else rows, token_ids, target_ids)


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Sizes of a batch of G rows, and which of them are this rank's: the r-th of R equal slices.

    Raises InputError when G cannot be divided evenly.
    """

    features: FeatureShape
    batch_size: int
    max_length: int
    rank: int = 0
    num_workers: int = 1
    int8: bool = False  # patch features as pcm.kernels.quantised has them

    def __post_init__(self) -> None:
        if self.batch_size % self.num_workers:
            raise InputError(
                f"batch size {self.batch_size}: cannot be divided evenly among {self.num_workers} workers; "
                "change batch_size or --num-workers"
            )

    @property
    def slice(self) -> range:
        """Places in the global batch."""
        share = self.batch_size // self.num_workers
        return range(self.rank * share, (self.rank + 1) * share)

    @property
    def bytes_per_row(self) -> int:
        """Of a row's features in memory."""
        stored, values = self.features.bytes_per_row, self.features.num_patches * self.features.patch_dim
        return stored - values + 2 * self.features.patch_dim if self.int8 else stored


class OpenBatch:
    """A batch that is being filled; rows of other ranks are passed over."""

    def __init__(self, shape: BatchShape) -> None:
        self._slice = shape.slice
        rows, features = len(self._slice), shape.features
        self._sample_ids, self._shards = [""] * rows, [""] * rows
        self._arrays: dict[str, np.ndarray] = {
            "global_feature": np.zeros((rows, features.embed_dim), np.float16),
            # Megabytes that nearly always are filled: `close` clears what is not.
            "patch_features": np.empty(
                (rows, features.num_patches, features.patch_dim), np.int8 if shape.int8 else np.float16
            ),
            "patch_scale": np.zeros((rows, features.patch_dim if shape.int8 else 0), np.float16),
            "clip_score": np.zeros(rows, np.float32),
            "token_ids": np.zeros((rows, shape.max_length), np.int64),
            "target_ids": np.full((rows, shape.max_length), -1, np.int64),
        }

    def put(self, position: int, decoded: Decoded, indices: np.ndarray) -> None:
        """Copy rows of a shard to the places from `position` on of the global batch."""
        start = position - self._slice.start
        first = max(0, -start)  # rows before the slice are another rank's, as are those after it
        mine = indices[first : max(first, len(self._slice) - start)]
        if not len(mine):
            return
        place = slice(start + first, start + first + len(mine))
        self._sample_ids[place] = decoded.rows.sample_ids[mine]
        self._shards[place] = [decoded.shard] * len(mine)
        lines = decoded.rows.feature_lines(mine)
        for name in ("global_feature", "patch_features", "patch_scale"):
            np.take(getattr(decoded.rows, name), lines, axis=0, out=self._arrays[name][place], mode="clip")
        np.take(decoded.rows.clip_score, mine, out=self._arrays["clip_score"][place], mode="clip")
        self._arrays["token_ids"][place] = decoded.token_ids[mine]
        self._arrays["target_ids"][place] = decoded.target_ids[mine]

    def close(self, *, epoch: int, step: int, last: bool) -> Batch:
        missing = [row for row, sample_id in enumerate(self._sample_ids) if not sample_id]
        self._arrays["patch_features"][missing] = 0
        return Batch(epoch, step, last, tuple(self._sample_ids), tuple(self._shards), **self._arrays)


_END = object()


def in_background(make: Callable[[], Iterator[_Item]], *, depth: int) -> Iterator[_Item]:
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
