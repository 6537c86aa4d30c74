"""One copy a machine of weights that lie on a store, used by all its processes.

    CACHE/SHA256/files/         the model's folder
    CACHE/SHA256/weights.json   its manifest
    CACHE/SHA256.lock           held by the process that fetches; the system lets go of it when that process dies
    CACHE/SHA256.part/          what is being fetched, or was when a process was killed: never read

A copy gets its name by one rename, after the digest of every file and of the whole was compared. Later processes
compare the sizes. CACHE is PCM_WEIGHTS_CACHE, else ~/.cache/pcmnet/weights, on a disk of the machine.
"""

import errno
import fcntl
import hashlib
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from cluster.numbers import spent
from cluster.store.paths import inside
from cluster.store.retries import with_retries
from cluster.store.store import Store, is_uri, open_store
from cluster.weights.manifest import (
    MANIFEST,
    LaterManifest,
    StagedFile,
    WeightsManifest,
    digits,
    read_manifest,
    revision_of,
)
from pcm.errors import InputError
from pcm.spec import DIGEST, ClipSpec, DatasetSpec, GeneratorSpec

log = logging.getLogger(__name__)

T = TypeVar("T")

CACHE_VARIABLE = "PCM_WEIGHTS_CACHE"
CACHE = "~/.cache/pcmnet/weights"
#: Machines that start together begin to fetch within so many seconds.
JITTER_SECONDS = 2.0
#: Pieces that are fetched at once, and their bytes: one connection to an object store gives some 60 MB/s.
READERS, PIECE = 8, 32 * 2**20
_FILES = "files"


def local_spec(spec: DatasetSpec) -> DatasetSpec:
    """The same spec, with the models where they are on this machine: for loading, never for recording."""
    return replace(spec, generator=local_generator(spec.generator), clip=local_clip(spec.clip))


def local_generator(spec: GeneratorSpec) -> GeneratorSpec:
    return replace(spec, model=local_name(spec.model, spec.revision))


def local_clip(spec: ClipSpec) -> ClipSpec:
    return replace(spec, model=local_name(spec.model, spec.revision))


def local_name(name: str, revision: str | None = None) -> str:
    """What a model's NAME is on this machine: of a URI the folder of its copy, fetched where it is not here yet.

    revision: what was pinned. None, or one that is no digest, takes what is staged now. Raises InputError where nothing
    is staged at the URI, or other weights than were pinned.
    """
    return str(_node_copy(name, revision)) if is_uri(name) else name


def _node_copy(uri: str, revision: str | None) -> Path:
    store = open_store(uri)
    manifest = None if (revision or "").startswith(DIGEST) else read_manifest(store)
    revision = manifest.revision if manifest else str(revision)
    try:
        folder = cache_folder() / digits(revision)
    except ValueError as error:
        raise InputError(f"{uri}: {error}; it is no digest that was pinned") from None
    if _is_whole(folder):
        return folder / _FILES
    with _locked(folder, uri):
        if not _is_whole(folder):  # another process has fetched it meanwhile
            if manifest is None:  # pinned before: the workers of many machines come at once
                time.sleep(random.uniform(0, JITTER_SECONDS))
            _fetch(store, manifest or read_manifest(store), revision, folder)
    return folder / _FILES


def cache_folder() -> Path:
    """Where this machine keeps its copies; made where it is not there, for this user alone. Raises InputError."""
    named = os.environ.get(CACHE_VARIABLE) or CACHE
    try:
        folder = Path(named).expanduser().absolute()
    except RuntimeError:
        raise InputError(f"{named}: this machine has no home folder; name a folder with {CACHE_VARIABLE}") from None
    with_retries(lambda: folder.mkdir(mode=0o700, parents=True, exist_ok=True), place=str(folder))
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a copy is there, and its files have their sizes."""
    try:
        manifest = WeightsManifest.from_bytes((folder / MANIFEST).read_bytes(), place=str(folder / MANIFEST))
        return all((folder / _FILES / file.name).stat().st_size == file.size for file in manifest.files)
    except LaterManifest:
        raise
    except (OSError, InputError):
        return False


#: What flock says on a disk without: Lustre without -o flock, some of NFS and of FUSE.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})


@contextmanager
def _locked(folder: Path, uri: str) -> Iterator[None]:
    lock = folder.with_suffix(".lock")
    with with_retries(lambda: lock.open("w"), place=str(lock)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process of this machine, which fetches it", uri)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise InputError(
                f"{folder.parent}: its disk has no locks ({errno.errorcode[error.errno]}); name a folder on a disk of "
                f"each machine's own with {CACHE_VARIABLE}"
            ) from None
        yield


def _fetch(store: Store, manifest: WeightsManifest, revision: str, folder: Path) -> None:
    if manifest.revision != revision:
        raise InputError(
            f"{store.root}: holds {manifest.revision}, but {revision} was pinned; stage the same weights there again, "
            "or give another place"
        )
    log.info("%s: fetching %.2f GB to %s", store.root, manifest.size / 1e9, folder)
    started, part = time.monotonic(), folder.with_suffix(".part")
    files = part / _FILES
    for left_over in (part, folder):  # of a process that was killed; a copy that somebody has damaged
        shutil.rmtree(left_over, ignore_errors=True)
    with_retries(lambda: _make_files(files, manifest), place=str(part))
    with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
        pieces = [piece for file in manifest.files for piece in _pieces(store, file)]
        _run(pool, lambda piece: _copy_piece(store, manifest, files, *piece), pieces)
        _run(pool, lambda file: _check(store, manifest, files, file), manifest.files)
    if (found := revision_of(files, revision)) != revision:
        raise InputError(f"{store.root}: its files together are {found}, not {revision}; {_AGAIN}")
    with_retries(lambda: _complete(part, folder, manifest), place=str(folder))
    log.info("%s: here after %s", store.root, spent(time.monotonic() - started))


def _run(pool: ThreadPoolExecutor, function: Callable[[T], None], items: Iterable[T]) -> None:
    """Every item, or the first error, with what has not begun left undone."""
    futures = [pool.submit(function, item) for item in items]
    try:
        for future in futures:
            future.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


def _make_files(files: Path, manifest: WeightsManifest) -> None:
    for file in manifest.files:
        path = inside(files, file.name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with path.open("wb"):
            os.truncate(path, file.size)


def _pieces(store: Store, file: StagedFile) -> Iterator[tuple[StagedFile, int, int]]:
    """(file, start, end) of what is fetched at once: all of it where no part can be had."""
    size = PIECE if store.gives_ranges else max(file.size, 1)
    for start in range(0, file.size, size):
        yield file, start, min(start + size, file.size)


def _copy_piece(store: Store, manifest: WeightsManifest, files: Path, file: StagedFile, start: int, end: int) -> None:
    place = f"{store.root}/{manifest.key(file)}"
    try:
        with store.open(manifest.key(file), buffered=False) as source, (files / file.name).open("r+b") as copy:
            source.seek(start)
            at = start
            while at < end:
                data = source.read(min(PIECE, end - at))
                if not data:
                    raise InputError(f"{place}: has fewer than the {file.size} bytes that {MANIFEST} says; {_AGAIN}")
                with_retries(partial(_write_at, copy.fileno(), data, at), place=str(files))
                at += len(data)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{place}: is not there, though {MANIFEST} names it; {_AGAIN}") from None


def _write_at(descriptor: int, data: bytes, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def _check(store: Store, manifest: WeightsManifest, files: Path, file: StagedFile) -> None:
    with (files / file.name).open("rb") as copy:
        os.fsync(copy.fileno())
        found = f"{DIGEST}{hashlib.file_digest(copy, 'sha256').hexdigest()}"
    if found != file.sha256:
        raise InputError(
            f"{store.root}/{manifest.key(file)}: its bytes are {found}, and {MANIFEST} says {file.sha256}; {_AGAIN}"
        )


def _complete(part: Path, folder: Path, manifest: WeightsManifest) -> None:
    with (part / MANIFEST).open("wb") as file:
        file.write(manifest.to_bytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, folder)


_AGAIN = "delete what is there and run python -m jobs.stage_models again"
