"""The short form of `make chaos`: kill -9 in the middle of a run, of each kind of thing that a run is made of."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.dataset.verify import verify
from cluster.store.store import open_store
from tests.helpers.job_runs import running
from tests.helpers.paths import ROOT
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(("generator", "driver"), id="generator-driver"),
        pytest.param(
            ("raylet", "store", "monitor", "driver"), id="raylet-store-monitor-driver", marks=pytest.mark.slow
        ),
        pytest.param(("scorer", "generator"), id="scorer-generator", marks=pytest.mark.slow),
    ],
)
def test_kills_leave_no_trace_in_the_dataset(victims: tuple[str, ...]) -> None:
    captions = 60 * len(victims)
    command = ["-m", "tests.chaos.chaos", "--victims", ",".join(victims), "--seed", "0", "--captions", str(captions)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout, done.stderr)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == len(victims) and report["drivers_started"] == 1 + victims.count("driver")


@pytest.mark.slow
def test_two_drivers_on_one_output_make_the_same_dataset(tmp_path: Path) -> None:
    captions = ["\x00", *(f"caption number {index}" for index in range(120)), "x" * 3000]
    corpus = write_corpus(tmp_path, captions)
    command = [
        sys.executable, "-m", "jobs.generate", "--corpus", str(corpus), "--out", str(tmp_path / "out"), "--t2i", "null",
        "--shard-size", "2", "--generators", "1",
    ]  # fmt: skip
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        drivers = [stack.enter_context(running(command, **streams)) for _ in range(2)]
        outputs = [driver.communicate(timeout=300) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    make_dataset_in_process(tmp_path / "alone", corpus, null_spec(), shard_size=7)
    both, alone = verify(open_store(tmp_path / "out")), verify(open_store(tmp_path / "alone"))
    assert both["ok"], both
    assert (both["stored"], both["quarantined"], both["fingerprint"]) == (120, 2, alone["fingerprint"])
    assert not list((tmp_path / "out").rglob("*.tmp"))
