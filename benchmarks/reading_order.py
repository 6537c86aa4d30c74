"""What training asks before its first step of a dataset of many rows, and how often it reads each shard.

python -m benchmarks.reading_order [--rows 100000000] [--shard-rows 256] [--batch-size 192] [--ranks 64] [--folder DIR]

A synthetic dataset: dataset.json and the index of its rows, no shards and no pictures. One rank of `--ranks` opens it
in a process of its own, holds pairs out as a run does, and finds what each of its lanes reads first. It reads the index
of all rows; in a run the ranks share that. Seconds are of each of both parts, dataset.json and the rest; peak memory is
over that of the imports. Then, for 1, 2, 6, 16 and 64 ranks, the shard reads of a whole epoch over the number of
shards; that the loader asks for those shards, once each, is tested. The index takes 12 bytes a row on the disk while
this runs.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from cluster.dataset.committed import GROUP
from cluster.dataset.documents import Manifest, load_manifest, store_manifest
from cluster.dataset.keys import shard_key
from cluster.dataset.row_index import store_row_index
from cluster.store.store import open_store
from cluster.training.data.batches import BatchShape
from cluster.training.data.selection import RowFilter, Selection, holdout_share, select_rows
from cluster.training.data.shuffled import Part, ShardLoader
from pcm.records import FeatureShape
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec
from pcm.text.vocabulary import Vocabulary

FEATURES = FeatureShape(embed_dim=768, patch_dim=1024, num_patches=64)
RANKS = (1, 2, 6, 16, 64)
MIB = 1 << 20


def write_synthetic(folder: Path, *, rows: int, shard_rows: int) -> None:
    sizes = [min(shard_rows, rows - start) for start in range(0, rows, shard_rows)]
    entries = tuple(
        {"key": shard_key(shard), "rows": size, "quarantined": 0, "bytes": size * 170_000}
        | {"sha256": hashlib.sha256(str(shard).encode()).hexdigest()}
        for shard, size in enumerate(sizes)
    )
    manifest = Manifest(
        spec=DatasetSpec(generator=GeneratorSpec(model="null", revision=""), clip=ClipSpec(model="none", revision="")),
        corpus="", corpus_fingerprint="", features=FEATURES, expected=rows, stored=rows, quarantined=0,
        quarantined_by_reason={}, clip_score_mean=0.25, shard_bytes=0, shards=entries,
    )  # fmt: skip
    store = open_store(folder)
    store_manifest(store, manifest)
    shards, random = manifest.stored_shards, np.random.default_rng(0)
    for group, start in enumerate(range(0, len(shards), GROUP)):
        each = shards[start : start + GROUP]
        count = sum(shard.rows for shard in each)
        columns = {
            "caption": random.integers(0, 2**64, count, np.uint64),
            "clip_score": random.random(count, np.float32),
            "weight": np.ones(count, np.int32),
        }
        store_row_index(store, group, each, pa.table(columns))


@contextmanager
def measured(found: dict, name: str) -> Iterator[None]:
    """Seconds, by the clock and of processors, and the peak of the memory over what was in use after the imports."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    started, cpu = time.perf_counter(), time.process_time()
    yield
    found[name] = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mib": round(_memory("VmHWM") / MIB) - found["imports_mib"],
    }


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def loader_of(folder: Path, selection: Selection, *, batch_size: int, rank: int, ranks: int) -> ShardLoader:
    shape = BatchShape(features=FEATURES, batch_size=batch_size, max_length=20, rank=rank, num_workers=ranks)
    return ShardLoader([Part(open_store(folder), selection)], shape, Vocabulary.build(["word"], min_count=1), seed=0)


def first_step(folder: Path, batch_size: int, ranks: int) -> dict:
    """What one rank does before it reads its first shard."""
    found: dict = {"imports_mib": round(_memory("VmRSS") / MIB)}
    with measured(found, "dataset.json"):
        shards = load_manifest(open_store(folder)).stored_shards
    with measured(found, "rows_and_order"):
        rows = sum(shard.rows for shard in shards)
        held_out = holdout_share(fraction=0.05, limit=1000, rows=rows)
        training, _ = select_rows(open_store(folder), shards, RowFilter(seed=0, held_out=held_out))
        loader = loader_of(folder, training, batch_size=batch_size, rank=ranks // 2, ranks=ranks)
        for pieces in loader.lanes(0):
            next(pieces)
    found["held_out"] = rows - loader.rows_per_epoch
    return found


def shard_reads(folder: Path, batch_size: int) -> dict[int, float]:
    """Shard reads of an epoch over shards, by the number of ranks."""
    shards = load_manifest(open_store(folder)).stored_shards
    training, _ = select_rows(open_store(folder), shards, RowFilter(seed=0, held_out=0.001))
    found = {}
    for ranks in (ranks for ranks in RANKS if batch_size % ranks == 0):
        reads = 0
        for rank in range(ranks):
            loader = loader_of(folder, training, batch_size=batch_size, rank=rank, ranks=ranks)
            reads += len(loader.shards(0))
        found[ranks] = round(reads / len(shards), 4)
    return found


def measure(folder: Path, *, rows: int, shard_rows: int, batch_size: int, ranks: int) -> dict:
    write_synthetic(folder, rows=rows, shard_rows=shard_rows)
    with multiprocessing.get_context("spawn").Pool(1) as process:  # its memory is its own
        opened = process.apply(first_step, (folder, batch_size, ranks))
    return {
        "rows": rows,
        "shards": -(-rows // shard_rows),
        "ranks": ranks,
        "before_the_first_step": opened,
        "shard_reads_over_shards": shard_reads(folder, batch_size),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--shard-rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=192)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        sizes = {name: getattr(asked, name) for name in ("rows", "shard_rows", "batch_size", "ranks")}
        print(json.dumps(measure(Path(folder), **sizes)))


if __name__ == "__main__":
    main()
