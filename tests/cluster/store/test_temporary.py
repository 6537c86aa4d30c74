"""What is made in the machine's folder for temporary files is gone after use, also where its process is killed."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.generation.stages.watchdog import Watchdog
from cluster.store import temporary
from cluster.store.temporary import LEFTOVER_SECONDS, PREFIX, delete_leftovers, in_use, temporary_folder
from tests.helpers.paths import ROOT

KILLED = """
import os
from cluster.store.temporary import temporary_folder
with temporary_folder("copy") as folder:
    (folder / "checkpoint").write_bytes(bytes(100))
    print(folder, flush=True)
    input()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files, of a process that has made nothing there yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    delete_leftovers.cache_clear()
    return tmp_path


def make_old(path: Path) -> Path:
    then = time.time() - LEFTOVER_SECONDS - 60
    os.utime(path, (then, then), follow_symlinks=False)
    return path


def test_what_a_killed_process_left_is_deleted_after_a_day_and_what_is_in_use_is_not(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None
        left = make_old(Path(process.stdout.readline().strip()))
        delete_leftovers()
        assert (left / "checkpoint").exists(), "a trial of days works with it"
        process.kill()
    delete_leftovers.cache_clear()
    with temporary_folder("checkpoint") as own:
        assert list(folder.iterdir()) == [own]
    assert not list(folder.iterdir())


@pytest.mark.parametrize("begin", [delete_leftovers, lambda: Watchdog("actor", within="x.py")])
def test_only_our_own_are_deleted_and_only_old_ones(folder: Path, begin: Callable[[], object]) -> None:
    for name in (f"{PREFIX}checked-0", "pcm-datasets", "pcm-checkpoint-baseline", "other"):
        (folder / name).mkdir()
        (folder / name / "file").touch()
        make_old(folder / name)
    (folder / f"{PREFIX}copy-new").mkdir()
    (folder / f"{PREFIX}watchdog-1.txt").touch()
    make_old(folder / f"{PREFIX}watchdog-1.txt")
    (folder / f"{PREFIX}link").symlink_to(folder / "other")
    make_old(folder / f"{PREFIX}link")
    begin()
    there = {"pcm-datasets", "pcm-checkpoint-baseline", "other", f"{PREFIX}copy-new", f"{PREFIX}link"}
    assert {path.name for path in folder.iterdir()} == there
    assert (folder / "other" / "file").exists()


def test_what_another_user_left_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{PREFIX}copy-0").mkdir()
    make_old(folder / f"{PREFIX}copy-0")
    monkeypatch.setattr(temporary.os, "geteuid", lambda: os.getuid() + 1)
    delete_leftovers()
    assert list(folder.iterdir())


def test_several_processes_may_use_one(folder: Path) -> None:
    (shared := folder / f"{PREFIX}checked-0").mkdir()
    with in_use(shared):
        with in_use(shared):
            make_old(shared)
        delete_leftovers()
        assert shared.exists()
    with in_use(folder / "gone"):
        pass


def test_every_folder_for_temporary_files_is_made_here() -> None:
    made = re.compile(r"tempfile\.(TemporaryDirectory|mkdtemp|mkstemp|NamedTemporaryFile)\((.*)")
    found = {
        (str(path.relative_to(ROOT)), what.group(2))
        for package in ("pcm", "cluster", "jobs")
        for path in (ROOT / package).rglob("*.py")
        for what in made.finditer(path.read_text())
    }
    assert {path for path, arguments in found if PREFIX not in arguments} == {"cluster/store/temporary.py"}
