"""Where Ray Train and Ray Tune keep their own small records, and from where they delete checkpoints: in our store.

By way of ours, a record is there whole or not at all, a store that does not answer is waited for as all else waits, and
what cannot pass is one line. The checkpoints themselves are put by `cluster.training.checkpoints`.
"""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from cluster.store.store import Store


def ray_storage(out: Store) -> dict[str, Any]:
    """RunConfig's storage arguments for OUT."""
    return {
        "storage_path": out.prefix,
        "storage_filesystem": pyarrow.fs.PyFileSystem(_StoreHandler(out)),
    }


class _StoreHandler(pyarrow.fs.FSSpecHandler):
    """A store by the full paths that Ray makes of its prefix. What Ray does not ask for stays as pyarrow has it."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.fs)
        self._store = store

    def __reduce__(self) -> tuple:
        return _StoreHandler, (self._store,)

    def get_file_info(self, paths: list[str]) -> list[pyarrow.fs.FileInfo]:
        return [self._file_info(path) for path in paths]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a put makes the folders that it needs, and s3fs would ask for the bucket, or create one."""

    def delete_dir(self, path: str) -> None:
        self._store.delete_folder(self._key(path))

    def delete_file(self, path: str) -> None:
        self._store.delete(self._key(path))

    def open_input_stream(self, path: str) -> pa.PythonFile:
        return pa.PythonFile(self._store.open(self._key(path)), mode="r")

    def open_input_file(self, path: str) -> pa.PythonFile:
        return self.open_input_stream(path)

    def open_output_stream(self, path: str, metadata: object) -> pa.PythonFile:
        return pa.PythonFile(_Record(self._store, self._key(path)), mode="w")

    def _file_info(self, path: str) -> pyarrow.fs.FileInfo:
        info = self._store.info(self._key(path))
        return (
            pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.NotFound)
            if info is None
            else self._create_file_info(path, info)
        )

    def _key(self, path: str) -> str:
        prefix = Path(self._store.prefix).as_posix()  # as Ray writes it
        return path.removeprefix(prefix).strip("/")


class _Record(io.BytesIO):
    """An object that is put, whole, when it is closed; never by the garbage collector, which closes what was dropped.

    Where nothing was written one that is there stays: Ray was stopped before it wrote, or it only marks the place.
    """

    def __init__(self, store: Store, key: str) -> None:
        super().__init__()
        self._store, self._key = store, key

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            if data or not self._store.exists(self._key):
                self._store.write_bytes(self._key, data)

    def __del__(self) -> None:
        pass
