"""What one picture, or too little memory, does to CLIP is done to no other picture."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cluster.dataset.documents import load_plan
from cluster.dataset.keys import shard_key
from cluster.dataset.rows import read_shard
from cluster.generation.pinning import clip_spec
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.shard_row import ShardRow
from cluster.generation.stages.write import WriteShard
from cluster.store.store import Store
from pcm.clip.encoder import ClipEncoder, ImageFeatures
from pcm.errors import InputError
from pcm.records import SCHEMA_VERSION
from pcm.spec import ClipSpec, DatasetSpec
from tests.helpers.shards import as_it_lies
from tests.helpers.tiny_generation import CAPTIONS, plan_dataset, tiny_spec, write_corpus
from tests.helpers.tiny_models import save_resnet_clip


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


class OverflowingEncoder(ClipEncoder):
    """Its second picture has a token that float16 does not hold, its fourth a feature that is no number."""

    def encode_images(self, images: list[Image.Image]) -> ImageFeatures:
        encoded = super().encode_images(images)
        encoded.patch_features[1, 0, 0] = 1e5
        if len(images) > 3:
            encoded.global_feature[3, 0] = np.nan
        return encoded


class FeaturiseOverflowing(FeaturiseShard):
    @staticmethod
    def load(spec: ClipSpec) -> ClipEncoder:
        return OverflowingEncoder(spec.model, batch_size=spec.batch_size)


@pytest.fixture(scope="module")
def drawn(
    tiny_t2i: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, DatasetSpec, pa.Table]:
    """Six pictures on their way from the first stage to the second."""
    folder = tmp_path_factory.mktemp("drawn")
    spec = tiny_spec(tiny_t2i, tiny_clip, num_inference_steps=1)
    store, plan = plan_dataset(folder / "data", write_corpus(folder, CAPTIONS[:6]), spec, shard_size=6)
    return store, plan.spec, DrawShard(store, plan.spec)(pa.table({"shard": [0], "part": [plan.part_key(0)]}))


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
    stats = json.loads(WriteShard(store, SCHEMA_VERSION, again=[0])(featurised.to_block())["stats"][0].as_py())
    assert (stats["successes"], stats["quarantined_by_reason"]) == (5, {"clip_error": 1})


def test_a_shard_of_more_pictures_than_it_can_hold_is_one_line_before_it_is_scored(
    drawn: tuple[Store, DatasetSpec, pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec, block = drawn
    plan = load_plan(store)
    assert plan is not None
    monkeypatch.setattr("cluster.generation.stages.shard_row.MAX_SHARD_BYTES", 1000)
    said = r"shard 0: its pictures have [\d,]+ bytes, at most 1,000 fit; give a smaller --shard-size and another --out"
    with pytest.raises(InputError, match=said):
        DrawShard(store, spec)(pa.table({"shard": [0], "part": [plan.part_key(0)]}))
    with pytest.raises(InputError, match=said):
        WriteShard(store, SCHEMA_VERSION)(block)


def test_a_picture_whose_features_are_not_finite_is_quarantined_alone(
    drawn: tuple[Store, DatasetSpec, pa.Table],
) -> None:
    store, spec, block = drawn
    healthy = ShardRow.from_block(FeaturiseShard(spec.clip)(block)).samples.to_pylist()
    featurised = ShardRow.from_block(FeaturiseOverflowing(spec.clip)(block))
    for index, (one, two) in enumerate(zip(healthy, featurised.samples.to_pylist(), strict=True)):
        if index in (1, 3):
            assert (two["image"], two["reason"], two["clip_score"]) == (b"", "clip_error", 0)
        else:
            assert one == two
    said = "clip_error: a feature is not finite as float16"
    assert featurised.stats["errors"] == [{"sample_id": f"00000000{k}-00", "error": said} for k in (1, 3)]
    stats = json.loads(WriteShard(store, SCHEMA_VERSION, again=[0])(featurised.to_block())["stats"][0].as_py())
    assert (stats["successes"], stats["quarantined_by_reason"]) == (4, {"clip_error": 2})


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


def test_a_clip_without_patches_gives_scores_and_global_features(
    drawn: tuple[Store, DatasetSpec, pa.Table], tmp_path: Path
) -> None:
    """A ResNet has no tokens: the column of patches holds one zero a row, and there is no head for PCM-Net."""
    store, _, block = drawn
    clip = save_resnet_clip(tmp_path / "resnet")
    stage = FeaturiseShard(clip_spec(str(clip), device="cpu", dtype="float32", batch_size=4))
    assert (stage.features.embed_dim, stage.features.has_patches, stage._encoder.head()) == (32, False, {})
    featurised = ShardRow.from_block(stage(block))
    for sample in featurised.samples.to_pylist():
        assert -1 <= sample["clip_score"] <= 1 and sample["clip_score"]
        assert np.linalg.norm(np.array(sample["global_feature"], np.float32)) == pytest.approx(1, abs=1e-3)
        assert not any(sample["patch_features"]), "bytes of one zero"
    stats = json.loads(WriteShard(store, SCHEMA_VERSION, again=[0])(featurised.to_block())["stats"][0].as_py())
    assert stats["successes"] == 6
    assert read_shard(store, as_it_lies(store, shard_key(0)), ["global_feature", "patch_features"]).num_rows == 6
