"""One run at a time makes a dataset on a cluster."""

import logging
import threading
from pathlib import Path

import pytest

from cluster.generation.limits import FaultPolicy
from cluster.generation.one_run import monitor_of_run
from cluster.generation.pipeline import run_pipeline
from cluster.generation.pools import Pools
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.tiny_generation import (
    CAPTIONS,
    Dataset,
    make_dataset,
    make_dataset_in_process,
    null_spec,
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
