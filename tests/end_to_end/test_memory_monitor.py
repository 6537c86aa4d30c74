"""Ray's memory monitor ends processes of a machine that is nearly full: a run in a memory cgroup, as a container has.

This file is also the program that runs there: `python test_memory_monitor.py FOLDER (always | once)`.
"""

import dataclasses
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from ray.cloudpickle import register_pickle_by_value

from cluster.dataset.verify import verify
from cluster.generation.limits import FaultPolicy
from cluster.generation.pipeline import run_pipeline
from cluster.generation.pools import Pools
from cluster.session import start_ray
from tests.helpers import faulty_generators
from tests.helpers.faulty_generators import FILLS_MEMORY, hungry
from tests.helpers.paths import ROOT
from tests.helpers.tiny_generation import null_spec, plan_dataset, write_corpus
from tests.helpers.waiting import wait_until

CGROUPS = Path("/sys/fs/cgroup/memory")
LIMIT = 6 << 30
CAPTIONS = [*(f"caption number {number}" for number in range(40)), FILLS_MEMORY]
#: Where Ray looks for the limit is the process's own group, as in a container.
ENTER = 'echo $$ > "$1/cgroup.procs" && mount --bind "$1" "$2" && shift 2 && exec "$@"'


@pytest.fixture
def cgroup() -> Iterator[Path]:
    made = CGROUPS / f"pcm-{secrets.token_hex(4)}"
    try:
        made.mkdir()
    except OSError:
        pytest.skip("needs root and the memory controller of version 1 of control groups")
    try:
        (made / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield made
    finally:
        wait_until(lambda: not (made / "cgroup.procs").read_text(), seconds=30, said="processes are left")
        made.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["once", "always"])
def test_processes_that_ray_ends_for_memory_lose_nothing(when: str, cgroup: Path, tmp_path: Path) -> None:
    """Ray ends helpers of Ray Data as well. A caption that always needs all of it is given up."""
    with tempfile.TemporaryDirectory(prefix="pcm-") as ray_folder:  # Ray's sockets need short paths
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", ENTER, "sh", cgroup, CGROUPS, sys.executable, __file__, tmp_path, when],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": ray_folder}, capture_output=True,
            text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        made = json.loads((tmp_path / "made.json").read_text())
        (raylet,) = Path(ray_folder).glob("ray/session_2*/logs/raylet.out")
        ended = re.findall(r"Selected to kill: .*task name=([\w():]+)", raylet.read_text())
    assert any("Generator" in name for name in ended)
    assert made["ok"]
    assert made["quarantined"] == ({FILLS_MEMORY: "generator_crashed"} if when == "always" else {})
    assert made["stored"] + len(made["quarantined"]) == len(CAPTIONS)


def main(folder: Path, when: str) -> None:
    register_pickle_by_value(faulty_generators)
    spec = null_spec()
    spec = dataclasses.replace(
        spec, generator=dataclasses.replace(spec.generator, model="pixels")
    )  # one that is watched
    start_ray(num_cpus=3)
    store, plan = plan_dataset(folder / "data", write_corpus(folder, CAPTIONS), spec, shard_size=4)
    pools = Pools.for_cluster(device="cpu", cpus=3, gpus=0, generators=1 if when == "once" else 2)
    run_pipeline(store, plan, pools, faults=FaultPolicy(), draw=hungry(folder / "claim" if when == "once" else None))
    report = verify(store)
    refused = [row for key in store.list("quarantine") for row in pq.read_table(f"{store.prefix}/{key}").to_pylist()]
    quarantined = {row["caption"]: row["reason"] for row in refused}
    made = {"ok": report["ok"], "stored": report["stored"], "quarantined": quarantined}
    (folder / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
