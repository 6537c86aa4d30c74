"""One job at a time works on a place, on its cluster and on its machine; what a killed one held is free."""

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster import only_job as module
from cluster.only_job import TRAINS, only_job
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from tests.helpers.job_runs import running
from tests.helpers.waiting import wait_until

HOW = "wait for its end, or end it (`ray job stop` where it was submitted, else SIGTERM to its driver)"


def refused(store: Store) -> str:
    """What a second job that does not wait is told."""
    with pytest.raises(InputError) as refusal, only_job(store, TRAINS, waits=False):
        pass
    return str(refusal.value)


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.0)


def test_a_second_job_on_the_cluster_is_refused_however_it_spells_the_place(
    ray_session: None, tmp_path: Path, no_patience: None
) -> None:
    store = open_store(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path)
    with only_job(store, TRAINS, waits=False) as (_, waited):
        assert not waited
        for spelled in ("run", "link/run"):
            other = open_store(tmp_path / spelled)
            assert refused(other) == f"{other.root}: another job on this cluster trains into it; {HOW}"
        with only_job(open_store(tmp_path / "other"), TRAINS, waits=False):
            pass
    assert not store.list() and (tmp_path / "run").is_dir()
    with only_job(store, TRAINS, waits=True) as (_, waited):
        assert not waited


def test_a_job_with_a_ray_of_its_own_is_met_at_the_folder(
    ray_session: None, tmp_path: Path, no_patience: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    store = open_store(tmp_path)
    found: list[bool] = []

    def wait() -> None:
        with only_job(store, TRAINS, waits=True) as (_, waited):
            found.append(waited)

    waiting = threading.Thread(target=wait, daemon=True)
    with module._locked(store):  # as such a job has it
        assert refused(store) == f"{tmp_path}: another job on this machine trains into it; {HOW}"
        waiting.start()
        wait_until(lambda: "another job on this machine trains into it; waiting for its end" in caplog.text)
        assert not found
    waiting.join(60)
    assert found == [True]


def test_a_job_that_is_ending_is_given_a_moment(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    begun: list[bool] = []

    def begin() -> None:
        with only_job(store, TRAINS, waits=False) as (_, waited):
            begun.append(waited)

    starting = threading.Thread(target=begin, daemon=True)
    looked = threading.Event()

    def sleep(seconds: float) -> None:
        looked.set()
        time.sleep(0.1)

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    with module._locked(store):
        starting.start()
        assert looked.wait(60)
    starting.join(60)
    assert begun == [True]


def test_a_file_system_without_locks_is_worked_on_all_the_same(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_here(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none_here)
    with only_job(open_store(tmp_path / "run"), TRAINS, waits=False) as (_, waited):
        assert not waited


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with module._locked(store):
        child = os.fork()
        if not child:
            signal.pause()
    try:
        with module._locked(store):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@contextmanager
def held_by_another_process(code: str, **environment: str) -> Iterator[None]:
    """A process runs the code, says when it holds the place, and waits; at the block's end it is killed."""
    code = f"import time\nfrom cluster.store.store import open_store\n{code}"
    code += ":\n    print('held', flush=True)\n    time.sleep(600)"
    settings = {"env": {**os.environ, **environment}, "stdout": subprocess.PIPE, "text": True}
    with running([sys.executable, "-c", code], **settings) as process:
        assert process.stdout is not None and "held" in process.stdout.readline()
        yield


def test_the_folder_of_a_killed_process_is_free(tmp_path: Path) -> None:
    """Though a program that it has started lives on."""
    store = open_store(tmp_path)
    code = "import subprocess\nfrom cluster.only_job import _locked\n"
    code += f"with _locked(open_store({str(tmp_path)!r})), subprocess.Popen(['sleep', '600'])"
    with held_by_another_process(code), pytest.raises(module._Taken), module._locked(store):
        pass
    with module._locked(store):
        pass


@pytest.mark.slow
def test_the_name_of_a_killed_driver_is_free(ray_session: None, tmp_path: Path) -> None:
    """Within the time for which a job that does not wait is patient: a driver may be started again at once."""
    import ray

    store = open_store(tmp_path)
    code = "from cluster.session import start_ray\nfrom cluster.only_job import only_job\nstart_ray()\n"
    code += f"with only_job(open_store({str(tmp_path)!r}), 'works', waits=False)"
    with held_by_another_process(code, RAY_ADDRESS=ray.get_runtime_context().gcs_address):
        assert "another job on this cluster trains into it" in refused(store)
    with only_job(store, TRAINS, waits=False) as (_, waited):
        assert waited in (True, False)
