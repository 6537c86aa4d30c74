"""The one record that crosses the pipeline, and its Arrow schemas: names, dtypes and units in one place."""

import json
from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 2

STORED = "stored"
QUARANTINED = "quarantined"

#: `reason` of a stored row whose prompt is longer than the CLIP context: generated from the truncated prompt.
PROMPT_TRUNCATED = "prompt_truncated"

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
        ("reason", pa.string()),  # "" or PROMPT_TRUNCATED: to be generated; anything else: quarantined
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


#: In place of the patches of a CLIP whose tower has none: one zero a row.
NO_PATCHES = FeatureShape(embed_dim=1, patch_dim=1, num_patches=1)


def shard_schema(features: FeatureShape) -> pa.Schema:
    """Arrow schema of `shards/part-*.parquet`, with the metadata by which Hugging Face shows `image` as an Image.

    `clip_score` is the raw cosine; `global_feature` (D,) is L2-normalised; `patch_features` (N * D_v,) are the last
    block's tokens before ln_post and projection, row-major over patches.
    """
    fields = [
        ("sample_id", pa.string()),
        ("caption", pa.string()),
        ("image", IMAGE_TYPE),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("seed", pa.int64()),
        ("attempts", pa.int32()),  # seeds tried; the last, planned seed + attempts - 1, made the picture
        ("batch_size", pa.int32()),  # pictures drawn at once: spec.batch_size, or less after running out of memory
        ("clip_score", pa.float32()),
        ("global_feature", pa.list_(pa.float16(), features.embed_dim)),
        ("patch_features", pa.list_(pa.float16(), features.num_patches * features.patch_dim)),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
    return pa.schema(fields).with_metadata({"huggingface": json.dumps(_huggingface_info(features))})


def _huggingface_info(features: FeatureShape) -> dict:
    def value(dtype: str) -> dict:
        return {"dtype": dtype, "_type": "Value"}

    def vector(length: int) -> dict:
        return {"feature": value("float16"), "length": length, "_type": "List"}

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
                "patch_features": vector(features.num_patches * features.patch_dim),
                "status": value("string"),
                "reason": value("string"),
            }
        }
    }
