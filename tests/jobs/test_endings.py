"""A job that is stopped, or that nobody listens to: its status, its one line, and nothing left running."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from cluster.options import BEGINS_ANEW, WITH_RESUME, Request
from jobs.__main__ import job_names
from jobs.endings import descendants
from tests.helpers.job_runs import running
from tests.helpers.paths import ROOT
from tests.helpers.stored import shards_stored
from tests.helpers.tiny_generation import write_corpus

#: A job as any other, but for what it does: it starts a process, says so, and never ends by itself.
JOB = """
import subprocess, sys, time
from dataclasses import dataclass
from cluster.options import Request, option
from jobs.command_line import Job

@dataclass(frozen=True, kw_only=True)
class SleepRequest(Request):
    how: str = option("sleep", help="what it does")

def run(request):
    if request.how == "done":
        return {"done": 1}
    child = subprocess.Popen(["sleep", "1000"])
    print(child.pid, file=sys.stderr, flush=True)
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            if request.how == "sleep":
                raise

Job("sleep", "Sleeps. Long.", SleepRequest, run).main()
"""


def start(*arguments: object, **streams: int) -> AbstractContextManager[subprocess.Popen]:
    return running([sys.executable, *arguments], text=True, **streams)


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    for _ in range(50):
        if not any(map(is_running, pids)):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("how", "signals"), [("sleep", 1), ("stuck", 1), ("stuck", 2)])
def test_a_stopped_job_ends_with_its_status_one_line_and_no_orphan(how: str, signals: int, number: int) -> None:
    with start("-c", JOB, "--how", how, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        child = int(process.stderr.readline())
        for _ in range(signals):
            process.send_signal(number)
            time.sleep(0.5)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.splitlines() == [
        f"stopped by {signal.Signals(number).name}: what is written is whole; run the same command again to go on"
    ]
    assert gone([child])


@pytest.mark.parametrize("name", job_names())
def test_every_job_ends_so(name: str) -> None:
    """Whatever a job does, its process begins with Job.main: a signal is waited for in its place."""
    program = (
        f"import sys, time, dataclasses; from jobs.{name} import JOB; from cluster.options import Request\n"
        "def wait(request):\n    print('ready', file=sys.stderr, flush=True); time.sleep(1000)\n"
        "job = dataclasses.replace(JOB, run=wait)\n"
        "object.__setattr__(job, 'read', lambda argv: Request())\n"
        "job.main([])"
    )
    with start("-c", program, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None and process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    again = {"train": WITH_RESUME, "sweep": WITH_RESUME} | dict.fromkeys(("evaluate", "caption", "report"), BEGINS_ANEW)
    assert said == f"stopped by SIGTERM: what is written is whole; {again.get(name, Request.AGAIN)}\n"


@pytest.mark.parametrize("stream", ["> /dev/full", "| true", ">&-", "2> /dev/full", "> /dev/full 2> /dev/full", "<&-"])
def test_streams_that_nobody_reads_change_no_status(stream: str, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    command = f"{sys.executable} {tmp_path}/job.py --how done {stream}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_what_ray_prints_is_not_on_stdout(tmp_path: Path) -> None:
    """Not while the job works, and not when the interpreter exits: Ray keeps repeated lines until then."""
    work = """if request.how == "done":
        import ray
        from cluster.session import start_ray
        start_ray(num_cpus=2)
        @ray.remote(num_cpus=0)
        def chat(number):
            print("a worker says so")
        ray.get([chat.remote(number) for number in range(4)])
        time.sleep(2)  # until the driver has read it"""
    (tmp_path / "job.py").write_text(JOB.replace('if request.how == "done":', work))
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py", "--how", "done"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"done": 1}
    assert "a worker says so" in done.stderr and "repeated" in done.stderr


@pytest.mark.parametrize(
    "locale",
    [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}],
)
def test_names_and_captions_are_utf_8_whatever_the_locale(locale: dict[str, str], tmp_path: Path) -> None:
    read = "return {'файл': open(request.how).read(), 'name': request.how, 'argument': sys.argv[-1]}"
    program = JOB.replace('if request.how == "done":', "if True:").replace('return {"done": 1}', read)
    (tmp_path / "job.py").write_text(program, encoding="utf-8")
    file = tmp_path / "данные.txt"
    file.write_text("ein weißer Hund, 白い犬", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, tmp_path / "job.py", "--how", file],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **locale}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"файл": "ein weißer Hund, 白い犬", "name": str(file), "argument": str(file)}


@pytest.mark.parametrize("command", ["-m jobs", "-m jobs.verify --help"])
def test_help_for_nobody_is_no_failure(command: str) -> None:
    done = subprocess.run(["bash", "-c", f"{sys.executable} {command} > /dev/full"], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_generation_stopped_while_it_draws_keeps_its_shards_and_goes_on(number: int, tmp_path: Path, run_job) -> None:
    corpus = write_corpus(tmp_path, [f"caption number {index}" for index in range(400)])
    arguments = ["--corpus", corpus, "--out", tmp_path / "out", "--t2i", "null", "--shard-size", 2]
    with start("-m", "jobs.generate", *arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        while shards_stored(tmp_path / "out") < 3:
            assert process.poll() is None
            time.sleep(0.02)
        started = descendants(process.pid)
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert said.splitlines()[-1].startswith(f"stopped by {signal.Signals(number).name}: ")
    assert "Traceback" not in said and gone(started)
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/shards").glob("*.parquet")}
    assert 3 <= len(shards) < 200 and not (tmp_path / "out/dataset.json").exists()

    run = run_job("generate", *arguments)
    assert run.returncode == 0, run.stderr
    assert run.summary["stored"] == 400 and run.summary["skipped"] >= 2 * len(shards)
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert json.loads((tmp_path / "out/dataset.json").read_text())
