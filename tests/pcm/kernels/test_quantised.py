"""Patch features rounded to 8 bits: how far they are off, and that batches are otherwise the same."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.dataset.rows import Rows, no_scale
from cluster.store.store import open_store
from cluster.training.data.shard_cache import ShardCache
from cluster.training.data.shuffled import Part
from pcm.kernels.quantised import dequantised
from tests.cluster.training.data.test_shuffled import everything, make_loader, select
from tests.helpers.tiny_dataset import write_dataset

ARRAYS = ("patch_features", "patch_scale", "global_feature", "clip_score", "token_ids", "target_ids")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("quantised") / "data", tiny_clip, rows=37, shard_size=10)


def rows_of(patch_features: np.ndarray) -> Rows:
    count = len(patch_features)
    return Rows(
        sample_ids=np.array([str(number) for number in range(count)], dtype=object),
        captions=np.array(["a thing"] * count, dtype=object),
        clip_score=np.zeros(count, np.float32),
        global_feature=np.zeros((count, 4), np.float16),
        patch_features=patch_features,
        patch_scale=no_scale(count),
    )


def restored(rows: Rows) -> np.ndarray:
    return dequantised(torch.from_numpy(rows.patch_features), torch.from_numpy(rows.patch_scale)).numpy()


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def test_a_value_is_off_by_half_a_step_of_its_channel_at_most() -> None:
    features = normal(5, 16, 24)
    features[:, :, 3] *= 300  # as CLIP has them: one channel that dwarfs the others
    found = rows_of(features).in_8_bits()
    assert found.patch_features.dtype == np.int8 and found.patch_scale.shape == (5, 24)
    step = np.abs(features.astype(np.float32)).max(axis=1, keepdims=True) / 127
    assert (np.abs(restored(found) - features) <= 0.51 * step + 0.0005 * np.abs(features)).all()
    others = np.delete(restored(found) - features, 3, axis=2)
    assert np.sqrt((others**2).mean()) < 0.01, "the large channel took the precision of the others"


def test_a_picture_is_rounded_alike_whatever_lies_beside_it() -> None:
    features = normal(6, 9, 8)
    together = rows_of(features).in_8_bits()
    alone = rows_of(np.concatenate([features[2:3], 50 * features[:1]])).in_8_bits()
    np.testing.assert_array_equal(together.patch_features[2], alone.patch_features[0])
    np.testing.assert_array_equal(together.patch_scale[2], alone.patch_scale[0])


def test_zeros_stay_zeros_and_what_is_not_finite_does_not_become_so() -> None:
    features = normal(3, 4, 6)
    features[0] = 0.0
    features[1, 2, 5] = np.nan
    features[2, 0, 1] = np.inf
    found = restored(rows_of(features).in_8_bits())
    assert (found[0] == 0).all()
    assert not np.isfinite(found[1, :, 5]).any() and not np.isfinite(found[2, :, 1]).any()
    assert np.isfinite(np.delete(found[1], 5, axis=1)).all()


def test_rounded_rows_are_not_rounded_again_and_float16_is_passed_through() -> None:
    rows = rows_of(normal(2, 4, 6))
    once = rows.in_8_bits()
    assert once.in_8_bits() is once
    np.testing.assert_array_equal(restored(rows), rows.patch_features.astype(np.float32))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])
def test_batches_have_the_same_rows_and_the_rounded_features_in_memory_and_by_way_of_a_cache(
    dataset: Path, tmp_path: Path, cache_bytes: int
) -> None:
    store = open_store(dataset)
    chosen, _ = select(dataset, fraction=0.8)
    plain = make_loader(dataset, Part(store, chosen), cache_bytes=0)
    rounded = make_loader(dataset, Part(store, chosen), int8=True, cache_bytes=cache_bytes)
    cached = make_loader(
        dataset, Part(store, chosen, cache=ShardCache(tmp_path, int8=True)), int8=True, cache_bytes=cache_bytes
    )
    for epoch in (0, 0, 1):  # the second time out of memory and cache
        batches = zip(plain.epoch(epoch), rounded.epoch(epoch), cached.epoch(epoch), strict=True)
        for exact, batch, by_cache in batches:
            assert exact.sample_ids == batch.sample_ids == by_cache.sample_ids
            assert batch.patch_features.dtype == np.int8 and exact.patch_scale.size == 0
            for name in ARRAYS:
                np.testing.assert_array_equal(getattr(batch, name), getattr(by_cache, name))
            for name in ARRAYS[2:]:
                np.testing.assert_array_equal(getattr(exact, name), getattr(batch, name))
            values = dequantised(torch.from_numpy(batch.patch_features), torch.from_numpy(batch.patch_scale)).numpy()
            largest = np.abs(exact.patch_features).max(axis=1, keepdims=True).astype(np.float32)
            assert (np.abs(values - exact.patch_features) <= largest / 127).all()


def test_twice_as_many_rows_stay_in_memory(dataset: Path) -> None:
    features = make_loader(dataset)._shape.features
    budget = len(everything(dataset)) * features.bytes_per_row * 2 // 3
    for int8, kept in ((False, 0), (True, 4)):
        loader = make_loader(dataset, int8=int8, cache_bytes=budget)
        list(loader.epoch(0))
        assert len(loader._cache or {}) == kept
