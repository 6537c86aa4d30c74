"""Features taken from Parquet pages: what Arrow reads of the same file, or nothing."""

import base64
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.dataset.feature_pages import plain_matrices
from cluster.dataset.layout import parquet_bytes
from cluster.dataset.rows import MATRICES, read_rows
from cluster.dataset.thrift_compact import Malformed, read_struct
from cluster.store.object_file import ObjectFile
from cluster.store.store import open_store
from pcm.errors import InputError
from pcm.records import FeatureShape, shard_schema
from tests.helpers.seaweedfs import S3Server

FEATURES = FeatureShape(embed_dim=24, patch_dim=96, num_patches=5)
ROWS = 37
#: Every 16-bit pattern is a value of its own kind: subnormal, infinite, NaN with a payload.
BITS = np.random.default_rng(0).integers(2**16, size=(ROWS, 24 + 5 * 96), dtype=np.uint16)
PLAIN = {"compression": "none", "use_dictionary": False}


def lists(matrix: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def shard(rows: int = ROWS) -> pa.Table:
    values = BITS[:rows].view(np.float16)
    columns = {
        "sample_id": [f"{row:09d}-00" for row in range(rows)],
        "caption": [f"caption {row % 7}" for row in range(rows)],
        "image": [{"bytes": b"picture" * 3000, "path": f"{row}.jpg"} for row in range(rows)],
        "clip_score": np.arange(rows, dtype=np.float32),
        "global_feature": lists(values[:, :24]),
        "patch_features": lists(values[:, 24:]),
        **{name: [1] * rows for name in ("width", "height", "seed", "attempts", "batch_size")},
        **{name: [""] * rows for name in ("status", "reason")},
    }
    return pa.table(columns, schema=shard_schema(FEATURES))


def written(table: pa.Table, **settings) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **settings)
    return buffer.getvalue()


def bits(matrices: list[np.ndarray] | None) -> np.ndarray | None:
    return None if matrices is None else np.concatenate([matrix.view(np.uint16) for matrix in matrices], axis=1)


def pages_of(data: bytes, *, whole: bool = False) -> np.ndarray | None:
    file = pa.BufferReader(data)
    return bits(plain_matrices(file.read_at, pq.ParquetFile(file), MATRICES, whole=whole))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data_page_version": "2.0"},
        {"row_group_size": 10},
        {"data_page_size": 700},  # pages that end within a row
        {"data_page_size": 700, "data_page_version": "2.0", "row_group_size": 15},
        {"write_page_index": True, "write_page_checksum": True, "write_statistics": True},
    ],
)
def test_plain_pages_hold_what_arrow_reads(settings: dict, whole: bool) -> None:
    np.testing.assert_array_equal(pages_of(written(shard(), **PLAIN, **settings), whole=whole), BITS)


@pytest.mark.parametrize("rows", [1, 8, ROWS])
def test_the_shards_we_write_are_plain(rows: int) -> None:
    np.testing.assert_array_equal(pages_of(parquet_bytes(shard(rows))), BITS[:rows])


def test_columns_that_cannot_hold_nulls_are_plain_too() -> None:
    kind = pa.list_(pa.field("element", pa.float16(), nullable=False), 24)
    column = lists(BITS[:, :24].view(np.float16)).cast(kind)
    for nullable in (True, False):
        schema = pa.schema([pa.field("global_feature", kind, nullable=nullable)])
        file = pa.BufferReader(written(pa.table([column], schema=schema), **PLAIN))
        found = plain_matrices(file.read_at, pq.ParquetFile(file), ["global_feature"], whole=False)
        np.testing.assert_array_equal(bits(found), BITS[:, :24])


@pytest.mark.parametrize(
    "settings",
    [
        {"compression": "zstd", "use_dictionary": False},
        {"compression": "zstd", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "none", "use_dictionary": True},
        {**PLAIN, "column_encoding": {"patch_features.list.element": "BYTE_STREAM_SPLIT"}},
    ],
)
def test_other_pages_are_left_to_arrow(settings: dict, tmp_path: Path) -> None:
    data = written(shard(), **settings)
    assert pages_of(data) is None
    (tmp_path / "part.parquet").write_bytes(data)
    rows = read_rows(open_store(tmp_path), "part.parquet", None, FEATURES)
    np.testing.assert_array_equal(bits([rows.global_feature, rows.patch_features.reshape(ROWS, -1)]), BITS)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("missing", ["value", "list"])
def test_missing_values_are_an_error_and_not_zeros(missing: str, version: str, tmp_path: Path) -> None:
    values = BITS[:, :24].view(np.float16).astype(object)
    rows = [[None if missing == "value" and row == 3 else value for value in values[row]] for row in range(ROWS)]
    column = pa.array(
        [None if missing == "list" and row == 3 else rows[row] for row in range(ROWS)],
        shard().schema.field("global_feature").type,
    )
    table = shard().set_column(shard().schema.get_field_index("global_feature"), "global_feature", column)
    data = written(table, **PLAIN, data_page_version=version)
    assert pages_of(data) is None
    (tmp_path / "part.parquet").write_bytes(data)
    with pytest.raises(InputError, match=r"part.parquet: cannot be read \(global_feature lacks values\)"):
        read_rows(open_store(tmp_path), "part.parquet", None, FEATURES)


def test_lists_of_other_lengths_are_left_to_arrow() -> None:
    """Twelve values and then 36 are as many as twice 24: only the levels tell."""
    ragged = pa.array([BITS[0, :12].view(np.float16), BITS[1, :36].view(np.float16)], pa.list_(pa.float16()))
    fixed = pa.schema([("global_feature", pa.list_(pa.float16(), 24))])
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, pa.schema([("global_feature", ragged.type)]), store_schema=False, **PLAIN) as writer:
        writer.write_table(pa.table([ragged], names=["global_feature"]))
        writer.add_key_value_metadata({"ARROW:schema": base64.b64encode(fixed.serialize().to_pybytes())})
    assert pq.ParquetFile(buffer).schema_arrow.equals(fixed)
    file = pa.BufferReader(buffer.getvalue())
    assert plain_matrices(file.read_at, pq.ParquetFile(file), ["global_feature"], whole=False) is None


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_damaged_headers_never_give_other_values(version: str) -> None:
    """Each bit of what lies between the values, in turn."""
    data = written(shard(9).select(list(MATRICES)), **PLAIN, data_page_version=version, data_page_size=300)
    parquet = pq.ParquetFile(pa.BufferReader(data))
    values = [BITS[:9, :24].tobytes(), BITS[:9, 24:].tobytes()]
    found = 0
    for column, whole in enumerate(values):
        chunk = parquet.metadata.row_group(0).column(column)
        start, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
        is_value = np.zeros(end - start, bool)
        for piece in range(0, len(whole), 16):
            place = data.index(whole[piece : piece + 16], start, end)
            is_value[place - start : place - start + 16] = True
        for place in np.flatnonzero(~is_value):
            for bit in range(8):
                damaged = bytearray(data)
                damaged[start + place] ^= 1 << bit
                read = bits(plain_matrices(pa.BufferReader(bytes(damaged)).read_at, parquet, MATRICES, whole=False))
                assert read is None or np.array_equal(read, BITS[:9])
                found += read is None
    assert found > 1000


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    data = parquet_bytes(shard())
    (tmp_path / "part.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"part.parquet: cannot be read \(.+\); run jobs.verify"):
        read_rows(open_store(tmp_path), "part.parquet", None, FEATURES)


def test_a_store_is_asked_for_the_needed_bytes_only(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = ObjectFile._next

    def counted(self, count: int) -> bytes:
        asked.append(count)
        return read(self, count)

    monkeypatch.setattr(ObjectFile, "_next", counted)
    store, data = open_store(f"{s3.uri}/pages"), parquet_bytes(shard())
    store.write_bytes("part.parquet", data)
    rows = read_rows(store, "part.parquet", None, FEATURES)
    np.testing.assert_array_equal(bits([rows.global_feature, rows.patch_features.reshape(ROWS, -1)]), BITS)
    assert 0 < len(asked) <= 4
    assert BITS.nbytes < sum(asked) < BITS.nbytes + 80_000 < len(data) / 4


@pytest.mark.parametrize(
    "data", [b"", b"\x15", b"\x15\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x1c" * 40, b"\x1b"]
)
def test_what_is_no_struct_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        read_struct(memoryview(data), 0)
