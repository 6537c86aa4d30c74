"""Two runs of one dataset at the same moment: which waits, and which is refused (cluster.only_job)."""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.dataset.committed import committed
from cluster.dataset.keys import MANIFEST_KEY, shard_key
from cluster.dataset.verify import verify
from cluster.generation.pipeline import GenerationResult, run_pipeline, write_manifest
from cluster.generation.pools import Pools
from cluster.generation.repair import repair_dataset
from cluster.generation.retry_quarantined import ALL_GENERATOR, parse_reason, retry_quarantined
from cluster.only_job import MAKES, only_job
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.faulty_generators import RAISES, DrawFaulty
from tests.helpers.seaweedfs import S3Server
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


def refused(run: Callable[[], object]) -> tuple[threading.Thread, list[str]]:
    """A thread that does it, and the lines with which it is refused."""
    said: list[str] = []

    def work() -> None:
        try:
            run()
        except InputError as error:
            said.append(str(error))

    return threading.Thread(target=work), said


def test_a_second_run_waits_and_draws_nothing_again(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    corpus, out = write_corpus(tmp_path), tmp_path / "data"
    made: list[Dataset] = []
    second = threading.Thread(target=lambda: made.append(make_dataset(out, corpus, null_spec())))
    with only_job(open_store(out), MAKES, waits=True) as (_, waited):
        assert not waited
        second.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
        make_dataset_in_process(out, corpus, null_spec(), finish=False)
        assert not made and second.is_alive()
    second.join(60)
    (dataset,) = made
    assert (dataset.result.skipped, dataset.result.generated) == (len(CAPTIONS), 0)
    assert dataset.result.manifest is not None


@pytest.mark.slow
def test_runs_of_two_clusters_make_one_dataset(s3_server: S3Server, tmp_path: Path, run_job: Callable) -> None:
    """Each draws everything, in the same order at the same time; what is stored is of one of them, and both know it."""
    corpus, out = write_corpus(tmp_path, CAPTIONS * 20), f"{s3_server.uri}/two-clusters"
    env = dict(os.environ) | s3_server.environment
    command = ("generate", "--corpus", corpus, "--out", out, "--t2i", "null", "--shard-size", 2)
    with ThreadPoolExecutor(2) as clusters:
        runs = list(clusters.map(lambda _: run_job(*command, env=env), range(2)))
    for run in runs:
        assert run.returncode == 0, run.stderr
        assert run.summary["stored"] == len(CAPTIONS * 20)
    assert sum(run.stderr.count("was committed by another writer meanwhile") for run in runs) > 0
    found = run_job("verify", out, env=env)
    assert found.returncode == 0 and found.summary["ok"], found.stderr


def test_what_another_run_has_changed_is_not_repaired(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which shards are made again was decided before."""
    caplog.set_level(logging.WARNING)
    store, plan, _ = make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0)
    repairing, said = refused(lambda: run_pipeline(store, plan, pools, redo=[1]))
    with only_job(store, MAKES, waits=True):
        repairing.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
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
    with only_job(open_store(out), MAKES, waits=True):
        repairing.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
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
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0)
    retrying, said = refused(lambda: retry_quarantined(store, plan, ALL_GENERATOR, pools))
    with only_job(store, MAKES, waits=True):
        retrying.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
        assert store.read_bytes(MANIFEST_KEY) == whole
    retrying.join(60)
    assert said == [f"{store.root}: another run has changed this dataset meanwhile; run the command again"]
    assert store.read_bytes(MANIFEST_KEY) == whole


def test_a_run_that_failed_and_one_of_another_dataset_are_not_waited_for(ray_session: None, tmp_path: Path) -> None:
    one, other = open_store(tmp_path / "one"), open_store(tmp_path / "other")
    with pytest.raises(ZeroDivisionError), only_job(one, MAKES, waits=True):
        raise ZeroDivisionError
    found: list[bool] = []

    def begin() -> None:
        with only_job(one, MAKES, waits=True), only_job(other, MAKES, waits=True) as (_, waited):
            found.append(waited)

    beginning = threading.Thread(target=begin, daemon=True)
    beginning.start()
    beginning.join(60)
    assert found == [False]


def test_a_run_waits_for_a_retry_though_every_shard_is_there(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A retry takes the manifest away before it draws: who wrote one of that moment would name shards that go."""
    caplog.set_level(logging.WARNING)
    corpus = write_corpus(tmp_path, [*CAPTIONS[:3], RAISES])
    store, plan = plan_dataset(tmp_path / "data", corpus, null_spec())
    write_manifest(store, plan, draw_in_process(store, plan, [0], draw=DrawFaulty))
    reasons, pools = parse_reason(ALL_GENERATOR), Pools.for_cluster(device="cpu", cpus=2, gpus=0)
    made: list[GenerationResult] = []
    running = threading.Thread(target=lambda: made.append(run_pipeline(store, plan, pools)))
    with only_job(store, MAKES, waits=True):
        committed(store, plan).forget([0])
        store.delete(MANIFEST_KEY)
        running.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
        assert not store.exists(MANIFEST_KEY)
        draw_in_process(store, plan, [0], retry=reasons)
    running.join(60)
    (result,) = made
    assert result.manifest is not None and (result.manifest.stored, result.generated) == (4, 0)
    assert verify(store)["ok"]


def test_a_repair_waits_though_it_draws_nothing(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    out = tmp_path / "data"
    make_dataset_in_process(out, write_corpus(tmp_path), null_spec())
    (out / MANIFEST_KEY).unlink()
    reports: list[dict] = []
    repairing = threading.Thread(target=lambda: reports.append(repair_dataset(str(out))))
    with only_job(open_store(out), MAKES, waits=True):
        repairing.start()
        wait_until(lambda: "another job on this cluster makes this dataset" in caplog.text)
        assert not (out / MANIFEST_KEY).exists()
    repairing.join(60)
    assert [report["ok"] for report in reports] == [True]
