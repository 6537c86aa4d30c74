"""Caption files in gzip, which may not stand for much more than captions do."""

import gzip
import io
from typing import Any, BinaryIO

from pcm.errors import InputError

#: Captions shrink to a tenth in gzip, lists of the same few to a hundredth. So many times its size a file may grow, and
#: some more where it is small.
LARGEST_RATIO = 200
FREE_BYTES = 64 << 20

_BUFFER = 1 << 20


def open_gzip(raw: BinaryIO, *, name: str) -> io.BufferedReader:
    """What a gzip file holds, as a file to read; `name` is what errors call it.

    While it is read it raises InputError where it grows beyond LARGEST_RATIO, and what gzip raises for damaged data.
    """
    return io.BufferedReader(_Inflated(raw, name), _BUFFER)


class _Inflated(io.RawIOBase):
    def __init__(self, raw: BinaryIO, name: str) -> None:
        self._raw, self._name, self._given = raw, name, 0
        self._gzip = gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._gzip.readinto(buffer)
        self._given += count
        if self._given > FREE_BYTES + LARGEST_RATIO * self._raw.tell():
            raise InputError(
                f"{self._name}: its gzip data grows to more than {LARGEST_RATIO} times its size, which no captions do; "
                "if it is right, decompress it yourself"
            )
        return count
