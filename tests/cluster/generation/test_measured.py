"""Batch size and shard size are measured once, by drawing; a resume takes the numbers it finds in the plan."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cluster.generation.measured
from cluster.generation.make import prepare
from cluster.generation.measured import measured, shard_size_at
from cluster.generation.pools import Pools
from cluster.generation.request import GenerateRequest
from cluster.store.store import open_store
from pcm.errors import InputError
from pcm.generation import batch_search
from pcm.generation.batch_search import SIZES, Trial, best_size, rate_of, table, try_generator, try_sizes
from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from tests.helpers.tiny_generation import null_spec, tiny_spec, write_corpus


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
    trials = try_generator(DiffusersTextToImage(tiny_spec(tiny_t2i).generator))
    assert trials and all(trial.images_per_second for trial in trials)
    assert best_size(trials) in SIZES[:2]


def test_a_batch_size_that_is_given_is_measured_alone(tiny_t2i: Path) -> None:
    trials = try_generator(DiffusersTextToImage(tiny_spec(tiny_t2i, batch_size=3).generator), search=False)
    assert [trial.size for trial in trials] == [3] and rate_of(trials, 3) > 0


@pytest.mark.parametrize(
    ("images_per_second", "batch_size", "size"),
    [(20.0, 8, 256), (0.43, 8, 256), (0.42, 8, 248), (0.1, 16, 48), (0.02, 8, 8), (0.01, 8, 6), (0.0001, 1, 1)],
)
def test_a_shard_is_whole_batches_of_ten_minutes_at_most(images_per_second: float, batch_size: int, size: int) -> None:
    assert shard_size_at(images_per_second, batch_size=batch_size) == size


@pytest.mark.slow
def test_what_a_worker_measures_is_what_a_resume_takes(
    tiny_t2i: Path, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cluster.generation.measured, "SHARD_SECONDS", 0.5)
    request = GenerateRequest(
        corpus=str(write_corpus(tmp_path)), out=str(tmp_path / "data"), t2i=str(tiny_t2i), clip="null", steps=2,
        batch_size="auto", device="cpu",
    )  # fmt: skip
    store = open_store(request.out)
    plan = prepare(store, request).plan
    assert plan.spec.generator.batch_size in SIZES and "images/s by batch size: 1: " in caplog.text
    assert f"(--shard-size {plan.shard_size})" in caplog.text and plan.shard_size < 256
    caplog.clear()
    assert prepare(store, request).plan == plan and "images/s" not in caplog.text, "not measured again"
    assert prepare(store, replace(request, shard_size=plan.shard_size)).plan == plan
    with pytest.raises(InputError, match=rf"shard_size: {plan.shard_size} -> 11"):
        prepare(store, replace(request, shard_size=11))


def test_a_model_that_cannot_be_loaded_is_one_line(tiny_t2i: Path, ray_session: None) -> None:
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)
    spec = tiny_spec(tiny_t2i, scheduler="NoScheduler")
    with pytest.raises(InputError, match="scheduler 'NoScheduler'"):
        measured(spec, pools, batch_size=True, shard_size=8)


def test_what_is_given_or_known_to_be_fast_is_not_measured(tiny_t2i: Path) -> None:
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0)
    assert measured(null_spec(), pools, batch_size=True, shard_size=None) == (null_spec(), 256)
    spec = tiny_spec(tiny_t2i)
    assert measured(spec, pools, batch_size=False, shard_size=7) == (spec, 7)
