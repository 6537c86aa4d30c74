"""A dataset as a job takes it: finished, derived, or what is there of one that is still being made."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.dataset.committed import committed, load_stats, manifest_of
from cluster.dataset.documents import (
    Manifest,
    Plan,
    StoredShard,
    find_manifest,
    load_manifest,
    load_plan,
    read_plan_part,
)
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, shard_number
from cluster.dataset.rows import read_shard, read_view_part
from cluster.dataset.state import state_digest
from cluster.store.reach import Landmark
from cluster.store.store import Store, open_store
from pcm.errors import InputError

log = logging.getLogger(__name__)

_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True)
class OpenDataset:
    """manifest: what the dataset holds; of an unfinished one, what it would say of the shards that are there.

    plan: None for a derived dataset. sha256: names this state (cluster.dataset.state).
    """

    store: Store
    manifest: Manifest
    plan: Plan | None
    sha256: str
    is_unfinished: bool = False

    @property
    def shards(self) -> Sequence[StoredShard]:
        return self.manifest.stored_shards

    @property
    def landmarks(self) -> list[Landmark]:
        """Of the stores from which its rows are read."""
        own = (self.store, PLAN_KEY if self.is_unfinished else MANIFEST_KEY)
        return [own, *((open_store(each.path), MANIFEST_KEY) for each in self.manifest.pictures)]

    @property
    def planned_shards(self) -> int:
        return self.plan.num_shards if self.plan is not None else len(self.manifest.shards)

    @property
    def extent(self) -> str:
        """Of an unfinished dataset "31 of 2,215 shards", else ""."""
        return f"{len(self.manifest.shards):,} of {self.planned_shards:,} shards" if self.is_unfinished else ""


def open_dataset(
    store: Store, *, unfinished: bool = False, offer: bool = True, shards: Sequence[int] | None = None
) -> OpenDataset:
    """The dataset at a place; with `unfinished` whatever shards are there, if it is being made or was piloted. shards:
    only these, as if nothing had come since, for a reader that goes on.

    Raises InputError where there is no dataset, and without `unfinished` for one that is not finished: the line names
    the option --unfinished, unless `offer` is False, for a job that has none.
    """
    plan = load_plan(store)
    if unfinished and plan is not None:
        manifest = find_manifest(store)
        if shards is not None or manifest is None or manifest.corpus_fingerprint != plan.corpus_fingerprint:
            return _what_is_there(store, plan, shards)
    elif offer and not store.exists(MANIFEST_KEY) and plan is not None:
        raise InputError(
            f"{store.root}: an unfinished dataset (no {MANIFEST_KEY}); rerun the same jobs.generate command to finish "
            "it, or add --unfinished to use the shards that are there"
        )
    manifest = load_manifest(store)
    digest = state_digest(store.read_bytes(MANIFEST_KEY))
    return OpenDataset(store, manifest, None if manifest.lineage is not None else plan, digest)


def _what_is_there(store: Store, plan: Plan, shards: Sequence[int] | None) -> OpenDataset:
    from cluster.dataset.vocabularies import stored_features  # imports Ray, which takes seconds

    made = committed(store, plan)
    planned = range(plan.num_shards)
    numbers = [shard for shard in (planned if shards is None else shards) if shard in planned and shard in made]
    if not numbers:
        raise InputError(
            f"{store.root}: none of its {plan.num_shards:,} planned shards is there yet; run jobs.generate first"
        )
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        manifest = manifest_of(plan, stored_features(store, plan), pool.map(lambda n: load_stats(store, n), numbers))
    digest = state_digest(manifest.to_json())
    found = OpenDataset(store, manifest, plan, digest, is_unfinished=True)
    log.info("%s: unfinished, %s are used", store.root, found.extent)
    return found


def read_corpus_ids(source: OpenDataset, shard: int) -> list[str]:
    """What the corpus calls the captions of a shard's rows; their sample ids where nothing tells.

    Raises InputError as read_shard does.
    """
    stored = source.shards[shard]
    if source.manifest.is_view:
        return read_view_part(source.store, stored).rows["corpus_id"].to_pylist()
    if source.plan is None:
        name = "corpus_id" if source.manifest.lineage is not None else "sample_id"
        return read_shard(source.store, stored, [name], checksum=False)[name].to_pylist()
    sample_ids = read_shard(source.store, stored, ["sample_id"], checksum=False)["sample_id"].to_pylist()
    part = source.plan.part_key(shard_number(stored.key))
    planned = read_plan_part(source.store, part, ["sample_id", "corpus_id"]).to_pylist()
    named = {row["sample_id"]: row["corpus_id"] for row in planned}
    return [named.get(sample_id, sample_id) for sample_id in sample_ids]
