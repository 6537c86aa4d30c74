"""Reading the columns of shards that training needs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.dataset.feature_pages import plain_matrices
from cluster.store.store import Store
from pcm.errors import InputError, first_line
from pcm.kernels.quantised import quantised
from pcm.records import FeatureShape

MATRICES = ("global_feature", "patch_features")
SMALL = ("sample_id", "caption", "clip_score")
COLUMNS = (*SMALL, *MATRICES)


@dataclass(frozen=True)
class Rows:
    """Decoded rows of a dataset. Features stay float16 until they are on the training device."""

    sample_ids: np.ndarray  # (n,) of str
    captions: np.ndarray  # (n,) of str
    clip_score: np.ndarray  # (n,) float32, raw cosine
    global_feature: np.ndarray  # (n, D) float16
    patch_features: np.ndarray  # (n, N, D_v) float16, or int8: see pcm.kernels.quantised
    patch_scale: np.ndarray  # (n, D_v) float16 beside int8, (n, 0) beside float16

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take(self, indices: np.ndarray) -> "Rows":
        return Rows(*(getattr(self, name)[indices] for name in self.__dataclass_fields__))

    def select(self, numbers: np.ndarray) -> "Rows":
        """The rows of ascending numbers; nothing is copied where these are all."""
        return self if len(numbers) == len(self) else self.take(numbers)

    def in_8_bits(self) -> "Rows":
        """With patch features in int8; as they are where they have been rounded already."""
        if self.patch_features.dtype == np.int8:
            return self
        values, scale = quantised(torch.from_numpy(self.patch_features))
        return replace(self, patch_features=values.numpy(), patch_scale=scale.numpy())

    @staticmethod
    def concatenate(parts: Sequence["Rows"]) -> "Rows":
        if len(parts) == 1:
            return parts[0]
        return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in Rows.__dataclass_fields__))

    @staticmethod
    def empty(features: FeatureShape) -> "Rows":
        return Rows(
            sample_ids=np.zeros(0, dtype=object),
            captions=np.zeros(0, dtype=object),
            clip_score=np.zeros(0, np.float32),
            global_feature=np.zeros((0, features.embed_dim), np.float16),
            patch_features=np.zeros((0, features.num_patches, features.patch_dim), np.float16),
            patch_scale=no_scale(0),
        )


def no_scale(rows: int) -> np.ndarray:
    """The patch_scale of features that have none."""
    return np.zeros((rows, 0), np.float16)


#: Tables that this process was given, by the path of their shard: the trials of a sweep share them.
_PRELOADED: dict[str, pa.Table] = {}


def preload(tables: Mapping[str, pa.Table]) -> None:
    """Let read_shard answer from these tables, by the path of their shard, as long as this process lives."""
    _PRELOADED.update(tables)


def read_shard(store: Store, key: str, columns: Sequence[str]) -> pa.Table:
    """Some columns of one shard. Raises InputError naming the shard when it cannot be read."""
    if (preloaded := _PRELOADED.get(store.path(key))) is not None:
        return preloaded.select(list(columns))
    with _opened(store, key) as (_, parquet):
        return parquet.read(columns=list(columns))


def read_rows(store: Store, key: str, rows: np.ndarray | None, features: FeatureShape) -> Rows:
    """The given rows (ascending row numbers; None = all) of one shard, decoded. Raises as read_shard does."""
    if store.path(key) in _PRELOADED:
        table = read_shard(store, key, COLUMNS)
        matrices = [_matrix(table, name) for name in MATRICES]
    else:
        with _opened(store, key) as (file, parquet):
            plain = plain_matrices(file.read_at, parquet, MATRICES, whole=not isinstance(file, pa.OSFile))
            table = parquet.read(columns=list(COLUMNS if plain is None else SMALL))
            matrices = plain or [_matrix(table, name) for name in MATRICES]
    global_feature, patch_features = matrices
    decoded = Rows(
        sample_ids=np.array(table["sample_id"].to_pylist(), dtype=object),
        captions=np.array(table["caption"].to_pylist(), dtype=object),
        clip_score=table["clip_score"].to_numpy(),
        global_feature=global_feature,
        patch_features=patch_features.reshape(-1, features.num_patches, features.patch_dim),  # (n, N, D_v)
        patch_scale=no_scale(len(global_feature)),
    )
    return decoded if rows is None else decoded.select(rows)


def _matrix(table: pa.Table, name: str) -> np.ndarray:
    """(n, length) of a column of fixed-size lists. Raises ArrowInvalid where values are missing."""
    values = pa.concat_arrays(table[name].chunks) if table[name].num_chunks != 1 else table[name].chunk(0)
    if values.null_count or values.flatten().null_count:
        raise pa.ArrowInvalid(f"{name} lacks values")
    return values.flatten().to_numpy(zero_copy_only=True).reshape(table.num_rows, -1)


@contextmanager
def _opened(store: Store, key: str) -> Iterator[tuple[pa.NativeFile, pq.ParquetFile]]:
    """One shard, open. Raises InputError naming it when it cannot be read."""
    path = store.path(key)
    try:
        # Arrow's own file reads without Python's lock; a store's does not, and with a buffer would read ahead into
        # the pictures between the columns.
        with pa.OSFile(path) if store.is_local else pa.PythonFile(store.open(key, buffered=False), "r") as file:
            yield file, pq.ParquetFile(file, pre_buffer=True)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{store.root}/{key}: cannot be read ({first_line(error)}); run jobs.verify on the dataset"
        ) from error
