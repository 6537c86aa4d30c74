"""One object of a store as a file: read from any place, a range at a time."""

import io
from collections.abc import Callable
from typing import Any

from pcm.errors import InputError

#: Bytes that are asked for at once where everything up to the end is wanted.
LONGEST_READ = 64 * 2**20


class ObjectFile(io.RawIOBase):
    """A readable, seekable file over `read_range(start, end)`, which gives the bytes of a half-open range.

    A read gives all that was asked for, up to `size`. At the end `version()` must still be `opened`, which it was when
    the size was taken: an object that is replaced meanwhile would be read as a mixture. Raises InputError if it is not.
    """

    def __init__(
        self,
        read_range: Callable[[int, int], bytes],
        *,
        size: int,
        opened: object,
        version: Callable[[], object],
        name: str,
    ) -> None:
        super().__init__()
        self._read_range = read_range
        self._size = size
        self.opened = opened
        self._version = version
        self._checked = False
        self._at = 0
        self.name = name

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        pieces = []
        while piece := self._next(LONGEST_READ):
            pieces.append(piece)
        return b"".join(pieces)

    def _next(self, count: int) -> bytes:
        start, end = self._at, min(self._at + count, self._size)
        if start >= end:
            if count and not self._checked:
                self._check()
            return b""
        data = self._read_range(start, end)
        if len(data) != end - start:
            raise InputError(f"{self.name}: {len(data)} bytes where {end - start} were asked for; {_CHANGED}")
        self._at = end
        return data

    def _check(self) -> None:
        if self._version() != self.opened:
            raise InputError(f"{self.name}: {_CHANGED}")
        self._checked = True


_CHANGED = "it was changed while it was read; run the command again when nothing writes to it"
