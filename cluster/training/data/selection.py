"""Which rows of a dataset are trained on and which are held out, decided row by row from caption and clip score alone.

So neither sharding nor workers nor what else is selected changes the fate of a row: the rows of `fraction` 0.2 contain
those of 0.1, and every fraction and threshold is validated on the same held-out rows.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.dataset.committed import GROUP
from cluster.dataset.documents import Manifest, StoredShard
from cluster.dataset.row_index import caption_digests, row_index
from cluster.store.store import Store
from pcm.errors import OneLineError

_GROUPS_AT_ONCE, _SHARDS_AT_ONCE = 4, 16


@dataclass(frozen=True)
class Selection:
    """Which rows of which shards are read: `rows[i]` are the ascending row numbers used of `shards[i]`.

    weights: how often each of these rows comes in an epoch; None: once.
    captions: of held-out rows the digests of two of their captions, or of the only one.
    """

    shards: Sequence[StoredShard]
    rows: Sequence[np.ndarray]
    weights: Sequence[np.ndarray] | None = None
    captions: frozenset[int] = frozenset()

    @cached_property
    def sizes(self) -> np.ndarray:
        """(shards,) rows that are used of each, once each."""
        return np.array([len(rows) for rows in self.rows], np.int64)

    def __len__(self) -> int:
        return int(self.sizes.sum())


class Ragged(Sequence[np.ndarray]):
    """Arrays of different lengths, one after another in one: a small array costs a hundred bytes more than it holds."""

    def __init__(self, values: np.ndarray, sizes: np.ndarray) -> None:
        self._values, self._ends, self._sizes = values, np.cumsum(sizes), sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # no slices: nobody takes any
        return self._values[self._ends[index] - self._sizes[index] : self._ends[index]]


class PackedRows(Sequence[np.ndarray]):
    """Ascending row numbers of many shards, kept as a bit a row: 12.5 MB of 100 million rows."""

    def __init__(self, bits: np.ndarray, sizes: np.ndarray) -> None:
        """`sizes`: (shards,) rows of each; `bits`: their masks as numpy.packbits gives them, one after another."""
        self._bits, self._sizes = Ragged(bits, -(-sizes // 8)), sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # no slices: nobody takes any
        return np.flatnonzero(np.unpackbits(self._bits[index], count=self._sizes[index]))


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
        return self.masks_of(caption_digests(captions), clip_score)

    def masks_of(self, digests: np.ndarray, clip_score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`masks` of the rows whose captions have these cluster.dataset.row_index.caption_digests."""
        held_out = self._below(self.held_out, "", digests)
        training = ~held_out & ~(clip_score < np.float32(self.min_clip_score))  # NaN stays: training names such rows
        if self.fraction < 1:
            training &= self._below(self.fraction, "fraction", digests)
        return training, held_out

    def _below(self, share: float, purpose: str, digests: np.ndarray) -> np.ndarray:
        salt = hashlib.sha256(f"{self.seed}{purpose}".encode()).digest()[:8]
        return _unit_hash(digests ^ np.frombuffer(salt, "<u8")) < share


def all_rows(manifest: Manifest) -> Selection:
    """Every row of a dataset, whatever its weight."""
    shards = manifest.stored_shards
    return Selection(shards, _every_row(shards))


def _every_row(shards: Sequence[StoredShard]) -> PackedRows:
    sizes = np.array([shard.rows for shard in shards], np.int64)
    return PackedRows(np.full((-(-sizes // 8)).sum(), 0xFF, np.uint8), sizes)


def holdout_share(*, fraction: float, limit: int, rows: int) -> float:
    """Share of captions to hold out of a dataset of `rows`: `fraction`, but not many more than `limit` rows."""
    return min(fraction, limit / max(rows, 1))


@dataclass(frozen=True)
class Ranks:
    """The workers that open a dataset together. `gather`: what every one says, in their order; all must call it."""

    rank: int = 0
    num_workers: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


def select_rows(
    store: Store,
    shards: Sequence[StoredShard],
    row_filter: RowFilter,
    *,
    ranks: Ranks = Ranks(),
    keep_index: bool = True,
) -> tuple[Selection, Selection]:
    """(training, held-out) rows of some shards, the first with the weights that a view's rows have.

    The index of every thousand shards is read, and where there is none made, by one of the workers, who tells the
    others; `keep_index` as in cluster.dataset.row_index. Where all rows are taken once, nothing is read. Raises
    InputError as row_index does, on every worker alike.
    """
    is_weighted = any(shard.weighted_rows is not None for shard in shards)
    if row_filter.keeps_everything and not is_weighted:
        return Selection(shards, _every_row(shards)), Selection((), ())
    groups = [shards[start : start + GROUP] for start in range(0, len(shards), GROUP)]
    mine = range(ranks.rank, len(groups), ranks.num_workers)
    said: list[_Chosen] | OneLineError
    try:
        with ThreadPoolExecutor(_GROUPS_AT_ONCE) as pool, ThreadPoolExecutor(_SHARDS_AT_ONCE) as shard_pool:

            def chosen(number: int) -> _Chosen:
                index = row_index(store, number, groups[number], shard_pool, keep=keep_index)
                return _Chosen.of(index, groups[number], row_filter, is_weighted=is_weighted)

            said = list(pool.map(chosen, mine))
    except OneLineError as error:
        said = error
    all_said = ranks.gather(said)
    for each in all_said:
        if isinstance(each, OneLineError):
            raise each
    found = [all_said[place % ranks.num_workers][place // ranks.num_workers] for place in range(len(groups))]
    sizes = np.array([shard.rows for shard in shards], np.int64)
    training, held_out, weights, counts = (
        np.concatenate([getattr(each, name) for each in found])
        for name in ("training", "held_out", "weights", "counts")
    )
    return (
        Selection(shards, PackedRows(training, sizes), Ragged(weights, counts) if is_weighted else None),
        Selection(shards, PackedRows(held_out, sizes), captions=frozenset().union(*(each.captions for each in found))),
    )


@dataclass(frozen=True)
class _Chosen:
    """What is chosen of a group's shards."""

    training: np.ndarray  # uint8, see PackedRows
    held_out: np.ndarray  # the same
    weights: np.ndarray  # of the training rows; empty where no row has one
    counts: np.ndarray  # (shards,) training rows of each
    captions: frozenset[int]  # of held-out rows the digests of two captions, or of the only one

    @staticmethod
    def of(index: pa.Table, shards: Sequence[StoredShard], row_filter: RowFilter, *, is_weighted: bool) -> "_Chosen":
        captions = index["caption"].to_numpy()
        training, held_out = row_filter.masks_of(captions, index["clip_score"].to_numpy())
        cuts = np.cumsum([shard.rows for shard in shards])[:-1]
        weights = index["weight"].to_numpy()[training] if is_weighted else np.zeros(0, np.int32)
        by_shard = np.split(training, cuts)
        return _Chosen(
            np.concatenate([np.packbits(mask) for mask in by_shard]),
            np.concatenate([np.packbits(mask) for mask in np.split(held_out, cuts)]),
            weights.astype(np.min_scalar_type(weights.max(initial=0))),
            np.array([np.count_nonzero(mask) for mask in by_shard], np.int64),
            frozenset(np.unique(captions[held_out])[:2].tolist()),
        )


def _unit_hash(values: np.ndarray) -> np.ndarray:
    """(n,) numbers in [0, 1) of (n,) uint64: the finaliser of SplitMix64."""
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
