"""Text-only training in the manner of CapDec: a dataset whose global features are CLIP embeddings of its captions.

Made from a dataset of pictures, so that both are trained on the same captions with the same words. Training adds the
noise (PCMNetConfig.noise_variance) that bridges CLIP's two modalities; real pictures give their own global feature.
There are no patches: train with use_patches false and top_patches 0.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pyarrow as pa

from cluster.dataset.documents import DATASET, Manifest, load_manifest, store_manifest
from cluster.dataset.environment import made_by, tell_encoder
from cluster.dataset.keys import (
    MANIFEST_KEY,
    VOCABULARIES_KEY,
    VOCABULARY_KEYS,
    shard_key,
)
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.rows import read_shard
from cluster.dataset.state import state_digest
from cluster.ingest.shards import undrawn
from cluster.store.store import Store
from pcm.clip.encoder import ClipEncoder
from pcm.generation.names import TEXT_ONLY
from pcm.records import SCHEMA_VERSION, STORED, FeatureShape, feature_columns, shard_schema

#: Settings of a captioner that sees the global feature only, and weighs every caption alike.
TEXT_ONLY_SETTINGS = {"use_patches": False, "top_patches": 0, "clip_weight": 1.0}


def text_only_dataset(source: Store, out: Store, encoder: ClipEncoder) -> Manifest:
    """Write the dataset at `out`, or find it there; `encoder` is the CLIP of `source`.

    Rows, captions, sample ids and shards are those of `source`; clip scores are 1, patch features 0, images null.
    Raises InputError when `source` is not a finished dataset.
    """
    manifest = load_manifest(source)
    digest = state_digest(source.read_bytes(MANIFEST_KEY))
    spec = replace(manifest.spec, generator=undrawn(TEXT_ONLY, revision=f"sha256:{digest}"))
    if out.exists(MANIFEST_KEY) and (found := load_manifest(out)).spec == spec:
        return found
    shards = []
    for number, stored in enumerate(manifest.stored_shards):
        table = read_shard(source, stored, ["sample_id", "caption", "seed"])
        texts = encoder.encode_texts(table["caption"].to_pylist())
        data = parquet_bytes(_rows(table, texts, manifest.features))
        out.write_bytes(shard_key(number), data)
        entry = {"key": shard_key(number), "rows": stored.rows, "quarantined": manifest.shards[number]["quarantined"]}
        shards.append({**entry, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    for key in (*VOCABULARY_KEYS, VOCABULARIES_KEY):
        if source.exists(key):
            out.write_bytes(key, source.read_bytes(key))
    tell_encoder(out, replace(spec.clip, device=encoder.device.type))
    made = replace(
        manifest,
        **made_by(out),
        spec=spec,
        clip_score_mean=1.0,
        shard_bytes=sum(shard["bytes"] for shard in shards),
        shards=tuple(shards),
        schema_version=SCHEMA_VERSION,
        kind=DATASET,
        pictures=(),
        fingerprint=None,
        lineage=None,
    )
    store_manifest(out, made)
    return made


def _rows(table: pa.Table, texts: np.ndarray, features: FeatureShape) -> pa.Table:
    """A shard of `texts` (n, D)."""
    rows = len(table)
    patches = np.zeros((rows, features.num_patches, features.patch_dim), np.float16)
    columns = {
        **{name: table[name] for name in table.column_names},
        "image": pa.nulls(rows, shard_schema(features).field("image").type),
        "clip_score": np.ones(rows, np.float32),
        **feature_columns(texts.astype(np.float16), patches),
        "status": [STORED] * rows,
        "reason": [""] * rows,
        **{name: np.zeros(rows, np.int32) for name in ("width", "height", "attempts", "batch_size")},
    }
    schema = shard_schema(features)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)
