"""Reading the columns of shards that training needs."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.store.store import Store
from pcm.errors import InputError, first_line
from pcm.records import FeatureShape, feature_matrix

COLUMNS = ("sample_id", "caption", "clip_score", "global_feature", "patch_features")

#: While a piece of this size is copied, the system reads the next ones from the disk; one large read waits for all.
_PIECE_BYTES = 128 << 10


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
        import torch  # seconds to import, and who reads rows as they are needs none of it

        from pcm.kernels.quantised import quantised

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
    with _readable(store, key):
        table = _read(store, key, columns)
        if missing := [name for name in columns if name not in table.column_names]:
            raise pa.ArrowInvalid(f"no column {missing[0]}")
        return table


def features_of(store: Store, key: str, table: pa.Table, name: str, *shape: int) -> np.ndarray:
    """(n, *shape) float16 of a column of one shard. Raises InputError where values are missing or more or fewer."""
    with _readable(store, key):
        matrix = feature_matrix(table[name])
        if matrix.shape[1] != math.prod(shape):
            raise pa.ArrowInvalid(f"{name}: {matrix.shape[1]} values, must be {' x '.join(map(str, shape))}")
        return matrix.reshape(-1, *shape)


def read_rows(store: Store, key: str, rows: np.ndarray | None, features: FeatureShape) -> Rows:
    """The given rows (ascending row numbers; None = all) of one shard, decoded. Raises as read_shard does."""
    table = read_shard(store, key, COLUMNS)
    decoded = Rows(
        sample_ids=np.array(table["sample_id"].to_pylist(), dtype=object),
        captions=np.array(table["caption"].to_pylist(), dtype=object),
        clip_score=table["clip_score"].to_numpy(),
        global_feature=features_of(store, key, table, "global_feature", features.embed_dim),
        patch_features=features_of(store, key, table, "patch_features", features.num_patches, features.patch_dim),
        patch_scale=no_scale(len(table)),
    )
    return decoded if rows is None else decoded.select(rows)


class _InPieces(io.FileIO):
    """A local file whose large reads are done piece by piece, each without Python's lock."""

    def read(self, size: int | None = -1) -> bytes | memoryview:  # type: ignore[override]  # Arrow takes any buffer
        if size is None or size <= _PIECE_BYTES:
            return super().read(size) or b""
        view, done = np.empty(size, np.uint8).data, 0
        while count := self.readinto(view[done : done + _PIECE_BYTES]):
            done += count
        return view[:done]


def _read(store: Store, key: str, columns: Sequence[str]) -> pa.Table:
    """Nothing is read but these columns."""
    if store.is_local:
        # In this thread, for it is no more than one copy.
        with _InPieces(store.path(key)) as file:
            return pq.ParquetFile(pa.PythonFile(file, "r")).read(columns=list(columns), use_threads=False)
    # A buffer would read ahead into the pictures between the columns; Arrow asks for neighbours in one request.
    with pa.PythonFile(store.open(key, buffered=False), "r") as file:
        return pq.ParquetFile(file, pre_buffer=True).read(columns=list(columns))


@contextmanager
def _readable(store: Store, key: str) -> Iterator[None]:
    """What goes wrong with a shard inside is an InputError that names it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{store.root}/{key}: cannot be read ({first_line(error)}); run jobs.verify on the dataset"
        ) from error
