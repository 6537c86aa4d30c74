"""Second stage: pictures to CLIP scores and features."""

import time
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cluster.stages.shard_row import ShardRow
from pcm.images import open_image
from pcm.records import FeatureShape
from pcm.spec import ClipSpec

if TYPE_CHECKING:
    from pcm.clip import ClipEncoder

NULL_FEATURES = FeatureShape(embed_dim=1, patch_dim=1, num_patches=1)


class FeaturiseShard:
    """Scorer pool: adds clip_score, global_feature and patch_features, computed from the stored image bytes."""

    def __init__(self, spec: ClipSpec) -> None:
        self._encoder = None if spec.model == "null" else _load_encoder(spec)

    @property
    def features(self) -> FeatureShape:
        return self._encoder.features if self._encoder else NULL_FEATURES

    def __call__(self, block: pa.Table) -> pa.Table:
        row = ShardRow.from_block(block)
        started = time.time()
        samples = self.featurise(row.samples)
        return ShardRow(row.shard, samples, row.stats | {"featurise_seconds": time.time() - started}).to_block()

    def featurise(self, drawn: pa.Table) -> pa.Table:
        shape = self.features
        global_feature = np.zeros((len(drawn), shape.embed_dim), np.float16)
        patch_features = np.zeros((len(drawn), shape.num_patches * shape.patch_dim), np.float16)
        clip_score = np.zeros(len(drawn), np.float32)
        has_image = [row for row, image in enumerate(drawn["image"]) if len(image.as_buffer())]
        if self._encoder and has_image:
            images = [
                open_image(drawn["image"][row].as_py(), name=drawn["sample_id"][row].as_py()) for row in has_image
            ]
            encoded = self._encoder.encode_images(images)
            texts = self._encoder.encode_texts([drawn["caption"][row].as_py() for row in has_image])  # (B, D)
            global_feature[has_image] = encoded.global_feature
            patch_features[has_image] = encoded.patch_features.reshape(len(has_image), -1)
            clip_score[has_image] = (encoded.global_feature * texts).sum(axis=1)
        columns = {
            "clip_score": pa.array(clip_score),
            "global_feature": _fixed_lists(global_feature),
            "patch_features": _fixed_lists(patch_features),
        }
        for name, column in columns.items():
            drawn = drawn.append_column(name, column)
        return drawn


def _load_encoder(spec: ClipSpec) -> "ClipEncoder":
    import torch

    from pcm.clip import ClipEncoder  # seconds to import, and null needs none of it

    if spec.device == "cpu":
        torch.set_num_threads(spec.cpu_threads)
    return ClipEncoder(spec.model, device=spec.device, dtype=spec.dtype, batch_size=spec.batch_size)


def _fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
