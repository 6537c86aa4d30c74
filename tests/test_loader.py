"""The order and completeness of training batches."""

from pathlib import Path

import numpy as np
import pytest
from tiny_dataset import write_dataset

from cluster.dataset import VOCABULARY_KEY, load_manifest
from cluster.loader import Selection, ShardLoader, read_shard, split_holdout
from cluster.storage import open_store
from pcm.errors import InputError
from pcm.vocabulary import Vocabulary

ROWS = 53


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("loader") / "data", tiny_clip, rows=ROWS, shard_size=10)


def everything(dataset: Path) -> Selection:
    shards = load_manifest(open_store(dataset)).shards
    return Selection(tuple(shard["key"] for shard in shards), tuple(np.arange(shard["rows"]) for shard in shards))


def make_loader(dataset: Path, selection: Selection | None = None, **settings) -> ShardLoader:
    store = open_store(dataset)
    defaults = {"batch_size": 8, "max_length": 12, "window_shards": 2, "seed": 7}
    return ShardLoader(
        store,
        everything(dataset) if selection is None else selection,
        features=load_manifest(store).features,
        vocabulary=Vocabulary.load(dataset / VOCABULARY_KEY),
        **{**defaults, **settings},
    )


def global_batches(dataset: Path, num_workers: int, epoch: int = 0, **settings) -> list[list[str]]:
    """Sample ids of the global batches, put together from the batches of all ranks."""
    ranks = [
        list(make_loader(dataset, rank=rank, num_workers=num_workers, **settings).epoch(epoch))
        for rank in range(num_workers)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "ranks take different numbers of steps"
    return [[sample_id for part in parts for sample_id in part.sample_ids] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_workers(dataset: Path, num_workers: int) -> None:
    assert global_batches(dataset, num_workers) == global_batches(dataset, 1)


def test_every_row_comes_exactly_once_an_epoch(dataset: Path) -> None:
    batches = global_batches(dataset, 2)
    ids = [sample_id for batch in batches for sample_id in batch if sample_id]
    assert sorted(ids) == [f"{index:09d}-00" for index in range(ROWS)]
    assert len(batches) == make_loader(dataset).steps_per_epoch == -(-ROWS // 8)


def test_order_differs_by_epoch_and_by_seed_and_repeats(dataset: Path) -> None:
    first = global_batches(dataset, 1, epoch=0)
    assert first == global_batches(dataset, 1, epoch=0)
    assert first != global_batches(dataset, 1, epoch=1)
    assert first != global_batches(dataset, 1, epoch=0, seed=8)


def test_rows_of_different_shards_mix_inside_a_window(dataset: Path) -> None:
    batches = global_batches(dataset, 1, window_shards=6)
    shards_in_first = {int(sample_id[:9]) // 10 for sample_id in batches[0]}
    assert len(shards_in_first) > 2


@pytest.mark.parametrize("start_step", [1, 3, 6])
def test_an_epoch_can_be_entered_at_any_step(dataset: Path, start_step: int) -> None:
    loader = make_loader(dataset)
    whole = [batch.sample_ids for batch in loader.epoch(3)]
    rest = list(loader.epoch(3, start_step=start_step))
    assert [batch.sample_ids for batch in rest] == whole[start_step:]
    assert [batch.step for batch in rest] == list(range(start_step, len(whole)))


def test_cached_and_uncached_batches_are_equal(dataset: Path) -> None:
    cached, uncached = make_loader(dataset), make_loader(dataset, cache_bytes=0)
    for _ in range(2):  # the second epoch comes out of the cache
        for a, b in zip(cached.epoch(1), uncached.epoch(1), strict=True):
            assert a.sample_ids == b.sample_ids
            np.testing.assert_array_equal(a.patch_features, b.patch_features)
            np.testing.assert_array_equal(a.target_ids, b.target_ids)


def test_batches_hold_the_stored_values(dataset: Path) -> None:
    loader = make_loader(dataset)
    table = read_shard(open_store(dataset), "shards/part-000001.parquet", ["sample_id", "patch_features", "caption"])
    vocabulary = Vocabulary.load(dataset / VOCABULARY_KEY)
    stored = {row["sample_id"]: row for row in table.to_pylist()}
    seen = 0
    for batch in loader.epoch(0):
        for position, sample_id in enumerate(batch.sample_ids):
            if sample_id in stored:
                seen += 1
                expected = np.array(stored[sample_id]["patch_features"], np.float16)
                np.testing.assert_array_equal(batch.patch_features[position].reshape(-1), expected)
                token_ids, target_ids = vocabulary.encode(stored[sample_id]["caption"], 12)
                np.testing.assert_array_equal(batch.token_ids[position], token_ids)
                np.testing.assert_array_equal(batch.target_ids[position], target_ids)
        assert batch.patch_features.dtype == np.float16
    assert seen == len(stored)


def test_padding_rows_of_the_last_batch_have_no_targets(dataset: Path) -> None:
    *_, last = make_loader(dataset, batch_size=16, rank=1, num_workers=2).epoch(0)
    # 53 rows in batches of 16: the last one holds 5, all of them on rank 0.
    assert last.sample_ids == ("",) * 8
    assert (last.target_ids == -1).all() and (last.clip_score == 0).all()
    assert last.patch_features.shape == (8, 16, 64) and np.isfinite(last.patch_features).all()


def test_a_dataset_smaller_than_a_batch_gives_one_batch(dataset: Path) -> None:
    few = Selection(("shards/part-000000.parquet",), (np.array([1, 4]),))
    (batch,) = make_loader(dataset, few).epoch(0)
    assert sorted(batch.sample_ids) == [""] * 6 + ["000000001-00", "000000004-00"]


def test_trimming_cuts_all_ranks_to_the_longest_caption_of_the_global_batch(dataset: Path) -> None:
    parts = [list(make_loader(dataset, trim=True, rank=rank, num_workers=4).epoch(0)) for rank in range(4)]
    for step in zip(*parts, strict=True):
        lengths = {batch.target_ids.shape[1] for batch in step}
        assert len(lengths) == 1
        longest = max(int((batch.target_ids >= 0).sum(axis=1).max()) for batch in step)
        assert lengths == {longest}


def test_held_out_captions_are_never_trained_on(dataset: Path) -> None:
    store = open_store(dataset)
    keys = everything(dataset).keys
    training, held_out = split_holdout(store, keys, fraction=0.3, limit=100, seed=1)
    assert len(training) + len(held_out) == ROWS and len(held_out) > 3

    def captions(selection: Selection) -> set[str]:
        return {
            read_shard(store, key, ["caption"])["caption"][int(row)].as_py()
            for key, rows in zip(selection.keys, selection.rows, strict=True)
            for row in rows
        }

    assert not captions(training) & captions(held_out)
    everyone = captions(everything(dataset))
    assert len(everyone) < ROWS, "the fixture has no duplicate captions, so it proves nothing"


def test_hold_out_respects_its_limit_and_seed(dataset: Path) -> None:
    store, keys = open_store(dataset), everything(dataset).keys
    _, few = split_holdout(store, keys, fraction=0.5, limit=3, seed=1)
    assert len(few) <= 12
    choices = [split_holdout(store, keys, fraction=0.3, limit=100, seed=seed)[1] for seed in (1, 2)]
    assert [rows.tolist() for rows in choices[0].rows] != [rows.tolist() for rows in choices[1].rows]


def test_uneven_division_among_workers_is_refused(dataset: Path) -> None:
    with pytest.raises(InputError, match="batch size 8: cannot be divided evenly among 3 workers"):
        make_loader(dataset, num_workers=3)


def test_a_broken_shard_is_named(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/part-000000.parquet").write_bytes(b"PAR1 but not really PAR1")
    (tmp_path / VOCABULARY_KEY).write_bytes((dataset / VOCABULARY_KEY).read_bytes())
    (tmp_path / "dataset.json").write_bytes((dataset / "dataset.json").read_bytes())
    loader = make_loader(tmp_path, Selection(("shards/part-000000.parquet",), (np.arange(3),)))
    with pytest.raises(InputError, match=r"shards/part-000000\.parquet: cannot be read"):
        list(loader.epoch(0))


def test_leaving_an_epoch_early_ends_its_thread(dataset: Path) -> None:
    import threading
    import time

    batches = make_loader(dataset, prefetch=1).epoch(0)
    next(batches)
    batches.close()
    for _ in range(50):
        if not any(thread.name == "shard-loader" for thread in threading.enumerate()):
            return
        time.sleep(0.1)
    pytest.fail("the loader's thread is still running")
