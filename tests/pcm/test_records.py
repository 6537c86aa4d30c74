"""Columns of features: what is written is read bit for bit, in either version, and nothing is made up."""

import numpy as np
import pyarrow as pa
import pytest

from pcm.records import (
    FeatureShape,
    feature_columns,
    feature_matrix,
    feature_shape,
    in_version,
    shard_schema,
    shard_version,
    with_features,
)

SHAPE = FeatureShape(embed_dim=24, patch_dim=96, num_patches=5)
ROWS = 7
#: Every 16-bit pattern is a value of its own kind: subnormal, infinite, NaN with a payload.
BITS = np.random.default_rng(0).integers(2**16, size=(ROWS, 24 + 5 * 96), dtype=np.uint16)
GLOBAL, PATCHES = (np.ascontiguousarray(part).view(np.float16) for part in (BITS[:, :24], BITS[:, 24:]))


def samples() -> pa.Table:
    return with_features(pa.table({"caption": [str(row) for row in range(ROWS)]}), GLOBAL, PATCHES.reshape(ROWS, 5, 96))


def shard() -> pa.Table:
    """A whole one: `samples` and a column of each other kind."""
    schema, table = shard_schema(SHAPE), samples()
    for field in schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(ROWS, field.type))
    return table.select(schema.names)


def bits(column: pa.ChunkedArray) -> np.ndarray:
    return feature_matrix(column).view(np.uint16)


def test_patch_features_are_the_bytes_that_the_contract_says() -> None:
    table = samples()
    assert table.schema.field("patch_features").type == pa.binary(5 * 96 * 2)
    assert table["patch_features"].to_pylist() == [row.astype("<f2").tobytes() for row in PATCHES]
    assert table.schema.metadata == {b"patch_features_shape": b"[5, 96]"}
    assert feature_shape(table.schema) == SHAPE
    schema = shard_schema(SHAPE)
    assert (
        schema.field("patch_features").type == pa.binary(960) and schema.metadata[b"patch_features_shape"] == b"[5, 96]"
    )


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("rows", [slice(None), slice(2, 5), slice(0, 0)])
def test_both_versions_hold_the_same_bits(version: int, rows: slice) -> None:
    table = in_version(shard(), SHAPE, version)
    assert shard_version(table.schema) == version
    part = table.slice(rows.start or 0, None if rows.stop is None else rows.stop - rows.start)
    np.testing.assert_array_equal(bits(part["patch_features"]), BITS[rows, 24:])
    np.testing.assert_array_equal(bits(part["global_feature"]), BITS[rows, :24])
    chunks = pa.concat_tables([table.slice(3), table.slice(0, 3)])
    np.testing.assert_array_equal(bits(chunks["patch_features"]), np.concatenate([BITS[3:, 24:], BITS[:3, 24:]]))


def test_there_and_back_is_the_same_table() -> None:
    schema = shard_schema(SHAPE)
    there = in_version(shard(), SHAPE, 3)
    back = in_version(in_version(there, SHAPE, 2), SHAPE, 3)
    assert back.schema.equals(there.schema, check_metadata=True) and back.schema.metadata == schema.metadata
    assert back["patch_features"].equals(there["patch_features"])
    assert b"patch_features_shape" not in in_version(there, SHAPE, 2).schema.metadata


@pytest.mark.parametrize("version", [2, 3])
def test_missing_values_are_an_error_and_not_zeros(version: int) -> None:
    column = in_version(shard(), SHAPE, version)["patch_features"]
    values = column.to_pylist()
    values[3] = None
    with pytest.raises(pa.ArrowInvalid, match="lack values"):
        feature_matrix(pa.chunked_array([pa.array(values, column.type)]))
    if version == 2:
        values[3] = [None, *values[4][1:]]
        with pytest.raises(pa.ArrowInvalid, match="lack values"):
            feature_matrix(pa.chunked_array([pa.array(values, column.type)]))


@pytest.mark.parametrize("kind", [pa.list_(pa.float16()), pa.list_(pa.float32(), 2), pa.binary(), pa.string()])
def test_features_of_another_type_are_refused(kind: pa.DataType) -> None:
    with pytest.raises(pa.ArrowInvalid, match="features of type"):
        feature_matrix(pa.chunked_array([pa.nulls(2, kind)]))


@pytest.mark.parametrize("shape", [None, b"", b"5", b"[5]", b"[96, 4]", b"[5, 96, 1]", b'["5", 96]', b"{", b"null"])
def test_a_shape_that_the_metadata_does_not_tell_is_an_error(shape: bytes | None) -> None:
    table = samples().replace_schema_metadata(None if shape is None else {b"patch_features_shape": shape})
    with pytest.raises(ValueError, match="patch_features"):
        feature_shape(table.schema)


def test_features_of_another_shape_are_not_put_into_a_version() -> None:
    with pytest.raises(pa.ArrowInvalid, match="of 480 values"):
        in_version(shard(), FeatureShape(embed_dim=24, patch_dim=96, num_patches=4), 2)


def test_no_rows_are_a_table_too() -> None:
    empty = with_features(pa.table({"caption": pa.array([], pa.string())}), GLOBAL[:0], PATCHES[:0].reshape(0, 5, 96))
    assert feature_shape(empty.schema) == SHAPE
    assert feature_matrix(empty["patch_features"]).shape == (0, 480)


def test_columns_share_the_memory_of_their_arrays() -> None:
    columns = feature_columns(GLOBAL, PATCHES.reshape(ROWS, 5, 96))
    for array, name in ((GLOBAL, "global_feature"), (PATCHES, "patch_features")):
        assert np.shares_memory(feature_matrix(pa.chunked_array([columns[name]])), array)
