"""One storage layer: a dataset or a run is a prefix on a local disk or an object store.

Any URI that fsspec understands (`s3://` through s3fs, `gs://`, `file://`, a plain path). Credentials and endpoints come
from the environment or the instance's role (AWS_ENDPOINT_URL and friends); they are never arguments and never logged.
"""

import os
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pcm.errors import InputError


@dataclass(frozen=True)
class Store:
    """Objects under one prefix. Keys are relative, with forward slashes."""

    root: str  # the URI as the user wrote it
    fs: fsspec.AbstractFileSystem
    prefix: str  # the file system's own path of the prefix

    def path(self, key: str) -> str:
        return f"{self.prefix}/{key}" if key else self.prefix

    def read_bytes(self, key: str) -> bytes:
        """The object's bytes. Raises FileNotFoundError."""
        return self.fs.cat_file(self.path(key))

    def write_bytes(self, key: str, data: bytes) -> None:
        """Put one object at once: readers see the old object, or the new one whole, or none."""
        path = self.path(key)
        if not isinstance(self.fs, LocalFileSystem):
            self.fs.pipe_file(path, data)
            return
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

    def exists(self, key: str) -> bool:
        return self.fs.exists(self.path(key))

    def size(self, key: str) -> int:
        return self.fs.size(self.path(key))

    def list(self, prefix: str = "") -> list[str]:
        """Keys of the objects under a prefix, sorted; temporary files of interrupted writers are not objects."""
        try:
            found = self.fs.find(self.path(prefix.rstrip("/")), detail=True)
        except FileNotFoundError:
            return []
        # Object stores may hold an empty object as the marker of a folder, this prefix itself too.
        files = (path for path, entry in found.items() if entry["type"] == "file" and path != self.prefix)
        return sorted(path[len(self.prefix) + 1 :] for path in files if not path.endswith(("/", ".tmp")))

    def delete(self, key: str) -> None:
        self.fs.rm_file(self.path(key))


def open_store(uri: str | os.PathLike) -> Store:
    """The store at a path or URI; nothing is created or contacted yet.

    Raises InputError for a protocol that is unknown or whose package is missing.
    """
    uri = os.fspath(uri)
    try:
        # No cache of listings: other machines write to the same prefix.
        fs, prefix = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise InputError(
            f"{uri}: {error}; allowed are local paths, file://, s3://, gs:// and other fsspec URIs"
        ) from None
    if isinstance(fs, LocalFileSystem):
        prefix = os.path.abspath(prefix)
    return Store(root=uri.rstrip("/"), fs=fs, prefix=prefix.rstrip("/"))


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
