"""A dataset as exports read it: shard by shard, checked against the manifest."""

import hashlib
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.committed import read_stats
from cluster.dataset.documents import Manifest, Plan
from cluster.dataset.keys import shard_number
from cluster.dataset.opened import OpenDataset, open_dataset, read_corpus_ids
from cluster.dataset.parquet import UNREADABLE
from cluster.dataset.plan import parse_sample_id
from cluster.dataset.rows import read_shard, read_view_part
from cluster.dataset.shard_check import check_schema, check_values, picture_sha256
from cluster.store.store import Store
from pcm.errors import InputError, first_line
from pcm.records import shard_schema


@dataclass(frozen=True)
class Source:
    """A dataset that an export reads. Its shards are numbered from 0, as its manifest lists them."""

    opened: OpenDataset

    @staticmethod
    def open(store: Store, *, unfinished: bool = False, shards: Sequence[int] | None = None) -> "Source":
        """shards: as in open_dataset. Raises InputError when there is no finished dataset and, with `unfinished`, none
        that has a shard.
        """
        found = open_dataset(store, unfinished=unfinished, shards=shards)
        if found.plan is None and found.manifest.lineage is None:
            raise InputError(f"{store.root}: has no plan.json; run jobs.verify on the dataset")
        return Source(found)

    @property
    def store(self) -> Store:
        return self.opened.store

    @property
    def manifest(self) -> Manifest:
        return self.opened.manifest

    @property
    def plan(self) -> Plan | None:
        """None for a derived dataset."""
        return self.opened.plan

    @property
    def sha256(self) -> str:
        """Names the dataset in its present state."""
        return self.opened.sha256

    @property
    def num_shards(self) -> int:
        return len(self.manifest.shards)

    @property
    def largest_shard(self) -> int:
        """Places in it, those of quarantined samples among them."""
        if self.plan is not None:
            return self.plan.shard_size
        return max((shard["rows"] for shard in self.manifest.shards), default=0)

    def read_bytes(self, shard: int) -> bytes:
        """A shard's object. Raises InputError when it is not the manifest's."""
        entry = self.manifest.shards[shard]
        try:
            data = self.store.read_bytes(entry["key"])
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise InputError(f"{self.store.root}/{entry['key']}: missing or damaged; run jobs.verify on the dataset")
        return data

    def read(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """A shard's rows. Raises InputError when it is not the manifest's."""
        try:
            if self.manifest.is_view:
                schema = shard_schema(self.manifest.features)
                table = read_shard(self.store, self.opened.shards[shard], columns or schema.names)
                if columns is None:
                    parts = {name: table[name].cast(schema.field(name).type) for name in schema.names}
                    table = pa.table(parts, schema=schema)
            else:
                file = pq.ParquetFile(io.BytesIO(self.read_bytes(shard)))
                check_schema(file.schema_arrow, self.manifest.schema_version, self.manifest.features)
                if columns is None and self.plan is None:  # without the columns that only derived datasets have
                    columns = shard_schema(self.manifest.features).names
                table = file.read(columns=columns)
            check_values(table)
        except UNREADABLE as error:
            place = f"{self.store.root}/{self.manifest.shards[shard]['key']}"
            raise InputError(f"{place}: damaged ({first_line(error)}); run jobs.verify on the dataset") from None
        return table

    def stats(self, shard: int) -> dict:
        """What a shard's writer said of it; of a derived dataset, which was not drawn, the counts alone."""
        entry = self.manifest.shards[shard]
        if self.plan is None:
            rows = entry["rows"]
            return {
                "count": rows, "successes": rows, "failed_to_generate": 0, "start_time": 0.0, "end_time": 0.0,
                "status_dict": {"success": rows},
            }  # fmt: skip
        number = shard_number(entry["key"])
        return read_stats(self.store, number)

    def positions(self, shard: int, sample_ids: Sequence[str]) -> list[int]:
        """The places of a shard's rows among all that were planned; of a derived dataset, among all its rows."""
        if self.plan is None:
            return list(range(self._starts[shard], self._starts[shard] + len(sample_ids)))
        per_caption = self.plan.spec.images_per_caption
        parsed = [parse_sample_id(sample_id) for sample_id in sample_ids]
        return [record_index * per_caption + image_index for record_index, image_index in parsed]

    def places(self, shard: int, sample_ids: Sequence[str]) -> list[int]:
        """The places of a shard's rows in its plan part; of a derived dataset, in the shard."""
        positions = self.positions(shard, sample_ids)
        if self.plan is None:
            return [position - self._starts[shard] for position in positions]
        return [self.plan.shard_of(position)[1] for position in positions]

    def corpus_ids(self, shard: int) -> dict[str, str]:
        """Sample id -> the caption's own id in its corpus, of a shard's rows."""
        sample_ids = self.read(shard, ["sample_id"])["sample_id"].to_pylist()
        return dict(zip(sample_ids, read_corpus_ids(self.opened, shard), strict=True))

    def picture_digests(self, shard: int) -> dict[str, str]:
        """Sample id -> sha256 of its picture's bytes, of a shard's rows; a view says it without reading pictures."""
        if self.manifest.is_view:
            rows = read_view_part(self.store, self.opened.shards[shard]).rows
            digests = [digest.hex() for digest in rows["image_sha256"].to_pylist()]
        else:
            rows = self.read(shard, ["sample_id", "image"])
            digests = [picture_sha256(image["bytes"]) for image in rows["image"].to_pylist()]
        return dict(zip(rows["sample_id"].to_pylist(), digests, strict=True))

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(shard["rows"] for shard in self.manifest.shards)]


class Format(Protocol):
    """What an export writes for each shard, and when all are written. The same dataset gives the same bytes.

    Once it is prepared it may travel to other processes, which write the shards.
    """

    def prepare(self) -> dict[str, bytes]:
        """The objects that do not depend on the shards. Raises InputError for a dataset that the format cannot hold."""

    def marker(self, shard: int) -> str:
        """The object of a shard that is written last: its presence says that the others are there."""

    def write(self, shard: int) -> Any:
        """Write one shard's objects; called from several threads. What `finish` needs to know of them."""

    def written(self, shard: int) -> Any:
        """What `write` said of a shard that an earlier run wrote."""

    def finish(self, shards: Sequence[Any]) -> None:
        """Write what needs every shard; `shards`: what was said of each, in order."""

    def tidy(self) -> None:
        """Delete what only an unfinished export needs."""
