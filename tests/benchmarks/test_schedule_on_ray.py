"""The simulated schedule against a real small cluster: the same run, with a model that waits, and one generator lost.

Compared are counts, not times: generators that drew, shards begun again, and how many shards the others still drew
after a generator had drawn its last.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from benchmarks import idle_gpus
from benchmarks.idle_gpus import FOLDER, LOAD, SHARD, SHARD_SIZE, hosts_that_drew, read_notes
from benchmarks.schedule import Settings, Simulation
from cluster.dataset.verify import verify
from cluster.store.store import open_store
from tests.helpers.job_runs import running
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

GENERATORS, SHARDS = 4, 24
LOAD_SECONDS, SHARD_SECONDS = 1.0, 2.0
#: A busy machine may end one shard later than another that began after it.
OUT_OF_ORDER = 2


class Watched(Simulation):
    """Notes the end of every shard."""

    def __init__(self, seed: int) -> None:
        super().__init__(
            Settings(
                generators=GENERATORS, shards=SHARDS, shard_seconds=SHARD_SECONDS, load_seconds=LOAD_SECONDS,
                store_seconds=0.1, joins_within_seconds=0.0, lost=1, seed=seed,
            )
        )  # fmt: skip
        self.ends: dict[str, list[float]] = {}

    def _drawn(self, number: int) -> None:
        self.ends.setdefault(self._generators[number].name, []).append(self.now)
        super()._drawn(number)

    @property
    def begun_again(self) -> int:
        return self._monitor.begun_again()


def drawn_after_its_last(ends: Mapping[str, Sequence[float]]) -> int:
    """Shards that ended after the last one of the generator that was the first to have none left."""
    first = min(max(found) for found in ends.values())
    return sum(at > first for found in ends.values() for at in found)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    yield found
    found.shutdown()


def test_counts_of_the_simulation_are_those_of_a_real_run(cluster: Cluster, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    captions = tmp_path / "captions.txt"
    captions.write_text("".join(f"caption number {row}\n" for row in range(SHARDS * SHARD_SIZE)))
    nodes = {
        node.node_id: node
        for node in (
            cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=100_000_000) for _ in range(GENERATORS)
        )
    }
    command = [
        sys.executable, idle_gpus.__file__, "--drive", "--corpus", captions, "--out", tmp_path / "data", "--t2i",
        "null", "--clip", "null", "--device", "cuda", "--generators", GENERATORS, "--shard-size", SHARD_SIZE,
    ]  # fmt: skip
    environment = os.environ | {
        "RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT), FOLDER: str(notes), LOAD: str(LOAD_SECONDS),
        SHARD: str(SHARD_SECONDS),
    }  # fmt: skip
    with (
        (tmp_path / "said").open("w") as log,
        running(command, stdout=subprocess.DEVNULL, stderr=log, env=environment) as job,
    ):
        while hosts_that_drew(notes) < GENERATORS:
            assert job.poll() is None, (tmp_path / "said").read_text()[-3000:]
            time.sleep(0.1)
        lost = next(iter(nodes))
        cluster.remove_node(nodes[lost], allow_graceful=False)
        assert job.wait(timeout=400) == 0, (tmp_path / "said").read_text()[-3000:]
    report = verify(open_store(tmp_path / "data"))
    assert report["ok"] and report["stored"] == SHARDS * SHARD_SIZE

    simulated = [Watched(seed) for seed in range(20)]
    for run in simulated:
        run.run()
    assert hosts_that_drew(notes) == GENERATORS == len(simulated[0].joined)
    found = read_notes(notes)
    # As the model itself notes it: what the monitor gave to a process that died at once is not begun.
    begun_again = sum(what == "begin" for node in found.values() for _, what in node) - SHARDS
    again = [run.begun_again for run in simulated]
    assert min(again) <= begun_again <= max(again) + OUT_OF_ORDER, again
    ends = {node: [at for at, what in events if what == "end"] for node, events in found.items() if node != lost}
    left = [drawn_after_its_last(run.ends) for run in simulated]
    assert drawn_after_its_last(ends) <= max(left) + OUT_OF_ORDER, left
    print(f"begun again {begun_again} (simulated {again}), left {drawn_after_its_last(ends)} ({left})")
