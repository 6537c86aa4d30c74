"""Which models of this machine were compared with what was pinned: once, not by every process that loads them.

    CACHE/compared/MARK    an empty file. MARK is a digest of the place, of what was pinned, and of name, size, inode
                           and times of each file; so a file that is replaced is read again

CACHE is that of cluster.weights.node_copy. Where it cannot be written, every process reads the files.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster.weights.node_copy import cache_folder
from pcm.errors import OneLineError


def revision_once(place: Path, pinned: str, revision: Callable[[], str]) -> str:
    """The `revision` of a folder or file, which is asked for only where it has not been found to be `pinned` yet."""
    mark = None
    with suppress(OSError, OneLineError):
        mark = cache_folder() / "compared" / _state(place, pinned)
        if mark.exists():
            return pinned
    found = revision()
    if found == pinned and mark is not None:
        with suppress(OSError):
            mark.parent.mkdir(mode=0o700, exist_ok=True)
            mark.touch()
    return found


def _state(place: Path, pinned: str) -> str:
    tops = [place, *(place.iterdir() if place.is_dir() else ())]  # a part of a pipeline may be a link to a folder
    files = {file for top in tops for file in (top, *top.rglob("*")) if file.is_file()}
    found = [(str(file), file.stat()) for file in sorted(files)]
    facts = [(name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in found]
    return hashlib.sha256(json.dumps([str(place.absolute()), pinned, facts]).encode()).hexdigest()
