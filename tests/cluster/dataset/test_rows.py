"""Rows of shards as training reads them."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.dataset.documents import StoredShard
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.rows import COLUMNS, Rows, _Checks, read_rows, read_shard, share_checks
from cluster.store.store import open_store
from pcm.errors import InputError
from pcm.records import FeatureShape, feature_columns, in_version, shard_schema
from tests.helpers.seaweedfs import S3Server
from tests.helpers.shards import described

_digest = hashlib.file_digest
FEATURES = FeatureShape(embed_dim=24, patch_dim=96, num_patches=5)
ROWS = 37
BITS = np.random.default_rng(0).integers(2**16, size=(ROWS, 24 + 5 * 96), dtype=np.uint16)
KEY = "part.parquet"


def shard(version: int = 3) -> pa.Table:
    values = BITS.view(np.float16)
    columns = {
        "sample_id": [f"{row:09d}-00" for row in range(ROWS)],
        "caption": [f"caption {row % 7}" for row in range(ROWS)],
        "image": [{"bytes": b"picture" * 3000, "path": f"{row}.jpg"} for row in range(ROWS)],
        "clip_score": np.arange(ROWS, dtype=np.float32),
        **feature_columns(values[:, :24], values[:, 24:].reshape(ROWS, 5, 96)),
        **{name: [1] * ROWS for name in ("width", "height", "seed", "attempts", "batch_size")},
        **{name: [""] * ROWS for name in ("status", "reason")},
    }
    return in_version(pa.table(columns, schema=shard_schema(FEATURES)), FEATURES, version)


def written(table: pa.Table, **settings) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **settings)
    return buffer.getvalue()


def bits(rows: Rows) -> np.ndarray:
    matrices = (rows.global_feature, rows.patch_features.reshape(len(rows), -1))
    return np.concatenate([matrix.view(np.uint16) for matrix in matrices], axis=1)


def read(folder: Path, data: bytes, numbers: np.ndarray | None = None, *, rows: int | None = None) -> Rows:
    (folder / KEY).write_bytes(data)
    return read_rows(open_store(folder), described(KEY, data, rows=rows), numbers, FEATURES)


@pytest.mark.parametrize("version", [2, 3])
def test_the_shards_we_write_are_read_bit_for_bit(version: int, tmp_path: Path) -> None:
    table = shard(version)
    rows = read(tmp_path, parquet_bytes(table))
    np.testing.assert_array_equal(bits(rows), BITS)
    assert rows.patch_features.shape == (ROWS, 5, 96) and rows.patch_features.flags.writeable
    for array, name in ((rows.sample_ids, "sample_id"), (rows.captions, "caption"), (rows.clip_score, "clip_score")):
        assert array.tolist() == table[name].to_pylist()
    some = np.array([0, 5, 36])
    np.testing.assert_array_equal(bits(read(tmp_path, parquet_bytes(table), some)), BITS[some])


def test_patch_features_lie_in_the_file_as_they_are() -> None:
    """Neither compressed nor in a dictionary: reading them is one copy, by Arrow or by anything else."""
    data = parquet_bytes(shard())
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    column = next(
        metadata.column(place)
        for place in range(metadata.num_columns)
        if metadata.column(place).path_in_schema == "patch_features"
    )
    assert column.compression == "UNCOMPRESSED" and not column.has_dictionary_page
    assert np.ascontiguousarray(BITS[:, 24:]).tobytes() in data


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"compression": "zstd"},
        {"compression": "none", "use_dictionary": True, "row_group_size": 10},
        {"data_page_version": "2.0", "data_page_size": 700},
    ],
)
def test_shards_that_others_have_written_are_read_too(settings: dict, version: int, tmp_path: Path) -> None:
    np.testing.assert_array_equal(bits(read(tmp_path, written(shard(version), **settings))), BITS)


def test_columns_of_later_work_are_ignored(tmp_path: Path) -> None:
    table = shard().append_column("aesthetic_score", pa.array(np.ones(ROWS, np.float32)))
    np.testing.assert_array_equal(bits(read(tmp_path, parquet_bytes(table))), BITS)


@pytest.mark.parametrize("version", [2, 3])
def test_missing_values_are_an_error_that_names_the_shard(version: int, tmp_path: Path) -> None:
    table = shard(version)
    place, kind = table.schema.get_field_index("patch_features"), table.schema.field("patch_features").type
    values = table["patch_features"].to_pylist()
    table = table.set_column(place, "patch_features", pa.array([None, *values[1:]], kind))
    with pytest.raises(InputError, match=r"part.parquet: cannot be read \(features lack values\); run jobs.verify"):
        read(tmp_path, parquet_bytes(table))


@pytest.mark.parametrize("version", [2, 3])
def test_features_of_another_shape_are_an_error_that_names_the_shard(version: int, tmp_path: Path) -> None:
    data = parquet_bytes(shard(version))
    (tmp_path / KEY).write_bytes(data)
    with pytest.raises(InputError, match=r"part.parquet: .*patch_features: 480 values, must be 6 x 96"):
        read_rows(
            open_store(tmp_path), described(KEY, data), None, FeatureShape(embed_dim=24, patch_dim=96, num_patches=6)
        )


def test_a_shard_without_a_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"part.parquet: cannot be read \(no column clip_score\)"):
        read(tmp_path, parquet_bytes(shard().drop_columns(["clip_score"])))


def test_a_shard_cut_short_is_named(tmp_path: Path) -> None:
    data = parquet_bytes(shard())
    with pytest.raises(InputError, match=r"part.parquet: cannot be read \(.+\); run jobs.verify"):
        read(tmp_path, data[: len(data) // 2], rows=ROWS)


def test_a_store_is_asked_for_the_needed_bytes_only(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    asked: list[int] = []
    fetch = s3fs.S3FileSystem._cat_file

    async def counted(self, path: str, *, start: int, end: int) -> bytes:
        asked.append(end - start)
        return await fetch(self, path, start=start, end=end)

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", counted)
    store, data = open_store(f"{s3.uri}/rows"), parquet_bytes(shard())
    store.write_bytes(KEY, data)
    stored = described(KEY, data)
    np.testing.assert_array_equal(bits(read_rows(store, stored, None, FEATURES)), BITS)
    assert sum(asked) == len(data), "once whole, for its checksum"
    asked.clear()
    np.testing.assert_array_equal(bits(read_rows(store, stored, None, FEATURES)), BITS)
    assert 0 < len(asked) <= 4
    assert BITS.nbytes < sum(asked) < BITS.nbytes + 80_000 < len(data) / 4
    assert read_shard(store, stored, COLUMNS).num_rows == ROWS


def lying(folder: Path, data: bytes) -> StoredShard:
    (folder / KEY).write_bytes(data)
    return described(KEY, data)


def edited_in_place(data: bytes) -> bytes:
    """The same length and the same rows, and Arrow reads it without complaint: one bit of one feature differs."""
    place = data.index(np.ascontiguousarray(BITS[:, 24:]).tobytes()) + 100
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


OTHER_SHARDS = {
    "other bytes": (edited_in_place, "its sha256 is .* instead of"),
    "other rows": (lambda data: parquet_bytes(shard().slice(1)), "bytes instead of"),
    "written anew by pandas": (
        lambda data: written(pa.Table.from_pandas(shard(2).drop_columns(["image"]).to_pandas())),
        "bytes instead of",
    ),
}


@pytest.mark.parametrize("case", OTHER_SHARDS)
def test_another_shard_than_the_manifests_is_noticed_when_it_is_opened(case: str, tmp_path: Path) -> None:
    change, said = OTHER_SHARDS[case]
    data = parquet_bytes(shard())
    stored = lying(tmp_path, data)
    (tmp_path / KEY).write_bytes(change(data))
    with pytest.raises(InputError, match=rf"part.parquet: not the shard that .*{said}.*; run jobs.verify"):
        read_rows(open_store(tmp_path), stored, None, FEATURES)


def test_a_shard_that_changes_after_it_was_compared_is_compared_again(tmp_path: Path) -> None:
    data = parquet_bytes(shard())
    stored, store = lying(tmp_path, data), open_store(tmp_path)
    read_rows(store, stored, None, FEATURES)
    (tmp_path / KEY).write_bytes(edited_in_place(data))
    with pytest.raises(InputError, match="its sha256 is"):
        read_rows(store, stored, None, FEATURES)


def test_other_bytes_on_an_object_store_are_noticed_too(s3: S3Server) -> None:
    data, store = parquet_bytes(shard()), open_store(f"{s3.uri}/other")
    store.write_bytes(KEY, edited_in_place(data))
    with pytest.raises(InputError, match="its sha256 is"):
        read_rows(store, described(KEY, data), None, FEATURES)
    store.write_bytes(KEY, data[:-1])
    with pytest.raises(InputError, match="bytes instead of"):
        read_shard(store, described(KEY, data), ["caption"], checksum=False)


def test_rows_that_the_manifest_does_not_know_are_noticed_without_the_checksum(tmp_path: Path) -> None:
    data = parquet_bytes(shard())
    (tmp_path / KEY).write_bytes(data)
    with pytest.raises(InputError, match="it has 37 rows instead of 36"):
        read_shard(open_store(tmp_path), described(KEY, data, rows=36), ["caption"], checksum=False)


def test_the_checksum_is_compared_once_by_all_processes_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, store = lying(tmp_path, parquet_bytes(shard())), open_store(tmp_path)
    hashed: list[object] = []
    monkeypatch.setattr("hashlib.file_digest", lambda file, name: hashed.append(file) or _digest(file, name))
    for _ in range(3):  # as three processes: each begins with nothing
        monkeypatch.setattr("cluster.dataset.rows._checks", _Checks(set(), tmp_path / "checked"))
        (tmp_path / "checked").mkdir(exist_ok=True)
        read_rows(store, stored, None, FEATURES)
        read_rows(store, stored, None, FEATURES)
    assert len(hashed) == 1
    with share_checks(tmp_path / "checked"):
        pass
    assert not (tmp_path / "checked").exists()


def test_a_caption_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    table = shard()
    place = table.schema.get_field_index("caption")
    for values in (pa.array([None, *["a"] * (ROWS - 1)], pa.string()), pa.array([1] * ROWS), _no_utf8()):
        with pytest.raises(InputError, match=r"part.parquet: cannot be read \(.*; run jobs.verify"):
            read(tmp_path, parquet_bytes(table.set_column(place, "caption", values)))


def _no_utf8() -> pa.Array:
    texts = pa.array([b"\xff\xfe"] * ROWS, pa.binary())
    return pa.Array.from_buffers(pa.string(), ROWS, texts.buffers())
