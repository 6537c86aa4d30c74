"""One storage layer: a dataset or a run is a prefix on a local disk or an object store.

Any URI that fsspec understands (`s3://` through s3fs, `gs://`, `file://`, a plain path). Credentials and endpoints come
from the environment or the instance's role (AWS_ENDPOINT_URL, AWS_PROFILE and friends); they are never arguments, never
logged, and a store that travels to a worker carries its URI alone.

A shard costs three or four operations, in this order: GET of its plan part, PUT of its quarantine part where it has
one, PUT of its statistics, PUT of the shard; what resuming costs stands in `cluster.dataset.committed`. One prefix is
enough for them: S3 serves at least 3,500 PUT and 5,500 GET a second below one prefix, and splits prefixes by itself
under load; a GPU that draws 2 pictures a second commits a shard of 256 every two minutes, so 64 GPUs make 1.5 PUT a
second and 1,000 GPUs make 23.
"""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.store.retries import with_retries
from pcm.errors import InputError

T = TypeVar("T")

TIMEOUT_SECONDS = 30.0  # of silence, after which a connection is given up; PCM_STORE_TIMEOUT_SECONDS says otherwise
SLOWEST_UPLOAD = 2**20  # bytes a second that an upload must reach
#: Up to S3's limit for it, an object is one PUT: whole or not there, and nothing to clean up behind a writer that died.
LARGEST_PUT = 5 * 2**30
_SECRET_PARAMETERS = ("signature", "sig", "token", "secret", "password", "credential")


@dataclass(frozen=True)
class Store:
    """Objects under one prefix. Keys are relative, with forward slashes.

    Operations are tried again while the store fails in ways that pass (`cluster.store.retries.with_retries`, which says
    what they raise when it does not). `fs` is for those who need an open file; it has only its library's own retries.
    """

    root: str  # the URI as the user wrote it
    fs: fsspec.AbstractFileSystem
    prefix: str  # the file system's own path of the prefix
    _single: fsspec.AbstractFileSystem  # as fs, but the first failure is reported: the patience is ours

    def path(self, key: str) -> str:
        return f"{self.prefix}/{key}" if key else self.prefix

    def read_bytes(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        return self._patiently(key, lambda: self._single.cat_file(self.path(key)))

    def write_bytes(self, key: str, data: bytes) -> None:
        """Put one object at once: readers see the old object, or the new one whole, or none.

        What arrives is what was sent: botocore sends a CRC-32 of the object with it (and over plain http the SHA-256
        that it signs), and the server refuses a body that differs; on a local disk it is on the disk before the file
        gets its name. Nothing is read back.
        """
        if isinstance(self.fs, LocalFileSystem):
            self._patiently(key, lambda: _write_file(self.path(key), data))
            return
        self._patiently(key, lambda: self._put(self.path(key), data))

    def exists(self, key: str) -> bool:
        try:
            self._patiently(key, lambda: self._single.info(self.path(key)))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, key: str) -> int:
        """Bytes of the object. Raises FileNotFoundError."""
        return self._patiently(key, lambda: self._single.info(self.path(key)))["size"]

    def list(self, prefix: str = "") -> list[str]:
        """Keys that begin with a prefix, sorted: `shards/` is a folder, `shards/part-000123` a thousand shards.

        One request a 1,000 keys on an object store. Temporary files of interrupted writers are not objects.
        """
        try:
            return sorted(self._patiently(prefix, lambda: [key for key in self._find(prefix) if _is_object(key)]))
        except FileNotFoundError:
            return []

    def delete(self, key: str) -> None:
        self._patiently(key, lambda: self._single.rm_file(self.path(key)))

    def _patiently(self, key: str, operation: Callable[[], T]) -> T:
        return with_retries(operation, place=f"{self.root}/{key}" if key else self.root)

    def _put(self, path: str, data: bytes) -> None:
        options: dict = {}
        if isinstance(self._single, AsyncFileSystem):
            # The client library waits for ever for a server that does not say 100 Continue, or stops reading the body.
            options["timeout"] = 2 * _timeout_seconds() + len(data) / SLOWEST_UPLOAD
        if "s3" in _protocols(self._single):
            options["chunksize"] = LARGEST_PUT
        self._single.pipe_file(path, data, **options)

    def _find(self, prefix: str) -> Iterator[str]:
        if isinstance(self.fs, LocalFileSystem):
            yield from _find_files(self.prefix, prefix)
            return
        folder, _, stem = prefix.rpartition("/")
        by_prefix = {"prefix": stem} if {"s3", "gs"} & set(_protocols(self.fs)) else {}
        found = self._single.find(self.path(folder), detail=True, **by_prefix)
        for path, entry in found.items():
            key = path[len(self.prefix) + 1 :]
            if entry["type"] == "file" and key.startswith(prefix):
                yield key

    def __reduce__(self) -> tuple:
        # By address: what a file system was made with may hold a secret, and a worker has its own environment.
        return _reopen, (self.root, self.prefix if isinstance(self.fs, LocalFileSystem) else self.root)


def open_store(uri: str | os.PathLike) -> Store:
    """The store at a path or URI; nothing is created or contacted yet.

    Raises InputError for a protocol that is unknown or whose package is missing, and for a URI that holds a secret:
    URIs are logged and stored with the dataset.
    """
    return _reopen(os.fspath(uri), os.fspath(uri))


def _reopen(root: str, uri: str) -> Store:
    _refuse_secrets(uri)
    try:
        # No cache of listings: other machines write to the same prefix.
        fs, prefix = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        single = fs
        if "s3" in _protocols(fs):
            fs, _ = fsspec.core.url_to_fs(uri, use_listings_cache=False, config_kwargs=_s3_config())
            # One connection an operation: s3fs would ask for the size before each read, and retry beneath our retries.
            config = _s3_config() | {"retries": {"total_max_attempts": 1, "mode": "standard"}}
            single, _ = fsspec.core.url_to_fs(uri, use_listings_cache=False, config_kwargs=config, max_concurrency=1)
            single.retries = 1
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{uri}: {error}; allowed are local paths, file://, s3://, gs:// and other fsspec URIs"
        ) from None
    if isinstance(fs, LocalFileSystem):
        prefix = os.path.abspath(prefix)
    return Store(root=root.rstrip("/"), fs=fs, prefix=prefix.rstrip("/"), _single=single)


def _s3_config() -> dict:
    return {"connect_timeout": 10, "read_timeout": _timeout_seconds(), "max_pool_connections": 32}


def _timeout_seconds() -> float:
    return float(os.environ.get("PCM_STORE_TIMEOUT_SECONDS", TIMEOUT_SECONDS))


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _refuse_secrets(uri: str) -> None:
    if "://" not in uri:
        return
    parts = urlsplit(uri)
    signed = any(word in name.lower() for name, _ in parse_qsl(parts.query) for word in _SECRET_PARAMETERS)
    if parts.password is not None or signed:
        shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise InputError(
            f"{shown}: the URI carries a credential, and URIs are logged and stored with the dataset; "
            "give credentials by the environment or the instance's role"
        )


def _is_object(key: str) -> bool:
    # Object stores may hold an empty object as the marker of a folder, the store's own prefix ("") too.
    return key != "" and not key.endswith(("/", ".tmp"))


def _write_file(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _find_files(root: str, prefix: str) -> Iterator[str]:
    """Keys of files below a folder that begin with a prefix; only folders that can hold one are read.

    A folder that links lead to more than once is read once: a link to a folder above it would never end.
    """
    folders = [prefix.rpartition("/")[0]]
    read: set[tuple[int, int]] = set()
    while folders:
        folder = folders.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            entries = os.scandir(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        with entries:
            if (status.st_dev, status.st_ino) in read:
                continue
            read.add((status.st_dev, status.st_ino))
            for entry in entries:
                key = f"{folder}/{entry.name}" if folder else entry.name
                if _is_folder(entry):
                    if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                        folders.append(key)
                elif key.startswith(prefix):
                    yield key


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_uri(uri: str | os.PathLike) -> bytes:
    """Bytes of one file at a path or URI. Raises InputError when it is not there."""
    store = open_store(uri)
    try:
        return store.read_bytes("")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{os.fspath(uri)}: no such file; give an existing path or URI") from None


def local_copy(uri: str | os.PathLike, *, folder: Path | None = None) -> Path:
    """A local path with the same content: the path itself when it is local, else a download.

    A remote prefix is downloaded as a folder. Raises InputError when there is nothing at the URI.
    """
    store = open_store(uri)
    if isinstance(store.fs, LocalFileSystem):
        path = Path(store.prefix)
        if not path.exists():
            raise InputError(f"{os.fspath(uri)}: no such file or folder; give an existing path or URI")
        return path
    target = Path(folder or tempfile.mkdtemp(prefix="pcm-")) / Path(store.prefix).name
    if store.fs.isfile(store.prefix):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read_bytes(""))
        return target
    keys = store.list()
    if not keys:
        raise InputError(f"{os.fspath(uri)}: no such file or folder; give an existing path or URI")
    for key in keys:
        (target / key).parent.mkdir(parents=True, exist_ok=True)
        (target / key).write_bytes(store.read_bytes(key))
    return target
