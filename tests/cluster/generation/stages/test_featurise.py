"""What one picture, or too little memory, does to CLIP is done to no other picture."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.shard_row import ShardRow
from cluster.generation.stages.write import WriteShard
from cluster.store.store import Store
from pcm.clip.encoder import ClipEncoder, ImageFeatures
from pcm.records import SCHEMA_VERSION
from pcm.spec import ClipSpec, DatasetSpec
from tests.helpers.tiny_generation import CAPTIONS, plan_dataset, tiny_spec, write_corpus


class GreedyEncoder(ClipEncoder):
    """Has memory for two pictures at once."""

    def encode_images(self, images: list[Image.Image]) -> ImageFeatures:
        if self.batch_size > 2:
            torch.empty(1 << 50)
        return super().encode_images(images)


class FeaturiseGreedily(FeaturiseShard):
    @staticmethod
    def load(spec: ClipSpec) -> ClipEncoder:
        return GreedyEncoder(spec.model, batch_size=spec.batch_size)


@pytest.fixture(scope="module")
def drawn(
    tiny_t2i: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, DatasetSpec, pa.Table]:
    """Six pictures on their way from the first stage to the second."""
    folder = tmp_path_factory.mktemp("drawn")
    spec = tiny_spec(tiny_t2i, tiny_clip, num_inference_steps=1)
    store, plan = plan_dataset(folder / "data", write_corpus(folder, CAPTIONS[:6]), spec, shard_size=6)
    return store, plan.spec, DrawShard(store, plan.spec)(pa.table({"shard": [0]}))


def test_a_picture_on_which_clip_raises_is_quarantined_alone(drawn: tuple[Store, DatasetSpec, pa.Table]) -> None:
    store, spec, block = drawn
    row = ShardRow.from_block(block)
    images = row.samples["image"].to_pylist()
    images[2] = images[2][: len(images[2]) // 2]  # truncated
    at = row.samples.schema.get_field_index("image")
    spoilt = ShardRow(0, row.samples.set_column(at, "image", pa.array(images)), row.stats).to_block()
    stage = FeaturiseShard(spec.clip)
    healthy = ShardRow.from_block(stage(block)).samples.to_pylist()
    featurised = ShardRow.from_block(stage(spoilt))
    samples = featurised.samples.to_pylist()
    assert (samples[2]["image"], samples[2]["reason"], samples[2]["attempts"]) == (b"", "clip_error", 0)
    for index in (0, 1, 3, 4, 5):
        assert samples[index]["image"] == images[index]
        assert samples[index]["clip_score"] == pytest.approx(healthy[index]["clip_score"], abs=1e-5)
    assert featurised.stats["errors"][0]["sample_id"] == "000000002-00"
    stats = json.loads(WriteShard(store, SCHEMA_VERSION)(featurised.to_block())["stats"][0].as_py())
    assert (stats["successes"], stats["quarantined_by_reason"]) == (5, {"clip_error": 1})


def test_too_little_memory_halves_clips_batches_and_the_stats_say_so(
    drawn: tuple[Store, DatasetSpec, pa.Table], caplog: pytest.LogCaptureFixture
) -> None:
    _, spec, block = drawn
    healthy = ShardRow.from_block(FeaturiseShard(spec.clip)(block))
    featurised = ShardRow.from_block(FeaturiseGreedily(spec.clip)(block))
    assert (healthy.stats["clip_batch_size"], featurised.stats["clip_batch_size"]) == (4, 2)
    assert len([record for record in caplog.records if "CLIP takes 2 pictures" in record.message]) == 1
    for one, two in zip(healthy.samples.to_pylist(), featurised.samples.to_pylist(), strict=True):
        assert one["clip_score"] == pytest.approx(two["clip_score"], abs=1e-5) and two["reason"] == ""
