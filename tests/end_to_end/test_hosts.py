"""A cluster of several hosts: they come one by one, are lost, are cut off and come back, and the head is killed."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.dataset.verify import verify
from cluster.generation.stages.monitor import MAX_IN_HAND
from tests.helpers.hosts import Hosts, Job, Slow, can_make_hosts, several_hosts
from tests.helpers.paths import ROOT
from tests.helpers.stored import proven, shards_stored
from tests.helpers.tiny_dataset import TINY, write_dataset
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus
from tests.helpers.trained import step_losses
from tests.helpers.waiting import wait_until

#: Shards that an idle generator may draw again when nothing else is left.
LATE_AT_THE_END = 2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_make_hosts(), reason="needs root, iproute2 and the right to make namespaces"),
]

CAPTIONS = [f"caption number {number}" for number in range(240)]
SHARD_SIZE = 2


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with several_hosts(4) as made:
        yield made


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the same dataset, made in one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    store, *_ = make_dataset_in_process(folder / "data", write_corpus(folder, CAPTIONS), null_spec(), shard_size=64)
    return verify(store)["fingerprint"]


def generate(hosts: Hosts, folder: Path) -> Job:
    corpus = write_corpus(folder, CAPTIONS)
    return hosts.job(
        "jobs.generate", "--corpus", str(corpus), "--out", f"{folder}/data", "--t2i", "null", "--shard-size",
        str(SHARD_SIZE), "--generators", "3", "--device", "cpu",
    )  # fmt: skip


def stored(folder: Path) -> int:
    return shards_stored(folder / "data")


def more_shards(job: Job, folder: Path, count: int = 5) -> None:
    """Wait until so many more shards are stored, or all."""
    goal = min(stored(folder) + count, len(CAPTIONS) // SHARD_SIZE)
    wait_until(lambda: stored(folder) >= goal or job.is_over(), seconds=300, said=f"{stored(folder)} shards")


def cost(summary: dict) -> str:
    """What the faults have cost."""
    again, shards = summary["shards_begun_again"], len(CAPTIONS) // SHARD_SIZE
    pause = summary["longest_pause_seconds"]
    return f"{again} of {shards} shards drawn again ({100 * again / shards:.1f} %), longest pause {pause:.1f} s"


def test_hosts_come_one_by_one_and_one_is_lost(hosts: Hosts, tmp_path: Path, wanted: str) -> None:
    head, one, two, three = hosts.hosts
    head.join(cpus=0, head=True)
    job = generate(hosts, tmp_path)
    time.sleep(5)  # it asks for generators that nobody can give yet
    one.join(cpus=2)
    more_shards(job, tmp_path)
    two.join(cpus=2)
    three.join(cpus=2)
    more_shards(job, tmp_path)
    one.lose()
    summary = job.summary()
    assert summary["stored"] == len(CAPTIONS)
    assert proven(tmp_path / "data")["fingerprint"] == wanted
    print(f"one by one, one lost: {cost(summary)}")


def test_a_link_that_is_cut_for_a_while_and_heals(hosts: Hosts, tmp_path: Path, wanted: str) -> None:
    head, one, two, _ = hosts.hosts
    head.join(cpus=0, head=True)
    one.join(cpus=2)
    two.join(cpus=2)
    job = generate(hosts, tmp_path)
    more_shards(job, tmp_path)
    one.cut()
    time.sleep(20)
    one.heal()
    summary = job.summary()
    assert summary["stored"] == len(CAPTIONS)
    assert proven(tmp_path / "data")["fingerprint"] == wanted
    print(f"link cut for 20 s: {cost(summary)}")


def test_an_answer_that_is_lost_with_a_link_is_asked_for_again(hosts: Hosts) -> None:
    """Its connection is gone at one end when the link heals. Who only waits there learns of it after minutes."""
    head, one, *_ = hosts.hosts
    head.join(cpus=0, head=True)
    one.join(cpus=1)
    hosts.wait_for_cpus(1)
    address, script = f"RAY_ADDRESS={hosts.ray_address}", str(ROOT / "tests/helpers/late_answer.py")
    asking = head.start("env", address, sys.executable, script, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert asking.stdout is not None and asking.stdout.readline() == "asking\n"
    time.sleep(2)
    one.cut()
    time.sleep(32)  # within 30 s TCP gives up a connection whose bytes nobody acknowledges
    one.heal()
    said, _ = asking.communicate(timeout=100)
    assert "answered" in said, said


def test_a_host_behind_a_slow_link_holds_up_nobody(tmp_path: Path, wanted: str) -> None:
    """200 ms there and back, 2 Mbit/s: its shards come late, and the others draw on meanwhile."""
    with several_hosts(4, slow={4: Slow(seconds=0.1, bits=2e6)}) as hosts:
        head, *workers = hosts.hosts
        head.join(cpus=0, head=True)
        for worker in workers:
            worker.join(cpus=1)
        hosts.wait_for_cpus(len(workers))
        job = generate(hosts, tmp_path)
        summary = job.summary()
    assert summary["stored"] == summary["generated"] == len(CAPTIONS)
    assert proven(tmp_path / "data")["fingerprint"] == wanted
    assert summary["shards_begun_again"] <= MAX_IN_HAND + LATE_AT_THE_END * len(workers)
    print(f"slow link: {cost(summary)}")


@pytest.mark.parametrize("seed", [0, 1])
def test_spot_notices_at_random_moments_hand_the_shards_back(
    hosts: Hosts, tmp_path: Path, wanted: str, seed: int
) -> None:
    """Three machines, of which one after another is given notice and taken away; another comes in its place."""
    chance = random.Random(seed)
    head, *workers = hosts.hosts
    head.join(cpus=0, head=True)
    for worker in workers:
        worker.join(cpus=1)
    hosts.wait_for_cpus(len(workers))  # a generator on each
    job = generate(hosts, tmp_path)
    notices = 0
    while notices < 4:
        more_shards(job, tmp_path, chance.randrange(3, 12))
        if job.is_over():
            break
        notices += 1
        leaving = chance.choice(workers)
        leaving.notice()
        time.sleep(chance.uniform(0, 3))  # what was begun on it meanwhile is lost too
        leaving.lose()
        more_shards(job, tmp_path, chance.randrange(1, 6))
        leaving.join(cpus=1)
    summary = job.summary()
    assert notices, "at least one while it was at work"
    assert summary["stored"] == summary["generated"] == len(CAPTIONS), "none lost, none drawn into the dataset twice"
    assert proven(tmp_path / "data")["fingerprint"] == wanted
    # A machine takes along what its generator has in hand, at the notice and, as Ray starts there again, when it goes.
    assert summary["shards_begun_again"] <= 2 * notices * MAX_IN_HAND + LATE_AT_THE_END * len(workers)
    print(f"seed {seed}: {notices} notices, {cost(summary)}")


def test_the_head_is_killed_and_the_same_command_goes_on(hosts: Hosts, tmp_path: Path, wanted: str) -> None:
    head, one, *_ = hosts.hosts
    head.join(cpus=0, head=True)
    one.join(cpus=2)
    job = generate(hosts, tmp_path)
    more_shards(job, tmp_path)
    head.lose()  # the driver is on it
    job.process.wait(timeout=60)
    before = stored(tmp_path)
    one.lose()
    head.join(cpus=0, head=True)
    one.join(cpus=2)
    again = generate(hosts, tmp_path).summary()
    assert again["skipped"] >= before * SHARD_SIZE > 0
    assert proven(tmp_path / "data")["fingerprint"] == wanted


def test_training_over_two_hosts_loses_one_and_goes_on(hosts: Hosts, tmp_path: Path, tiny_clip: Path) -> None:
    """The losses are those of one worker on one host."""
    head, one, two, _ = hosts.hosts
    data = write_dataset(tmp_path / "data", tiny_clip, rows=96)
    head.join(cpus=0, head=True)
    settings = [f"--set={name}={value}" for name, value in TINY.items() if name != "epochs"]

    def train(out: str, workers: str) -> Job:
        return hosts.job(
            "jobs.train", "--data", str(data), "--out", f"{tmp_path}/{out}", "--device", "cpu",
            "--cpus-per-worker", "1", "--num-workers", workers, "--epochs", "12", *settings,
        )  # fmt: skip

    one.join(cpus=1)
    two.join(cpus=1)
    job = train("run", "1:2")
    wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists() or job.is_over(), seconds=300, said="no epoch ended")
    one.lose()
    job.summary()
    train("alone", "1").summary()
    assert dict(step_losses(tmp_path / "run")) == pytest.approx(dict(step_losses(tmp_path / "alone")), rel=1e-4)
