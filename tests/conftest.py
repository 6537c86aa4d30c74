"""What tests share: tiny models, one Ray session, jobs run as a user runs them."""

import importlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.job_runs import JobRun, run_job_process

if TYPE_CHECKING:
    from tests.helpers.seaweedfs import S3Server


# Before torch, Ray or a hub client is imported, here and in every process that a test starts.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests use local models only
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small processes on few cores
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
os.environ.setdefault("RAY_metrics_report_interval_ms", "1000")  # every 10 s otherwise
os.environ.pop("RAY_ADDRESS", None)  # never a cluster that the machine happens to have


@pytest.fixture(scope="session", autouse=True)
def _weights_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a machine knows of its models stays out of the home directory."""
    os.environ["PCM_WEIGHTS_CACHE"] = str(tmp_path_factory.mktemp("weights-cache"))


@pytest.fixture(scope="session")
def run_job() -> Callable[..., JobRun]:
    """run_job("generate", "--out", path, ...) -> JobRun. Costs a process and, for most jobs, a start of Ray."""
    return run_job_process


@pytest.fixture
def call_job(capsys: pytest.CaptureFixture) -> Callable[..., JobRun]:
    """The same in this process: cheaper, and a job that needs Ray uses `ray_session`'s."""

    def call(name: str, *args: object) -> JobRun:
        job = importlib.import_module(f"jobs.{name}").JOB
        capsys.readouterr()
        try:
            job.main([str(arg) for arg in args])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        last = out.splitlines()[-1] if out else ""  # of a run that fails it may be one of Ray's own
        return JobRun(status, json.loads(last) if last.startswith('{"') else None, err)

    return call


@pytest.fixture(scope="session")
def _ray_at_end() -> Iterator[None]:
    yield
    import ray

    ray.shutdown()


@pytest.fixture
def ray_session(_ray_at_end: None) -> None:
    """Ray on this machine with two CPUs, started once for all tests."""
    from cluster.session import start_ray

    start_ray(num_cpus=2)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder: 32 px, 16 patches of 64, D = 32."""
    from tests.helpers.tiny_models import save_tiny_clip

    return save_tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def tiny_t2i(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder: 32 px pictures."""
    from tests.helpers.tiny_models import save_tiny_t2i

    return save_tiny_t2i(tmp_path_factory.mktemp("models") / "t2i")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[S3Server]":
    """A real S3 store (SeaweedFS). Give `s3_server.environment` to a job, or use the fixture `s3` in this process."""
    from tests.helpers.seaweedfs import seaweedfs

    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture
def s3(s3_server: "S3Server", monkeypatch: pytest.MonkeyPatch) -> "Iterator[S3Server]":
    """The S3 store, its endpoint and credentials in this process's environment for the time of one test."""
    import s3fs

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_server
    s3fs.S3FileSystem.clear_instance_cache()
