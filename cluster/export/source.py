"""A finished dataset as exports read it: shard by shard, checked against the manifest."""

import hashlib
import io
import json
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.committed import load_stats
from cluster.dataset.layout import MANIFEST_KEY, Manifest, Plan, load_manifest, load_plan, stats_key
from cluster.dataset.plan import parse_sample_id
from cluster.dataset.shard_check import UNREADABLE, check_schema, check_values
from cluster.store.store import Store
from pcm.errors import InputError, first_line


@dataclass(frozen=True)
class Source:
    """A dataset: where it is, what was planned, what it holds, and its manifest's sha256, which names it."""

    store: Store
    plan: Plan
    manifest: Manifest
    sha256: str

    @staticmethod
    def open(store: Store) -> "Source":
        """Raises InputError when there is no finished dataset."""
        manifest, plan = load_manifest(store), load_plan(store)
        if plan is None:
            raise InputError(f"{store.root}: has no plan.json; run jobs.verify on the dataset")
        return Source(store, plan, manifest, hashlib.sha256(store.read_bytes(MANIFEST_KEY)).hexdigest())

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
        data = self.read_bytes(shard)
        try:
            file = pq.ParquetFile(io.BytesIO(data))
            check_schema(file.schema_arrow, self.plan, self.manifest)
            table = file.read(columns=columns)
            check_values(table)
        except UNREADABLE as error:
            place = f"{self.store.root}/{self.manifest.shards[shard]['key']}"
            raise InputError(f"{place}: damaged ({first_line(error)}); run jobs.verify on the dataset") from None
        return table

    def stats(self, shard: int) -> dict:
        load_stats(self.store, shard)  # raises InputError where they are damaged
        return json.loads(self.store.read_bytes(stats_key(shard)))

    def position(self, sample_id: str) -> int:
        """A sample's place among all that were planned."""
        record_index, image_index = parse_sample_id(sample_id)
        return record_index * self.plan.spec.images_per_caption + image_index


class Format(Protocol):
    """What an export writes for each shard, and when all are written. The same dataset gives the same bytes."""

    def prepare(self) -> None:
        """Write what does not depend on the shards. Raises InputError for a dataset that the format cannot hold."""

    def marker(self, shard: int) -> str:
        """The object of a shard that is written last: its presence says that the others are there."""

    def write(self, shard: int) -> None:
        """Write one shard's objects; called from several threads."""

    def finish(self) -> None:
        """Write what needs every shard."""

    def tidy(self) -> None:
        """Delete what only an unfinished export needs."""
