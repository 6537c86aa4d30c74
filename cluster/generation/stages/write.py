"""Third stage: samples to objects on the store."""

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.dataset.committed import ROW_INDEX, read_stats
from cluster.dataset.keys import shard_key, stats_key
from cluster.dataset.parquet import parquet_bytes, pyarrow_here
from cluster.dataset.row_index import index_text
from cluster.generation.stages.asking import ask
from cluster.generation.stages.merge import merge_retried, replace_shard, stats_before, store_quarantine, with_before
from cluster.generation.stages.shard_row import ShardRow, check_picture_bytes, picture_bytes
from cluster.store.store import Store
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.images import FORMAT_BYTES, image_ending
from pcm.records import (
    NULL_FEATURES,
    QUARANTINE_SCHEMA,
    QUARANTINED,
    STORED,
    feature_shape,
    in_version,
    shard_schema,
)

if TYPE_CHECKING:
    from ray.actor import ActorHandle

log = logging.getLogger(__name__)

#: What is given once a shard is stored.
STORED_SCHEMA = pa.schema([("stats", pa.string())])

#: Another writer that has put the stats of a shard is given so many seconds to put the rest.
STORING_SECONDS = 30.0
_PAUSE = 0.5  # between two looks whether it has

#: In what a writer tells the driver of a shard with retried samples: stats of these alone, for what this run did.
OF_THIS_RUN = "of_this_run"

#: A column of samples whose pictures were drawn elsewhere: where each lay there. It becomes the picture's path.
IMAGE_PATH = "image_path"


class WriteShard:
    """Stats first, then the quarantine part, the shard last: the shard's presence says that all three exist.

    The first one to commit a shard wins, with the quarantine and the stats of its own. Of two generators of a run the
    monitor says which. Of two runs that know nothing of each other, or a node that was cut off, it is the one whose
    stats are put where there are none.
    """

    def __init__(
        self,
        store: Store,
        schema_version: int,
        monitor: "ActorHandle | None" = None,
        again: Collection[int] = (),
        pyarrow: str | None = None,
    ) -> None:
        """`schema_version`: the plan's; a dataset is finished in the version in which it was begun.

        `again`: shards that are put in the place of those that are there. `pyarrow`: the release that has to write;
        None where any will do.
        """
        self._store = store
        self._version = schema_version
        self._monitor = monitor
        self._again = frozenset(again)
        self._pyarrow = pyarrow
        self._began = time.time()  # as stats tell of times

    def check_pyarrow(self) -> None:
        """Raises InputError where this machine has another release than has to write."""
        if self._pyarrow not in (None, pyarrow_here()):
            raise InputError(
                f"{self._store.root}: its shards were written by pyarrow {self._pyarrow}, and this machine has "
                f"{pyarrow_here()}, which would write other bytes; install pyarrow {self._pyarrow} on it, or run "
                "jobs.verify --repair --other-bytes and make views, runs and exports anew"
            )

    def __call__(self, block: pa.Table) -> pa.Table:
        """One row, the stats of the shard that the block holds; none where another drawer's is stored."""
        row = ShardRow.from_block(block)
        if self._monitor is not None and not ask(self._monitor, "may_store", row.shard, row.turn):
            return STORED_SCHEMA.empty_table()
        return pa.table({"stats": [json.dumps(self.write(row))]}, schema=STORED_SCHEMA)

    def write(self, row: ShardRow) -> dict:
        """The stats of the shard as it is stored, maybe by another. Raises InputError where its pictures are too many
        bytes."""
        started = time.time()
        check_picture_bytes(picture_bytes(row.samples["image"]), row.shard)
        made = split_samples(row.samples)
        stored, quarantined = made
        retry = row.stats.get("retry", [])
        if retry:
            stored, quarantined = merge_retried(self._store, row.shard, *made, retry)
            check_picture_bytes(picture_bytes(pc.struct_field(stored["image"], "bytes")), row.shard)
        shard_data = parquet_bytes(in_version(stored, feature_shape(stored.schema), self._version))
        encoded_at = time.time()
        ended = {"encode_seconds": encoded_at - started, "end_time": time.time()}
        stats = _shard_stats(row, stored, quarantined, num_bytes=len(shard_data)) | ended
        stats["sha256"] = sha256 = hashlib.sha256(shard_data).hexdigest()
        of_this_run = {}
        if retry:
            before = stats_before(self._store, row.shard)
            more = max(0, len(shard_data) - before.get("bytes", 0))
            of_this_run = _shard_stats(row, *made, num_bytes=more) | ended
            stats = with_before(stats, before)
        stats_data = document_bytes(stats)
        if retry:
            replace_shard(self._store, row.shard, shard_data, quarantined, stats_data)
        elif self._is_first(row.shard, stats_data):
            store_quarantine(self._store, row.shard, quarantined)
            self._store.write_bytes(shard_key(row.shard), shard_data)
        else:
            log.warning("shard %d was committed by another writer meanwhile; what is there stays", row.shard)
            stats = read_stats(self._store, row.shard)
        # Not in the stats object: seconds that are known only after the shard is in place, for the driver's report, and
        # what the driver writes once for the whole group.
        told: dict[str, object] = {"store_seconds": time.time() - encoded_at}
        if of_this_run:
            told[OF_THIS_RUN] = of_this_run | told
        # Rows without features are never trained on; another writer's may differ, if something failed there or here.
        if feature_shape(stored.schema) != NULL_FEATURES and stats["sha256"] == sha256:
            told[ROW_INDEX] = index_text(stored["caption"].to_pylist(), stored["clip_score"].to_numpy())
        return stats | told

    def _is_first(self, shard: int, stats_data: bytes) -> bool:
        """Put the stats of a shard, unless another writer has committed it."""
        if shard not in self._again:
            if self._store.create_bytes(stats_key(shard), stats_data):
                return True
            if self._is_committed(shard):
                return False
        self._store.write_bytes(stats_key(shard), stats_data)
        return True

    def _is_committed(self, shard: int) -> bool:
        """Whether the shard is there beside its stats, or is soon. Who put them before this writer began has died."""
        is_storing = stats_before(self._store, shard).get("end_time", 0) > self._began
        deadline = time.monotonic() + (STORING_SECONDS if is_storing else 0)
        while not self._store.exists(shard_key(shard)):
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE)
        return True


def split_samples(samples: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(shard table, quarantine table) of featurised samples."""
    good = pc.greater(pc.binary_length(samples["image"]), 0)
    stored = samples.filter(good)
    bad = samples.filter(pc.invert(good))
    schema = shard_schema(feature_shape(samples.schema))
    images = pa.StructArray.from_arrays(
        [stored["image"].combine_chunks(), pa.array(_image_paths(stored), pa.string())],
        names=["bytes", "path"],
    )
    columns = {name: stored[name] for name in schema.names if name not in ("image", "status")}
    columns |= {"image": images, "status": pa.array([STORED] * len(stored), pa.string())}
    shard = pa.table([columns[name] for name in schema.names], schema=schema)
    bad = bad.append_column("status", pa.array([QUARANTINED] * len(bad), pa.string()))
    return shard, bad.select(QUARANTINE_SCHEMA.names).cast(QUARANTINE_SCHEMA)


def _image_paths(stored: pa.Table) -> list[str]:
    """Where pictures of others lay there; ours are named by their sample."""
    if IMAGE_PATH in stored.column_names:
        return stored[IMAGE_PATH].to_pylist()
    heads = pc.binary_slice(stored["image"], 0, FORMAT_BYTES).to_pylist()
    samples = stored["sample_id"].to_pylist()
    return [f"{sample}.{image_ending(head)}" for sample, head in zip(samples, heads, strict=True)]


def _shard_stats(row: ShardRow, stored: pa.Table, quarantined: pa.Table, *, num_bytes: int) -> dict:
    """img2dataset's convention (count, successes, failures by reason, times), and what the manifest needs."""
    scores = stored["clip_score"].to_numpy()
    reasons = _counted(quarantined["reason"])
    histogram, _ = np.histogram(scores, bins=np.linspace(-1, 1, 41))
    return row.stats | {
        "shard": row.shard,
        "count": len(stored) + len(quarantined),
        "successes": len(stored),
        "failed_to_generate": len(quarantined),
        "status_dict": {"success": len(stored), **reasons},
        "quarantined_by_reason": reasons,
        "retried": sum(attempts > 1 for part in (stored, quarantined) for attempts in part["attempts"].to_pylist()),
        "batch_sizes": _counted(stored["batch_size"]),
        "clip_score_sum": float(scores.sum(dtype=np.float64)),
        "clip_score_sum_of_squares": float(np.square(scores, dtype=np.float64).sum()),
        "clip_score_histogram": histogram.tolist(),  # 40 bins over -1..1
        "bytes": num_bytes,
    }


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs; JSON's keys are text."""
    return {str(value): count for value, count in sorted(Counter(column.to_pylist()).items())}
