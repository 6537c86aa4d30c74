"""A committed shard in which some quarantined samples are tried again: what to draw, and how it joins what is there."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.dataset.environment import DRAWN_BEFORE_IN, DRAWN_IN, drawn_in
from cluster.dataset.keys import quarantine_key, shard_key, stats_key
from cluster.dataset.parquet import parquet_bytes, read_table
from cluster.store.store import Store
from pcm.records import SCHEMA_VERSION, feature_shape, in_version

#: Of a shard's stats: when it was made, and how long that took.
_TIMES = ("start_time", "end_time")
_SECONDS = ("draw_seconds", "featurise_seconds", "encode_seconds")


def to_retry(store: Store, shard: int, planned: pa.Table, reasons: Collection[str]) -> pa.Table:
    """The plan's rows of the samples that are quarantined for one of the reasons, with the `attempts` made so far."""
    quarantined = _quarantined(store, shard)
    if quarantined is None:
        return planned.slice(0, 0).append_column("attempts", pa.array([], pa.int32()))
    wanted = quarantined.filter(pc.is_in(quarantined["reason"], pa.array(list(reasons), pa.string())))
    attempts = dict(zip(wanted["sample_id"].to_pylist(), wanted["attempts"].to_pylist(), strict=True))
    rows = planned.filter(pc.is_in(planned["sample_id"], pa.array(list(attempts), pa.string())))
    return rows.append_column(
        "attempts", pa.array([attempts[name] for name in rows["sample_id"].to_pylist()], pa.int32())
    )


def merge_retried(
    store: Store, shard: int, stored: pa.Table, quarantined: pa.Table, reasons: Collection[str]
) -> tuple[pa.Table, pa.Table]:
    """(shard, quarantine) tables with the retried samples in their places; rows that are stored keep their bytes.

    After a death between the puts of `replace_shard` a sample may be both stored and quarantined: stored it stays.
    """
    there = in_version(read_table(store, shard_key(shard)), feature_shape(stored.schema), SCHEMA_VERSION)
    new = stored.filter(pc.invert(pc.is_in(stored["sample_id"], there["sample_id"])))
    # Columns that this package does not know stay; of the new rows they are null.
    shard_table = pa.concat_tables([there, new], promote_options="default").sort_by("sample_id")
    waiting = _quarantined(store, shard)
    if waiting is not None:
        others = waiting.filter(pc.invert(pc.is_in(waiting["reason"], pa.array(list(reasons), pa.string()))))
        quarantined = pa.concat_tables([others.cast(quarantined.schema), quarantined]).sort_by("sample_id")
    in_shard = pc.is_in(quarantined["sample_id"], shard_table["sample_id"])
    return shard_table, quarantined.filter(pc.invert(in_shard))


def stats_before(store: Store, shard: int) -> dict[str, Any]:
    """The stats of a shard of which samples are tried again; empty where they are missing or damaged."""
    try:
        found = json.loads(store.read_bytes(stats_key(shard)))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def with_before(stats: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What the stats of a shard say once its retried samples have joined the others, of which `before` tells: the
    seconds of all, when the others were made, and the machines that drew them, if these were of another kind."""
    joined = {**stats, **{name: before[name] for name in _TIMES if name in before}}
    joined |= {name: stats[name] + before.get(name, 0.0) for name in _SECONDS}
    others = [digest for digest in drawn_in(before) if digest != stats.get(DRAWN_IN)]
    return joined | ({DRAWN_BEFORE_IN: others} if others else {})


def replace_shard(store: Store, shard: int, shard_data: bytes, quarantined: pa.Table, stats_data: bytes) -> None:
    """Put a shard with retried samples in the place of the old one.

    The shard first, so that a death leaves a sample in both parts and never in neither; the stats last, because they
    are what says that there is something to retry: the same command finds this shard again and ends what was begun.
    """
    store.write_bytes(shard_key(shard), shard_data)
    store_quarantine(store, shard, quarantined)
    store.write_bytes(stats_key(shard), stats_data)


def store_quarantine(store: Store, shard: int, quarantined: pa.Table) -> None:
    """The part of a shard's quarantined samples; none where there are none. A process that died may have left one, with
    samples that another machine can draw."""
    if len(quarantined):
        store.write_bytes(quarantine_key(shard), parquet_bytes(quarantined))
    elif store.exists(quarantine_key(shard)):
        store.delete(quarantine_key(shard))


def _quarantined(store: Store, shard: int) -> pa.Table | None:
    try:
        return read_table(store, quarantine_key(shard))
    except FileNotFoundError:
        return None
