"""Machines as they are: homes and temporary folders that allow little, another user, little shared memory."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode != 0,
        reason="needs the right to mount",
    ),
]

NOBODY = 65534


@dataclass(frozen=True)
class Surroundings:
    """`first`: a shell command before the job, in a mount namespace of its own; PLACE is an empty folder."""

    first: str = "true"
    environment: dict[str, str] = field(default_factory=dict)
    user: int = 0


CASES = {
    "a HOME that is read-only": Surroundings('mount -t tmpfs -o ro none "$PLACE"', {"HOME": "PLACE"}),
    "a HOME that is not there": Surroundings(environment={"HOME": "/nonexistent"}),
    "a TMPDIR in which nothing may be executed": Surroundings(
        'mount -t tmpfs -o noexec none "$PLACE"', {"TMPDIR": "PLACE"}
    ),
    "shared memory as Docker gives it": Surroundings("mount -t tmpfs -o size=64m none /dev/shm"),
    "another user without a home": Surroundings(environment={"HOME": "/nonexistent"}, user=NOBODY),
}


def run(folder: Path, surroundings: Surroundings, *command: str) -> subprocess.CompletedProcess[str]:
    place = folder / "place"
    place.mkdir(exist_ok=True)
    environment = {name: str(place) if value == "PLACE" else value for name, value in surroundings.environment.items()}
    program = [sys.executable, "-m", *command]
    if surroundings.user:
        user = str(surroundings.user)
        program = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *program]
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{surroundings.first} && exec "$@"', "sh", *program],
        cwd=ROOT, env={**os.environ, "PLACE": str(place), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_dataset_is_made_and_trained_on(name: str) -> None:
    surroundings = CASES[name]
    if surroundings.user and not _may_run_python(surroundings.user):
        pytest.skip(f"{Path(sys.executable).resolve()} is closed to other users")
    folder = Path("/tmp") / f"pcm-surroundings-{os.getpid()}"  # pytest's own is closed to other users
    folder.mkdir()
    try:
        os.chown(folder, surroundings.user, -1)
        made = run(
            folder, surroundings, "jobs.generate", "--corpus", "embedded", "--limit", "24", "--t2i", "embedded",
            "--clip", "embedded", "--shard-size", "12", "--out", f"{folder}/data",
        )  # fmt: skip
        assert made.returncode == 0, made.stderr[-3000:]
        trained = run(
            folder, surroundings, "jobs.train", "--data", f"{folder}/data", "--out", f"{folder}/run",
            "--epochs", "1", "--set", "batch_size=2", "--set", "holdout_fraction=0.25",
        )  # fmt: skip
        assert trained.returncode == 0, trained.stderr[-3000:]
        assert (folder / "run/best").is_dir()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _may_run_python(user: int) -> bool:
    again = "import subprocess, sys; subprocess.run([sys.executable, '-c', ''], check=True)"
    tried = subprocess.run(
        ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", sys.executable, "-c", again],
        capture_output=True, check=False,
    )  # fmt: skip
    return tried.returncode == 0
