"""Samples a second that training reads, against one .npz file an image and against what training consumes.

python -m benchmarks.data_path [--rows 1024] [--shard-rows 128] [--rounds 5] [--folder DIR]

Random features of the published size (64 x 1024 and 768): as a dataset's Parquet shards, float16, beside a picture of
40 kB each that training skips; and as the published code keeps them, one uncompressed float32 .npz an image. Both
sides give the same batches' worth of arrays, in random order, from files whose pages were dropped from the cache as far
as the system heeds posix_fadvise. The loader reads every epoch anew (nothing kept in memory), with captions turned into
ids; the .npz side does without captions. `cached` is the loader by way of --cache-dir, in any epoch but the first, and
`cached_int8` the same with feature_dtype=int8. Sides take turns; medians of the rounds.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.as_worker import as_worker
from benchmarks.matmul_rate import machine, seconds
from benchmarks.published_size import BATCH, published_model, random_batch
from cluster.dataset.documents import StoredShard
from cluster.dataset.keys import shard_key
from cluster.dataset.parquet import parquet_bytes
from cluster.store.store import open_store
from cluster.training.data.batches import BatchShape
from cluster.training.data.selection import Selection
from cluster.training.data.shard_cache import ShardCache
from cluster.training.data.shuffled import Part, ShardLoader
from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy
from pcm.records import STORED, FeatureShape, feature_columns, shard_schema
from pcm.text.vocabulary import Vocabulary

FEATURES = FeatureShape(embed_dim=768, patch_dim=1024, num_patches=64)
PICTURE_BYTES = 40_000
WORDS = [f"word{number}" for number in range(5000)]


def write_both(folder: Path, *, rows: int, shard_rows: int) -> Selection:
    """Shards under folder/shards and one file a row under folder/npz."""
    (folder / "npz").mkdir()
    selection = write_shards(folder, rows=rows, shard_rows=shard_rows)
    for start, global_feature, patches in _vectors(FEATURES, rows=rows, shard_rows=shard_rows):
        for row in range(len(patches)):
            arrays = {"features": patches[row], "g_feature": global_feature[row : row + 1]}
            np.savez(folder / "npz" / f"{start + row}.npz", **arrays)
    return selection


def write_shards(
    folder: Path, *, rows: int, shard_rows: int, features: FeatureShape = FEATURES, picture_bytes: int = PICTURE_BYTES
) -> Selection:
    """Shards of random features under folder/shards."""
    store, random = open_store(folder), np.random.default_rng(1)
    shards, numbers = [], []
    for start, global_feature, patches in _vectors(features, rows=rows, shard_rows=shard_rows):
        key = shard_key(start // shard_rows)
        data = parquet_bytes(_table(features, global_feature, patches, random, start, picture_bytes))
        store.write_bytes(key, data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append(StoredShard(key, rows=len(patches), bytes=len(data), sha256=digest))
        numbers.append(np.arange(len(patches)))
    return Selection(tuple(shards), tuple(numbers))


def _vectors(features: FeatureShape, *, rows: int, shard_rows: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Shard by shard: its first row, global features and patches, the same at every call."""
    random = np.random.default_rng(0)
    for start in range(0, rows, shard_rows):
        count = min(shard_rows, rows - start)
        global_feature = random.standard_normal((count, features.embed_dim), dtype=np.float32)
        yield (
            start,
            global_feature,
            random.standard_normal((count, features.num_patches, features.patch_dim), dtype=np.float32),
        )


def _table(
    features: FeatureShape,
    global_feature: np.ndarray,
    patches: np.ndarray,
    random: np.random.Generator,
    start: int,
    picture_bytes: int,
) -> pa.Table:
    count = len(patches)
    ids = [f"{start + row:09d}-00" for row in range(count)]
    columns = {
        "sample_id": ids,
        "caption": [" ".join(random.choice(WORDS, 11)) for _ in range(count)],
        "image": [{"bytes": random.bytes(picture_bytes), "path": f"{name}.jpg"} for name in ids],
        "clip_score": random.random(count, dtype=np.float32),
        "status": [STORED] * count,
        "reason": [""] * count,
    }
    columns |= feature_columns(global_feature.astype(np.float16), patches.astype(np.float16))
    schema = shard_schema(features)
    return pa.table({name: columns.get(name, [1] * count) for name in schema.names}, schema=schema)


def drop_from_cache(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_shards(loader: ShardLoader, epoch: int) -> float:
    """Samples a second of one epoch."""
    started, rows = time.perf_counter(), 0
    for batch in loader.epoch(epoch):
        rows += len(batch.sample_ids)
    return rows / (time.perf_counter() - started)


def read_npz(folder: Path, rows: int, epoch: int) -> float:
    """The same of one file an image, stacked to batches."""
    order = np.random.default_rng(epoch).permutation(rows)
    started = time.perf_counter()
    for start in range(0, rows, BATCH):
        batch = []
        for row in order[start : start + BATCH]:
            with np.load(folder / "npz" / f"{row}.npz") as arrays:
                batch.append((arrays["features"], arrays["g_feature"]))
        np.stack([features for features, _ in batch])
        np.concatenate([global_feature for _, global_feature in batch])
    return rows / (time.perf_counter() - started)


def training_rate(repeats: int) -> float:
    """Samples a second that one trainer on this machine's CPU consumes, at the published size."""
    model = published_model(device="cpu").train()
    batch = random_batch(model.config, device="cpu")
    loss_function, optimizer = CLIPWeightedCrossEntropy(), torch.optim.Adam(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        logits = model(batch["global_feature"], batch["patch_features"], batch["token_ids"])
        loss_function(logits, batch["target_ids"], batch["clip_score"]).backward()
        optimizer.step()

    return BATCH / statistics.median(seconds(step, repeats=repeats, device="cpu"))


def _loader(
    folder: Path, selection: Selection, cache: ShardCache | None, features: FeatureShape = FEATURES
) -> ShardLoader:
    return ShardLoader(
        [Part(open_store(folder), selection, cache=cache)],
        BatchShape(features=features, batch_size=BATCH, max_length=20, int8=cache is not None and cache.int8),
        Vocabulary.build(WORDS, min_count=1),
        seed=0,
        cache_bytes=0,
    )


def measure(folder: Path, *, rows: int, shard_rows: int, rounds: int) -> dict:
    selection = write_both(folder, rows=rows, shard_rows=shard_rows)
    loaders = {
        "shards": _loader(folder, selection, None),
        "cached": _loader(folder, selection, ShardCache(folder / "cache")),
        "cached_int8": _loader(folder, selection, ShardCache(folder / "cache-int8", int8=True)),
    }
    for loader in loaders.values():
        read_shards(loader, 0)
    rates: dict[str, list[float]] = {name: [] for name in (*loaders, "npz")}
    for epoch in range(rounds):
        for name, loader in loaders.items():
            drop_from_cache(folder)
            rates[name].append(read_shards(loader, epoch))
        drop_from_cache(folder)
        rates["npz"].append(read_npz(folder, rows, epoch))
    trainer = training_rate(repeats=rounds)
    places = {"shards": "shards", "cached": "cache", "cached_int8": "cache-int8", "npz": "npz"}
    sizes = {
        name: sum(file.stat().st_size for file in (folder / place).rglob("*") if file.is_file())
        for name, place in places.items()
    }
    return {
        "samples_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "over_npz": {
            name: round(statistics.median(a / b for a, b in zip(rates[name], rates["npz"], strict=True)), 2)
            for name in loaders
        },
        "trainer_samples_per_second": round(trainer, 2),
        "over_trainer": {name: round(statistics.median(rates[name]) / trainer, 1) for name in loaders},
        "bytes_per_row": {name: round(size / rows) for name, size in sizes.items()},
        "rows": rows,
        "rounds": rounds,
        **machine("cpu"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--shard-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write some hundred MB for the time of the run")
    arguments = parser.parse_args()
    as_worker("benchmarks.data_path")
    with tempfile.TemporaryDirectory(prefix="pcm-data-path-", dir=arguments.folder) as folder:
        result = measure(Path(folder), rows=arguments.rows, shard_rows=arguments.shard_rows, rounds=arguments.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
