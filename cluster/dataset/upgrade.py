"""A dataset of an older schema version rewritten in the present one, in place: nothing is drawn or computed anew.

The order of writes makes it safe to be killed at any moment, and to be run again:

1. plan.json in the new version. From now on an older package refuses the dataset, and shards of either version may lie
   side by side: readers go by the type of the column. The objects under progress/ are bound to the plan, so they are
   not believed any more, and made anew when somebody needs them.
2. Each shard: its stats first, with the new checksum and, as `upgraded_from`, that of the shard that lies there; then
   the shard, in one put. A shard of the old version is rewritten if it has either checksum.
3. The groups' objects go: a run between two upgrades may have made them anew, of the old checksums.
4. dataset.json, last. Until then jobs.verify says that an upgrade was interrupted, or, where such a run wrote it, that
   the checksums are others.

Rows, captions, seeds and pictures stay, and with them the dataset's fingerprint.
"""

import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.committed import committed, load_stats
from cluster.dataset.documents import UPGRADED_FROM, Manifest, Plan, find_manifest, store_manifest
from cluster.dataset.keys import PLAN_KEY, shard_key, stats_key
from cluster.dataset.parquet import UNREADABLE, parquet_bytes
from cluster.dataset.verify import require_plan
from cluster.store.store import Store
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.records import SCHEMA_VERSION, FeatureShape, in_version, shard_version

log = logging.getLogger(__name__)

_SHARDS_AT_ONCE = 4


def upgrade(store: Store) -> dict:
    """Rewrite every shard of an older version, then the manifest where there is one. No other run may be at work here.

    Returns schema_version and upgraded, a number of shards. A shard that is not the one that its stats describe is left
    as it is. Raises InputError when there is no dataset, and, after all other shards, when there were such ones.
    """
    plan = require_plan(store, "upgraded")
    if plan.schema_version < SCHEMA_VERSION:
        plan = replace(plan, schema_version=SCHEMA_VERSION)
        store.write_bytes(PLAN_KEY, plan.to_json())
    manifest = find_manifest(store)
    features = manifest.features if manifest else _planned_features(store, plan)
    made = committed(store, plan)
    shards = [shard for shard in range(plan.num_shards) if shard in made]
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        outcomes = list(pool.map(lambda shard: _upgrade_shard(store, shard, features), shards))
    if any(outcomes):
        made.forget(shards)
    damaged = [shard for shard, outcome in zip(shards, outcomes, strict=True) if outcome is None]
    if damaged:
        raise InputError(
            f"{store.root}: {len(damaged)} shards are damaged (such as {shard_key(damaged[0])}) and were not upgraded; "
            "run jobs.verify DATASET --repair, then --upgrade again"
        )
    if manifest and (upgraded := _upgraded(store, manifest)) != manifest:
        made.forget(shards)  # they may be of a run between two tries
        store_manifest(store, upgraded)
    return {"schema_version": SCHEMA_VERSION, "upgraded": outcomes.count(True)}


def _upgrade_shard(store: Store, shard: int, features: FeatureShape) -> bool | None:
    """Whether it had to be rewritten; None where it is damaged."""
    try:
        data = store.read_bytes(shard_key(shard))
        stats = json.loads(store.read_bytes(stats_key(shard)))
        table = pq.read_table(pa.BufferReader(data))
        if shard_version(table.schema) == SCHEMA_VERSION:
            return False
        digest = hashlib.sha256(data).hexdigest()
        if digest not in (stats["sha256"], stats.get(UPGRADED_FROM)):
            return None
        upgraded = parquet_bytes(in_version(table, features, SCHEMA_VERSION))
    except UNREADABLE as error:
        log.warning("%s: %s", shard_key(shard), error)
        return None
    stats |= {"sha256": hashlib.sha256(upgraded).hexdigest(), "bytes": len(upgraded), UPGRADED_FROM: digest}
    store.write_bytes(stats_key(shard), document_bytes(stats))
    store.write_bytes(shard_key(shard), upgraded)
    return True


def _upgraded(store: Store, manifest: Manifest) -> Manifest:
    """The manifest with its shards as they are now."""
    with ThreadPoolExecutor(_SHARDS_AT_ONCE) as pool:
        stats = list(pool.map(lambda shard: load_stats(store, shard), range(len(manifest.shards))))
    shards = tuple(
        {**entry, "sha256": found["sha256"], "bytes": found["bytes"]}
        for entry, found in zip(manifest.shards, stats, strict=True)
    )
    shard_bytes = sum(found["bytes"] for found in stats)
    return replace(manifest, schema_version=SCHEMA_VERSION, shards=shards, shard_bytes=shard_bytes)


def _planned_features(store: Store, plan: Plan) -> FeatureShape:
    from cluster.dataset.vocabularies import stored_features  # imports Ray, which takes seconds

    return stored_features(store, plan)
