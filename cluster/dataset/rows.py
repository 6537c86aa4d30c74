"""Reading the columns of shards that training needs, of the very shards that the dataset speaks of.

What lies on the store must be what was stored: its size and its rows are compared with the manifest's each time, its
sha256 once a process - once a node where the processes of a run share what they found (`share_checks`) - and again
when the object changes. That reads the shard whole, its pictures too: a local file goes from the disk to the cache of
the system, where its columns are read then, and of a remote object the columns are taken from these bytes.

A shard of a view (cluster.dataset.view) is read like any other: its captions and scores are its own, all else comes
from the shards that hold its pictures, which are compared in the same way.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cluster.dataset.documents import UPGRADED_FROM, StoredShard
from cluster.dataset.keys import shard_number, stats_key
from cluster.dataset.view_part import OWN_COLUMNS, PictureShard, ViewPart
from cluster.store.object_file import ObjectFile
from cluster.store.store import Store, open_store
from cluster.store.temporary import delete_leftovers, in_use
from pcm.errors import InputError, first_line
from pcm.records import MAX_SHARD_BYTES, VIEW_SCHEMA, FeatureShape, feature_column, feature_matrix

COLUMNS = ("sample_id", "caption", "clip_score", "global_feature", "patch_features")
_FEATURES = ("global_feature", "patch_features")

#: Of the columns those of text, which every row has.
_TEXTS = frozenset({"sample_id", "caption"})

#: While a piece of this size is copied, the system reads the next ones from the disk; one large read waits for all.
_PIECE_BYTES = 128 << 10


_OF_ROW = ("sample_ids", "captions", "clip_score")
_OF_PICTURE = ("global_feature", "patch_features", "patch_scale")


@dataclass(frozen=True)
class Rows:
    """Decoded rows of a dataset. Features stay float16 until they are on the training device.

    The three arrays of features have a line for each row, but where feature_rows says otherwise: read_rows does so only
    for `in_place`.
    """

    sample_ids: np.ndarray  # (n,) of str
    captions: np.ndarray  # (n,) of str
    clip_score: np.ndarray  # (n,) float32, raw cosine
    global_feature: np.ndarray  # (n, D) float16
    patch_features: np.ndarray  # (n, N, D_v) float16, or int8: see pcm.kernels.quantised
    patch_scale: np.ndarray  # (n, D_v) float16 beside int8, (n, 0) beside float16
    feature_rows: np.ndarray | None = None  # (n,) the line that a row's features are in; None: its own

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take(self, indices: np.ndarray) -> "Rows":
        lines = self.feature_lines(indices)
        own = {name: getattr(self, name)[indices] for name in _OF_ROW}
        return Rows(**own, **{name: getattr(self, name)[lines] for name in _OF_PICTURE})

    def feature_lines(self, indices: np.ndarray) -> np.ndarray:
        """Where the features of these rows are in their arrays."""
        return indices if self.feature_rows is None else self.feature_rows[indices]

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
        return Rows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _OF_ROW + _OF_PICTURE})

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


def not_finite(
    global_feature: np.ndarray, patch_features: np.ndarray, patch_scale: np.ndarray, clip_score: np.ndarray
) -> np.ndarray:
    """(n,) of bool: which rows have a NaN or an infinity in their features or score. Arrays as in `Rows`."""
    finite = np.isfinite(clip_score)
    for values in (global_feature, patch_features, patch_scale):
        finite &= np.isfinite(values).reshape(len(values), -1).all(axis=1)
    return ~finite


def not_finite_error(damaged: Sequence[tuple[str, str]]) -> InputError:
    """For rows with values that are not finite. `damaged`: (shard, sample id) of each, at least one."""
    (shard, sample_id), *others = damaged
    more = f", and {len(others)} rows more" if others else ""
    return InputError(
        f"{shard}: the features or the score of sample {sample_id} are not finite{more}; run jobs.verify on the dataset"
    )


def no_scale(rows: int) -> np.ndarray:
    """The patch_scale of features that have none."""
    return np.zeros((rows, 0), np.float16)


#: Tables that this process was given, by the path of their shard: the trials of a sweep share them.
_PRELOADED: dict[str, pa.Table] = {}


def preload(tables: Mapping[str, pa.Table]) -> None:
    """Let read_shard answer from these tables, by the path of their shard, as long as this process lives."""
    _PRELOADED.update(tables)


@dataclass
class _Checks:
    """Which objects have been compared with their checksum, in this process and, by `folder`, on this node."""

    seen: set[str]
    folder: Path | None = None

    def due(self, mark: str) -> bool:
        return mark not in self.seen and not (self.folder and (self.folder / mark).exists())

    def done(self, mark: str) -> None:
        self.seen.add(mark)
        if self.folder:
            with contextlib.suppress(OSError):  # then another process of the node compares it, too
                (self.folder / mark).touch()


_checks = _Checks(set())


@contextmanager
def share_checks(folder: Path) -> Iterator[None]:
    """Share with the node's processes that name the same folder which checksums were compared.

    The first that leaves deletes the folder; the others go by what they know.
    """
    delete_leftovers()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    _checks.folder = folder
    try:
        with in_use(folder):
            yield
    finally:
        _checks.folder = None
        shutil.rmtree(folder, ignore_errors=True)


def read_shard(store: Store, shard: StoredShard, columns: Sequence[str], *, checksum: bool = True) -> pa.Table:
    """Some columns of one shard.

    Without `checksum`, for a reader of a few small columns of every shard, only its size and its rows are compared.
    Raises InputError naming the shard when it cannot be read or is not the one that the dataset speaks of.
    """
    preloaded = _PRELOADED.get(store.path(shard.key))
    if preloaded is not None and set(columns) <= set(preloaded.column_names):
        return preloaded.select(list(columns))
    if shard.pictures:
        return _read_view(store, shard, columns, checksum=checksum)
    with _readable(store, shard):
        try:
            table = _read(store, shard, columns, checksum=checksum)
        except _OtherShard:
            if (upgraded := _upgraded(store, shard)) is None:
                raise
            table = _read(store, upgraded, columns, checksum=checksum)
        if missing := [name for name in columns if name not in table.column_names]:
            raise pa.ArrowInvalid(f"no column {missing[0]}")
        for name in _TEXTS & set(columns):
            if (kind := table[name].type) != pa.string() or table[name].null_count:
                raise pa.ArrowInvalid(f"{name}: {table[name].null_count} of {len(table)} are missing, type {kind}")
            table[name].validate(full=True)  # it is UTF-8
        return table


def features_of(store: Store, shard: StoredShard, table: pa.Table, name: str, *shape: int) -> np.ndarray:
    """(n, *shape) float16 of a column of one shard. Raises InputError where values are missing or more or fewer."""
    with _readable(store, shard):
        matrix = feature_matrix(table[name])
        if matrix.shape[1] != math.prod(shape):
            raise pa.ArrowInvalid(f"{name}: {matrix.shape[1]} values, must be {' x '.join(map(str, shape))}")
        return matrix.reshape(-1, *shape)


def scores_of(store: Store, shard: StoredShard, table: pa.Table) -> np.ndarray:
    """(n,) float32 of a shard's clip_score. Raises InputError where values are missing."""
    with _readable(store, shard):
        if (kind := table["clip_score"].type) != pa.float32() or table["clip_score"].null_count:
            raise pa.ArrowInvalid(f"clip_score: {table['clip_score'].null_count} of {len(table)} missing, type {kind}")
        return table["clip_score"].to_numpy()


def read_rows(
    store: Store, shard: StoredShard, rows: np.ndarray | None, features: FeatureShape, *, in_place: bool = False
) -> Rows:
    """The given rows (ascending row numbers; None = all) of one shard, decoded. Raises as read_shard does.

    With `in_place` the features of a view's rows may stay where their shard was read to, told by Rows.feature_rows: a
    reader that copies them to a batch saves a copy.
    """
    if shard.pictures and store.path(shard.key) not in _PRELOADED:
        return _read_view_rows(store, shard, rows, features, in_place=in_place)
    table = read_shard(store, shard, COLUMNS)
    decoded = Rows(
        sample_ids=np.array(table["sample_id"].to_pylist(), dtype=object),
        captions=np.array(table["caption"].to_pylist(), dtype=object),
        clip_score=scores_of(store, shard, table),
        global_feature=features_of(store, shard, table, "global_feature", features.embed_dim),
        patch_features=features_of(store, shard, table, "patch_features", features.num_patches, features.patch_dim),
        patch_scale=no_scale(len(table)),
    )
    return decoded if rows is None else decoded.select(rows)


def read_view_part(store: Store, shard: StoredShard, columns: Sequence[str] = VIEW_SCHEMA.names) -> ViewPart:
    """The rows of a view's shard as they lie there. Raises InputError as read_shard does."""
    with _readable(store, shard):
        data = store.read_bytes(shard.key)  # small, so at once
        if len(data) != shard.bytes:
            raise _OtherShard(f"it has {len(data)} bytes instead of {shard.bytes}")
        if (found := hashlib.sha256(data).hexdigest()) != shard.sha256:
            raise _OtherShard(f"its sha256 is {found[:16]}... instead of {shard.sha256[:16]}...")
        table = _columns(pq.ParquetFile(pa.BufferReader(data)), shard, columns, use_threads=False)
        for name in _TEXTS & set(columns):
            table[name].validate(full=True)
        return ViewPart.of(table, datasets=len(shard.pictures))


#: Of a view's own columns, what decoding rows takes.
_TRAINED = ("sample_id", "caption", "clip_score", "shard", "row")


def read_weights(store: Store, shard: StoredShard) -> np.ndarray:
    """(rows,) how often each row of a shard comes in an epoch. Raises InputError as read_shard does."""
    if shard.weighted_rows is None:
        return np.ones(shard.rows, np.int64)
    return read_shard(store, shard, ["weight"])["weight"].to_numpy().astype(np.int64)


def _read_view(store: Store, shard: StoredShard, columns: Sequence[str], *, checksum: bool) -> pa.Table:
    return part_columns(store, read_view_part(store, shard), shard.pictures, columns, checksum=checksum)


def part_columns(
    view: Store, part: ViewPart, pictures: Sequence[str], columns: Sequence[str], *, checksum: bool = True
) -> pa.Table:
    """Columns of a view's rows, from the rows themselves and from the shards of `pictures`, the datasets that hold the
    pictures; features as version 3 has them. Raises InputError as read_shard does."""
    found: dict[str, pa.ChunkedArray] = {name: part.rows[name] for name in columns if name in OWN_COLUMNS}
    others = [name for name in columns if name not in found]
    if others:
        parts, places = [], []
        for each, numbers, among in part.groups():
            with _pictures_of(view):
                source = open_store(pictures[each.pictures])
                table = read_shard(source, each.stored, others, checksum=checksum)
                parts.append(table.combine_chunks().take(numbers))
            places.append(among)
        back = np.argsort(np.concatenate(places)) if places else np.zeros(0, np.int64)
        for name in others:
            chunks = [table[name] for table in parts]
            if name == "image":
                _check_picture_bytes(view, chunks)
            if name in _FEATURES:  # of any version, all of the newest now
                found[name] = pa.chunked_array(
                    [feature_column(name, np.concatenate([feature_matrix(chunk) for chunk in chunks])[back])]
                )
            else:
                found[name] = pa.chunked_array([each for chunk in chunks for each in chunk.chunks]).take(back)
    return pa.table({name: found[name] for name in columns})


def _check_picture_bytes(view: Store, images: Sequence[pa.ChunkedArray]) -> None:
    lengths = (pc.binary_length(pc.struct_field(each, "bytes")).cast(pa.int64()) for each in images)
    num_bytes = sum(pc.sum(each).as_py() or 0 for each in lengths)
    if num_bytes > MAX_SHARD_BYTES:
        raise InputError(
            f"{view.root}: the pictures of one of its shards have {num_bytes:,} bytes, at most {MAX_SHARD_BYTES:,} can "
            "be read together; derive it from each of its sources alone, or from datasets with smaller shards"
        )


def _read_view_rows(
    store: Store, shard: StoredShard, rows: np.ndarray | None, features: FeatureShape, *, in_place: bool
) -> Rows:
    """Features are copied at most once, from the source's column to their place."""
    part = read_view_part(store, shard, _TRAINED)
    numbers = np.arange(len(part)) if rows is None else rows
    own = part.rows if len(numbers) == len(part) else part.rows.take(numbers)
    told: dict[str, np.ndarray] = {
        "sample_ids": np.array(own["sample_id"].to_pylist(), dtype=object),
        "captions": np.array(own["caption"].to_pylist(), dtype=object),
        "clip_score": scores_of(store, shard, own),
    }
    groups = list(part.groups(numbers))
    if in_place and len(groups) == 1 and _KEPT_SHARE * groups[0][0].stored.rows <= len(numbers):
        image, patches = _features(store, shard, groups[0][0], features)
        return Rows(**told, global_feature=image, patch_features=patches, patch_scale=no_scale(len(image)),
                    feature_rows=groups[0][1])  # fmt: skip
    image = np.empty((len(numbers), features.embed_dim), np.float16)
    patches = np.empty((len(numbers), features.num_patches, features.patch_dim), np.float16)
    for pictures, in_source, places in groups:
        for found, array in zip(_features(store, shard, pictures, features), (image, patches), strict=True):
            if len(groups) == 1:  # then they are all, in order
                np.take(found, in_source, axis=0, out=array, mode="clip")
            else:
                array[places] = found[in_source]
    return Rows(**told, global_feature=image, patch_features=patches, patch_scale=no_scale(len(numbers)))


#: A view's rows may keep the features of a whole shard in memory where they use so much of it.
_KEPT_SHARE = 0.5


def _features(
    view: Store, shard: StoredShard, pictures: PictureShard, features: FeatureShape
) -> tuple[np.ndarray, np.ndarray]:
    """(m, D) and (m, N, D_v) of a whole shard that holds pictures of a view's shard."""
    with _pictures_of(view):
        source = open_store(shard.pictures[pictures.pictures])
        table = read_shard(source, pictures.stored, _FEATURES)
        sizes = (features.embed_dim,), (features.num_patches, features.patch_dim)
        image, patches = (
            features_of(source, pictures.stored, table, name, *size)
            for name, size in zip(_FEATURES, sizes, strict=True)
        )
    return image, patches


@contextmanager
def _pictures_of(view: Store) -> Iterator[None]:
    """An error about a shard that a view points at says that a view does."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{view.root}: a view, whose pictures are there: {error}") from error


class _InPieces(io.FileIO):
    """A local file whose large reads are done piece by piece, each without Python's lock."""

    def read(self, size: int | None = -1) -> bytes | memoryview:  # type: ignore[override]  # Arrow takes any buffer
        if size is None or size <= _PIECE_BYTES:
            return super().read(size) or b""
        view, done = np.empty(size, np.uint8).data, 0
        while count := self.readinto(view[done : done + _PIECE_BYTES]):
            done += count
        return view[:done]


def _read(store: Store, shard: StoredShard, columns: Sequence[str], *, checksum: bool) -> pa.Table:
    """Nothing is read but these columns, unless the checksum has still to be compared."""
    if store.is_local:
        # In this thread, for it is no more than one copy.
        with _InPieces(store.path(shard.key)) as file:
            _compare_size(file, shard)
            mark = _mark(store, shard, file)
            if checksum and _checks.due(mark):
                _compare_sha256(hashlib.file_digest(file, "sha256").hexdigest(), shard, mark)
            return _columns(pq.ParquetFile(pa.PythonFile(file, "r")), shard, columns, use_threads=False)
    # A buffer would read ahead into the pictures between the columns; Arrow asks for neighbours in one request.
    with store.open(shard.key, buffered=False) as file:
        _compare_size(file, shard)
        mark = _mark(store, shard, file)
        source: pa.NativeFile = pa.PythonFile(file, "r")
        if checksum and _checks.due(mark):
            data = file.read()
            _compare_sha256(hashlib.sha256(data).hexdigest(), shard, mark)
            source = pa.BufferReader(data)
        return _columns(pq.ParquetFile(source, pre_buffer=True), shard, columns, use_threads=True)


def _columns(file: pq.ParquetFile, shard: StoredShard, columns: Sequence[str], *, use_threads: bool) -> pa.Table:
    if file.metadata.num_rows != shard.rows:
        raise _OtherShard(f"it has {file.metadata.num_rows} rows instead of {shard.rows}")
    return file.read(columns=list(columns), use_threads=use_threads)


class _OtherShard(Exception):
    """What lies on the store is another shard than the one that the dataset speaks of; in what they differ."""


def _upgraded(store: Store, shard: StoredShard) -> StoredShard | None:
    """The shard as `cluster.dataset.upgrade` rewrote it, where the manifest has not heard of that yet."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, LookupError, RecursionError):
        stats = json.loads(store.read_bytes(stats_key(shard_number(shard.key))))
        if stats[UPGRADED_FROM] == shard.sha256:
            return replace(shard, bytes=stats["bytes"], sha256=stats["sha256"])
    return None


def _compare_size(file: BinaryIO, shard: StoredShard) -> None:
    size = file.seek(0, os.SEEK_END)
    if size != shard.bytes:
        raise _OtherShard(f"it has {size} bytes instead of {shard.bytes}")
    file.seek(0)


def _compare_sha256(found: str, shard: StoredShard, mark: str) -> None:
    if found != shard.sha256:
        raise _OtherShard(f"its sha256 is {found[:16]}... instead of {shard.sha256[:16]}...")
    _checks.done(mark)


def _mark(store: Store, shard: StoredShard, file: BinaryIO) -> str:
    """Names an object as it lies there now, and what it has to be."""
    if isinstance(file, ObjectFile):
        version: object = file.opened
    else:
        status = os.fstat(file.fileno())
        version = (status.st_ino, status.st_size, status.st_mtime_ns)
    return hashlib.sha256(repr((store.path(shard.key), shard.sha256, version)).encode()).hexdigest()


@contextmanager
def _readable(store: Store, shard: StoredShard) -> Iterator[None]:
    """What goes wrong with a shard inside is an InputError that names it."""
    try:
        yield
    except _OtherShard as error:
        raise InputError(
            f"{store.root}/{shard.key}: not the shard that the dataset speaks of ({error}); "
            "run jobs.verify on the dataset"
        ) from None
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{store.root}/{shard.key}: cannot be read ({first_line(error)}); run jobs.verify on the dataset"
        ) from error
