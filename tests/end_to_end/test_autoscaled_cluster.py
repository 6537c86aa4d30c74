"""From an empty cluster: Ray's autoscaler starts the machines that a job asks for by label, and no others."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.autoscaled import AutoscaledCluster
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

ROLE = "pcmnet.io/role"


@pytest.fixture
def cluster() -> Iterator[AutoscaledCluster]:
    """The worker types of ray_cluster.yaml with their labels, small."""
    types = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["available_node_types"]
    sizes = {"generation_spot": {"CPU": 2, "GPU": 1}, "training_on_demand": {"CPU": 4, "GPU": 4}}
    small = {name: {**types[name], "resources": size} for name, size in sizes.items()}
    with tempfile.TemporaryDirectory(prefix="pcm-") as folder:
        cluster = AutoscaledCluster(Path(folder), small)
        cluster.start()
        yield cluster
        cluster.stop()


def run(cluster: AutoscaledCluster, *command: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, env=cluster.environment, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_job_gets_the_machines_of_its_label_and_they_go_when_idle(
    cluster: AutoscaledCluster, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    made = run(
        cluster, "jobs.generate", "--corpus", "embedded", "--limit", 48, "--shard-size", 4, "--out", data,
        "--device", "cpu", "--generators", 4, "--node-label", f"{ROLE}=generation",
    )  # fmt: skip
    assert made["stored"] == 48
    assert cluster.node_types_started() == ["generation_spot"] * 2, "two generators on each"
    cluster.wait_until_idle_machines_are_gone()
    trained = run(
        cluster, "jobs.train", "--data", data, "--out", tmp_path / "run", "--preset", "embedded", "--epochs", 1,
        "--set", "batch_size=8", "--device", "cpu", "--num-workers", "1:2", "--cpus-per-worker", 2,
        "--worker-label", f"{ROLE}=training",
    )  # fmt: skip
    assert trained["epochs"] == 1
    assert cluster.node_types_started() == ["generation_spot"] * 2 + ["training_on_demand"]
    cluster.wait_until_idle_machines_are_gone()
