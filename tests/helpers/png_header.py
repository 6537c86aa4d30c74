"""A PNG file that claims a size: a decompression bomb costs its maker nothing."""

import struct
import zlib


def png_header(width: int, height: int) -> bytes:
    """It has a valid header, and holds nearly no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
