"""Every job stopped in the middle of its work, by each signal: its status, its line, no process left, work kept.

jobs.generate's own test is in test_endings.py, with what the jobs share.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from cluster.export.export import export_dataset
from cluster.export.request import ExportRequest
from cluster.store.store import open_store
from tests.helpers.job_runs import running
from tests.helpers.paths import ROOT
from tests.helpers.stored import shards_stored
from tests.helpers.tiny_dataset import TINY, write_checkpoint, write_dataset, write_pictures
from tests.helpers.tiny_generation import write_corpus

pytestmark = pytest.mark.slow

SETTINGS = tuple(f"--set={name}={value}" for name, value in TINY.items() if name != "epochs")
#: The share of TINY leaves too few of 60 captions to choose the best epoch on.
HALF_HELD_OUT = tuple(each if "holdout_fraction" not in each else "--set=holdout_fraction=0.5" for each in SETTINGS)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_t2i: Path, run_job) -> Path:
    """What the jobs work on: enough of it for a job to be in the middle of it."""
    folder = tmp_path_factory.mktemp("world")
    write_dataset(folder / "data", tiny_clip, rows=96)
    write_pictures(folder / "pictures", count=300)
    given = {"images": folder / "pictures", "captions": folder / "references.csv", "clip": tiny_clip, "shard-size": 5}
    made = run_job("featurise", "--out", folder / "photos", *(f"--{name}={value}" for name, value in given.items()))
    assert made.returncode == 0, made.stderr
    write_checkpoint(folder / "run" / "best", folder / "data")
    write_corpus(folder, [f"A red circle on a green ground, number {index}." for index in range(60)])
    official = ExportRequest(data="it", out="there", to="official", name="sd", max_length=12)
    export_dataset(open_store(folder / "photos"), open_store(folder / "official"), official)
    for picture in (folder / "official/images").rglob("*.png"):
        picture.rename(picture.with_suffix(".jpg"))  # as published; what is in it decides
    (folder / "clip").symlink_to(tiny_clip)
    (folder / "t2i").symlink_to(tiny_t2i)
    return folder


def family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def opened(pid: int, part: str) -> bool:
    """Whether a process of the job has a file open in whose path this is."""
    for process in family(pid):
        try:
            if any(part in file.path for file in process.open_files()):
                return True
        except psutil.Error:
            continue
    return False


def loaded(pid: int, library: str) -> bool:
    """Whether the job's own process has this library in its memory."""
    try:
        return any(library in mapped.path for mapped in psutil.Process(pid).memory_maps())
    except psutil.Error:
        return False


def runs(pid: int, program: str) -> bool:
    for process in family(pid):
        try:
            if process.name() == program:
                return True
        except psutil.Error:
            continue
    return False


@dataclass(frozen=True)
class Case:
    """A job, its arguments ({} is the world's folder, OUT what it writes), and what shows that it is at work."""

    job: str
    arguments: tuple[str, ...]
    at_work: Callable[[int, Path], bool]
    #: What the same command needs to go on; None where there is nothing to go on with: it begins again, or elsewhere.
    again: tuple[str, ...] | None = ()


CASES = {
    "train": Case(
        "train", ("--data={}/data", "--out=OUT", "--epochs=12", *SETTINGS, "--num-workers=2", "--cpus-per-worker=1"),
        lambda pid, out: (out / "best/model.safetensors").exists(), again=("--resume",),
    ),
    "stream": Case(
        "stream",
        ("--corpus={}/captions.txt", "--out=OUT", "--t2i={}/t2i", "--clip={}/clip", "--steps=2", "--shard-size=5",
         "--epochs=3", *HALF_HELD_OUT, "--set=top_concepts=2"),  # few nouns
        lambda pid, out: shards_stored(out / "dataset") > 2,
    ),
    "sweep": Case(
        "sweep",
        ("--data={}/data", "--out=OUT", "--param=lr_factor=0.1,0.2,0.4", "--search=grid", "--epochs=4", *SETTINGS),
        lambda pid, out: any(out.glob("trials/*/best/*")), again=("--resume",),
    ),
    "evaluate, captioning": Case(
        "evaluate", ("--checkpoint={}/run/best", "--images={}/pictures", "--references={}/references.csv", "--out=OUT",
                     "--clip={}/clip"),
        lambda pid, out: loaded(pid, "libtorch"),  # to caption with; a picture is open too short a time to be seen
    ),
    "evaluate, in Java": Case(
        "evaluate", ("--checkpoint={}/run/best", "--images={}/pictures", "--references={}/references.csv", "--out=OUT",
                     "--limit=5", "--clip={}/clip"),
        lambda pid, out: (out / "captions.json").exists() and runs(pid, "java"),  # not its check at the beginning
    ),
    "evaluate, on actors": Case(
        "evaluate", ("--checkpoint={}/run/best", "--images={}/pictures", "--references={}/references.csv", "--out=OUT",
                     "--num-workers=2", "--clip={}/clip"),
        lambda pid, out: opened(pid, "/pictures/"),
    ),
    "caption": Case(
        "caption",
        ("--checkpoint={}/run/best", "--out=OUT.json", "--clip={}/clip",
         *(f"{{}}/pictures/scene{number}.png" for number in range(1000, 1300))),
        lambda pid, out: opened(pid, "/pictures/"),
    ),
    "featurise": Case(
        "featurise", ("--images={}/pictures", "--captions={}/references.csv", "--out=OUT", "--clip={}/clip",
                      "--shard-size=5"),
        lambda pid, out: any((out / "shards").glob("*.parquet")),
    ),
    "export": Case(
        "export", ("--data={}/photos", "--out=OUT", "--to=official", "--name=sd"),
        lambda pid, out: any(out.glob("features/*/*")), again=None,
    ),
    "import_official": Case(
        "import_official",
        ("--annotations={}/official/mscoco_caption_anno_train.pkl", "--images={}/official/images/sd",
         "--features={}/official/features/sd", "--vocabulary={}/official/vocabulary.txt",
         "--concepts={}/official/concepts.pickle", "--clip-head={}/official/clip_head.pth", "--clip={}/clip",
         "--out=OUT", "--shard-size=5"),
        lambda pid, out: any((out / "shards").glob("*.parquet")),
    ),
    "verify": Case("verify", ("{}/photos",), lambda pid, out: opened(pid, "/photos/shards/")),
    "report": Case(
        "report", ("--data={}/photos", "--out=OUT.html"), lambda pid, out: opened(pid, "/photos/shards/")
    ),
    "demo": Case(
        "demo", ("--out=OUT", "--captions=400"), lambda pid, out: any(out.glob("*/shards/*.parquet")), again=None
    ),
}  # fmt: skip


def command(case: Case, world: Path, out: Path) -> list[str]:
    arguments = [text.replace("{}", str(world)).replace("OUT", str(out)) for text in case.arguments]
    return [sys.executable, "-m", f"jobs.{case.job}", *arguments]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", CASES)
def test_a_job_stopped_at_work_ends_so_and_goes_on(name: str, number: int, world: Path, tmp_path: Path) -> None:
    case, out = CASES[name], tmp_path / "out"
    asked = command(case, world, out)
    with running(asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not case.at_work(process.pid, out):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(process.communicate())
            time.sleep(0.005)
        started = family(process.pid)
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (128 + number, "")
    assert said.splitlines()[-1].startswith(f"stopped by {signal.Signals(number).name}: "), said  # and nothing after it
    assert not psutil.wait_procs(started, timeout=10)[1]
    if number == signal.SIGINT and case.again is not None:
        done = subprocess.run([*asked, *case.again], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
