"""A retry of quarantined samples, from its first put to its last: by what a run knows one that was killed, and ends it.

On the store, in this order: `retrying.json` is put, dataset.json deleted; each shard is replaced, its stats last, which
name the retry; dataset.json is put, `retrying.json` deleted. With dataset.json there, no retry is at work or wanted.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from cluster.dataset.committed import read_stats
from cluster.dataset.keys import MANIFEST_KEY
from cluster.store.store import Store
from pcm.documents import document_bytes
from pcm.errors import InputError

_RETRYING_KEY = "retrying.json"
#: In the stats of a shard: the id of the retry by which its samples were last tried again.
RETRIED_BY = "retried_by"

_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True)
class Retry:
    """reasons: for which samples are quarantined that are tried again. id: random, of this retry alone."""

    reasons: frozenset[str]
    id: str

    def begin(self, store: Store) -> None:
        """Before anything of the dataset is touched. The same retry may be begun several times."""
        store.write_bytes(_RETRYING_KEY, document_bytes({"reasons": sorted(self.reasons), "id": self.id}))
        if store.exists(MANIFEST_KEY):
            store.delete(MANIFEST_KEY)

    def end(self, store: Store) -> None:
        """All is tried again, and dataset.json written."""
        if store.exists(_RETRYING_KEY):
            store.delete(_RETRYING_KEY)


def interrupted_retry(store: Store) -> Retry | None:
    """The retry that was killed, or is at work, on a dataset; None where there is none. Raises InputError."""
    if store.exists(MANIFEST_KEY):
        return None
    try:
        values = json.loads(store.read_bytes(_RETRYING_KEY))
        return Retry(frozenset(map(str, values["reasons"])), str(values["id"]))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError, RecursionError):
        raise InputError(
            f"{store.root}/{_RETRYING_KEY}: damaged; delete it, run jobs.verify --repair, then the retry again"
        ) from None


def samples_left(store: Store, shards: Iterable[int], retry: Retry) -> dict[int, int]:
    """Of shards that are there those that an interrupted retry has still to try again, with how many samples. Raises
    InputError when the stats of one are damaged or missing."""
    shards = list(shards)
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        counts = pool.map(partial(_left, store, retry), shards)
        return {shard: count for shard, count in zip(shards, counts, strict=True) if count}


def _left(store: Store, retry: Retry, shard: int) -> int:
    stats = read_stats(store, shard)
    return 0 if stats.get(RETRIED_BY) == retry.id else wanted(stats, retry)


def wanted(stats: dict, retry: Retry) -> int:
    """How many samples of a shard are quarantined for the reasons of a retry."""
    return sum(stats["quarantined_by_reason"].get(reason, 0) for reason in retry.reasons)
