"""What happens to one shard: drawn, featurised, written. Three callables, one for each actor pool of the pipeline.

Between the stages a shard is one row of one block, its samples an Arrow table in IPC bytes: Ray Data splits and merges
blocks of many rows as it sees fit, and a shard must arrive whole where it is written.
"""

import hashlib
import json
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from cluster.dataset import parquet_bytes, plan_part_key, quarantine_key, read_table, shard_key, stats_key
from cluster.plan import USABLE_REASONS
from cluster.storage import Store
from pcm.clip import ClipEncoder
from pcm.images import open_image
from pcm.records import QUARANTINE_SCHEMA, QUARANTINED, STORED, FeatureShape, shard_schema
from pcm.spec import ClipSpec, DatasetSpec
from pcm.text_to_image import Drawing, Request, load_generator

NULL_FEATURES = FeatureShape(embed_dim=1, patch_dim=1, num_patches=1)

#: What travels between stages. large_binary: a shard of pictures and features may exceed 2 GB.
SHARD_ROW_SCHEMA = pa.schema([("shard", pa.int64()), ("payload", pa.large_binary()), ("stats", pa.string())])


@dataclass(frozen=True)
class ShardRow:
    """One shard on its way: number, samples, and what the stages measured."""

    shard: int
    samples: pa.Table
    stats: dict

    def to_block(self) -> pa.Table:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.samples.schema) as writer:
            writer.write_table(self.samples)
        row = {"shard": [self.shard], "payload": [sink.getvalue()], "stats": [json.dumps(self.stats)]}
        return pa.table(row, schema=SHARD_ROW_SCHEMA)

    @staticmethod
    def from_block(block: pa.Table) -> "ShardRow":
        payload = block["payload"].combine_chunks()[0].as_buffer()
        with pa.ipc.open_stream(payload) as reader:
            samples = reader.read_all()
        return ShardRow(block["shard"][0].as_py(), samples, json.loads(block["stats"][0].as_py()))


class DrawShard:
    """Generator pool: plan part in, drawings (or the reasons why there are none) out."""

    def __init__(self, store: Store, spec: DatasetSpec) -> None:
        self._store = store
        self._spec = spec
        self._generator = load_generator(spec.generator)

    def __call__(self, block: pa.Table) -> pa.Table:
        shard = block["shard"][0].as_py()
        started = time.time()
        plan = read_table(self._store, plan_part_key(shard))
        return ShardRow(
            shard, self.draw(plan), {"start_time": started, "draw_seconds": time.time() - started}
        ).to_block()

    def draw(self, plan: pa.Table) -> pa.Table:
        """The plan's rows with columns image (bytes), width, height, attempts, and their final seed and reason."""
        rows = plan.to_pylist()
        usable = [row for row in rows if row["reason"] in USABLE_REASONS]
        drawings = iter(self._generator.draw([self._request(row) for row in usable]))
        none = Drawing(b"", 0, 0, 0, 0)
        drawn = []
        for row in rows:
            drawing = next(drawings) if row["reason"] in USABLE_REASONS else none
            drawn.append(
                row
                | {"image": drawing.image, "width": drawing.width, "height": drawing.height}
                | {"attempts": drawing.attempts, "seed": drawing.seed if drawing.attempts else row["seed"]}
                | {"reason": drawing.reason or row["reason"]}
            )
        return pa.Table.from_pylist(drawn, schema=_DRAWN_SCHEMA)

    def _request(self, row: dict) -> Request:
        position = row["record_index"] * self._spec.images_per_caption + row["image_index"]
        return Request(position=position, caption=row["caption"], seed=row["seed"])


_DRAWN_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("corpus_id", pa.string()),
        ("caption", pa.string()),
        ("seed", pa.int64()),
        ("reason", pa.string()),
        ("attempts", pa.int32()),
        ("image", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)


class FeaturiseShard:
    """Scorer pool: adds clip_score, global_feature and patch_features, computed from the stored image bytes."""

    def __init__(self, spec: ClipSpec) -> None:
        if spec.model == "null":
            self._encoder = None
            return
        if spec.device == "cpu":
            import torch

            torch.set_num_threads(spec.cpu_threads)
        self._encoder = ClipEncoder(spec.model, device=spec.device, dtype=spec.dtype, batch_size=spec.batch_size)

    @property
    def features(self) -> FeatureShape:
        return self._encoder.features if self._encoder else NULL_FEATURES

    def __call__(self, block: pa.Table) -> pa.Table:
        row = ShardRow.from_block(block)
        started = time.time()
        samples = self.featurise(row.samples)
        return ShardRow(row.shard, samples, row.stats | {"featurise_seconds": time.time() - started}).to_block()

    def featurise(self, drawn: pa.Table) -> pa.Table:
        shape = self.features
        global_feature = np.zeros((len(drawn), shape.embed_dim), np.float16)
        patch_features = np.zeros((len(drawn), shape.num_patches * shape.patch_dim), np.float16)
        clip_score = np.zeros(len(drawn), np.float32)
        has_image = [row for row, image in enumerate(drawn["image"]) if len(image.as_buffer())]
        if self._encoder and has_image:
            images = [
                open_image(drawn["image"][row].as_py(), name=drawn["sample_id"][row].as_py()) for row in has_image
            ]
            encoded = self._encoder.encode_images(images)
            texts = self._encoder.encode_texts([drawn["caption"][row].as_py() for row in has_image])  # (B, D)
            global_feature[has_image] = encoded.global_feature
            patch_features[has_image] = encoded.patch_features.reshape(len(has_image), -1)
            clip_score[has_image] = (encoded.global_feature * texts).sum(axis=1)
        columns = {
            "clip_score": pa.array(clip_score),
            "global_feature": _fixed_lists(global_feature),
            "patch_features": _fixed_lists(patch_features),
        }
        for name, column in columns.items():
            drawn = drawn.append_column(name, column)
        return drawn


class WriteShard:
    """Writer pool: quarantine part and stats first, the shard last - the shard's presence says that all three exist."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, block: pa.Table) -> pa.Table:
        row = ShardRow.from_block(block)
        stats = self.write(row)
        return pa.table({"stats": [json.dumps(stats)]})

    def write(self, row: ShardRow) -> dict:
        started = time.time()
        stored, quarantined = split_samples(row.samples)
        shard_data = parquet_bytes(stored)
        encoded_at = time.time()
        if len(quarantined):
            self._store.write_bytes(quarantine_key(row.shard), parquet_bytes(quarantined))
        stats = _shard_stats(row, stored, quarantined, shard_data)
        stats |= {"encode_seconds": encoded_at - started, "end_time": time.time()}
        self._store.write_bytes(stats_key(row.shard), (json.dumps(stats, indent=1, sort_keys=True) + "\n").encode())
        self._store.write_bytes(shard_key(row.shard), shard_data)
        # Known only after the shard is in place, so not in its stats object: the driver adds these up for its report.
        return stats | {"store_seconds": time.time() - encoded_at}


def split_samples(samples: pa.Table) -> tuple[pa.Table, pa.Table]:
    """(shard table, quarantine table) of featurised samples."""
    good = pa.array([len(image.as_buffer()) > 0 for image in samples["image"]], pa.bool_())
    stored = samples.filter(good)
    bad = samples.filter(pa.compute.invert(good))
    features = FeatureShape(
        embed_dim=samples.schema.field("global_feature").type.list_size,
        patch_dim=samples.schema.field("patch_features").type.list_size,
        num_patches=1,
    )
    schema = shard_schema(features)
    images = pa.StructArray.from_arrays(
        [stored["image"].combine_chunks(), pa.array([f"{key}" for key in _image_paths(stored)], pa.string())],
        names=["bytes", "path"],
    )
    columns = {name: stored[name] for name in schema.names if name not in ("image", "status")}
    columns |= {"image": images, "status": pa.array([STORED] * len(stored), pa.string())}
    shard = pa.table([columns[name] for name in schema.names], schema=schema)
    bad = bad.append_column("status", pa.array([QUARANTINED] * len(bad), pa.string()))
    return shard, bad.select(QUARANTINE_SCHEMA.names).cast(QUARANTINE_SCHEMA)


def _image_paths(stored: pa.Table) -> list[str]:
    endings = {b"\xff\xd8": ".jpg", b"\x89P": ".png", b"RI": ".webp"}
    return [
        sample.as_py() + endings[image.as_py()[:2]]
        for sample, image in zip(stored["sample_id"], stored["image"], strict=True)
    ]


def _shard_stats(row: ShardRow, stored: pa.Table, quarantined: pa.Table, shard_data: bytes) -> dict:
    """img2dataset's convention (count, successes, failures by reason, times), and what the manifest needs."""
    scores = stored["clip_score"].to_numpy()
    reasons: dict[str, int] = {}
    for reason in quarantined["reason"].to_pylist():
        reasons[reason] = reasons.get(reason, 0) + 1
    histogram, _ = np.histogram(scores, bins=np.linspace(-1, 1, 41))
    return row.stats | {
        "shard": row.shard,
        "count": len(row.samples),
        "successes": len(stored),
        "failed_to_generate": len(quarantined),
        "status_dict": {"success": len(stored), **reasons},
        "quarantined_by_reason": reasons,
        "retried": int(sum(attempts > 1 for attempts in row.samples["attempts"].to_pylist())),
        "clip_score_sum": float(scores.sum(dtype=np.float64)),
        "clip_score_histogram": histogram.tolist(),  # 40 bins over -1..1
        "sha256": hashlib.sha256(shard_data).hexdigest(),
        "bytes": len(shard_data),
    }


def _fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
