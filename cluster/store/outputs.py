"""Where a job may write: checked before anything is put, so that a place that cannot hold its result costs no work."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from cluster.store.store import Store, open_store
from pcm.errors import InputError

#: Where nothing can be put, or what is put does not stay: with the reason.
_NO_OUTPUT = {
    "http": "is read only",
    "https": "is read only",
    "data": "is read only",
    "github": "is read only",
    "git": "is read only",
    "memory": "is gone when its process ends",
}

#: Bytes of a name of a file or folder, on all disks that there are.
LONGEST_NAME = 255


def check_output(uri: str, kind: Literal["folder", "file"], *, shown: str) -> None:
    """Whether a folder or a file can be made at a path or URI, as far as that can be told without writing there.

    `shown`: the option, for the error. Raises InputError for a protocol that takes no output, and, on a local disk,
    where a file stands in the way, a folder in that of a file, something that is no plain file (a device, a pipe, a
    mounted file), or a link that leads nowhere, where a name is too long, and where the user may not write.
    """
    store = open_store(uri)
    protocol = uri.partition("://")[0] if "://" in uri else "file"
    why = "joins file systems" if "::" in protocol else _NO_OUTPUT.get(protocol)
    if why is not None:
        raise InputError(f"{shown} {uri}: {protocol}:// {why}; give a local path, s3://, gs:// or abfs://")
    if store.is_local:
        _check_local(store, uri, kind, shown=shown)


def _check_local(store: Store, uri: str, kind: Literal["folder", "file"], *, shown: str) -> None:
    path = Path(store.prefix)
    if too_long := next((part for part in path.parts if len(os.fsencode(part)) > LONGEST_NAME), None):
        raise InputError(f"{shown} {uri}: the name {too_long[:40]}... is longer than {LONGEST_NAME} bytes; shorten it")
    if kind == "folder" and path.exists() and not path.is_dir():
        raise InputError(f"{shown} {uri}: is a file; give a folder, or a name that is not taken")
    if kind == "file" and path.is_dir():
        raise InputError(f"{shown} {uri}: is a folder; give a file in it, or a name that is not taken")
    if kind == "file" and path.exists():
        path = path.resolve()  # what a link leads to is replaced
        if not path.is_file():
            raise InputError(f"{shown} {uri}: is a device or a pipe, no file; give a file, or a name that is not taken")
        if _is_mounted(path):
            raise InputError(f"{shown} {uri}: is a mounted file, which cannot be replaced; mount its folder instead")
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise InputError(f"{shown} {uri}: {place} is a link that leads nowhere; remove it, or give another place")
        if place != path and place.exists():
            if not place.is_dir():
                raise InputError(f"{shown} {uri}: {place} is a file, not a folder; give another place")
            is_made = kind == "file" or not path.exists()
            if is_made and not os.access(place, os.W_OK | os.X_OK):
                raise InputError(f"{shown} {uri}: nothing can be written in {place}; check its owner and permissions")
            return


def refuse_other_things(out: Store, what: str, *, own: tuple[str, ...] = ()) -> None:
    """For a job that has not found its own document in OUT. `what`: such as "no export". `own`: beginnings of keys that
    it may have left. Raises InputError where OUT holds anything else."""
    own = (*own, "seen-by-all-")  # which a killed job of an earlier release has left
    if there := next((key for key in out.list() if not key.startswith(own)), None):
        raise InputError(f"{out.root}: not empty and {what}: it holds {there}; give an empty place") from None


def _is_mounted(file: Path) -> bool:
    """Whether something is mounted on a file, as containers do it; os.path.ismount knows other disks only."""
    mounts = Path("/proc/self/mountinfo")
    escaped = str(file).translate({ord(letter): f"\\{ord(letter):03o}" for letter in "\\ \t\n"})
    return mounts.exists() and any(line.split(" ")[4] == escaped for line in mounts.read_text().splitlines())


def put_captioner(out: Store, files: Mapping[str, bytes]) -> None:
    """Put the files of a captioner where nothing is, or where some of them are already.

    Raises InputError, and writes nothing, where OUT holds anything else, another captioner too.
    """
    there = set(out.list())
    if foreign := sorted(there - files.keys()):
        raise InputError(f"--out {out.root}: holds other things ({foreign[0]}); give an empty place")
    if other := next((name for name in files if name in there and out.read_bytes(name) != files[name]), None):
        raise InputError(f"--out {out.root}: holds another captioner ({other} is another); give an empty place")
    for name, data in files.items():
        if name not in there:
            out.write_bytes(name, data)
