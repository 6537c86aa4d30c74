"""Files that are gone once they have been used, in the machine's folder for such: what TMPDIR names, else /tmp.

A process that is killed leaves its own there. All have names that begin with PREFIX, and who makes another one deletes
what was left so long ago that nobody can want it.
"""

import fcntl
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cluster.store.retries import FULL_ERRNO, RERUN
from pcm.errors import StoreFailure

PREFIX = "pcm-tmp-"
LEFTOVER_SECONDS = 24 * 3600.0


@contextmanager
def temporary_folder(what: str) -> Iterator[Path]:
    """A folder of this process alone, deleted in the end; `what` is in its name. Raises StoreFailure."""
    with named_temporary_folder():
        delete_leftovers()
        temporary = tempfile.TemporaryDirectory(prefix=f"{PREFIX}{what}-", ignore_cleanup_errors=True)
    with temporary as folder, in_use(Path(folder)):
        yield Path(folder)


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Meanwhile a file or folder is no leftover, whatever its age: its lock is held, by any number of processes."""
    try:
        held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_SH)
        yield
    finally:
        with suppress(OSError):  # a process that was forked meanwhile has the lock, too: closing would not free it
            fcntl.flock(held, fcntl.LOCK_UN)
        os.close(held)


@functools.cache
def delete_leftovers() -> None:
    """Delete, once a process, what killed processes of this user have left there more than a day ago.

    What a process holds (`in_use`), or lies where the file system has no locks, stays.
    """
    with suppress(OSError):
        for name in os.listdir(tempfile.gettempdir()):
            if name.startswith(PREFIX):
                with suppress(OSError):  # it is held, or was deleted meanwhile
                    _delete_if_left(os.path.join(tempfile.gettempdir(), name))


def _delete_if_left(path: str) -> None:
    found = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(found)
        if status.st_uid != os.geteuid() or time.time() - status.st_mtime < LEFTOVER_SECONDS:
            return
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(status.st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)
    finally:
        os.close(found)


@contextmanager
def named_temporary_folder() -> Iterator[None]:
    """Around what writes temporary files and nothing else: a disk that is full is said to be that folder's.

    Raises StoreFailure there, and where no folder for temporary files can be written at all.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise StoreFailure(
            "no folder for temporary files can be written, neither TMPDIR's nor /tmp; name one with TMPDIR that can"
        ) from None
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise StoreFailure(
            f"{folder}: the disk for temporary files is full; free space there, or name another folder with TMPDIR, "
            f"and {RERUN}"
        ) from None


def _is_full(error: BaseException) -> bool:
    """Also of an error that a library raises in place of the system's: torch's while it handles that, safetensors'."""
    inner = error.__context__
    return any(
        (isinstance(link, OSError) and link.errno in FULL_ERRNO) or "No space left on device" in str(link)
        for link in (error, inner)
    )
