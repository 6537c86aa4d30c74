"""What a worker raises reaches the user as what it is; and a Ray of this machine is of this machine alone."""

import contextlib
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.utils import check_version_info
from ray.exceptions import RayTaskError

from cluster import session
from cluster.dataset.documents import OtherSchema
from cluster.ray_state import actors_are_placed
from cluster.session import (
    _resources,
    _Wanted,
    cpus_for_each,
    free_room,
    is_no_user_error,
    protect_token_file,
    room_for,
    user_error,
    waiting_for,
)
from jobs.endings import descendants
from pcm.errors import InputError, StoreFailure
from tests.helpers.paths import ROOT
from tests.helpers.waiting import Holds, wait_until

RECORD = logging.LogRecord("ray.data.exceptions", logging.ERROR, "", 0, "a long traceback", None, None)


@pytest.mark.parametrize(
    ("error", "line", "tries"),
    [
        (
            "AF_UNIX path length cannot exceed 107 bytes: /x",
            r"/scratch/job \(TMPDIR\) is too long .*RAY_TMPDIR=/tmp",
            1,
        ),
        ("no room", r"3 times tried .* look into /scratch/job/ray/session_latest/logs", 3),
    ],
)
def test_a_ray_that_does_not_start_says_what_to_mend(
    error: str, line: str, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def init(*arguments: object, **options: object) -> None:
        tried.append(options)
        raise OSError(error)

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/scratch/job")
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with pytest.raises(InputError, match=line):
        session._start_local(None, {})
    assert len(tried) == tries


@pytest.mark.parametrize(("of_ray", "of_python"), [("2.55.1", None), (None, "3.10.4")])
def test_a_cluster_of_another_ray_or_python_is_named_in_one_line(
    of_ray: str | None, of_python: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = (ray.__version__, platform.python_version())
    there = (of_ray or ours[0], of_python or ours[1])

    def init(**options: object) -> None:
        check_version_info(dict(zip(("ray_version", "python_version"), there, strict=True)), "node 10.0.0.7:6379")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(InputError) as caught:
        session._join(None)
    assert str(caught.value) == (
        f"RAY_ADDRESS 10.0.0.1:6379: that cluster runs Ray {there[0]} on Python {there[1]}, and this process "
        f"Ray {ours[0]} on Python {ours[1]}; run the job with the cluster's, as in its image"
    )


@pytest.mark.parametrize(
    "error", [ConnectionError("Could not find any running Ray instance."), RuntimeError("Failed to connect to GCS.\n")]
)
def test_a_cluster_that_is_not_there_is_told_of_in_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise error

    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(
        InputError, match=r"RAY_ADDRESS auto: the cluster cannot be joined \((Could|Failed).*\.\); give"
    ):
        session._join(None)


def test_an_input_error_is_found_under_what_ray_wraps_around_it() -> None:
    inner = InputError("batch size 0: must be at least 1")
    task = RayTaskError("draw", "Traceback", inner)
    outer = RuntimeError("pipeline failed")
    outer.__cause__ = task
    assert user_error(outer) is inner
    other = OtherSchema("a dataset of schema version 99")
    assert user_error(RayTaskError("read", "Traceback", other).as_instanceof_cause()) is other
    told = user_error(RuntimeError("Traceback\npcm.errors.InputError: no such model\n"))
    assert isinstance(told, InputError) and str(told) == "no such model"
    assert isinstance(user_error(RuntimeError("x\npcm.errors.StoreFailure: the disk is full\n")), StoreFailure)
    refused = StoreFailure("s3://b: access refused")
    assert user_error(RayTaskError("read", "Traceback", refused)) is refused
    told = user_error(RuntimeError("Traceback\npcm.errors.StoreFailure: s3://b: access refused\n"))
    assert told is not None and str(told) == "s3://b: access refused"
    assert user_error(RayTaskError("draw", "Traceback", ValueError("a bug"))) is None


def test_ray_data_keeps_its_traceback_of_a_users_error_to_itself() -> None:
    assert is_no_user_error(RECORD)
    for error, shown in ((InputError("no such model"), False), (ValueError("a bug"), True)):
        try:
            raise error
        except ValueError:
            assert is_no_user_error(RECORD) is shown


def test_ray_tune_keeps_it_to_itself_too_where_it_hands_the_error_to_the_log() -> None:
    record = copy(RECORD)
    for cause, shown in ((InputError("no such model"), False), (ValueError("a bug"), True)):
        error = RayTaskError("train", "Traceback", cause)
        record.exc_info = (type(error), error, None)
        assert is_no_user_error(record) is shown


def test_workers_start_with_the_environment_that_is_asked_for() -> None:
    code = (
        "import os, ray; from cluster.session import start_ray; start_ray(num_cpus=1, worker_env={'PCM_ASKED': 'for'});"
        "print(ray.get(ray.remote(lambda: os.environ.get('PCM_ASKED')).remote()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=180)
    assert done.stdout.splitlines()[-1:] == ["for"], done.stderr


def test_a_cluster_that_somebody_started_here_is_not_joined_unasked() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    code = (
        "import ray; from cluster.session import start_ray; start_ray(num_cpus=1);print(ray.cluster_resources()['CPU'])"
    )
    with tempfile.TemporaryDirectory(prefix="pcm-") as folder:  # Ray's sockets need short paths
        environment["RAY_TMPDIR"] = folder
        ray = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=7"]
        ray += ["--port=0", "--include-dashboard=false", "--disable-usage-stats"]
        other = subprocess.Popen(ray, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until((Path(folder) / "ray/ray_current_cluster").exists, seconds=120, said="no cluster")
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        finally:
            for pid in [*descendants(other.pid), other.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            other.wait()
    assert done.stdout.splitlines()[-1:] == ["1.0"], done.stderr


@pytest.mark.parametrize(("hard", "soft"), [(4096, 4096), (64, 64), (20_000, 8192)])
def test_as_many_open_files_as_ray_recommends_are_allowed_and_a_low_limit_is_named(hard: int, soft: int) -> None:
    code = (
        f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (60, {hard}))\n"
        "from cluster import session; session._raise_file_limit()\n"
        "print(r.getrlimit(r.RLIMIT_NOFILE)[0], 'ulimit -n' in session._low_limits())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(soft), str(soft < 8192)], done.stderr


LISTEN = "0A"  # of /proc/net/tcp


def listening(pids: set[int]) -> set[str]:
    """The addresses, in hexadecimal, at which processes listen."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(file))
            except OSError:
                continue
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == LISTEN and f"socket:[{line[9]}]" in sockets}


def test_a_local_ray_listens_on_the_loopback_alone_writes_no_token_and_is_silent(tmp_path: Path) -> None:
    program = (
        "from cluster.session import start_ray; start_ray(num_cpus=1)\n"
        "import ray.data; print(*ray.data.range(1).iter_rows(), flush=True); input()"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment | {"HOME": str(tmp_path)}, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout is not None and process.stdout.readline() == "{'id': 0}\n"
        addresses = listening({process.pid, *descendants(process.pid)})
        _, said = process.communicate("\n")
    assert said == ""
    assert addresses and addresses <= {"0100007F", f"{'0' * 16}FFFF00000100007F"}
    assert not (tmp_path / ".ray/auth_token").exists()


@pytest.mark.parametrize("variable", ["HOME", "RAY_AUTH_TOKEN_PATH"])
def test_the_token_file_of_a_cluster_is_for_its_owner_alone(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    file = tmp_path / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o644)
    monkeypatch.setenv(variable, str(tmp_path if variable == "HOME" else file))
    protect_token_file()
    assert file.stat().st_mode & 0o777 == 0o600
    file.unlink()
    protect_token_file()


def test_a_worker_has_its_cpus_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes of two CPUs have no room for a worker with six: Ray would wait for it without a word."""
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}} for _ in range(3)]
    head, lost = {"Alive": True, "Resources": {}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    monkeypatch.setattr("ray.nodes", lambda: [head, lost, *nodes])
    assert [room_for(cpus=cpus, gpus=0) for cpus in (1, 2, 3, 6)] == [6, 3, 0, 0]
    assert [cpus_for_each(workers) for workers in (1, 3, 4, 9)] == [2, 2, 1, 1]
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 48.0, "GPU": 4.0}}] * 2)
    assert [cpus_for_each(workers, gpus=1) for workers in (1, 2, 8)] == [48, 48, 12]
    assert room_for(cpus=1, gpus=0.25) == 32 and room_for(cpus=0, gpus=1) == 8
    monkeypatch.setattr("ray.nodes", lambda: [head])
    assert cpus_for_each(1) == 1 and room_for(cpus=1, gpus=0) == 0


def test_a_cluster_that_has_nothing_for_work_yet_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {"memory": 1e9}}]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert _resources() == "no CPUs or GPUs yet"
    nodes.append({"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}})
    assert _resources() == "4 CPU, 1 GPU"
    del nodes[1]["Resources"]["GPU"]
    assert _resources() == "4 CPU"


def test_a_queue_behind_other_work_is_said_as_long_as_there_is_one(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="cluster.session")
    monkeypatch.setattr("cluster.session.SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr("cluster.session.SECONDS_BETWEEN_WAITING_LINES", 0.2)
    monkeypatch.setattr("cluster.session.SECONDS_TO_START", 0.1)
    wait_until(lambda: free_room(cpus=1, gpus=0) == 2)
    holder = ray.remote(Holds).options(num_cpus=2).remote()
    ray.get(holder.ready.remote())
    wait_until(lambda: free_room(cpus=1, gpus=0) == 0)

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records]

    with waiting_for(cpus=1, gpus=0):
        assert lines() == [
            "waiting for 1 CPUs and 0 GPUs; the cluster has 2 and 0 now, of which 0 and 0 are free (for 0 s)"
        ]
    caplog.clear()
    with waiting_for(cpus=1, gpus=0, placed=actors_are_placed):
        waits = ray.remote(Holds).options(num_cpus=1).remote()
        wait_until(lambda: len(lines()) == 3)
        ray.kill(holder)
        ray.get(waits.ready.remote())
    again = ray.remote(Holds).options(num_cpus=1).remote()
    ray.get(again.ready.remote())
    wait_until(lambda: free_room(cpus=1, gpus=0) == 0 and actors_are_placed())
    caplog.clear()
    with waiting_for(cpus=1, gpus=0, placed=actors_are_placed):
        time.sleep(1)
    assert lines() == [], "the job has all of it itself"
    for actor in (waits, again):
        ray.kill(actor)


def test_what_is_waited_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}} for name in "abc"]
    nodes[2]["Labels"] = {"role": "training"}
    free: dict[str, dict[str, float]] = {
        "a": {"CPU": 2.0, "GPU": 0.5},
        "b": {"CPU": 2.0, "GPU": 0.5},
        "c": {"CPU": 4.0},
    }
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("cluster.session.free_resources", lambda: free)

    def line(**asked: Any) -> str:
        return _Wanted(**{"cpus": 4, "gpus": 1, "workers": 1, "labels": {}} | asked).line(seconds=90_000)

    assert line(workers=4) == "waiting for 16 CPUs and 4 GPUs; the cluster has 12 and 3 now (for 1 d 1 h)"
    assert line(cpus=6, workers=2) == (
        "waiting for 12 CPUs and 2 GPUs, on one node for each of 2 workers; the cluster has 12 and 3 now (for 1 d 1 h)"
    )
    assert line() == (
        "waiting for 4 CPUs and 1 GPUs, on one node; the cluster has 12 and 3 now, of which 8 and 1 are free "
        "(for 1 d 1 h)"
    )
    assert line(labels={"role": "training"}) == (
        "waiting for 4 CPUs and 1 GPUs; nodes with role=training have 4 and 1 now, of which 4 and 0 are free "
        "(for 1 d 1 h)"
    )
    free.clear()
    assert "of which 0 and 0 are free" in line()
