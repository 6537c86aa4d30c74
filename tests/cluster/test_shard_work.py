"""Work on many shards gives the same results, in the same order, in this process and on Ray."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.shard_work import (
    AUTO,
    MANY_SAMPLES,
    PROCESS,
    RAY,
    SHARDS_A_TASK,
    InThisProcess,
    OnRay,
    ShardWork,
    shard_work,
)
from cluster.store.store import open_store
from pcm.errors import InputError


@dataclass(frozen=True)
class Slow:
    """The first calls take longest, so that whoever returns results as they come returns them out of order."""

    calls: int

    def __call__(self, number: int) -> tuple[int, int]:
        time.sleep(0.2 if number < self.calls // 4 else 0)
        return number, os.getpid()


@dataclass(frozen=True)
class Refuses:
    number: int

    def __call__(self, number: int) -> int:
        if number == self.number:
            raise InputError(f"shard {number}: damaged")
        return number


@dataclass(frozen=True)
class Touches:
    folder: Path

    def __call__(self, number: int) -> int:
        (self.folder / f"{number}").touch()
        return number


def worker(run_on: str, folder: Path) -> ShardWork:
    store = open_store(folder)
    store.write_bytes("seen", b"")
    return shard_work(run_on, samples=1, landmarks=[(store, "seen")], threads=4)


@pytest.mark.parametrize("run_on", [PROCESS, RAY])
def test_results_come_in_the_order_of_the_calls(ray_session: None, tmp_path: Path, run_on: str) -> None:
    calls = 5 * SHARDS_A_TASK + 3
    found = list(worker(run_on, tmp_path).in_order(Slow(calls), iter(range(calls))))
    assert [number for number, _ in found] == list(range(calls))
    assert (os.getpid() in {process for _, process in found}) is (run_on == PROCESS)


@pytest.mark.parametrize("run_on", [PROCESS, RAY])
def test_what_a_call_refuses_is_raised_as_it_is(ray_session: None, tmp_path: Path, run_on: str) -> None:
    results = worker(run_on, tmp_path).in_order(Refuses(SHARDS_A_TASK + 1), range(100))
    with pytest.raises(InputError, match=f"^shard {SHARDS_A_TASK + 1}: damaged$"):
        list(results)


def test_no_calls_give_no_results(ray_session: None, tmp_path: Path) -> None:
    for run_on in (PROCESS, RAY):
        assert list(worker(run_on, tmp_path).in_order(Refuses(0), [])) == []


def test_a_result_is_fetched_as_soon_as_it_is_there(ray_session: None, tmp_path: Path) -> None:
    """However many tasks may wait: what they are given and what they give takes memory."""
    most = 32 * SHARDS_A_TASK
    given = 0

    def calls() -> Iterator[int]:
        nonlocal given
        for given in range(2 * most):
            deadline = time.monotonic() + 120
            while given == SHARDS_A_TASK and not (tmp_path / "0").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.05 if given >= SHARDS_A_TASK else 0)
            yield given

    results = OnRay().in_order(Touches(tmp_path), calls())
    assert next(results) == 0
    assert given < most
    results.close()


def test_a_node_that_does_not_see_the_folder_works_on_nothing(ray_session: None, tmp_path: Path) -> None:
    """One that came after all were asked: here the object by which they see it goes instead."""
    (tmp_path / "data").mkdir()
    work = worker(RAY, tmp_path / "data")
    (tmp_path / "data/seen").unlink()
    with pytest.raises(InputError, match=r"data: a folder of one machine, which node \S+ does not see; give a URI"):
        list(work.in_order(Touches(tmp_path / "data"), range(SHARDS_A_TASK)))
    assert not list((tmp_path / "data").iterdir())


def test_auto_takes_ray_where_samples_are_many(ray_session: None, tmp_path: Path) -> None:
    store = open_store(tmp_path)

    def chosen(samples: int) -> type:
        return type(shard_work(AUTO, samples=samples, landmarks=[(store, "seen")], threads=4))

    assert (chosen(MANY_SAMPLES - 1), chosen(MANY_SAMPLES)) == (InThisProcess, OnRay)
