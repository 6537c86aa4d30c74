"""Which models of this machine were compared with what was pinned: once, not by every process that loads them.

    CACHE/compared/MARK         an empty file. MARK is a digest of the place, of what was pinned, and of name, size,
                                inode and times of each file; so a file that is replaced is read again
    CACHE/compared/MARK.lock    held by the process that reads the files for it; the others wait

CACHE is that of cluster.weights.node_copy. Where it cannot be written, every process reads the files.
"""

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from cluster.weights.node_copy import cache_folder
from pcm.errors import OneLineError

log = logging.getLogger(__name__)


def revision_once(place: Path, pinned: str, revision: Callable[[], str]) -> str:
    """The `revision` of a folder or file, which is asked for only where it has not been found to be `pinned` yet."""
    with ExitStack() as until_read:
        mark = None
        with suppress(OSError, OneLineError):
            folder = cache_folder() / "compared"
            folder.mkdir(mode=0o700, exist_ok=True)
            mark = folder / _state(place, pinned)
            lock = until_read.enter_context(mark.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # the generators of a machine start together
        if mark is not None and mark.exists():
            return pinned
        log.info("comparing the files of %s with what was pinned", place)
        found = revision()
        if found == pinned and mark is not None:
            with suppress(OSError):
                mark.touch()
        return found


def _state(place: Path, pinned: str) -> str:
    tops = [place, *(place.iterdir() if place.is_dir() else ())]  # a part of a pipeline may be a link to a folder
    files = {file for top in tops for file in (top, *top.rglob("*")) if file.is_file()}
    found = [(str(file), file.stat()) for file in sorted(files)]
    facts = [(name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found]
    return hashlib.sha256(json.dumps([str(place.absolute()), pinned, facts]).encode()).hexdigest()
