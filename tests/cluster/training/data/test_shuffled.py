"""The order and completeness of training batches."""

import errno
import os
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

import cluster.training.data.selection
import cluster.training.data.shuffled
from cluster.dataset.documents import StoredShard, load_manifest
from cluster.dataset.keys import VOCABULARY_KEY
from cluster.dataset.rows import read_shard
from cluster.store.store import open_store
from cluster.training.data import shuffled
from cluster.training.data.batches import BatchShape, Decoded, OpenBatch
from cluster.training.data.selection import Ranks, RowFilter, Selection, all_rows, holdout_share, select_rows
from cluster.training.data.shard_cache import ShardCache
from cluster.training.data.shuffled import Part, ShardLoader, _RoundTrip
from cluster.training.loop import GPU_CHECK_STEPS, _check_steps
from cluster.training.validation import held_out_share
from pcm.errors import InputError
from pcm.records import FeatureShape
from pcm.text.vocabulary import Vocabulary
from tests.helpers.shards import described
from tests.helpers.tiny_dataset import write_dataset

ROWS = 53


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("loader") / "data", tiny_clip, rows=ROWS, shard_size=10)


def everything(dataset: Path) -> Selection:
    return all_rows(load_manifest(open_store(dataset)))


def make_loader(dataset: Path, *parts: Part, **settings) -> ShardLoader:
    store = open_store(dataset)
    sizes = {"batch_size": 8, "max_length": 12, "rank": 0, "num_workers": 1, "int8": False}
    sizes = {name: settings.pop(name, value) for name, value in sizes.items()}
    return ShardLoader(
        parts or [Part(store, everything(dataset))],
        BatchShape(features=load_manifest(store).features, **sizes),
        Vocabulary.load(dataset / VOCABULARY_KEY),
        **{"seed": 7, **settings},
    )


def global_batches(dataset: Path, num_workers: int, epoch: int = 0, **settings) -> list[list[str]]:
    """Sample ids of the global batches, put together from the batches of all ranks."""
    ranks = [
        list(make_loader(dataset, rank=rank, num_workers=num_workers, **settings).epoch(epoch))
        for rank in range(num_workers)
    ]
    assert len({len(batches) for batches in ranks}) == 1, "ranks take different numbers of steps"
    return [[sample_id for part in parts for sample_id in part.sample_ids] for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("batch_size", [8, 24, 64])  # of 64, every worker has lanes without a row
@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_global_batches_do_not_depend_on_the_number_of_workers(
    dataset: Path, num_workers: int, batch_size: int
) -> None:
    alone = global_batches(dataset, 1, batch_size=batch_size)
    assert global_batches(dataset, num_workers, batch_size=batch_size) == alone
    few = global_batches(dataset, num_workers, batch_size=batch_size, cache_bytes=0, window_bytes=30_000)
    assert few == alone, "the memory for shards is no part of the order"


def reads_of(work: Callable[[], object]) -> list[StoredShard]:
    reads: list[StoredShard] = []
    read_rows = cluster.training.data.shuffled.read_rows

    def counted(store, shard, rows, features, **options):
        reads.append(shard)
        return read_rows(store, shard, rows, features, **options)

    with patch.object(cluster.training.data.shuffled, "read_rows", counted):
        work()
    return reads


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 6, 12])
def test_a_shard_is_read_once_or_where_a_cut_between_two_workers_goes_through_by_both(
    tmp_path: Path, tiny_clip: Path, num_workers: int
) -> None:
    data = write_dataset(tmp_path / "data", tiny_clip, rows=96, shard_size=7)
    everywhere: list[StoredShard] = []
    for rank in range(num_workers):
        loader = make_loader(data, rank=rank, num_workers=num_workers, batch_size=12, cache_bytes=0)
        reads = reads_of(lambda loader=loader: list(loader.epoch(1)))
        assert max(Counter(reads).values()) == 1, "lanes of one worker share what they read"
        assert set(reads) == {everything(data).shards[shard] for _, shard in loader.shards(1)}
        everywhere += reads
    assert set(everywhere) == set(everything(data).shards)
    assert len(everywhere) <= len(everything(data).shards) + num_workers - 1


def test_an_epoch_that_is_entered_late_reads_only_what_is_left(tmp_path: Path, tiny_clip: Path) -> None:
    data = write_dataset(tmp_path / "data", tiny_clip, rows=96, shard_size=4)
    loader = make_loader(data, batch_size=4, cache_bytes=0)
    reads = reads_of(lambda: list(loader.epoch(1, start_step=loader.steps_per_epoch - 2)))
    assert len(reads) <= 8 < len(everything(data).shards)


def test_with_little_memory_a_shard_is_read_in_parts_and_that_is_said(
    dataset: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    loader = make_loader(dataset, cache_bytes=0, window_bytes=60_000)
    reads = reads_of(lambda: list(loader.epoch(1)))
    assert max(Counter(reads).values()) > 1 and "--window-bytes: each shard is read" in caplog.text
    caplog.clear()
    make_loader(dataset, cache_bytes=0)
    assert not caplog.text


def test_parts_of_shards_take_no_more_memory_than_is_given(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane holds a part, and the next one while the last quarter of it is used."""
    data = write_dataset(tmp_path / "data", tiny_clip, rows=240, shard_size=80)
    asked: list[tuple[weakref.ref[Future[Decoded]], int]] = []

    class Reads(shuffled._Reads):
        def __call__(self, piece: shuffled._Piece) -> "Future[Decoded]":
            future = super().__call__(piece)
            asked.append((weakref.ref(future), len(piece.order)))
            return future

    monkeypatch.setattr(shuffled, "_Reads", Reads)
    held, lanes = 8, 8
    row = make_loader(data)._shape.bytes_per_row
    loader = make_loader(data, cache_bytes=0, window_bytes=int(held * lanes * 1.25 * row), batch_size=lanes)
    assert loader._held_rows == held
    rows = [sum(rows for future, rows in asked if future() is not None) for _ in loader._batches(1, 0)]
    assert np.mean(rows) < 1.4 * held * lanes


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


def test_a_batch_mixes_rows_of_many_shards(dataset: Path) -> None:
    batches = global_batches(dataset, 1)
    assert all(len({int(sample_id[:9]) // 10 for sample_id in batch if sample_id}) >= 3 for batch in batches[:4])


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


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_batches_by_way_of_a_shard_cache_are_equal(dataset: Path, tmp_path: Path, fraction: float) -> None:
    store, cache = open_store(dataset), ShardCache(tmp_path / "cache")
    rows, _ = select(dataset, fraction=fraction)
    direct = make_loader(dataset, Part(store, rows), cache_bytes=0)
    by_cache = make_loader(dataset, Part(store, rows, cache=cache), cache_bytes=0)
    for _ in range(2):  # written, then found
        for a, b in zip(direct.epoch(1), by_cache.epoch(1), strict=True):
            assert a.sample_ids == b.sample_ids
            for name in ("patch_features", "global_feature", "clip_score", "target_ids"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert len(list((tmp_path / "cache/shards").iterdir())) == len(rows.shards)


def test_a_cached_shard_is_not_read_again_and_a_cache_without_room_is_done_without(
    dataset: Path, tmp_path: Path
) -> None:
    store, rows = open_store(dataset), everything(dataset)
    features, cache = load_manifest(store).features, ShardCache(tmp_path / "cache")
    first = cache.read_rows(store, rows.shards[0], rows.rows[0], features)
    gone = open_store(tmp_path / "gone")
    again = cache.read_rows(gone, rows.shards[0], rows.rows[0], features)
    np.testing.assert_array_equal(first.patch_features, again.patch_features)
    (tmp_path / "file").write_text("no folder can be made here")
    full = ShardCache(tmp_path / "file").read_rows(store, rows.shards[0], rows.rows[0], features)
    np.testing.assert_array_equal(first.patch_features, full.patch_features)


def test_a_cache_that_cannot_be_read_is_done_without(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = open_store(dataset), everything(dataset)
    features, cache = load_manifest(store).features, ShardCache(tmp_path / "cache")
    first = cache.read_rows(store, rows.shards[0], rows.rows[0], features)
    (place,) = (tmp_path / "cache/shards").iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert place.stat().st_mode & 0o777 == 0o777 & ~umask, "others may read what the umask lets them"

    def refused(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:  # another user's: root may read all
        patched.setattr(Path, "read_text", refused)
        without = cache.read_rows(store, rows.shards[0], rows.rows[0], features)
    np.testing.assert_array_equal(first.patch_features, without.patch_features)
    (place / "texts.json").unlink()  # a disk that is tidied
    without = cache.read_rows(store, rows.shards[0], rows.rows[0], features)
    np.testing.assert_array_equal(first.patch_features, without.patch_features)


def test_a_shard_that_another_worker_caches_meanwhile_is_no_failure(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, rows = open_store(dataset), everything(dataset)
    features, rename = load_manifest(store).features, os.rename

    def second(source: Path, target: Path) -> None:
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr("os.rename", second)
    ShardCache(tmp_path / "cache").read_rows(store, rows.shards[0], rows.rows[0], features)
    assert "not cached" not in caplog.text


def test_batches_hold_the_stored_values(dataset: Path) -> None:
    loader = make_loader(dataset)
    table = read_shard(open_store(dataset), everything(dataset).shards[1], ["sample_id", "patch_features", "caption"])
    vocabulary = Vocabulary.load(dataset / VOCABULARY_KEY)
    stored = {row["sample_id"]: row for row in table.to_pylist()}
    seen = 0
    for batch in loader.epoch(0):
        for position, sample_id in enumerate(batch.sample_ids):
            if sample_id in stored:
                seen += 1
                expected = np.frombuffer(stored[sample_id]["patch_features"], np.float16)
                np.testing.assert_array_equal(batch.patch_features[position].reshape(-1), expected)
                token_ids, target_ids = vocabulary.encode(stored[sample_id]["caption"], 12)
                np.testing.assert_array_equal(batch.token_ids[position], token_ids)
                np.testing.assert_array_equal(batch.target_ids[position], target_ids)
        assert batch.patch_features.dtype == np.float16
    assert seen == len(stored)


def test_padding_rows_of_the_last_batch_have_no_targets(dataset: Path) -> None:
    *_, last = make_loader(dataset, batch_size=16, rank=1, num_workers=2).epoch(0)
    # 53 rows in batches of 16: the last one holds 5, of which the second half of the lanes, rank 1, has 3.
    rows = np.array([bool(sample_id) for sample_id in last.sample_ids])
    assert rows.tolist() == [False, True, False, False, True, False, False, True]
    assert (last.target_ids[~rows] == -1).all() and (last.clip_score[~rows] == 0).all()
    assert (last.target_ids[rows] >= 0).any(axis=1).all()
    assert last.patch_features.shape == (8, 16, 64) and (last.patch_features[~rows] == 0).all()


def test_a_dataset_smaller_than_a_batch_gives_one_batch(dataset: Path) -> None:
    few = Selection(everything(dataset).shards[:1], (np.array([1, 4]),))
    (batch,) = make_loader(dataset, Part(open_store(dataset), few)).epoch(0)
    assert sorted(batch.sample_ids) == [""] * 6 + ["000000001-00", "000000004-00"]


def ids_of_epoch(loader: ShardLoader, epoch: int) -> list[str]:
    return [sample_id for batch in loader.epoch(epoch) for sample_id in batch.sample_ids if sample_id]


def test_a_weight_says_how_often_each_row_comes(dataset: Path) -> None:
    store = open_store(dataset)
    loader = make_loader(dataset, Part(store, everything(dataset), 2.5))
    assert loader.rows_per_epoch == 2 * ROWS + round(0.5 * ROWS)
    seen: Counter[str] = Counter()
    for epoch in range(4):
        counts = Counter(ids_of_epoch(loader, epoch))
        assert set(counts.values()) == {2, 3} and counts.total() == loader.rows_per_epoch
        seen += counts
    assert len(seen) == ROWS and max(seen.values()) - min(seen.values()) <= 1
    assert ids_of_epoch(loader, 0) != ids_of_epoch(loader, 1)


def test_a_mixture_is_the_same_for_any_number_of_workers(dataset: Path, tmp_path: Path, tiny_clip: Path) -> None:
    other = write_dataset(tmp_path / "other", tiny_clip, rows=30, shard_size=7, first=500)
    parts = [Part(open_store(dataset), everything(dataset)), Part(open_store(other), everything(other), 0.4)]

    def batches(num_workers: int) -> list[list[str]]:
        ranks = [
            list(make_loader(dataset, *parts, rank=rank, num_workers=num_workers).epoch(2))
            for rank in range(num_workers)
        ]
        return [[name for part in step for name in part.sample_ids] for step in zip(*ranks, strict=True)]

    one = batches(1)
    assert one == batches(2) == batches(4)
    names = [name for batch in one for name in batch if name]
    assert sum(int(name[:9]) >= 500 for name in names) == 12 and len(names) == ROWS + 12


def captions_of(dataset: Path, selection: Selection) -> list[str]:
    store = open_store(dataset)
    return [
        read_shard(store, shard, ["caption"])["caption"][int(row)].as_py()
        for shard, rows in zip(selection.shards, selection.rows, strict=True)
        for row in rows
    ]


def select(dataset: Path, **rule) -> tuple[Selection, Selection]:
    return select_rows(open_store(dataset), everything(dataset).shards, RowFilter(**{"seed": 1, **rule}))


def rows_of(selection: Selection) -> set[tuple[str, int]]:
    return {(shard.key, int(row)) for shard, rows in zip(selection.shards, selection.rows, strict=True) for row in rows}


def test_held_out_captions_are_never_trained_on(dataset: Path) -> None:
    training, held_out = select(dataset, held_out=0.3)
    assert len(training) + len(held_out) == ROWS and len(held_out) > 3
    assert not set(captions_of(dataset, training)) & set(captions_of(dataset, held_out))
    assert len(set(captions_of(dataset, everything(dataset)))) < ROWS, "no duplicate captions: this proves nothing"


def test_hold_out_respects_its_limit_and_seed(dataset: Path) -> None:
    _, few = select(dataset, held_out=holdout_share(fraction=0.5, limit=3, rows=ROWS))
    assert len(few) <= 12
    assert rows_of(select(dataset, held_out=0.3, seed=1)[1]) != rows_of(select(dataset, held_out=0.3, seed=2)[1])


def test_fractions_are_nested_and_leave_the_held_out_rows_alone(dataset: Path) -> None:
    chosen: Sequence[tuple[Selection, Selection]] = [
        select(dataset, held_out=0.2, fraction=fraction) for fraction in (0.25, 0.5, 1.0)
    ]
    quarter, half, whole = (rows_of(training) for training, _ in chosen)
    assert quarter < half < whole
    assert len({frozenset(rows_of(held_out)) for _, held_out in chosen}) == 1
    training = select(dataset, fraction=0.5, seed=2)[0]
    assert rows_of(training) != rows_of(select(dataset, fraction=0.5)[0]), "the seed does not matter"


def test_pairs_below_the_clip_score_are_not_trained_on() -> None:
    captions = [f"scene {number}" for number in range(400)]
    scores = np.linspace(0.1, 0.4, 400, dtype=np.float32)
    training, held_out = RowFilter(seed=1, held_out=0.2, min_clip_score=0.25).masks(captions, scores)
    np.testing.assert_array_equal(training, (scores >= 0.25) & ~held_out)
    assert held_out[scores < 0.25].any(), "what is held out does not depend on the threshold"
    assert RowFilter(seed=1, min_clip_score=float(scores[7])).masks(captions, scores)[0][7]


def selected_by(dataset: Path, num_workers: int, rule: RowFilter) -> list[tuple[Selection, Selection]]:
    """What every one of some workers selects, who tell each other what they find as torch.distributed lets them."""
    store, told = open_store(dataset), [None] * num_workers
    everybody = threading.Barrier(num_workers)

    def work(rank: int) -> tuple[Selection, Selection]:
        def gather(value):
            told[rank] = value
            everybody.wait(60)
            return told

        return select_rows(store, everything(dataset).shards, rule, ranks=Ranks(rank, num_workers, gather))

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(work, range(num_workers)))


@pytest.mark.parametrize("num_workers", [2, 4, 8])
def test_workers_share_the_index_and_select_the_same_rows(
    dataset: Path, tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    monkeypatch.setattr(cluster.training.data.selection, "GROUP", 2)
    rule = RowFilter(seed=1, held_out=0.3, fraction=0.7)
    asked: list[int] = []
    index = cluster.training.data.selection.row_index

    def counted(store, group, *others, **options):
        asked.append(group)
        return index(store, group, *others, **options)

    monkeypatch.setattr(cluster.training.data.selection, "row_index", counted)
    found = selected_by(data, num_workers, rule)
    assert sorted(asked) == [0, 1, 2], "each thousand shards are asked for by one worker"
    monkeypatch.undo()
    alone = select(dataset, held_out=0.3, fraction=0.7)
    for pair in found:
        assert [rows_of(each) for each in pair] == [rows_of(each) for each in alone]


def test_what_one_worker_cannot_read_ends_all(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    monkeypatch.setattr(cluster.training.data.selection, "GROUP", 2)
    (data / "shards/part-000003.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"part-000003\.parquet: not the shard"):
        selected_by(data, 2, RowFilter(seed=1, held_out=0.3))


@pytest.mark.parametrize(("weight", "rows"), [(0.5, 37), (0.3, 1), (1.75, 4), (2.01, 500)])
def test_rows_that_come_once_more_have_their_turns_equally_often(weight: float, rows: int) -> None:
    trip = _RoundTrip(rows, round(weight % 1 * rows))
    starts = np.array([0, rows // 3, rows // 3, rows])
    seen = np.zeros(rows, int)
    for epoch in range(40):
        turns = trip.has_turn(np.arange(rows), epoch)
        seen += turns
        assert turns.sum() == trip.extra == trip.sizes(starts, epoch).sum()
        assert trip.sizes(starts, epoch).tolist() == [turns[: rows // 3].sum(), 0, turns[rows // 3 :].sum()]
    assert seen.max() - seen.min() <= 1


def test_nothing_left_to_train_on_is_an_error(dataset: Path) -> None:
    training, _ = select(dataset, min_clip_score=1.0)
    with pytest.raises(InputError, match="no rows to train on; loosen the filters"):
        make_loader(dataset, Part(open_store(dataset), training))


@pytest.mark.parametrize(("weight", "rows", "least"), [(0.005, ROWS, "0.019"), (0.5, 1, "1"), (0.1, 3, "0.33")])
def test_a_dataset_of_which_no_row_would_come_is_an_error(
    dataset: Path, tmp_path: Path, tiny_clip: Path, weight: float, rows: int, least: str
) -> None:
    small = write_dataset(tmp_path / "small", tiny_clip, rows=rows)
    parts = (Part(open_store(dataset), everything(dataset)), Part(open_store(small), everything(small), weight))
    with pytest.raises(InputError, match=rf"small={weight}: of its {rows} rows none would .* at least {least}$"):
        make_loader(dataset, *parts)
    make_loader(dataset, parts[0], Part(open_store(small), everything(small), float(least)))


def test_a_batch_knows_how_large_it_is_and_of_large_ones_few_are_kept(dataset: Path) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    (small, *_) = make_loader(dataset).epoch(0)
    features = FeatureShape(embed_dim=768, num_patches=64, patch_dim=1024)
    large = OpenBatch(BatchShape(features=features, batch_size=1024, max_length=20)).close(epoch=0, step=0, last=False)
    assert small.nbytes < 1e6 < large.patch_features.nbytes < large.nbytes < 1.02 * large.patch_features.nbytes
    assert (_check_steps(gpu, small), _check_steps(gpu, large)) == (GPU_CHECK_STEPS, 3)
    assert _check_steps(cpu, small) == _check_steps(cpu, large) == 1


def test_uneven_division_among_workers_is_refused(dataset: Path) -> None:
    with pytest.raises(InputError, match="batch size 8: cannot be divided evenly among 3 workers"):
        make_loader(dataset, num_workers=3)


def test_a_broken_shard_is_named(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/part-000000.parquet").write_bytes(b"PAR1 but not really PAR1")
    (tmp_path / VOCABULARY_KEY).write_bytes((dataset / VOCABULARY_KEY).read_bytes())
    (tmp_path / "dataset.json").write_bytes((dataset / "dataset.json").read_bytes())
    stored = described("shards/part-000000.parquet", b"PAR1 but not really PAR1", rows=3)
    broken = Selection((stored,), (np.arange(3),))
    loader = make_loader(tmp_path, Part(open_store(tmp_path), broken))
    with pytest.raises(InputError, match=r"shards/part-000000\.parquet: cannot be read"):
        list(loader.epoch(0))


def test_leaving_an_epoch_early_ends_its_thread(dataset: Path) -> None:
    import time

    batches = make_loader(dataset, prefetch=1).epoch(0)
    next(batches)
    batches.close()
    for _ in range(50):
        if not any(thread.name == "shard-loader" for thread in threading.enumerate()):
            return
        time.sleep(0.1)
    pytest.fail("the loader's thread is still running")


@pytest.mark.parametrize("int8", [False, True])
def test_rows_that_are_no_numbers_are_found_in_their_batch_with_their_shard(
    int8: bool, tmp_path: Path, tiny_clip: Path
) -> None:
    data = write_dataset(tmp_path / "data", tiny_clip, rows=ROWS, shard_size=10, nan_row=25)
    found = [place for batch in make_loader(data, int8=int8).epoch(0) for place in batch.damaged()]
    assert found == [(f"{data}/shards/part-000002.parquet", "000000025-00")]


def test_held_out_rows_that_are_no_numbers_are_named_before_they_are_captioned(tmp_path: Path, tiny_clip: Path) -> None:
    data = write_dataset(tmp_path / "data", tiny_clip, rows=ROWS, shard_size=10, nan_row=25)
    held_out = [(open_store(data), everything(data))]
    with pytest.raises(InputError, match=r"part-000002.parquet: .* of sample 000000025-00 .*; run jobs.verify"):
        held_out_share(held_out, load_manifest(open_store(data)).features, rank=0, num_workers=1)
