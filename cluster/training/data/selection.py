"""Which rows of a dataset are trained on and which are held out, decided row by row from caption and clip score alone.

So neither sharding nor workers nor what else is selected changes the fate of a row: the rows of `fraction` 0.2 contain
those of 0.1, and every fraction and threshold is validated on the same held-out rows.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from cluster.dataset.layout import Manifest, StoredShard
from cluster.dataset.rows import read_shard, read_weights, scores_of
from cluster.store.store import Store

_INDEX_THREADS = 8


@dataclass(frozen=True)
class Selection:
    """Which rows of which shards are read: `rows[i]` are the ascending row numbers used of `shards[i]`.

    weights: how often each of these rows comes in an epoch; None: once.
    """

    shards: tuple[StoredShard, ...]
    rows: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...] | None = None

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def part(self, rank: int, num_workers: int) -> "Selection":
        """One worker's share of the shards."""
        return Selection(self.shards[rank::num_workers], self.rows[rank::num_workers])


@dataclass(frozen=True, kw_only=True)
class RowFilter:
    """The rule. Shares are of captions, by a hash of seed and words (letter case and spacing aside), so that copies of
    a caption (several images of one, duplicates in and among corpora) share their fate.
    """

    seed: int
    #: Share of the captions that is held out, before anything else is filtered.
    held_out: float = 0.0
    #: Share of the other captions that is trained on.
    fraction: float = 1.0
    #: Pairs with a lower raw cosine are not trained on; -1 keeps all.
    min_clip_score: float = -1.0

    @property
    def keeps_everything(self) -> bool:
        return self.held_out == 0 and self.fraction == 1 and self.min_clip_score == -1

    def masks(self, captions: Sequence[str], clip_score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(trained on, held out): two boolean masks of the rows."""
        held_out = self._below(self.held_out, "", captions)
        training = ~held_out & ~(clip_score < np.float32(self.min_clip_score))  # NaN stays: training names such rows
        if self.fraction < 1:
            training &= self._below(self.fraction, "fraction", captions)
        return training, held_out

    def _below(self, share: float, purpose: str, captions: Sequence[str]) -> np.ndarray:
        if share == 0:
            return np.zeros(len(captions), bool)
        hashes = (_unit_hash(f"{self.seed}{purpose}", caption) for caption in captions)
        return np.fromiter((value < share for value in hashes), dtype=bool, count=len(captions))


def all_rows(manifest: Manifest) -> Selection:
    """Every row of a dataset."""
    shards = manifest.stored_shards
    return Selection(shards, tuple(np.arange(shard.rows) for shard in shards))


def weighted(store: Store, selection: Selection) -> Selection:
    """With the weights that a view's rows have. Raises InputError as cluster.dataset.rows.read_shard does."""
    if all(shard.weighted_rows is None for shard in selection.shards):
        return selection
    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        weights = pool.map(lambda shard: read_weights(store, shard), selection.shards)
        found = tuple(each[rows] for each, rows in zip(weights, selection.rows, strict=True))
    return replace(selection, weights=found)


def holdout_share(*, fraction: float, limit: int, rows: int) -> float:
    """Share of captions to hold out of a dataset of `rows`: `fraction`, but not many more than `limit` rows."""
    return min(fraction, limit / max(rows, 1))


def select_rows(store: Store, shards: Sequence[StoredShard], row_filter: RowFilter) -> tuple[Selection, Selection]:
    """(training, held-out) rows of some shards; reads two small columns of each."""

    def masks(shard: StoredShard) -> tuple[np.ndarray, np.ndarray]:
        table = read_shard(store, shard, ["caption", "clip_score"], checksum=False)  # when its features are read
        return row_filter.masks(table["caption"].to_pylist(), scores_of(store, shard, table))

    with ThreadPoolExecutor(_INDEX_THREADS) as pool:
        chosen = list(pool.map(masks, shards))
    chosen_from = tuple(shards)
    return (
        Selection(chosen_from, tuple(np.flatnonzero(training) for training, _ in chosen)),
        Selection(chosen_from, tuple(np.flatnonzero(held_out) for _, held_out in chosen)),
    )


def _unit_hash(salt: str, caption: str) -> float:
    """A number in [0, 1) that depends on the salt and the words."""
    text = f"{salt}\0{' '.join(caption.lower().split())}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
