"""Rows of a dataset for any Python program: pictures, captions, scores and features, shard by shard.

    from cluster.dataset import read_dataset

    for row in read_dataset("s3://bucket/coco", columns=("image", "caption", "patch_features", "clip_score")):
        show(row.image, row.caption, row.patch_features.shape, row.clip_score)

Training reads by way of cluster.dataset.rows, which keeps whole shards as arrays.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cluster.dataset.committed import committed, stored_shard
from cluster.dataset.documents import StoredShard, load_manifest, load_plan
from cluster.dataset.rows import features_of, read_shard
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.images import open_image
from pcm.records import FeatureShape

COLUMNS = ("sample_id", "caption", "image", "clip_score", "global_feature", "patch_features")


@dataclass(frozen=True)
class DatasetRow:
    """One stored pair. What was not asked for is None."""

    sample_id: str | None = None
    caption: str | None = None
    image_bytes: bytes | None = None  # the stored JPEG, PNG or WebP file
    clip_score: float | None = None  # raw cosine
    global_feature: np.ndarray | None = None  # (D,) float16, L2-normalised
    patch_features: np.ndarray | None = None  # (N, D_v) float16

    @property
    def image(self) -> Image.Image:
        """The picture in RGB, decoded anew each time. Raises InputError where there is none or it is damaged."""
        if self.image_bytes is None:
            raise InputError(
                f"{self.sample_id or 'image'}: no picture was read; name 'image' in columns, if there is one"
            )
        return open_image(self.image_bytes, name=self.sample_id or "image")


def read_dataset(
    uri: str | os.PathLike, *, columns: str | Sequence[str] = COLUMNS, unfinished: bool = False
) -> Iterator[DatasetRow]:
    """The rows of the dataset at a path or URI, in the order of its plan; memory: one shard.

    `columns`: which fields to read, one or several; "image" fills `image_bytes`. `unfinished`: also of a dataset that
    is being made, the shards that are there now. Any schema version that this package knows.

    Raises InputError, before the first row, for an unknown column, and where there is no dataset, an unfinished one
    without `unfinished`, or one of a newer schema version; later for a shard that cannot be read.
    """
    if isinstance(columns, str):
        columns = (columns,)
    if unknown := [name for name in columns if name not in COLUMNS]:
        raise InputError(f"column {unknown[0]!r}: allowed are {', '.join(COLUMNS)}")
    store = open_store(uri)
    shards, features = _shards(store, unfinished=unfinished)
    return (row for shard in shards for row in _rows(store, shard, columns, features))


def _shards(store: Store, *, unfinished: bool) -> tuple[Iterable[StoredShard], FeatureShape]:
    plan = load_plan(store) if unfinished else None
    if plan is None:
        manifest = load_manifest(store)
        return manifest.stored_shards, manifest.features
    from cluster.dataset.vocabularies import stored_features  # imports Ray, which takes seconds

    made = committed(store, plan)
    shards = (stored_shard(store, shard) for shard in range(plan.num_shards) if shard in made)
    return shards, stored_features(store, plan)


def _rows(store: Store, shard: StoredShard, columns: Sequence[str], features: FeatureShape) -> Iterator[DatasetRow]:
    table = read_shard(store, shard, columns)
    shapes = {"global_feature": (features.embed_dim,), "patch_features": (features.num_patches, features.patch_dim)}
    plain = {name: table[name].to_pylist() for name in columns if name not in shapes}
    if "image" in plain:
        plain["image_bytes"] = [image and image["bytes"] for image in plain.pop("image")]
    arrays = {name: features_of(store, shard, table, name, *shapes[name]) for name in columns if name in shapes}
    for row in range(len(table)):
        values = {name: column[row] for name, column in plain.items()}
        values |= {name: array[row].copy() for name, array in arrays.items()}  # a kept row keeps no shard in memory
        yield DatasetRow(**values)
