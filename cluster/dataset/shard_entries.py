"""The list of a large dataset's shards: in memory columns of 94 bytes a shard, on the store Parquet parts.

As dicts it takes several times that, and seconds to read; every worker of a training run holds it.
"""

import functools
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "rows": pa.int64(),
        "quarantined": pa.int64(),
        "sha256": pa.binary(32),
        "bytes": pa.int64(),
        "weighted_rows": pa.int64(),  # null: as `rows`, and not in the entry
    }
)
_AT_ONCE = 4096


class ShardEntries(Sequence[dict[str, Any]]):
    """Entries of Manifest.shards, each made as it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        """Raises ValueError for another table than `part` writes."""
        if table.schema != _SCHEMA or any(table[name].null_count for name in _SCHEMA.names[:-1]):
            raise ValueError("not a list of shards")
        self._table = table.combine_chunks()

    @staticmethod
    def of(entries: Iterable[Mapping[str, Any]]) -> "ShardEntries":
        columns: dict[str, list] = {name: [] for name in _SCHEMA.names}
        for entry in entries:
            for name, values in columns.items():
                values.append(bytes.fromhex(entry[name]) if name == "sha256" else entry.get(name))
        return ShardEntries(pa.table(columns, schema=_SCHEMA))

    @staticmethod
    def of_parts(parts: Iterable[bytes]) -> "ShardEntries":
        """The inverse of `part`. Raises ValueError or ArrowException for what is none."""
        found = ShardEntries(pa.concat_tables([pq.ParquetFile(io.BytesIO(data)).read() for data in parts]))
        pa.default_memory_pool().release_unused()  # as much again, which the parts took before they were one
        return found

    def part(self, start: int, count: int) -> bytes:
        """Some of the entries as a Parquet file: the same entries give the same bytes."""
        buffer = io.BytesIO()
        pq.write_table(self._table.slice(start, count), buffer, compression="zstd", write_statistics=False)
        return buffer.getvalue()

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> "ShardEntries": ...
    def __getitem__(self, index: int | slice) -> "dict[str, Any] | ShardEntries":
        if isinstance(index, slice):
            places = range(len(self))[index]
            if places.step == 1:
                return ShardEntries(self._table.slice(places.start, len(places)))
            return ShardEntries(self._table.take(np.array(places, np.int64)))
        place = range(len(self))[index]
        return _entry({name: column[place].as_py() for name, column in self._columns.items()})

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self), _AT_ONCE):
            for row in self._table.slice(start, _AT_ONCE).to_pylist():
                yield _entry(row)

    def values(self, *names: str) -> Iterator[tuple]:
        """These fields of each entry, as the parts hold them (sha256: bytes): quicker than entries."""
        for start in range(0, len(self), _AT_ONCE):
            some = self._table.slice(start, _AT_ONCE)
            yield from zip(*(some[name].to_pylist() for name in names), strict=True)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, ShardEntries):
            return bool(self._table.equals(other._table))
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(dict.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]  # as of the dicts that it stands for

    @functools.cached_property
    def _columns(self) -> dict[str, pa.Array]:
        return {name: self._table[name].combine_chunks() for name in self._table.column_names}

    def __reduce__(self) -> tuple:
        return ShardEntries, (self._table,)


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    row["sha256"] = row["sha256"].hex()
    if row["weighted_rows"] is None:
        del row["weighted_rows"]
    return row
