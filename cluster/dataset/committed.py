"""Which shards are committed, found without asking for each of them.

Shards come in groups of a thousand. Once a group is whole, the driver writes what the manifest needs of its shards into
one object, `progress/group-000123.json`. It repeats what the stats objects say and is bound to the plan, so it may be
lost, damaged or of another plan: then it is not believed, and made again. Beside it the driver writes the index of the
group's rows (cluster.dataset.row_index), where it has committed all of the group itself.

What finding out costs, for S shards: one GET a group, S / 1,000; one LIST request for each group that is not whole; and
for the manifest one GET for each shard whose group has no object yet, at most the shards that were made since the
driver last died with their groups unfinished.
"""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cluster.dataset.documents import Manifest, Plan, StoredShard
from cluster.dataset.keys import group_key, shard_key, stats_key
from cluster.dataset.row_index import index_of_texts, store_row_index
from cluster.store.store import Store
from pcm.errors import InputError, OneLineError, one_line
from pcm.records import FeatureShape

log = logging.getLogger(__name__)

#: Shards that share the first three digits of their number: as many keys as one LIST request returns.
GROUP = 1000
#: Up to so many groups all are listed, whole or not: that is one round of requests, and finds a shard that was lost.
LISTED_GROUPS = 16

#: In what a writer tells the driver, beside what is in the stats object: the index of the shard's rows.
ROW_INDEX = "row_index"

_REQUESTS_AT_ONCE = 16
_SUMMARY = {
    "shard": int,
    "successes": int,
    "failed_to_generate": int,
    "quarantined_by_reason": dict,
    "sha256": str,
    "bytes": int,
    "clip_score_sum": float,
}


class CommittedShards:
    """The shards of a plan that are on the store; a driver tells it of each one that it commits."""

    def __init__(self, store: Store, plan: Plan, done: np.ndarray) -> None:
        self._store = store
        self._plan = plan
        self._done = done  # (num_shards,) bool
        self._summaries: dict[int, dict] = {}  # of this run's shards whose group is not whole yet
        self._row_indexes: dict[int, str] = {}  # of the same

    def __contains__(self, shard: int) -> bool:
        return bool(self._done[shard])

    @property
    def complete(self) -> bool:
        return bool(self._done.all())

    def forget(self, shards: Collection[int]) -> None:
        """These shards are to be made again: they count as missing, and their groups' objects are deleted first."""
        for group in {shard // GROUP for shard in shards}:
            if self._store.exists(group_key(group)):
                self._store.delete(group_key(group))
        self._done[list(shards)] = False

    def add(self, stats: dict) -> None:
        """A shard was committed with these stats. Writes the objects of its group if that is whole now."""
        shard = stats["shard"]
        self._done[shard] = True
        self._summaries[shard] = summary(stats)
        if ROW_INDEX in stats:
            self._row_indexes[shard] = stats[ROW_INDEX]
        shards = group_shards(self._plan, shard // GROUP)
        if self._done[shards.start : shards.stop].all():
            made = {number: self._summaries.pop(number) for number in shards if number in self._summaries}
            texts = [self._row_indexes.pop(number) for number in shards if number in self._row_indexes]
            try:
                with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
                    group = _store_group(self._store, self._plan, shard // GROUP, made, pool)
                if len(texts) == len(shards):
                    store_row_index(
                        self._store, shard // GROUP, [_stored(each) for each in group], index_of_texts(texts)
                    )
            except OneLineError as error:  # the manifest will ask for the same stats: time enough to fail then
                log.warning("%s", error)


def committed(store: Store, plan: Plan) -> CommittedShards:
    """The shards of a plan that are on the store."""
    groups = range(num_groups(plan))
    listed = len(groups) <= LISTED_GROUPS

    def numbers(group: int) -> Iterable[int]:
        shards = group_shards(plan, group)
        if not listed and load_group(store, plan, group) is not None:
            return shards
        found = set(store.list(shard_key(group * GROUP).removesuffix("000.parquet")))
        return [shard for shard in shards if shard_key(shard) in found]

    done = np.zeros(plan.num_shards, bool)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for found in pool.map(numbers, groups):
            done[list(found)] = True
    return CommittedShards(store, plan, done)


def summaries(store: Store, plan: Plan) -> Iterator[dict]:
    """What the manifest needs of each shard, in order; every shard must be committed. Group objects that are missing
    are written. Raises InputError when stats are damaged or missing."""
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        loaded = pool.map(lambda group: load_group(store, plan, group), range(num_groups(plan)))
        for group, found in enumerate(loaded):
            yield from found or _store_group(store, plan, group, {}, pool)


def manifest_of(plan: Plan, features: FeatureShape, made: Iterable[dict]) -> Manifest:
    """The manifest of the shards whose summaries these are: of a finished dataset all, in order."""
    shards = []
    reasons: dict[str, int] = {}
    expected, score_sum = 0, 0.0
    for part in made:
        for reason, count in part["quarantined_by_reason"].items():
            reasons[reason] = reasons.get(reason, 0) + count
        score_sum += part["clip_score_sum"]
        expected += part["successes"] + part["failed_to_generate"]
        shards.append(
            {
                "key": shard_key(part["shard"]),
                "rows": part["successes"],
                "quarantined": part["failed_to_generate"],
                "sha256": part["sha256"],
                "bytes": part["bytes"],
            }
        )
    stored = sum(shard["rows"] for shard in shards)
    return Manifest(
        spec=plan.spec,
        corpus=plan.corpus,
        corpus_fingerprint=plan.corpus_fingerprint,
        features=features,
        expected=expected,
        stored=stored,
        quarantined=sum(reasons.values()),
        quarantined_by_reason=dict(sorted(reasons.items())),
        clip_score_mean=score_sum / stored if stored and plan.spec.clip.model != "null" else None,
        shard_bytes=sum(shard["bytes"] for shard in shards),
        shards=tuple(shards),
        schema_version=plan.schema_version,
    )


def num_groups(plan: Plan) -> int:
    return -(-plan.num_shards // GROUP)


def group_shards(plan: Plan, group: int) -> range:
    return range(group * GROUP, min((group + 1) * GROUP, plan.num_shards))


def load_group(store: Store, plan: Plan, group: int) -> list[dict] | None:
    """The summaries of a whole group's shards, in order; None unless there is an intact object of this very plan."""
    try:
        document = json.loads(store.read_bytes(group_key(group)))
        if document["plan"] != _binding(plan, group):
            return None
        found = [summary(entry) for entry in document["shards"]]
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        log.warning("%s: damaged (%s); it is made again", group_key(group), error)
        return None
    shards = group_shards(plan, group)
    whole = [entry["shard"] for entry in found] == list(shards) and all(
        entry["successes"] + entry["failed_to_generate"] == plan.shard_rows(entry["shard"]) for entry in found
    )
    return found if whole else None


def summary(stats: dict) -> dict:
    """The part of a shard's stats that the manifest needs. Raises KeyError or TypeError when it is not there."""
    found = {name: stats[name] for name in _SUMMARY}
    for name, kind in _SUMMARY.items():
        if not isinstance(found[name], kind):
            raise TypeError(f"{name} is {found[name]!r}")
    return found


def read_stats(store: Store, shard: int) -> dict:
    """The stats object of one shard. Raises InputError when it is missing, or lacks what the manifest needs."""
    try:
        stats = json.loads(store.read_bytes(stats_key(shard)))
        if (number := summary(stats)["shard"]) != shard:
            raise ValueError(f"of shard {number}")
        return stats
    except (FileNotFoundError, ValueError, TypeError, LookupError, RecursionError) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({one_line(error, longest=200)})"
        raise InputError(f"{store.root}/{stats_key(shard)}: {what}; run jobs.verify --repair") from None


def load_stats(store: Store, shard: int) -> dict:
    """The summary of one shard from its stats object. Raises InputError when that is damaged or missing."""
    return summary(read_stats(store, shard))


def stored_shard(store: Store, shard: int) -> StoredShard:
    """A committed shard as its stats describe it. Raises InputError as load_stats does."""
    return _stored(load_stats(store, shard))


def _stored(stats: dict) -> StoredShard:
    key = shard_key(stats["shard"])
    return StoredShard(key, rows=stats["successes"], bytes=stats["bytes"], sha256=stats["sha256"])


def _store_group(store: Store, plan: Plan, group: int, known: dict[int, dict], pool: ThreadPoolExecutor) -> list[dict]:
    found = list(pool.map(lambda shard: known.get(shard) or load_stats(store, shard), group_shards(plan, group)))
    document = {"plan": _binding(plan, group), "shards": found}
    store.write_bytes(group_key(group), (json.dumps(document, sort_keys=True) + "\n").encode())
    return found


def _binding(plan: Plan, group: int) -> str:
    """A digest of all that decides the group's shards: spec, shard size, and the captions up to its last segment's end.

    It changes for the last group when the plan grows, and for no other.
    """
    last = group_shards(plan, group)[-1]
    segments = [
        (segment.first_shard, segment.num_shards, segment.corpus_fingerprint)
        for segment in plan.segments
        if segment.first_shard <= last
    ]
    decides = [plan.schema_version, plan.spec.digest(), plan.shard_size, segments]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()
