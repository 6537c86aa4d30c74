"""A local folder on a cluster whose nodes do not share it: nothing is planned or drawn there, or read on Ray."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.helpers.hosts import OF_ONE_MACHINE
from tests.helpers.job_runs import running
from tests.helpers.paths import ROOT
from tests.helpers.tiny_dataset import write_dataset
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus
from tests.helpers.waiting import wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0,
        reason="needs the right to mount",
    ),
]


@pytest.fixture
def head() -> Iterator[Cluster]:
    yield from started(cpus=1)


@pytest.fixture
def head_alone() -> Iterator[Cluster]:
    """It is given no work."""
    yield from started(cpus=0)


def started(*, cpus: int) -> Iterator[Cluster]:
    found = (each for addresses in psutil.net_if_addrs().values() for each in addresses if each.family == AF_INET)
    # Said, because Ray takes 127.0.0.1 where `cluster` was imported before it, and no other node can join it there.
    address = next(each.address for each in found if not each.address.startswith("127."))
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": cpus, "object_store_memory": 100_000_000, "node_ip_address": address},
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def other_machine(head: Cluster, tmp_path: Path) -> Iterator[None]:
    with blind_node(head, tmp_path):
        yield


@contextmanager
def blind_node(head: Cluster, tmp_path: Path) -> Iterator[None]:
    """A node in whose place `tmp_path` is another, empty folder."""
    join = (
        f"mount -t tmpfs none {tmp_path} && until {Path(sys.executable).parent}/ray start --address={head.address} "
        "--num-cpus=1 --object-store-memory=100000000 --disable-usage-stats --block; do sleep 1; done"
    )
    environment = {name: value for name, value in os.environ.items() if name != OF_ONE_MACHINE}
    command = ["unshare", "--mount", "sh", "-c", join]
    with running(command, stdout=subprocess.DEVNULL, env=environment) as node:
        try:
            # On a busy machine a start may miss Ray's fixed 30 seconds.
            wait_until(lambda: len(head_nodes(head)) == 2, seconds=300, said="no second node")
            yield
        finally:
            for process in psutil.Process(node.pid).children(recursive=True):
                process.kill()


def head_nodes(head: Cluster) -> list[str]:
    code = "import ray; ray.init(logging_level=40); print(*(n['NodeID'] for n in ray.nodes() if n['Alive']))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"RAY_ADDRESS": head.address}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return said.stdout.splitlines()[-1].split()


def test_a_folder_that_a_node_does_not_see_is_refused(head: Cluster, other_machine: None, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    command = [sys.executable, "-m", "jobs.generate", "--corpus", str(corpus), "--t2i", "null", "--shard-size", "4"]
    job = subprocess.run(
        [*command, "--out", str(tmp_path / "data")], cwd=ROOT, env=os.environ | {"RAY_ADDRESS": head.address},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert job.returncode == 2, job.stderr
    assert "a folder of one machine, which node" in job.stderr.splitlines()[-1]
    assert not list((tmp_path / "data").rglob("*.*")), "something was planned"


@pytest.mark.parametrize("generators", [(), ("--generators", "1")], ids=["first machine", "planning"])
def test_a_machine_that_comes_later_and_does_not_see_the_folder_plans_nothing(
    head_alone: Cluster, tmp_path: Path, generators: tuple[str, ...]
) -> None:
    """Without --generators the job waits for the first machine, and asks it; with, the tasks that plan bring it."""
    corpus, out = write_corpus(tmp_path), tmp_path / "data"
    # As for a corpus that is large: the job itself plans a small one in its own process.
    code = (
        "import sys, cluster.shard_work, cluster.dataset.plan; "
        "cluster.shard_work.MANY_SAMPLES = cluster.dataset.plan.MANY_SAMPLES = 1; "
        "from jobs.generate import JOB; JOB.main(sys.argv[1:])"
    )
    asked = ["--corpus", corpus, "--t2i", "null", "--shard-size", "4", "--device", "cpu", "--out", out, *generators]
    settings = {"env": os.environ | {"RAY_ADDRESS": head_alone.address}, "text": True}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code, *asked]
    with running(command, **settings, **streams) as job, blind_node(head_alone, tmp_path):
        _, said = job.communicate(timeout=300)
    assert job.returncode == 2, said
    assert "a folder of one machine, which node" in said.splitlines()[-1]
    assert not list(out.rglob("*.*")), "something was planned"


def test_nothing_is_derived_into_or_from_a_folder_that_a_node_does_not_see(
    head: Cluster, other_machine: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path
) -> None:
    seen = tmp_path_factory.mktemp("seen")
    for folder in (seen, tmp_path):
        write_dataset(folder / "data", tiny_clip, rows=20)
    sync = ["jobs.refine", "--method", "sync", "--sentences", "clip", "--clip", str(tiny_clip)]
    draw = ["jobs.refine", "--method", "best-of-n", "--clip", str(tiny_clip)]
    featurise = ["jobs.featurise", "--clip", "embedded"]
    for job, data, out in (
        (sync, seen, tmp_path),
        (draw, seen, tmp_path),
        (featurise, seen, tmp_path),
        (sync, tmp_path, seen),
        (featurise, tmp_path, seen),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", *job, "--data", str(data / "data"), "--out", str(out / "made")],
            cwd=ROOT, env=os.environ | {"RAY_ADDRESS": head.address}, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        blind = f"--out {out / 'made'}" if out == tmp_path else f"--data {data / 'data'}"
        assert ended.returncode == 2, ended.stderr
        assert f"{blind}: a folder of one machine, which node" in ended.stderr.splitlines()[-1]
        assert not list((out / "made").rglob("*.*")), "something was begun"


@pytest.mark.parametrize("job", ["train", "sweep"])
def test_a_run_in_a_folder_that_a_node_does_not_see_is_refused(
    head: Cluster, other_machine: None, tmp_path: Path, tiny_clip: Path, job: str
) -> None:
    data = write_dataset(tmp_path / "data", tiny_clip, rows=24)
    trials = ["--param=lr_factor=0.1,0.2", "--search=grid"] if job == "sweep" else []
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", "--data", data, "--out", tmp_path / "run", "--preset=embedded", *trials],
        cwd=ROOT, env=os.environ | {"RAY_ADDRESS": head.address}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "a folder of one machine, which node" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "run").rglob("*.*")), "something was begun"


@pytest.mark.parametrize("run_on", ["ray", "auto"])
def test_a_folder_that_a_node_does_not_see_is_verified_in_one_process_or_refused(
    head: Cluster, other_machine: None, tmp_path: Path, run_on: str
) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    # As for a dataset that is large: the job itself takes one process for a small one.
    verify = (
        "import sys, cluster.shard_work; cluster.shard_work.MANY_SAMPLES = 1; "
        "from jobs.verify import JOB; JOB.main(sys.argv[1:])"
    )
    job = subprocess.run(
        [sys.executable, "-c", verify, str(tmp_path / "data"), "--run-on", run_on], cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": head.address}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (job.returncode == 0) is (run_on == "auto"), job.stderr
    assert "a folder of one machine, which node" in job.stderr
    assert ("--run-on process" in job.stderr) is (run_on == "ray")
