"""What a report knows of a dataset: manifest, shard statistics, and the rows of some shards without their pictures.

A dataset of millions of rows costs some reads: the manifest, the statistics of at most MAX_STATS shards, and the
captions and scores of at most MAX_SHARDS shards, which a seed draws.
"""

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from cluster.dataset.committed import summary
from cluster.dataset.documents import Manifest
from cluster.dataset.keys import PLAN_KEY, quarantine_key, shard_number, stats_key
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.dataset.parquet import read_table
from cluster.dataset.rows import read_shard, read_view_part, scores_of
from cluster.dataset.verify import verify
from cluster.numbers import size
from cluster.store.store import Store
from pcm.errors import InputError, one_line
from pcm.generation.names import UNDRAWN

#: Of a shard's statistics, what the report computes with beside what the manifest needs.
_TIMES = frozenset({"start_time", "end_time", "draw_seconds", "featurise_seconds", "encode_seconds"})

T = TypeVar("T")
U = TypeVar("U")

MAX_STATS = 2_000
MAX_SHARDS, MAX_ROWS = 32, 20_000
#: A dataset is verified on the way where that reads no more than this; of a view the shards that hold its pictures too.
VERIFIED_BYTES = 256_000_000
EXAMPLES_PER_REASON = 3
_READS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stored sample without its picture, and where that is."""

    shard: int  # place in the manifest's list
    row: int
    sample_id: str
    caption: str
    seed: int
    clip_score: float  # raw cosine


@dataclass(frozen=True, kw_only=True)
class Refused:
    """One quarantined sample."""

    sample_id: str
    caption: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class DatasetFacts:
    """All that a report says of a dataset."""

    root: str
    manifest: Manifest
    rows: tuple[Row, ...]  # of `sampled_shards` shards, in order
    sampled_shards: int
    stats: tuple[dict[str, Any], ...]  # as the shards' writers made them; empty where the dataset has none
    refused: dict[str, list[Refused]]  # reason -> examples
    extent: str = ""  # of an unfinished dataset: "31 of 2,215 shards"
    verified: dict[str, Any] | None  # what jobs.verify finds; None where it was not asked
    unverified: str  # why not

    @property
    def scored(self) -> bool:
        """Whether a CLIP scored the pictures: the null CLIP's scores are all zero."""
        return self.manifest.spec.clip.model != "null"

    @property
    def drawn_here(self) -> bool:
        """Whether its pictures were drawn for it: they are no photos, nor imported, nor those of another dataset."""
        return self.manifest.spec.generator.model not in UNDRAWN and self.manifest.lineage is None

    @property
    def complete_sample(self) -> bool:
        return len(self.rows) == self.manifest.stored


def gather_dataset(store: Store, *, seed: int, unfinished: bool = False) -> DatasetFacts:
    """Raises InputError where there is no finished dataset and, with `unfinished`, none that has a shard, or a shard
    cannot be read."""
    found = open_dataset(store, unfinished=unfinished)
    manifest = found.manifest
    chosen = sample_shards([shard["rows"] for shard in manifest.shards], seed=seed)
    read = in_parallel(lambda place: _rows(store, manifest, place), chosen)
    verified, unverified = _verified(found)
    return DatasetFacts(
        root=store.root,
        manifest=manifest,
        rows=tuple(row for part in read for row in part),
        sampled_shards=len(chosen),
        stats=_stats(store, manifest),
        refused=_refused(store, manifest),
        extent=found.extent,
        verified=verified,
        unverified=unverified,
    )


def sample_shards(rows: Sequence[int], *, seed: int, most: int = MAX_SHARDS, most_rows: int = MAX_ROWS) -> list[int]:
    """Numbers of shards drawn by a seed, ascending: at least one that has rows, and no more than the two limits."""
    chosen: list[int] = []
    total = 0
    for place in np.random.default_rng(seed).permutation(len(rows)).tolist():
        if rows[place] and (not chosen or (len(chosen) < most and total + rows[place] <= most_rows)):
            chosen.append(place)
            total += rows[place]
    return sorted(chosen)


def in_parallel(work: Callable[[T], U], items: Sequence[T]) -> list[U]:
    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return list(pool.map(work, items))


def _rows(store: Store, manifest: Manifest, place: int) -> list[Row]:
    shard = manifest.stored_shards[place]
    table = read_shard(store, shard, ["sample_id", "caption", "seed", "clip_score"], checksum=False)
    if not np.isfinite(scores_of(store, shard, table)).all() or table["seed"].null_count:
        raise InputError(
            f"{store.root}/{shard.key}: a clip score or a seed is not a number; run jobs.verify on the dataset"
        )
    return [Row(shard=place, row=number, **row) for number, row in enumerate(table.to_pylist())]


def _stats(store: Store, manifest: Manifest) -> tuple[dict[str, Any], ...]:
    """Of all shards, or of MAX_STATS evenly spaced ones; none of a derived dataset, which was not drawn."""
    if manifest.lineage is not None:
        return ()
    shards = [shard_number(shard["key"]) for shard in manifest.shards]
    step = max(1, -(-len(shards) // MAX_STATS))

    def read(shard: int) -> dict[str, Any] | None:
        try:
            found = json.loads(store.read_bytes(stats_key(shard)))
            summary(found)
            for name in _TIMES & found.keys():
                if not isinstance(found[name], int | float):
                    raise TypeError(f"{name} is {found[name]!r}")
            return found
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            said = one_line(error, longest=200)
            raise InputError(f"{store.root}/{stats_key(shard)}: damaged ({said}); run jobs.verify --repair") from None

    found = in_parallel(read, shards[::step])
    return tuple(stats for stats in found if stats is not None)


def _refused(store: Store, manifest: Manifest) -> dict[str, list[Refused]]:
    """Examples of every reason, as far as MAX_SHARDS quarantine parts hold them."""
    found: dict[str, list[Refused]] = {reason: [] for reason in manifest.quarantined_by_reason}
    parts = [shard for shard in manifest.shards if shard["quarantined"]][:MAX_SHARDS]
    for shard in parts:
        if all(len(examples) >= EXAMPLES_PER_REASON for examples in found.values()):
            break
        columns = ["sample_id", "caption", "seed", "reason"]
        for row in read_table(store, quarantine_key(shard_number(shard["key"])), columns).to_pylist():
            examples = found.setdefault(row.pop("reason"), [])
            if len(examples) < EXAMPLES_PER_REASON:
                examples.append(Refused(**row))
    return found


def _verified(found: OpenDataset) -> tuple[dict[str, Any] | None, str]:
    """What jobs.verify finds, and "", or None and the reason."""
    store, manifest = found.store, found.manifest
    if found.is_unfinished:
        return None, f"no: it is unfinished, {found.extent}"
    total = 0
    for number_of_bytes in _verified_bytes(found):
        if (total := total + number_of_bytes) > VERIFIED_BYTES:
            what = " with the shards that hold its pictures" if manifest.is_view else ""
            larger = f"being larger{what} than {size(VERIFIED_BYTES)}"
            return None, f"not here, {larger}: run python -m jobs.verify {shlex.quote(store.root)}"
    if found.plan is None and manifest.lineage is None:
        return None, f"no: it has no {PLAN_KEY}, so nothing says what ought to be there"
    return verify(store), ""


def _verified_bytes(found: OpenDataset) -> Iterator[int]:
    """What verify reads, piece by piece, for whoever stops at a limit: a view's rows are read to find its pictures."""
    yield from (shard["bytes"] for shard in found.manifest.shards)
    for shard in found.shards if found.manifest.is_view else ():
        with contextlib.suppress(InputError):  # of rows that cannot be read verify says so
            part = read_view_part(found.store, shard, ["shard", "row"])
            yield from (each.stored.bytes for each in part.shards)
