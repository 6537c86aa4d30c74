"""One storage layer: a dataset or a run is a prefix on a local disk or an object store.

This is the only way to what a user names: any path, or any URI that fsspec understands (`s3://` through s3fs, `gs://`,
`https://`, `file://`, chains). Whatever has no "://" in it is a path. Credentials and endpoints come from the
environment or the instance's role (AWS_ENDPOINT_URL, AWS_PROFILE and friends); they are never arguments
(`pcm.credentials`), never logged, and a store that travels to a worker carries its URI alone.

A shard costs five operations, in this order: GET of its plan part, HEAD and PUT of its statistics, HEAD of its
quarantine part or the PUT where it has one, PUT of the shard; what resuming costs stands in
`cluster.dataset.committed`. One prefix is enough for them: S3 serves at least 3,500 PUT and 5,500 GET a second below
one prefix, and splits prefixes by itself under load; a GPU that draws 2 pictures a second commits a shard of 256 every
two minutes, so 64 GPUs make 1.5 PUT a second and 1,000 GPUs make 23.
"""

import contextlib
import io
import math
import os
import re
import shutil
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import EEXIST, ELOOP, EMLINK, ENAMETOOLONG, ENOENT, ENOSYS, ENOTSUP, EPERM
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.store.object_file import ObjectFile
from cluster.store.paths import inside, outside
from cluster.store.retries import no_bucket, says_existing, says_unknown, seconds_of, with_retries
from cluster.store.temporary import named_temporary_folder, temporary_folder
from pcm.credentials import refuse_credentials
from pcm.errors import InputError, StoreFailure, first_line
from pcm.line_timer import LineTimer

T = TypeVar("T")

TIMEOUT_SECONDS = 30.0  # of silence, after which a connection is given up; PCM_STORE_TIMEOUT_SECONDS says otherwise
SLOWEST_UPLOAD = 2**20  # bytes a second that an upload must reach
#: Up to S3's limit for it, bytes are one PUT: whole or not there, and nothing to clean up behind a writer that died.
#: s3fs sends a file of 100 MB or more in parts, so that it is not in memory: whole or not there too, but the parts of a
#: writer that died stay until the bucket's rule for incomplete uploads clears them.
LARGEST_PUT = 5 * 2**30
#: Bytes that a file asks for at once when it is read from one end to the other.
LOCAL_BUFFER, REMOTE_BUFFER = 2**20, 8 * 2**20
#: Protocols whose servers give a range of an object's bytes.
_RANGES = frozenset({"s3", "gs", "abfs"})


@dataclass(frozen=True)
class Store:
    """Objects under one prefix. Keys are relative, with forward slashes.

    Operations are tried again while the store fails in ways that pass (`cluster.store.retries.with_retries`, which says
    what they raise when it does not). `fs` has only its library's own retries.
    """

    root: str  # the URI as the user wrote it
    fs: fsspec.AbstractFileSystem
    prefix: str  # the file system's own path of the prefix
    _single: fsspec.AbstractFileSystem  # as fs, but the first failure is reported: the patience is ours

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def gives_ranges(self) -> bool:
        """Whether a part of an object can be had without the rest."""
        return self.is_local or bool(_RANGES & set(_protocols(self.fs)))

    @property
    def address(self) -> str:
        """The path or URI that means the same in a process whose working folder is another."""
        return self.prefix if self.is_local else self.root

    @property
    def name(self) -> str:
        """What a person calls it: the last part of its path."""
        return self.prefix.rsplit("/", 1)[-1]

    def path(self, key: str) -> str:
        """Raises InputError for a key that leads out of the store's folder: some come from files and listings."""
        if ".." in key and ".." in key.split("/"):
            raise outside(key, self.root)
        return f"{self.prefix}/{key}" if key else self.prefix

    def read_bytes(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        return self._read(key, lambda: self._single.cat_file(self.path(key)))

    def open(self, key: str = "", *, buffered: bool = True) -> BinaryIO:
        """One object as a file to read, from any place and in little memory.

        Each read of a remote object is tried again as any operation is. `buffered` suits a reader that goes from one
        end to the other in small steps; without it, exactly what is asked for is read. What no range can be had of
        (https:, chains, ...) is copied to a temporary file first. Raises FileNotFoundError and IsADirectoryError, and
        while reading InputError when a remote object is changed meanwhile.
        """
        if self.is_local:
            return self._read(key, lambda: open(self.path(key), "rb", LOCAL_BUFFER if buffered else 0))
        if not self.gives_ranges:
            return self._with_retries(key, lambda: self._copied(key))
        raw = self._open_remote(key)
        return cast(BinaryIO, io.BufferedReader(raw, REMOTE_BUFFER) if buffered else raw)

    def write_bytes(self, key: str, data: bytes) -> None:
        """Put one object at once: readers see the old object, or the new one whole, or none.

        What arrives is what was sent: botocore sends a CRC-32 of the object with it (and over plain http the SHA-256
        that it signs), and the server refuses a body that differs; on a local disk it is on the disk before the file
        gets its name. Nothing is read back.
        """
        if self.is_local:
            # A link that the user names stays one; of a link in a folder, the target may be another dataset's.
            path = self.path(key) if key else os.path.realpath(self.prefix)
            self._with_retries(key, lambda: _write_file(path, data))
            return
        self._upload(key, len(data), lambda wait: self._put(key, data, wait))

    def create_bytes(self, key: str, data: bytes) -> bool:
        """Put one object where there is none, as `write_bytes` does; whether these bytes are there now. What else was
        there stays.

        Of several that put different bytes at once, one succeeds: on a local disk, and on S3, GCS, Azure and stores
        that know their conditional put. On others the last one's bytes may stay.
        """
        if self.is_local:
            created = self._with_retries(key, lambda: _create_file(self.path(key), data))
        else:  # some stores take no notice of the condition
            created = not self.exists(key) and self._upload(key, len(data), lambda wait: self._put_new(key, data, wait))
        return created or self.read_bytes(key) == data  # put before, and the answer was lost

    def put_file(self, key: str, path: Path) -> None:
        """Put a file of any size as one object, without having it in memory: whole or not there."""
        if self.is_local:
            self._with_retries(key, lambda: _copy_file(path, self.path(key)))
            return
        size = path.stat().st_size
        self._upload(key, size, lambda wait: self._single.put_file(str(path), self.path(key), **wait))

    def exists(self, key: str) -> bool:
        return self.info(key) is not None

    def is_file(self, key: str = "") -> bool:
        """Whether there is an object, and not only a folder, at a key; "" is the store's own path."""
        info = self.info(key)
        return info is not None and info["type"] == "file"

    def info(self, key: str) -> dict[str, Any] | None:
        """What the file system says of an object or a folder: its `type` and `size`; None where there is neither."""
        try:
            return self._info(key)
        except FileNotFoundError:
            return None

    def size(self, key: str) -> int:
        """Bytes of the object. Raises FileNotFoundError."""
        return self._info(key)["size"]

    def list(self, prefix: str = "") -> list[str]:
        """Keys that begin with a prefix, sorted: `shards/` is a folder, `shards/part-000123` a thousand shards.

        One request a 1,000 keys on an object store. Temporary files of interrupted writers are not objects.
        """
        try:
            return sorted(self._with_retries(prefix, lambda: [key for key in self._find(prefix) if _is_object(key)]))
        except FileNotFoundError:
            return []

    def delete(self, key: str) -> None:
        """Delete the object; one that is gone already, as another job may have deleted it, is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._with_retries(key, lambda: self._single.rm_file(self.path(key)))

    def delete_folder(self, key: str) -> None:
        """Delete a folder with all that is in it. No letter of its name is a pattern, as in `rm` of fsspec."""
        if self.is_local:
            self._with_retries(key, lambda: shutil.rmtree(self.path(key)))
            return
        for found in self.list(f"{key}/"):
            self.delete(found)

    def _with_retries(self, key: str, operation: Callable[[], T]) -> T:
        place = f"{self.root}/{key}" if key else self.root
        return with_retries(operation, place=place, connect_anew=self._connect_anew)

    def _connect_anew(self) -> None:
        """Make the client anew where one that found no credentials would never look for them again: that of S3."""
        if "s3" in _protocols(self._single) and _connections.due():
            self._single.connect(refresh=True)

    def _read(self, key: str, operation: Callable[[], T]) -> T:
        """As `_with_retries`. What would lie below a file, or has a name that no file can have, is not there."""
        try:
            return self._with_retries(key, operation)
        except OSError as error:
            if isinstance(error, FileNotFoundError) or not _is_absent(error):
                raise
            raise FileNotFoundError(ENOENT, os.strerror(ENOENT), self.path(key)) from None

    def _info(self, key: str) -> dict[str, Any]:
        return self._read(key, lambda: self._single.info(self.path(key)))

    def _open_remote(self, key: str) -> ObjectFile:
        path, info = self.path(key), self._info(key)
        if info["type"] == "directory":
            raise IsADirectoryError(path)
        return ObjectFile(
            lambda start, end: self._with_retries(key, lambda: self._single.cat_file(path, start=start, end=end)),
            size=info["size"],
            opened=_version(info),
            version=lambda: _version(self._info(key)),
            name=f"{self.root}/{key}" if key else self.root,
        )

    def _copied(self, key: str) -> BinaryIO:
        if self._single.info(self.path(key))["type"] == "directory":
            raise IsADirectoryError(self.path(key))
        with named_temporary_folder():
            copy = tempfile.TemporaryFile()  # noqa: SIM115  # the caller's to close
        try:
            with self._single.open(self.path(key), "rb") as file, named_temporary_folder():
                shutil.copyfileobj(file, copy, REMOTE_BUFFER)
        except BaseException:
            copy.close()
            raise
        copy.seek(0)
        return cast(BinaryIO, copy)

    def _put(self, key: str, data: bytes, wait: dict[str, float], **how: str) -> None:
        options: dict[str, Any] = {"chunksize": LARGEST_PUT} if "s3" in _protocols(self._single) else {}
        self._single.pipe_file(self.path(key), data, **wait, **options, **how)

    def _put_new(self, key: str, data: bytes, wait: dict[str, float]) -> bool:
        """Whether it was put; False: there is one."""
        try:
            self._put(key, data, wait, mode="create")
        except Exception as error:
            if says_existing(error):
                return False
            if not says_unknown(error):
                raise
            self._put(key, data, wait)
        return True

    def _upload(self, key: str, size: int, put: Callable[[dict[str, float]], T]) -> T:
        """Call `put`, which sends so many bytes, with the options that limit how long it may take."""
        wait: dict[str, float] = {}
        if isinstance(self._single, AsyncFileSystem):
            # The client library never times out where a server does not say 100 Continue, or stops reading the body.
            wait["timeout"] = 2 * _timeout_seconds() + size / SLOWEST_UPLOAD
        try:
            return self._with_retries(key, lambda: put(wait))
        except FileNotFoundError:  # gcsfs; a put needs nothing but the bucket
            raise no_bucket(f"{self.root}/{key}") from None

    def _find(self, prefix: str) -> Iterator[str]:
        if self.is_local:
            yield from _find_files(self.prefix, prefix)
            return
        folder, _, stem = prefix.rpartition("/")
        by_prefix = {"prefix": stem} if {"s3", "gs"} & set(_protocols(self.fs)) else {}
        found = self._single.find(self.path(folder), detail=True, **by_prefix)
        if isinstance(found, list):  # adlfs, of one object: nothing is below it
            return
        for path, entry in found.items():
            key = path[len(self.prefix) + 1 :]
            if entry["type"] == "file" and key.startswith(prefix):
                yield key

    def __reduce__(self) -> tuple:
        # By address: what a file system was made with may hold a secret, and a worker has its own environment.
        return _reopen, (self.root, self.address)


def open_store(uri: str | os.PathLike) -> Store:
    """The store at a path or URI; nothing is created or contacted yet.

    Raises InputError for a protocol that is unknown or whose package is missing, and for a URI that carries a
    credential.
    """
    return _reopen(os.fspath(uri), os.fspath(uri))


#: The extra of pyproject.toml that brings a protocol's package; S3's is always installed.
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "adl": "azure"}


def _reopen(root: str, uri: str) -> Store:
    refuse_credentials(uri)
    _refuse_unmeant_chain(uri)
    if not is_uri(uri):
        fs, prefix = LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))  # "file:x" is a name, too
        return Store(root=root.rstrip("/"), fs=fs, prefix=prefix.rstrip("/"), _single=fs)
    try:
        # No cache of listings: other machines write to the same prefix.
        fs, prefix = fsspec.core.url_to_fs(uri, use_listings_cache=False)
        single = fs
        if {"http", "https"} & set(_protocols(fs)):
            fs, _ = fsspec.core.url_to_fs(uri, use_listings_cache=False, client_kwargs=_http_config())
            single = fs
        if "gs" in _protocols(fs):
            fs, _ = fsspec.core.url_to_fs(uri, use_listings_cache=False, session_kwargs={"trust_env": True})
            single = fs
        if "s3" in _protocols(fs):
            _refuse_no_bucket(uri, prefix)
            fs, _ = fsspec.core.url_to_fs(uri, use_listings_cache=False, config_kwargs=_s3_config())
            # One connection an operation: s3fs would ask for the size before each read, and retry beneath our retries.
            config = _s3_config() | {"retries": {"total_max_attempts": 1, "mode": "standard"}}
            single, _ = fsspec.core.url_to_fs(uri, use_listings_cache=False, config_kwargs=config, max_concurrency=1)
            single.retries = 1
    except ImportError as error:
        raise _not_installed(uri, error) from None
    except FileNotFoundError:  # of an archive in a chain
        raise InputError(f"{uri}: not there") from None
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise InputError(f"{uri}: no archive, or a damaged one ({first_line(error)})") from None
    except OSError as error:  # of hdfs, ftp and others, which connect at once
        raise StoreFailure(
            f"{uri}: cannot be opened ({first_line(error)}); check that its server runs, and what its client needs"
        ) from None
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        if uri.startswith("abfss://"):  # fsspec knows it once adlfs is installed
            raise _not_installed(uri, error) from None
        raise InputError(
            f"{uri}: cannot be opened ({first_line(error)}); allowed are local paths, file://, s3://, gs:// and other "
            "fsspec URIs"
        ) from None
    if isinstance(fs, LocalFileSystem):
        prefix = os.path.abspath(prefix)
    return Store(root=root.rstrip("/"), fs=fs, prefix=prefix.rstrip("/"), _single=single)


def _not_installed(uri: str, error: Exception) -> InputError:
    extra = _EXTRAS.get(uri.partition("://")[0])
    install = f"; install it with pip install -c constraints.txt -e '.[{extra}]'" if extra else ""
    return InputError(f"{uri}: needs a package that is not installed ({first_line(error)}){install}")


#: Sixteen threads of a process share a client: one of them makes it anew.
_connections = LineTimer(1.0, at_once=True)

#: Protocols of fsspec that take what follows "::" for the place they work on.
_CHAINED = frozenset(
    {"blockcache", "cached", "dir", "filecache", "libarchive", "reference", "simplecache", "tar", "zip"}
)


def _refuse_unmeant_chain(uri: str) -> None:
    """Raises InputError for a URI with "::" in a name: fsspec would cut it there, and read or write elsewhere."""
    *before, _ = uri.split("::")
    if is_uri(uri) and not all(link.partition("://")[0] in _CHAINED for link in before):
        raise InputError(
            f"{uri}: fsspec takes '::' for a chain of file systems and would go to {before[0]}; give a URI without '::'"
            " in its names, or a plain local path"
        )


#: What S3 and stores like it take for a bucket.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}|arn:.+")


def _refuse_no_bucket(uri: str, prefix: str) -> None:
    bucket = prefix.partition("/")[0]
    if not _BUCKET.fullmatch(bucket):
        raise InputError(f"{uri}: {bucket!r} is no name of a bucket (letters, digits, . _ -); give s3://BUCKET/NAME")


def _s3_config() -> dict:
    return {"connect_timeout": 10, "read_timeout": _timeout_seconds(), "max_pool_connections": 32}


def _http_config() -> dict:
    import aiohttp  # needed for this protocol alone

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=_timeout_seconds())
    return {"timeout": timeout, "trust_env": True}  # of the environment's proxies


def _timeout_seconds() -> float:
    seconds = seconds_of("PCM_STORE_TIMEOUT_SECONDS", TIMEOUT_SECONDS)
    if not 0 < seconds < math.inf:
        raise InputError(f"PCM_STORE_TIMEOUT_SECONDS {seconds:g}: must be more than 0, and a number such as 30")
    return seconds


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


#: Of what a file system says of an object: what changes when the object does.
_VERSION_FIELDS = ("size", "mtime", "ETag", "etag", "generation", "LastModified")


def _version(info: dict[str, Any]) -> tuple:
    return tuple(info.get(name) for name in _VERSION_FIELDS)


def _is_object(key: str) -> bool:
    # Object stores may hold an empty object as the marker of a folder, the store's own prefix ("") too.
    return key != "" and not key.endswith(("/", ".tmp"))


def _write_file(path: str, data: bytes) -> None:
    _put_in_place(path, lambda file: file.write(data))


def _create_file(path: str, data: bytes) -> bool:
    """Whether it was written; False: there is one."""
    try:
        _put_in_place(path, lambda file: file.write(data), is_new=True)
    except FileExistsError:
        return False
    return True


#: What a file system says that has no hard links, or no more of them.
_NO_LINKS = frozenset({EMLINK, ENOSYS, ENOTSUP, EPERM})


def _name_new(temporary: str, path: str) -> None:
    """Give a file its name. Raises FileExistsError where another has it."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(path):
            raise FileExistsError(EEXIST, os.strerror(EEXIST), path) from None
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _copy_file(source: Path, path: str) -> None:
    with source.open("rb") as opened:
        _put_in_place(path, lambda file: shutil.copyfileobj(opened, file, REMOTE_BUFFER))


def _put_in_place(path: str, write: Callable[[BinaryIO], object], *, is_new: bool = False) -> None:
    """Write a file whole or not at all; one that `is_new` must not be there. Raises FileExistsError."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{uuid.uuid4().hex}.tmp")  # a file may have as long a name as there can be
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        (_name_new if is_new else os.replace)(temporary, path)
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
        except OSError as error:
            if not _is_absent(error):
                raise
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


def _is_absent(error: OSError) -> bool:
    """Whether it says that nothing has this name: also of one that no file can have, such as a sentence."""
    return isinstance(error, (FileNotFoundError, NotADirectoryError)) or error.errno in (ENAMETOOLONG, ELOOP)


def is_uri(text: str) -> bool:
    """Whether this is a URI; anything without a protocol is a local path, whatever else is in its name."""
    return "://" in text


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def join(uri: str, *parts: str) -> str:
    """A path or URI below another."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_uri(uri: str | os.PathLike) -> bytes:
    """Bytes of one file at a path or URI. Raises InputError when it is not there."""
    store = open_store(uri)
    try:
        return store.read_bytes("")
    except IsADirectoryError:
        raise InputError(f"{os.fspath(uri)}: is a folder; give a file") from None
    except FileNotFoundError:
        raise InputError(f"{os.fspath(uri)}: no such file; give an existing path or URI") from None


@contextlib.contextmanager
def local_copy(uri: str | os.PathLike) -> Iterator[Path]:
    """A local path with the same content: the path itself when it is local, else a download, removed afterwards.

    A remote prefix is downloaded as a folder. Raises InputError when there is nothing at the URI, or a key there would
    lead out of the folder.
    """
    store = open_store(uri)
    if store.is_local:
        path = Path(store.prefix)
        if not store.exists(""):
            raise InputError(f"{os.fspath(uri)}: no such file or folder; give an existing path or URI")
        yield path
        return
    with temporary_folder("copy") as folder:
        target = inside(folder, store.name or "copy")
        keys = [""] if store.is_file() else store.list()
        if not keys:
            raise InputError(f"{os.fspath(uri)}: no such file or folder; give an existing path or URI")
        for key in keys:
            file = inside(target, key) if key else target
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with store.open(key, buffered=False) as source, named_temporary_folder(), file.open("xb") as copy:
                    shutil.copyfileobj(source, copy, REMOTE_BUFFER)
            except (FileExistsError, NotADirectoryError, IsADirectoryError):
                raise InputError(f"{store.root}: the key {key[:200]!r} is a file and a folder at once") from None
        yield target
