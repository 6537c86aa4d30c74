"""The batch size is searched once, by drawing; a resume takes the number it finds in the plan."""

import logging
from pathlib import Path

import pytest
import torch

from cluster.generation.auto_batch_size import with_batch_size
from cluster.generation.pools import Pools
from cluster.store.store import open_store
from pcm.errors import InputError
from pcm.generation import batch_search
from pcm.generation.batch_search import SIZES, Trial, best_size, table, try_generator, try_sizes
from tests.helpers.tiny_generation import null_spec, plan_dataset, tiny_spec, write_corpus


class Device:
    """A clock that a draw moves on: overhead a call, seconds a picture, and memory for so many."""

    def __init__(self, *, overhead: float, each: float, fits: int) -> None:
        self.now, self.drawn = 0.0, []
        self._overhead, self._each, self._fits = overhead, each, fits

    def draw(self, size: int) -> None:
        self.drawn.append(size)
        if size > self._fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.now += self._overhead + self._each * size


def trials_on(monkeypatch: pytest.MonkeyPatch, **values: float) -> tuple[list[Trial], Device]:
    device = Device(**values)  # type: ignore[arg-type]
    monkeypatch.setattr(batch_search.time, "perf_counter", lambda: device.now)
    return try_sizes(device.draw), device


def test_sizes_grow_until_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, device = trials_on(monkeypatch, overhead=10.0, each=0.01, fits=10)
    assert [trial.size for trial in trials] == [1, 2, 4, 8, 16] and trials[-1].images_per_second is None
    assert best_size(trials) == 8
    assert device.drawn.count(8) == 3, "one to warm up, two that count"
    assert table(trials).endswith("16: out of memory")


def test_the_search_ends_where_nothing_is_gained(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, _ = trials_on(monkeypatch, overhead=0.1, each=1.0, fits=1000)
    assert [trial.size for trial in trials] == [1, 2] and best_size(trials) == 1
    trials, _ = trials_on(monkeypatch, overhead=1.0, each=1.0, fits=1000)
    assert [trial.size for trial in trials] == [1, 2, 4, 8, 16, 32] and best_size(trials) == 16


def test_a_device_without_room_for_one_picture_has_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, _ = trials_on(monkeypatch, overhead=1.0, each=1.0, fits=0)
    assert trials == [Trial(1, None)] and best_size(trials) is None


def test_an_error_that_is_not_about_memory_is_raised() -> None:
    def draw(size: int) -> None:
        raise ValueError("a broken model")

    with pytest.raises(ValueError, match="a broken model"):
        try_sizes(draw)


def test_a_real_generator_is_tried(tiny_t2i: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_search, "SIZES", SIZES[:2])
    trials = try_generator(tiny_spec(tiny_t2i).generator)
    assert trials and all(trial.images_per_second for trial in trials)
    assert best_size(trials) in SIZES[:2]


@pytest.mark.slow
def test_a_worker_searches_and_a_resume_takes_the_plans_number(
    tiny_t2i: Path, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)
    spec = tiny_spec(tiny_t2i, batch_size=3)
    found = with_batch_size(open_store(str(tmp_path / "data")), spec, pools)
    assert found.generator.batch_size in SIZES and "images/s by batch size: 1: " in caplog.text
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path), tiny_spec(tiny_t2i, batch_size=7))
    assert with_batch_size(store, spec, pools) == plan.spec, "7 is no size that a search finds"


def test_a_model_that_cannot_be_loaded_is_one_line(tiny_t2i: Path, tmp_path: Path, ray_session: None) -> None:
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)
    spec = tiny_spec(tiny_t2i, scheduler="NoScheduler")
    with pytest.raises(InputError, match="scheduler 'NoScheduler'"):
        with_batch_size(open_store(str(tmp_path / "data")), spec, pools)


def test_the_null_generator_needs_no_search(tmp_path: Path) -> None:
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0)
    assert with_batch_size(open_store(str(tmp_path / "data")), null_spec(), pools) == null_spec()
