"""The one record that crosses the pipeline, and its Arrow schemas: names, dtypes and units in one place.

The number of a dataset's schema is `schema_version` in its plan.json and dataset.json:

    2   patch_features is a list of N * D_v float16 of fixed size
    3   patch_features is fixed_size_binary: the same N * D_v float16 as bytes, little-endian, row-major over patches;
        the schema's metadata holds their shape under `patch_features_shape`, as the text "[N, D_v]"

All else is the same in both. New datasets are of version 3. One of version 2 is read everywhere and finished in its own
version; `jobs.verify DATASET --upgrade` rewrites it.

Later work adds optional fields and columns under the same number, and readers ignore those that they do not know; or it
raises the number, and reads the version before, too.
"""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SCHEMA_VERSION = 3
#: Versions that are read, and in which a dataset that was begun in them is finished.
READABLE_VERSIONS = (2, 3)

#: Key of a shard's schema metadata, from version 3 on: "[N, D_v]", in JSON.
PATCH_SHAPE_KEY = b"patch_features_shape"

STORED = "stored"
QUARANTINED = "quarantined"

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

#: One planned sample: what has to exist in the end, whether or not it could be made.
PLAN_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("record_index", pa.int64()),  # position of the caption in the corpus, from 0
        ("image_index", pa.int32()),  # 0 .. images_per_caption - 1
        ("corpus_id", pa.string()),  # the caption's own id in its corpus
        ("caption", pa.string()),
        ("seed", pa.int64()),
        ("reason", pa.string()),  # one of pcm.reasons.USABLE: to be generated; anything else: quarantined
    ]
)

QUARANTINE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("corpus_id", pa.string()),
        ("caption", pa.string()),
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("attempts", pa.int32()),  # images that were generated and refused
    ]
)


#: A row of a view: what it says itself, and where its picture is. The schema's metadata lists the shards that hold the
#: pictures (VIEW_SHARDS_KEY): {"pictures": place in the manifest's list, "key", "rows", "bytes", "sha256"}.
VIEW_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("caption", pa.string()),
        ("clip_score", pa.float32()),
        ("weight", pa.int32()),  # how often training takes it in an epoch
        ("seed", pa.int64()),  # of the picture
        ("corpus_id", pa.string()),  # of the picture's caption in its corpus
        ("image_sha256", pa.binary()),  # 32 bytes; empty where there is no picture
        ("shard", pa.int32()),  # place in the list of shards
        ("row", pa.int32()),  # in that shard
        ("picture_id", pa.string()),  # the sample id that the picture has there
    ]
)
VIEW_SHARDS_KEY = b"shards"

#: What the pictures of a shard may have together: the offsets of an Arrow column have 32 bits.
MAX_SHARD_BYTES = 2**31 - 1


@dataclass(frozen=True)
class FeatureShape:
    """Sizes of the frozen CLIP features: embed_dim D, patch_dim D_v, num_patches N."""

    embed_dim: int
    patch_dim: int
    num_patches: int

    @property
    def has_patches(self) -> bool:
        """Not of the null CLIP and of towers without a grid of tokens, which store one zero."""
        return self.num_patches * self.patch_dim > 1

    @property
    def bytes_per_row(self) -> int:
        return 2 * (self.embed_dim + self.num_patches * self.patch_dim)


#: Of the CLIP named "null", which computes nothing: one zero in each column. One zero stands for the patches of a tower
#: without tokens, too.
NULL_FEATURES = FeatureShape(embed_dim=1, patch_dim=1, num_patches=1)


def shard_schema(features: FeatureShape, version: int = SCHEMA_VERSION) -> pa.Schema:
    """Arrow schema of `shards/part-*.parquet`, with the metadata by which Hugging Face shows `image` as an Image.

    `clip_score` is the raw cosine; `global_feature` (D,) is L2-normalised; `patch_features` (N, D_v) are the last
    block's tokens before ln_post and projection.
    """
    values = features.num_patches * features.patch_dim
    as_bytes = version >= 3
    lists, encoded = pa.list_(pa.float16(), values), pa.binary(2 * values)
    # Where none can be missing, Arrow copies a page at once instead of row by row.
    patches = pa.field("patch_features", encoded, nullable=False) if as_bytes else pa.field("patch_features", lists)
    fields = [
        ("sample_id", pa.string()),
        ("caption", pa.string()),
        ("image", IMAGE_TYPE),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seed", pa.int64()),
        ("attempts", pa.int32()),  # seeds tried; the last of them made the picture
        ("batch_size", pa.int32()),  # pictures drawn at once: spec.batch_size, or less after running out of memory
        ("clip_score", pa.float32()),
        ("global_feature", pa.list_(pa.float16(), features.embed_dim)),
        patches,
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
    metadata = {b"huggingface": json.dumps(_huggingface_info(features, as_bytes=as_bytes)).encode()}
    return pa.schema(fields).with_metadata(metadata | (_shape_metadata(features) if as_bytes else {}))


def feature_columns(global_feature: np.ndarray, patch_features: np.ndarray) -> dict[str, pa.Array]:
    """The two columns of features by their names; (n, D) and (n, N, D_v), both float16. Nothing is copied."""
    rows, num_patches, patch_dim = patch_features.shape
    patches = patch_features.reshape(rows, num_patches * patch_dim)
    return {"global_feature": _as_lists(global_feature), "patch_features": _as_bytes(patches)}


def feature_column(name: str, matrix: np.ndarray) -> pa.Array:
    """One of the two columns of features from its (n, length) float16."""
    return _as_lists(matrix) if name == "global_feature" else _as_bytes(matrix)


def with_features(samples: pa.Table, global_feature: np.ndarray, patch_features: np.ndarray) -> pa.Table:
    """Samples with the columns of their features, and the shape in the schema's metadata, as a shard has it."""
    _, num_patches, patch_dim = patch_features.shape
    features = FeatureShape(global_feature.shape[1], patch_dim, num_patches)
    for name, column in feature_columns(global_feature, patch_features).items():
        samples = samples.append_column(name, column)
    return samples.replace_schema_metadata({**(samples.schema.metadata or {}), **_shape_metadata(features)})


def feature_shape(schema: pa.Schema) -> FeatureShape:
    """The shape of the features in a table of version 3. Raises ValueError where the schema does not tell."""
    try:
        num_patches, patch_dim = json.loads(schema.metadata[PATCH_SHAPE_KEY])
        features = FeatureShape(schema.field("global_feature").type.list_size, patch_dim, num_patches)
        if schema.field("patch_features").type == pa.binary(2 * num_patches * patch_dim):
            return features
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(f"patch_features is not of the shape that {PATCH_SHAPE_KEY.decode()} in the metadata says")


def shard_version(schema: pa.Schema) -> int:
    """The version of the schema that a shard has by the type of its patch features."""
    return 3 if pa.types.is_fixed_size_binary(schema.field("patch_features").type) else 2


def feature_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(n, length) float16 of a column of features, in any version: here, and only here, its type decides.

    Arrow copies bytes as they are and decodes lists value by value, which takes several times as long. Raises
    ArrowInvalid where values are missing or the column is of another type.
    """
    values = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_fixed_size_binary(values.type):
        length, missing = values.type.byte_width // 2, values.null_count
        buffer, start = values.buffers()[1], values.offset * length
    elif pa.types.is_fixed_size_list(values.type) and pa.types.is_float16(values.type.value_type):
        items = values.flatten()
        length, missing = values.type.list_size, values.null_count or items.null_count
        buffer, start = items.buffers()[1], items.offset
    else:
        raise pa.ArrowInvalid(f"features of type {values.type}")
    if missing:
        raise pa.ArrowInvalid("features lack values")
    flat = np.frombuffer(buffer, "<f2") if buffer else np.zeros(0, np.float16)
    return flat[start : start + len(values) * length].reshape(len(values), length)


def in_version(shard: pa.Table, features: FeatureShape, version: int) -> pa.Table:
    """A shard's rows of any version in the schema of another; nothing is copied. Columns of later work stay.

    Raises ArrowInvalid where the features are not of this shape.
    """
    schema = shard_schema(features, version)
    matrix = feature_matrix(shard["patch_features"])
    if matrix.shape[1] != features.num_patches * features.patch_dim:
        raise pa.ArrowInvalid(f"patch_features of {matrix.shape[1]} values, must be {features}")
    patches = _as_bytes(matrix) if version >= 3 else _as_lists(matrix)
    for field in schema:
        # Parquet names the items of lists in its own way: cast, so that the same rows are written as the same bytes.
        column = patches if field.name == "patch_features" else shard[field.name].cast(field.type)
        shard = shard.set_column(shard.schema.get_field_index(field.name), field, column)
    kept = {key: value for key, value in (shard.schema.metadata or {}).items() if key != PATCH_SHAPE_KEY}
    return shard.replace_schema_metadata({**kept, **schema.metadata})


def _as_bytes(matrix: np.ndarray) -> pa.Array:
    """(n, length) float16 as n binary values of 2 * length bytes."""
    rows, length = matrix.shape
    buffer = pa.py_buffer(np.ascontiguousarray(matrix, "<f2"))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(2 * length), rows, [None, buffer])


def _as_lists(matrix: np.ndarray) -> pa.Array:
    """(n, length) float16 as n lists of fixed size."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def _shape_metadata(features: FeatureShape) -> dict[bytes, bytes]:
    return {PATCH_SHAPE_KEY: json.dumps([features.num_patches, features.patch_dim]).encode()}


def _huggingface_info(features: FeatureShape, *, as_bytes: bool) -> dict:
    def value(dtype: str) -> dict:
        return {"dtype": dtype, "_type": "Value"}

    def vector(length: int) -> dict:
        return {"feature": value("float16"), "length": length, "_type": "List"}

    values = features.num_patches * features.patch_dim
    return {
        "info": {
            "features": {
                "sample_id": value("string"),
                "caption": value("string"),
                "image": {"_type": "Image"},
                "width": value("int32"),
                "height": value("int32"),
                "seed": value("int64"),
                "attempts": value("int32"),
                "batch_size": value("int32"),
                "clip_score": value("float32"),
                "global_feature": vector(features.embed_dim),
                "patch_features": value(f"fixed_size_binary[{2 * values}]") if as_bytes else vector(values),
                "status": value("string"),
                "reason": value("string"),
            }
        }
    }
