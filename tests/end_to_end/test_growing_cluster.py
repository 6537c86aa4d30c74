"""A cluster that has nothing but its head yet: jobs say what they wait for, and begin when machines have come."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.helpers.job_runs import running
from tests.helpers.paths import ROOT
from tests.helpers.tiny_dataset import TINY, write_checkpoint, write_dataset, write_pictures
from tests.helpers.tiny_generation import CAPTIONS, write_corpus
from tests.helpers.trained import history, step_losses

pytestmark = pytest.mark.slow


@pytest.fixture
def head() -> Iterator[Cluster]:
    """A head that is given no work, as in ray_cluster.yaml."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def start(head: Cluster) -> Iterator[Callable[..., subprocess.Popen]]:
    """start("jobs.train", ...) -> the job, on the cluster."""
    settings = {"env": os.environ | {"RAY_ADDRESS": head.address}, "text": True}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with ExitStack() as stack:
        yield lambda *command: stack.enter_context(running([sys.executable, "-m", *command], **settings, **streams))


@pytest.fixture
def start_training(start: Callable[..., subprocess.Popen]) -> Callable[..., subprocess.Popen]:
    """start_training(data, out, ...) -> the job, of one epoch unless it is told otherwise."""
    settings = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]
    return lambda data, out, *arguments, epochs=1: start(
        "jobs.train", "--data", data, "--out", out, "--epochs", epochs, *settings, *arguments
    )


def test_training_waits_for_its_worker_and_says_so(
    head: Cluster, tmp_path: Path, tiny_clip: Path, start_training: Callable[..., subprocess.Popen]
) -> None:
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=24), tmp_path / "run"
    nobody = start_training(data, out)
    _, said = nobody.communicate(timeout=300)
    assert nobody.returncode == 2 and said.splitlines()[-1].startswith("error: --device auto: the cluster has no CPUs")
    assert not out.exists()

    job = start_training(data, out, "--device", "cpu")
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


def test_a_sweep_waits_for_its_trials_and_says_so(
    head: Cluster, tmp_path: Path, tiny_clip: Path, start: Callable[..., subprocess.Popen]
) -> None:
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=24), tmp_path / "sweep"
    settings = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]
    command = ["jobs.sweep", "--data", str(data), "--out", str(out), "--param=lr_factor=0.1,0.2", "--search=grid"]
    nobody = start(*command, "--epochs=1", *settings)
    _, said = nobody.communicate(timeout=300)
    assert nobody.returncode == 2 and said.splitlines()[-1].startswith("error: --device auto: the cluster has no CPUs")
    assert not out.exists()
    job = start(*command, "--epochs=1", *settings, "--device", "cpu")
    read_until(job, "waiting for 1 CPUs and 0 GPUs; the cluster has 0 and 0 now")
    head.add_node(num_cpus=2, object_store_memory=100_000_000)
    printed, said = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]
    assert json.loads(printed.splitlines()[-1])["by_status"] == {"finished": 2}


def test_generation_waits_for_its_first_machine_and_says_so(
    head: Cluster, tmp_path: Path, tiny_t2i: Path, start: Callable[..., subprocess.Popen]
) -> None:
    """Without --generators: the machine that comes counts with all its CPUs. One is lost while speed is measured."""
    out = tmp_path / "out"
    command = ["jobs.generate", "--corpus", str(write_corpus(tmp_path)), "--t2i", str(tiny_t2i), "--clip=null"]

    def start_generation(*options: str) -> subprocess.Popen:
        return start(*command, "--out", out, "--steps=2", *options)

    nobody = start_generation()
    _, said = nobody.communicate(timeout=300)
    assert nobody.returncode == 2 and said.splitlines()[-1].startswith("error: --device auto: the cluster has no CPUs")
    assert not out.exists()

    job = start_generation("--device", "cpu")
    read_until(job, "generators: waiting for a machine, for")
    first = head.add_node(num_cpus=2, object_store_memory=100_000_000)
    read_until(job, "one generator for each of the 2 CPUs that have come")
    read_until(job, "loading the model")
    head.remove_node(first, allow_graceful=False)
    read_until(job, "trying again (2 of 4)")
    read_until(job, "waiting for a machine, for")
    head.add_node(num_cpus=2, object_store_memory=100_000_000)
    printed, said = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]
    summary = json.loads(printed.splitlines()[-1])
    assert summary["stored"] == summary["expected"] == len(CAPTIONS)


def test_generation_waits_for_nodes_with_its_label_and_says_so(
    head: Cluster, tmp_path: Path, start: Callable[..., subprocess.Popen]
) -> None:
    """While a node with another label is idle, which neither counts nor draws."""
    head.add_node(num_cpus=4, object_store_memory=100_000_000, labels={"role": "training"})
    command = ["jobs.generate", "--corpus", write_corpus(tmp_path), "--t2i=null", "--clip=null", "--shard-size=2"]
    command += ["--out", tmp_path / "out", "--device=cpu", "--node-label=role=generation"]
    job = start(*command)
    read_until(job, "; 0 of the 0 CPUs of nodes with role=generation are free, and one takes")
    head.add_node(num_cpus=2, object_store_memory=100_000_000, labels={"role": "generation"})
    read_until(job, "one generator for each of the 2 CPUs that have come")
    printed, said = job.communicate(timeout=300)
    assert job.returncode == 0, said[-3000:]
    assert json.loads(printed.splitlines()[-1])["stored"] == len(CAPTIONS)


def read_until(job: subprocess.Popen, said: str) -> None:
    assert job.stderr is not None
    lines = []
    while not lines or said not in lines[-1]:
        lines.append(job.stderr.readline())
        assert lines[-1], "".join(lines)


def test_a_group_of_workers_grows_and_shrinks_with_the_cluster(
    head: Cluster, tmp_path: Path, tiny_clip: Path, start_training: Callable[..., subprocess.Popen]
) -> None:
    """With a node that comes and one that is lost the losses are those of an undisturbed run on one worker."""
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=96), tmp_path / "run"
    first = head.add_node(num_cpus=1, object_store_memory=100_000_000)
    job = start_training(data, out, "--device", "cpu", "--num-workers", "1:2", "--cpus-per-worker", "1", epochs=16)
    read_until(job, "1 worker(s) on cpu")
    head.add_node(num_cpus=1, object_store_memory=100_000_000)
    read_until(job, "2 worker(s) on cpu")
    head.remove_node(first, allow_graceful=False)
    read_until(job, "1 worker(s) on cpu")
    _, said = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]

    alone = start_training(data, tmp_path / "alone", "--device", "cpu", "--cpus-per-worker", "1", epochs=16)
    _, said = alone.communicate(timeout=600)
    assert alone.returncode == 0, said[-3000:]
    steps, values = zip(*step_losses(out), strict=True)
    undisturbed_steps, undisturbed = zip(*step_losses(tmp_path / "alone"), strict=True)
    assert steps == undisturbed_steps
    assert values == pytest.approx(undisturbed, rel=1e-4)


def test_a_group_of_two_grows_to_four_and_the_sizes_are_recorded(
    head: Cluster,
    tmp_path: Path,
    tiny_clip: Path,
    start_training: Callable[..., subprocess.Popen],
) -> None:
    data, out = write_dataset(tmp_path / "data", tiny_clip, rows=96), tmp_path / "run"
    for _ in range(2):
        head.add_node(num_cpus=1, object_store_memory=100_000_000)
    workers = ["--device", "cpu", "--num-workers", "2:4", "--cpus-per-worker", "1"]
    job = start_training(data, out, *workers, epochs=16)
    read_until(job, "2 worker(s) on cpu")
    for _ in range(2):
        head.add_node(num_cpus=1, object_store_memory=100_000_000)
    read_until(job, "4 worker(s) on cpu")
    printed, said = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]
    summary = json.loads(printed.splitlines()[-1])
    rows = history(out)
    first, second = summary["group_sizes"]
    assert (first, second["workers"]) == ({"from_step": 1, "workers": 2}, 4)
    assert rows[0]["group_sizes"] == [first] and rows[-1]["group_sizes"] == [first, second]
    assert second["from_step"] - 1 in {row["step"] for row in rows}, "after an epoch's checkpoint"


def test_a_caption_and_an_evaluation_wait_for_the_gpu_that_they_ask_for(
    head: Cluster,
    tmp_path: Path,
    tiny_clip: Path,
    start: Callable[..., subprocess.Popen],
) -> None:
    """Their drivers have none, and load nothing onto one."""
    checkpoint = write_checkpoint(tmp_path / "run/best", write_dataset(tmp_path / "data", tiny_clip, rows=24))
    pictures, references = write_pictures(tmp_path / "pictures", count=4), tmp_path / "references.csv"
    asked = ["--checkpoint", checkpoint, "--images", pictures, "--references", references]
    job = start("jobs.evaluate", *asked, "--device", "cuda", "--num-workers", 1)
    read_until(job, "waiting for 0 CPUs and 1 GPUs; the cluster has 0 and 0 now")
    picture = os.path.relpath(pictures / "scene1000.png", ROOT)
    other = start("jobs.caption", picture, "--checkpoint", checkpoint, "--device", "cuda", "--gpus-per-worker", 0.5)
    read_until(other, "waiting for 0 CPUs and 0.5 GPUs; the cluster has 0 and 0 now")
    head.add_node(num_cpus=1, num_gpus=2, object_store_memory=100_000_000)
    printed, said = job.communicate(timeout=600)
    assert job.returncode == 0, said[-3000:]
    assert json.loads(printed.splitlines()[-1])["n"] == 4
    printed, said = other.communicate(timeout=600)
    assert other.returncode == 0, said[-3000:]
    assert list(json.loads(printed.splitlines()[-1])["captions"]) == [picture]
