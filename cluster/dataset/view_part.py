"""A shard of a view as it lies on the store: rows that say where their pictures are (pcm.records.VIEW_SCHEMA)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.dataset.documents import StoredShard
from pcm.records import VIEW_SCHEMA, VIEW_SHARDS_KEY

#: What a view's rows say themselves, in place of the shards that hold their pictures.
OWN_COLUMNS = frozenset({"sample_id", "caption", "clip_score", "weight", "seed"})


@dataclass(frozen=True)
class PictureShard:
    """A shard that holds pictures; `pictures` is the place of its dataset in the manifest's list."""

    pictures: int
    stored: StoredShard


@dataclass(frozen=True)
class ViewPart:
    """rows: of VIEW_SCHEMA, or some of its columns, shard and row among them. shards: those that the rows number."""

    rows: pa.Table
    shards: tuple[PictureShard, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def groups(self, numbers: np.ndarray | None = None) -> Iterator[tuple[PictureShard, np.ndarray, np.ndarray]]:
        """(shard, rows in it, places among the view's rows `numbers`) for each shard that these rows point at."""
        where, rows = self.rows["shard"].to_numpy(), self.rows["row"].to_numpy()
        if numbers is not None:
            where, rows = where[numbers], rows[numbers]
        for number, shard in enumerate(self.shards):
            places = np.flatnonzero(where == number)
            if len(places):
                yield shard, rows[places], places

    @staticmethod
    def of(table: pa.Table, *, datasets: int) -> "ViewPart":
        """Of a table as it lies there; `datasets`: how many the manifest names. Raises ArrowInvalid where rows or the
        list of shards are no view's."""
        try:
            if any(table.schema.field(name) != VIEW_SCHEMA.field(name) for name in table.column_names):
                raise ValueError("other columns than a view's rows have")
            listed = json.loads(table.schema.metadata[VIEW_SHARDS_KEY])
            shards = tuple(PictureShard(entry["pictures"], StoredShard.of(entry)) for entry in listed)
            if any(table[name].null_count for name in table.column_names):
                raise ValueError("a value is missing")
            where, rows = table["shard"].to_numpy(), table["row"].to_numpy()
            sizes = np.array([shard.stored.rows for shard in shards], np.int64)
            if len(table) and not ((where >= 0) & (where < len(shards)) & (rows >= 0)).all():
                raise ValueError("a row points at no shard")
            if len(table) and not (rows < sizes[where]).all():
                raise ValueError("a row points beyond the end of its shard")
            if not all(type(shard.pictures) is int and 0 <= shard.pictures < datasets for shard in shards):
                raise ValueError("a shard is of no dataset that the manifest names")
            if "weight" in table.column_names and (table["weight"].to_numpy() < 1).any():
                raise ValueError("a weight below 1")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise pa.ArrowInvalid(f"not the rows of a view: {error}") from None
        return ViewPart(table, shards)


def part_table(columns: dict[str, list], shards: Sequence[PictureShard]) -> pa.Table:
    """A view's shard, to be written."""
    listed = [
        {"pictures": each.pictures, **{name: getattr(each.stored, name) for name in ("key", "rows", "bytes", "sha256")}}
        for each in shards
    ]
    schema = VIEW_SCHEMA.with_metadata({VIEW_SHARDS_KEY: json.dumps(listed).encode()})
    return pa.table({name: columns[name] for name in VIEW_SCHEMA.names}, schema=schema)
