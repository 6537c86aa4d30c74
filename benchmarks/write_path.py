"""What storing a shard costs over storing its bytes: MB/s of the write stage over MB/s of a bare put loop.

    python -m benchmarks.write_path                          # local disk, and SeaweedFS on this machine (S3)
    python -m benchmarks.write_path --rows 64 --shards 8 --rounds 5

The write stage encodes samples as Parquet, hashes the file, and puts it and its stats object, where there are none. The
bare loop puts the same shard bytes, encoded before the clock starts, under the same keys with the same storage layer.
Rounds of both alternate, on each store, in one process; medians are reported. Samples have pictures of --image-kb
random bytes (JPEGs do not compress either) and the feature shapes of ViT-L/14 (64 x 1024). The last line of stdout is
JSON.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa

from cluster.dataset.keys import shard_key, stats_key
from cluster.dataset.parquet import parquet_bytes
from cluster.generation.stages.draw import DRAWN_SCHEMA
from cluster.generation.stages.shard_row import ShardRow
from cluster.generation.stages.write import WriteShard, split_samples
from cluster.store.store import Store, open_store
from pcm.records import SCHEMA_VERSION, FeatureShape, with_features

ROOT = Path(__file__).parent.parent
FEATURES = FeatureShape(embed_dim=768, patch_dim=1024, num_patches=64)


def samples(rows: int, image_bytes: int) -> pa.Table:
    """What the CLIP stage hands on: one shard's samples."""
    random = np.random.default_rng(0)
    values = {
        "sample_id": [f"{row:09d}-00" for row in range(rows)],
        "corpus_id": [str(row) for row in range(rows)],
        "caption": [f"A photo of a cat number {row} on a table." for row in range(rows)],
        "reason": [""] * rows,
        "image": [b"\xff\xd8" + random.bytes(image_bytes - 2) for _ in range(rows)],
    }
    ones = {name: [1] * rows for name in DRAWN_SCHEMA.names if name not in values}
    table = pa.table({name: (values | ones)[name] for name in DRAWN_SCHEMA.names}, schema=DRAWN_SCHEMA)
    global_feature = random.standard_normal((rows, FEATURES.embed_dim)).astype(np.float16)
    patches = random.standard_normal((rows, FEATURES.num_patches, FEATURES.patch_dim)).astype(np.float16)
    table = with_features(table, global_feature, patches)
    return table.append_column("clip_score", pa.array(np.full(rows, 0.3, np.float32)))


def round_of(store: Store, table: pa.Table, shards: int) -> dict[str, float]:
    """MB/s of the bare loop and of the stage, one after the other, over the same number of bytes."""
    data = parquet_bytes(split_samples(table)[0])
    times = {"start_time": 0.0, "draw_seconds": 0.0, "featurise_seconds": 0.0}
    started = time.perf_counter()
    for shard in range(shards):
        store.write_bytes(shard_key(shard), data)
    bare = time.perf_counter() - started
    for shard in range(shards):  # the stage stores nothing where it finds a shard
        store.delete(shard_key(shard))
        store.delete(stats_key(shard))
    stage = WriteShard(store, SCHEMA_VERSION)
    started = time.perf_counter()
    encoding = 0.0
    for shard in range(shards):
        encoding += stage.write(ShardRow(shard, table, times))["encode_seconds"]
    staged = time.perf_counter() - started
    megabytes = shards * len(data) / 1e6
    return {
        "bare": megabytes / bare,
        "stage": megabytes / staged,
        "ratio": bare / staged,
        "encoding": encoding / staged,
    }


def measure(store: Store, table: pa.Table, *, shards: int, rounds: int) -> dict[str, float]:
    round_of(store, table, 1)
    done = [round_of(store, table, shards) for _ in range(rounds)]
    return {
        "bare_mb_per_second": round(median(one["bare"] for one in done), 1),
        "stage_mb_per_second": round(median(one["stage"] for one in done), 1),
        "ratio": round(median(one["ratio"] for one in done), 3),
        "encoding_share": round(median(one["encoding"] for one in done), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="samples a shard")
    parser.add_argument("--image-kb", type=int, default=100)
    parser.add_argument("--shards", type=int, default=4, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    table = samples(args.rows, args.image_kb * 1000)
    report: dict = {"shard_mb": round(len(parquet_bytes(split_samples(table)[0])) / 1e6, 1), "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        report["disk"] = measure(open_store(f"{folder}/disk"), table, shards=args.shards, rounds=args.rounds)
        from tests.helpers.seaweedfs import seaweedfs

        server_folder = Path(folder) / "seaweedfs"
        server_folder.mkdir()
        with seaweedfs(server_folder) as server:
            os.environ.update(server.environment)
            store = open_store(f"{server.uri}/write-path")
            report["s3"] = measure(store, table, shards=args.shards, rounds=args.rounds)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
