"""Files that were found to be what was pinned are not read again by the next process, and are where they changed."""

import os
import threading
from pathlib import Path

import pytest

from cluster.weights.compared import revision_once
from cluster.weights.node_copy import CACHE_VARIABLE


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `revision` was asked for, in a cache of its own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return []


def revision(place: Path, asked: list[str], *, pinned: str = "a", now: str = "a") -> str:
    def ask() -> str:
        asked.append(now)
        return now

    return revision_once(place, pinned, ask)


def test_of_processes_that_start_together_one_reads(tmp_path: Path, asked: list[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"one")
    begun, started = threading.Event(), threading.Event()

    def ask() -> str:
        asked.append("a")
        begun.set()
        started.wait(30)
        other.join(0.5)  # it waits for this one
        return "a"

    first = threading.Thread(target=lambda: revision_once(tmp_path / "model", "a", ask))
    other = threading.Thread(target=lambda: revision_once(tmp_path / "model", "a", ask))
    first.start()
    begun.wait(30)
    other.start()
    started.set()
    first.join()
    other.join()
    assert asked == ["a"]


@pytest.mark.parametrize("part", ["weights", "unet/weights", "vae/deeper/weights", ""])
def test_a_folder_or_file_is_read_once_in_each_state(part: str, tmp_path: Path, asked: list[str]) -> None:
    """A part may be a link."""
    place = tmp_path / "model"
    (tmp_path / "elsewhere" / "deeper").mkdir(parents=True)
    file = place / part
    if part:
        (place / "unet").mkdir(parents=True)
        (place / "vae").symlink_to(tmp_path / "elsewhere")
    file.write_bytes(b"one")
    assert [revision(place, asked) for _ in range(3)] == ["a"] * 3 and asked == ["a"]
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as `cp -p` leaves it
    assert revision(place, asked, now="b") == "b" and asked == ["a", "b"]
    assert revision(place, asked, now="b") == "b" and len(asked) == 3, "what is not what was pinned is never known"
    assert revision(place, asked, pinned="b", now="b") == "b" and len(asked) == 4
    assert revision(place, asked, pinned="b") == "b" and len(asked) == 4


def test_a_machine_without_a_cache_reads_each_time(
    tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "no-folder"))
    assert [revision(tmp_path / "file", asked) for _ in range(2)] == asked == ["a", "a"]
