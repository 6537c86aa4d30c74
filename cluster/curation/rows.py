"""The rows of some datasets, without pictures, as rules look at them."""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from cluster.dataset.opened import OpenDataset
from cluster.dataset.plan import MAX_RECORDS, parse_sample_id, sample_id
from cluster.dataset.rows import features_of, read_shard, read_weights, scores_of
from cluster.dataset.view import ViewRows
from pcm.errors import InputError
from pcm.line_timer import LineTimer
from pcm.text.concepts import lexicon_nouns

log = logging.getLogger(__name__)

#: From captions to every noun in them (pcm.text.concepts.noun_finder).
FindNouns = Callable[[Iterable[str]], Iterable[str]]

_READS_AT_ONCE = 8
#: Columns beside sample_id, caption and clip_score, which are read where a rule asks for them.
ATTEMPTS, REASON, FEATURES = "attempts", "reason", "global_feature"


@dataclass(frozen=True, kw_only=True)
class IndexRows:
    """n rows, sorted by source and sample id, so that nothing depends on how a dataset is cut into shards.

    sample_id: of the result; own_id: in the row's dataset. clip_score: (n,) float32. source, shard, row: (n,) where the
    row is among the opened datasets. attempts: (n,) int; reason: n; global_feature: (n, D) float16; each None where no
    rule asks for it.
    """

    sample_id: np.ndarray
    own_id: np.ndarray
    caption: np.ndarray
    clip_score: np.ndarray
    source: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    weight: np.ndarray
    attempts: np.ndarray | None = None
    reason: np.ndarray | None = None
    global_feature: np.ndarray | None = None
    #: Names of the stored concepts, which a caption's nouns are looked up in, and what finds the nouns.
    concepts: frozenset[str] = frozenset()
    find_nouns: FindNouns = lexicon_nouns

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, chosen: np.ndarray) -> "IndexRows":
        """Rows of a mask, or of numbers."""
        columns = self.__dataclass_fields__.keys() - {"concepts", "find_nouns"}
        values = {name: getattr(self, name) for name in columns}
        return replace(self, **{name: value[chosen] for name, value in values.items() if value is not None})

    @cached_property
    def named(self) -> list[tuple[str, ...]]:
        """The stored concepts that each caption names, sorted."""
        return [tuple(sorted(set(self.find_nouns([caption])) & self.concepts)) for caption in self.caption]

    def best_first(self) -> np.ndarray:
        """(n,) the order by score, ties by source and sample id."""
        return np.lexsort((np.arange(len(self)), -self.clip_score.astype(np.float64)))

    def for_view(self) -> ViewRows:
        return ViewRows(
            sample_id=self.sample_id.tolist(),
            caption=self.caption.tolist(),
            clip_score=self.clip_score,
            source=self.source,
            shard=self.shard,
            row=self.row,
            weight=self.weight,
        )


def read_index(
    sources: Sequence[OpenDataset],
    *,
    needs: Collection[str] = (),
    concepts: frozenset[str] = frozenset(),
    find_nouns: FindNouns = lexicon_nouns,
) -> IndexRows:
    """All rows of some datasets; `needs`: of ATTEMPTS, REASON and FEATURES those that are read, too.

    Of one dataset the sample ids stay. Of several the captions are numbered on: those of the second begin where the
    captions of the first end, and so on. Memory: some 300 bytes a row, and 2 D with features.
    Raises InputError where a shard cannot be read, or a score or a feature is not a number.
    """
    columns = ["sample_id", "caption", "clip_score", *(name for name in (ATTEMPTS, REASON) if name in needs)]
    parts: list[dict[str, np.ndarray]] = []
    offset, timer = 0, LineTimer()
    for number, source in enumerate(sources):

        def read(shard: int, source: OpenDataset = source, number: int = number) -> dict[str, np.ndarray]:
            return _read(source, number, shard, columns, features=FEATURES in needs)

        shards = range(len(source.shards))
        found: list[dict[str, np.ndarray]] = []
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for done, part in enumerate(pool.map(read, shards), start=1):
                found.append(part)
                if timer.due():
                    log.info("%s: %d of %d shards read", source.store.root, done, len(shards))
        mine = {name: np.concatenate([part[name] for part in found]) for name in found[0]} if found else {}
        if not mine or not len(mine["sample_id"]):
            raise InputError(f"{source.store.root}: holds no stored pair")
        order = np.argsort(mine["sample_id"])
        mine = {name: values[order] for name, values in mine.items()}
        mine["own_id"] = mine["sample_id"]
        if len(sources) > 1:
            places = [parse_sample_id(each) for each in mine["own_id"]]
            mine["sample_id"] = np.array([sample_id(offset + record, image) for record, image in places], object)
            last = max(record for record, _ in places) + 1
            offset += max(last, source.plan.records) if source.plan is not None else last
            if offset > MAX_RECORDS:
                raise InputError(f"--data: more than {MAX_RECORDS} captions in all; sample ids have nine digits")
        parts.append(mine)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return IndexRows(**joined, concepts=concepts, find_nouns=find_nouns)


def _read(source: OpenDataset, number: int, shard: int, columns: list[str], *, features: bool) -> dict[str, np.ndarray]:
    stored = source.shards[shard]
    wanted = [*columns, FEATURES] if features else columns
    table = read_shard(source.store, stored, wanted, checksum=False)
    scores = scores_of(source.store, stored, table)
    if not np.isfinite(scores).all():
        raise InputError(
            f"{source.store.root}/{stored.key}: a clip score is not a number; run jobs.verify on the dataset"
        )
    found = {
        "sample_id": np.array(table["sample_id"].to_pylist(), object),
        "caption": np.array(table["caption"].to_pylist(), object),
        "clip_score": np.array(scores),
        "source": np.full(stored.rows, number),
        "shard": np.full(stored.rows, shard),
        "row": np.arange(stored.rows),
        "weight": read_weights(source.store, stored),
    }
    if ATTEMPTS in columns:
        found[ATTEMPTS] = _numbers(table[ATTEMPTS])
    if REASON in columns:
        found[REASON] = np.array([each or "" for each in table[REASON].to_pylist()], object)
    if features:
        embed_dim = source.manifest.features.embed_dim
        found[FEATURES] = np.array(features_of(source.store, stored, table, FEATURES, embed_dim))
        if len(bad := np.flatnonzero(~np.isfinite(found[FEATURES]).all(axis=1))):
            raise InputError(
                f"{source.store.root}/{stored.key}: the features of {found['sample_id'][bad[0]]} are not finite, and "
                f"{len(bad) - 1} others; run jobs.verify, or leave these rows out first with jobs.curate --drop-list"
            )
    return found


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.fill_null(0).to_numpy().astype(np.int64)
