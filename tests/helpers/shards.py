"""A shard as a manifest would describe it, and one with another value in it."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.documents import StoredShard, load_plan
from cluster.dataset.keys import MANIFEST_KEY
from cluster.store.store import Store, open_store


def described(key: str, data: bytes, *, rows: int | None = None) -> StoredShard:
    """`rows`: of bytes that are no Parquet file."""
    found = pq.ParquetFile(io.BytesIO(data)).metadata.num_rows if rows is None else rows
    return StoredShard(key, rows=found, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def as_it_lies(store: Store, key: str) -> StoredShard:
    return described(key, store.read_bytes(key))


def describe_anew(store: Store) -> None:
    """Let the manifest speak of the shards as they lie there: what is wrong with them then is not that they differ."""
    manifest = json.loads(store.read_bytes(MANIFEST_KEY))
    for entry in manifest["shards"]:
        found = as_it_lies(store, entry["key"])
        entry |= {"rows": found.rows, "bytes": found.bytes, "sha256": found.sha256}
    manifest["stored"] = sum(entry["rows"] for entry in manifest["shards"])
    store.write_bytes(MANIFEST_KEY, json.dumps(manifest).encode())


def part_key(folder: Path, shard: int) -> str:
    """Of the plan part of a shard of the dataset in a folder."""
    plan = load_plan(open_store(folder))
    assert plan is not None
    return plan.part_key(shard)


def with_value(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    """The table with another value in one cell."""
    rows = table.to_pylist()
    rows[row][column] = value
    return pa.Table.from_pylist(rows, schema=table.schema)
