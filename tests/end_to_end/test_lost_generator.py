"""Generators, and the monitor, that are lost while a run goes on, and what who reads in the plan's order sees of it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

from cluster.dataset.verify import verify
from cluster.generation.stages.monitor import MAX_IN_HAND
from cluster.store.store import open_store
from tests.helpers.job_runs import running

pytestmark = pytest.mark.slow

SHARDS = 60
#: Ray knows after two seconds that a node is lost.
QUICKLY = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


@pytest.fixture
def head() -> Iterator[Cluster]:
    """A head that is given no work."""
    head = {"num_cpus": 0, "object_store_memory": 100_000_000, "_system_config": QUICKLY}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def run(head: Cluster, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A run of 60 shards on two generators, a second each, into `data`."""
    command = [sys.executable, "-m", "tests.helpers.paced_run", str(tmp_path / "data"), str(SHARDS), "2"]
    environment = os.environ | {"RAY_ADDRESS": head.address}
    with (tmp_path / "log").open("wb") as log, running(command, env=environment, stderr=log) as job:
        yield job


def stored(folder: Path) -> list[int]:
    """Shards in the order in which they were stored."""
    parts = sorted((folder / "data/shards").glob("part-*.parquet"), key=lambda part: part.stat().st_mtime_ns)
    return [int(part.stem.rpartition("-")[2]) for part in parts]


def wait_for(job: subprocess.Popen, folder: Path, shards: int) -> None:
    while len(stored(folder)) < shards:
        assert job.poll() is None, (folder / "log").read_text()[-3000:]
        time.sleep(0.1)


def ended_well(job: subprocess.Popen, folder: Path) -> None:
    assert job.wait(timeout=900) == 0, (folder / "log").read_text()[-3000:]
    assert verify(open_store(str(folder / "data")))["ok"]


def test_what_a_generator_had_that_does_not_come_back_is_stored_before_what_is_far_behind_it(
    head: Cluster, run: subprocess.Popen, tmp_path: Path
) -> None:
    """One node of two is lost for good, with a generator, all that it had begun and the turns that are bound to it."""
    first = head.add_node(num_cpus=1, object_store_memory=100_000_000)
    head.add_node(num_cpus=1, object_store_memory=100_000_000)
    wait_for(run, tmp_path, 12)
    there = set(stored(tmp_path))
    head.remove_node(first, allow_graceful=False)
    ended_well(run, tmp_path)
    begun = set(range(max(there) + 5)) - there
    last = max(stored(tmp_path).index(shard) for shard in begun)
    assert last < SHARDS - 20, f"of {sorted(begun)} one came as number {last} of {SHARDS}"


def test_a_run_goes_on_where_the_process_of_its_monitor_dies(
    head: Cluster, run: subprocess.Popen, tmp_path: Path
) -> None:
    for _ in range(2):
        head.add_node(num_cpus=1, object_store_memory=100_000_000)
    wait_for(run, tmp_path, 12)
    address = head.address.rpartition(":")[2]
    monitors = [each for each in psutil.process_iter(["cmdline"]) if "ray::RunMonitor" in (each.info["cmdline"] or ())]
    (mine,) = [each for each in monitors if f":{address}" in " ".join(each.parent().cmdline())]
    mine.send_signal(signal.SIGKILL)
    ended_well(run, tmp_path)
    assert "it knows again what is left" in (tmp_path / "log").read_text()
    drawn = (tmp_path / "drawn").read_text().splitlines()
    assert len(drawn) <= SHARDS + 2 * MAX_IN_HAND, "what is stored is drawn again, and more than what was in hand"
