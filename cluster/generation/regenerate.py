"""One sample drawn again, alone, and compared with what is stored."""

import dataclasses
import hashlib
from pathlib import Path

import pyarrow as pa

from cluster.dataset.documents import read_plan_part
from cluster.dataset.keys import quarantine_key, shard_key
from cluster.dataset.parquet import read_table
from cluster.dataset.plan import parse_sample_id
from cluster.dataset.verify import require_plan
from cluster.generation.moved_models import NOT_MOVED, ModelPlaces
from cluster.generation.stages.draw import DrawShard
from cluster.store.store import Store
from pcm.errors import InputError


def regenerate(store: Store, sample_id: str, *, image_out: str | None = None, places: ModelPlaces = NOT_MOVED) -> dict:
    """Draw `sample_id` from the dataset's own plan and spec; nothing on the store is changed. `places`: of what has
    moved.

    Returns sample_id, caption, seed, sha256 of the drawn image bytes, that of the stored ones, and whether they match
    (`ok` too). Raises InputError when the dataset or the sample does not exist.
    """
    plan = require_plan(store, "drawn again")
    record_index, image_index = parse_sample_id(sample_id)
    position = record_index * plan.spec.images_per_caption + image_index
    if position >= plan.expected or image_index >= plan.spec.images_per_caption:
        raise InputError(
            f"sample {sample_id!r}: the dataset has {plan.expected} samples; take an id from its sample_id column"
        )
    shard, offset = plan.shard_of(position)
    part = read_plan_part(store, plan.part_key(shard))
    row = part.slice(offset, 1)
    kept = _stored_row(store, shard, sample_id)
    spec = places.plan_at(store, plan).spec_to_load
    if kept:
        # As it was drawn then: perhaps in a smaller batch, perhaps with a seed that only a retry came to.
        row = row.append_column("attempts", pa.array([kept["attempts"] - 1], pa.int32()))
        spec = dataclasses.replace(
            spec, generator=dataclasses.replace(spec.generator, batch_size=kept["batch_size"], max_attempts=1)
        )
    drawn = DrawShard(store, spec).draw(row).to_pylist()[0]
    if image_out and drawn["image"]:
        Path(image_out).write_bytes(drawn["image"])
    stored = kept["image"]["bytes"] if kept else None
    return {
        "sample_id": sample_id,
        "caption": drawn["caption"],
        "seed": drawn["seed"],
        "reason": drawn["reason"],
        "sha256": hashlib.sha256(drawn["image"]).hexdigest() if drawn["image"] else None,
        "stored_sha256": hashlib.sha256(stored).hexdigest() if stored else None,
        "matches": (drawn["image"] or None) == stored,
        "image": image_out if drawn["image"] else None,
        "ok": (drawn["image"] or None) == stored or not store.exists(shard_key(shard)),
    }


def _stored_row(store: Store, shard: int, sample_id: str) -> dict | None:
    if not store.exists(shard_key(shard)):
        return None
    table = read_table(store, shard_key(shard), ["sample_id", "image", "attempts", "batch_size"])
    for row in table.to_pylist():
        if row["sample_id"] == sample_id:
            return row
    assert store.exists(quarantine_key(shard)), f"{sample_id} is neither stored nor quarantined"
    return None
