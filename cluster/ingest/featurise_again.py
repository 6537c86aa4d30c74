"""A shard by another CLIP: read from the source, featurised, and stored after what the manifest needs of its rows."""

import hashlib
import io
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.dataset.documents import StoredShard, find_whole_manifest
from cluster.dataset.environment import tell_encoder
from cluster.dataset.keys import LINEAGE_KEY, shard_key
from cluster.dataset.opened import OpenDataset, read_corpus_ids
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.rows import read_shard, read_weights
from cluster.generation.stages.asking import ask
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.shard_row import ShardRow
from cluster.generation.stages.takes_turns import TakesTurns
from cluster.generation.stages.write import STORED_SCHEMA
from cluster.store.reach import check_here
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.records import STORED, feature_shape, shard_schema
from pcm.spec import ClipSpec

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.generation.limits import FaultPolicy

#: Folder of what a run needs until it is done.
WORK = "featurising"
#: In the metadata of a shard's facts: the shard as the manifest names it.
_SHARD = b"shard"
#: Of the source's rows all that stays; score and features are new.
_KEPT = ("sample_id", "caption", "image", "width", "height", "seed", "attempts", "batch_size", "reason")


class FeaturiseAgain(TakesTurns):
    """A turn in; out the stats of a shard that was read, featurised and stored, or nothing where there was none.

    While one shard is featurised, another one is read or stored. A CLIP that takes too long over a batch ends this
    process, and Ray starts the next one. Raises InputError as read_shard does, and for a shard over which process after
    process ends.
    """

    def __init__(
        self,
        source: OpenDataset,
        out: Store,
        spec: ClipSpec,
        watched_by: "tuple[ActorHandle, FaultPolicy]",
        featurise: type[FeaturiseShard],
    ) -> None:
        super().__init__(watched_by[0], WriteFeaturised(out, watched_by[0]), scores=True)
        self._source, self._out, self._spec = source, out, spec
        self._read = ReadPictures(source)
        self._make_score = partial(featurise, spec, watched_by, before_again=self._overlap.wait)
        self._score: FeaturiseShard | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        number = block["turn"][0].as_py()
        if not self._models.loaded:
            self._overlap.begin(self._models.load_or_leave).result()
        turn = self._turn(number)
        if turn.shard is None:
            return self._nothing
        assert self._score is not None
        read = self._read(pa.table({"shard": [turn.shard], "turn": [number]}))
        stored = self._overlap.run(partial(self._score, read))
        assert stored is not None
        return stored

    def _load(self) -> None:
        check_here([(self._out, LINEAGE_KEY), *self._source.landmarks])
        self._score = self._score or self._make_score()
        tell_encoder(self._out, self._spec)


class ReadPictures:
    """A shard's number in, its rows as the source has them out. Raises InputError as read_shard does."""

    def __init__(self, source: OpenDataset) -> None:
        self._source = source

    def __call__(self, block: pa.Table) -> pa.Table:
        began = time.monotonic()
        shard = block["shard"][0].as_py()
        turn = block["turn"][0].as_py() if "turn" in block.column_names else None
        stored = self._source.shards[shard]
        names = [*_KEPT, *(["clip_score"] if is_scored(self._source) else [])]
        table = read_shard(self._source.store, stored, names)
        images = table["image"].combine_chunks()
        columns: dict[str, Any] = {name: table[name] for name in _KEPT if name != "image"}
        columns["image"] = images.field("bytes")
        columns["image_path"] = images.field("path")
        columns["corpus_id"] = pa.array(read_corpus_ids(self._source, shard), pa.string())
        columns["weight"] = pa.array(read_weights(self._source.store, stored).astype(np.int32))
        before = table["clip_score"] if is_scored(self._source) else pa.nulls(stored.rows, pa.float32())
        columns["score_before"] = before
        if images.field("bytes").null_count:
            raise InputError(
                f"{self._source.store.root}/{stored.key}: a row has no picture; give a dataset of pictures"
            )
        return ShardRow(shard, pa.table(columns), {"began": began}, turn).to_block()


def is_scored(source: OpenDataset) -> bool:
    return source.manifest.spec.clip.model != "null"


class WriteFeaturised:
    """A featurised shard in; its facts and then the shard onto the store; one row out, its stats: shard, rows and the
    seconds since this process began to read it. Of two that made a shard the monitor lets one store it."""

    def __init__(self, out: Store, monitor: "ActorHandle | None" = None) -> None:
        self._out = out
        self._monitor = monitor

    def __call__(self, block: pa.Table) -> pa.Table:
        row = ShardRow.from_block(block)
        if self._monitor is not None and not ask(self._monitor, "may_store", row.shard, row.turn):
            return STORED_SCHEMA.empty_table()
        drawn = row.samples
        there = pc.greater(pc.binary_length(drawn["image"]), 0)
        stored = drawn.filter(there).combine_chunks()
        schema = shard_schema(feature_shape(drawn.schema))
        images = pa.StructArray.from_arrays(
            [stored["image"].combine_chunks(), stored["image_path"].combine_chunks()], names=["bytes", "path"]
        )
        columns = {name: stored[name] for name in schema.names if name not in ("image", "status")}
        columns |= {"image": images, "status": pa.array([STORED] * len(stored), pa.string())}
        table = pa.table([columns[name] for name in schema.names], schema=schema)
        table = table.append_column("corpus_id", stored["corpus_id"])
        weights = stored["weight"].to_numpy()
        if (weights != 1).any():
            table = table.append_column("weight", stored["weight"])
        data = parquet_bytes(table)
        pictures = images.field("bytes").to_pylist()
        facts = pa.table(
            {
                **{name: stored[name] for name in ("sample_id", "caption", "seed", "clip_score", "score_before")},
                "image_sha256": pa.array([hashlib.sha256(picture).digest() for picture in pictures], pa.binary()),
            }
        )
        entry: dict[str, Any] = {"key": shard_key(row.shard), "rows": len(table), "quarantined": 0}
        if int(weights.sum()) != len(table):
            entry["weighted_rows"] = int(weights.sum())
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        refused = drawn.filter(pc.invert(there))["sample_id"].to_pylist()
        told = json.dumps({"entry": entry, "refused": refused}).encode()
        self._out.write_bytes(facts_key(row.shard), parquet_bytes(facts.replace_schema_metadata({_SHARD: told})))
        self._out.write_bytes(shard_key(row.shard), data)
        stats = {"shard": row.shard, "rows": len(drawn), "seconds": time.monotonic() - row.stats["began"]}
        return pa.table({"stats": [json.dumps(stats)]}, schema=STORED_SCHEMA)


def facts_key(shard: int) -> str:
    return f"{WORK}/part-{shard:06d}.parquet"


@dataclass(frozen=True)
class ShardFacts:
    """rows: sample_id, caption, seed, image_sha256, clip_score, score_before. entry: of Manifest.shards."""

    rows: pa.Table
    entry: dict[str, Any]
    refused: list[str]


def refuse_finished(out: Store) -> None:
    """Raises InputError where a job of another cluster has finished the dataset, and deleted the facts."""
    if find_whole_manifest(out) is not None:
        raise InputError(
            f"{out.root}: a job of another cluster has finished this dataset meanwhile; see with jobs.verify "
            "whether this one has changed its shards, and make it in another --out where it has"
        )


def read_facts(out: Store, shard: int) -> ShardFacts:
    """What WriteFeaturised stored beside a shard. Raises InputError where it is missing or damaged, also because a job
    of another cluster has finished the dataset and deleted it."""
    try:
        table = pq.read_table(io.BytesIO(out.read_bytes(facts_key(shard))))
        told = json.loads(table.schema.metadata[_SHARD])
        StoredShard.of(told["entry"])
        return ShardFacts(table.replace_schema_metadata(None), told["entry"], told["refused"])
    except (FileNotFoundError, pa.ArrowException, ValueError, TypeError, LookupError):
        refuse_finished(out)
        raise InputError(
            f"{out.root}/{facts_key(shard)}: missing or damaged; delete {shard_key(shard)} beside it and run the same "
            "command again"
        ) from None
