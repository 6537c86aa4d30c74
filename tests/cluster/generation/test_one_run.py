"""One run at a time makes a dataset on a cluster."""

import logging
import threading
from pathlib import Path

import pytest

from cluster.dataset.layout import MANIFEST_KEY, shard_key
from cluster.generation.limits import FaultPolicy
from cluster.generation.one_run import monitor_of_run
from cluster.generation.pipeline import run_pipeline, write_manifest
from cluster.generation.pools import Pools
from cluster.generation.repair import repair_dataset
from cluster.generation.retry_quarantined import ALL_GENERATOR, retry_quarantined
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.faulty_generators import RAISES, DrawFaulty
from tests.helpers.tiny_generation import (
    CAPTIONS,
    Dataset,
    draw_in_process,
    make_dataset,
    make_dataset_in_process,
    null_spec,
    plan_dataset,
    write_corpus,
)
from tests.helpers.waiting import wait_until


def test_a_second_run_waits_and_draws_nothing_again(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    corpus, out = write_corpus(tmp_path), tmp_path / "data"
    made: list[Dataset] = []
    second = threading.Thread(target=lambda: made.append(make_dataset(out, corpus, null_spec())))
    with monitor_of_run(open_store(out), FaultPolicy()) as (_, waited):
        assert not waited
        second.start()
        wait_until(lambda: "another run on this cluster makes this dataset" in caplog.text)
        make_dataset_in_process(out, corpus, null_spec(), finish=False)
        assert not made and second.is_alive()
    second.join(60)
    (dataset,) = made
    assert (dataset.result.skipped, dataset.result.generated) == (len(CAPTIONS), 0)
    assert dataset.result.manifest is not None


def test_what_another_run_has_changed_is_not_repaired(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which shards are made again was decided before."""
    caplog.set_level(logging.WARNING)
    store, plan, _ = make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0)
    said: list[str] = []

    def repair() -> None:
        try:
            run_pipeline(store, plan, pools, redo=[1])
        except InputError as error:
            said.append(str(error))

    repairing = threading.Thread(target=repair)
    with monitor_of_run(store, FaultPolicy()):
        repairing.start()
        wait_until(lambda: "another run on this cluster makes this dataset" in caplog.text)
    repairing.join(60)
    assert said == [f"{store.root}: another run has changed this dataset meanwhile; run the command again"]


def test_a_repair_waits_for_the_run_that_draws_what_is_missing(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    corpus, out = write_corpus(tmp_path), tmp_path / "data"
    make_dataset_in_process(out, corpus, null_spec())
    shard = out / shard_key(1)
    shard.unlink()
    reports: list[dict] = []
    repairing = threading.Thread(target=lambda: reports.append(repair_dataset(str(out))))
    with monitor_of_run(open_store(out), FaultPolicy()):
        repairing.start()
        wait_until(lambda: "another run on this cluster makes this dataset" in caplog.text)
        make_dataset_in_process(out, corpus, null_spec(), finish=False)
        stored = shard.stat().st_mtime_ns
    repairing.join(60)
    assert [report["ok"] for report in reports] == [True] and shard.stat().st_mtime_ns == stored, "drawn once"


def test_a_retry_that_is_refused_leaves_the_dataset_finished(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    corpus = write_corpus(tmp_path, [*CAPTIONS[:3], RAISES])
    store, plan = plan_dataset(tmp_path / "data", corpus, null_spec())
    write_manifest(store, plan, draw_in_process(store, plan, [0], draw=DrawFaulty))
    whole = store.read_bytes(MANIFEST_KEY)
    said: list[str] = []

    def retry() -> None:
        try:
            retry_quarantined(store, plan, ALL_GENERATOR, Pools.for_cluster(device="cpu", cpus=2, gpus=0))
        except InputError as error:
            said.append(str(error))

    retrying = threading.Thread(target=retry)
    with monitor_of_run(store, FaultPolicy()):
        retrying.start()
        wait_until(lambda: "another run on this cluster makes this dataset" in caplog.text)
        assert store.read_bytes(MANIFEST_KEY) == whole
    retrying.join(60)
    assert said == [f"{store.root}: another run has changed this dataset meanwhile; run the command again"]
    assert store.read_bytes(MANIFEST_KEY) == whole


def test_a_run_that_failed_and_one_of_another_dataset_are_not_waited_for(ray_session: None, tmp_path: Path) -> None:
    one, other = open_store(tmp_path / "one"), open_store(tmp_path / "other")
    with pytest.raises(ZeroDivisionError), monitor_of_run(one, FaultPolicy()):
        raise ZeroDivisionError
    found: list[bool] = []

    def begin() -> None:
        with monitor_of_run(one, FaultPolicy()), monitor_of_run(other, FaultPolicy()) as (_, waited):
            found.append(waited)

    beginning = threading.Thread(target=begin, daemon=True)
    beginning.start()
    beginning.join(60)
    assert found == [False]
