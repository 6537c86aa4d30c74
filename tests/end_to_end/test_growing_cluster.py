"""A cluster that has nothing but its head yet: jobs say what they wait for, and begin when machines have come."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.helpers.paths import ROOT
from tests.helpers.tiny_dataset import TINY, write_dataset

pytestmark = pytest.mark.slow


@pytest.fixture
def head() -> Iterator[Cluster]:
    """A head that is given no work, as in ray_cluster.yaml."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    yield cluster
    cluster.shutdown()


def start(head: Cluster, data: Path, out: Path, *arguments: str) -> subprocess.Popen:
    settings = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]
    command = [sys.executable, "-m", "jobs.train", "--data", str(data), "--out", str(out), "--epochs", "1"]
    return subprocess.Popen(
        [*command, *settings, *arguments], cwd=ROOT, env=os.environ | {"RAY_ADDRESS": head.address}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_training_waits_for_its_worker_and_says_so(head: Cluster, tmp_path: Path, tiny_clip: Path) -> None:
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=24), tmp_path / "run"
    nobody = start(head, data, out)
    _, said = nobody.communicate(timeout=300)
    assert nobody.returncode == 2 and said.splitlines()[-1].startswith("error: --device auto: the cluster has no CPUs")
    assert not out.exists()

    job = start(head, data, out, "--device", "cpu")
    assert job.stderr is not None
    lines = []
    while not lines or "waiting for 1 CPUs and 0 GPUs; the cluster has 0 and 0 now" not in lines[-1]:
        lines.append(job.stderr.readline())
        assert lines[-1], "".join(lines)
    time.sleep(3)  # Ray Train has asked by then, and found no room
    head.add_node(num_cpus=2, object_store_memory=100_000_000)
    printed, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    assert json.loads(printed.splitlines()[-1])["epochs"] == 1 and (out / "best" / "model.safetensors").exists()
