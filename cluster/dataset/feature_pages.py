"""Features straight from the pages of a Parquet file: for a column that lies there plainly, its bytes are its values.

Arrow decodes a list of float16 value by value (each is a byte array of length 2 to it), hardly faster than one .npz an
image is read. `parquet_bytes` leaves features uncompressed, unencoded and without nulls, so that all there is to do is
to find the pages and to check that they are what they should be. Whatever is not - other encodings, compression, nulls,
lists of other lengths, damaged headers - is left to Arrow, which reads it or says what is wrong.

After the Parquet format's specification (apache/parquet-format: parquet.thrift, Encodings.md).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.thrift_compact import Malformed, read_struct

# Of parquet.thrift: PageType and Encoding; fields of PageHeader, DataPageHeader and DataPageHeaderV2.
_DATA_PAGE, _DATA_PAGE_V2 = 0, 3
_PLAIN, _RLE = 0, 3
_TYPE, _UNCOMPRESSED_SIZE, _COMPRESSED_SIZE, _HEADER_V1, _HEADER_V2 = 1, 2, 3, 5, 8
_NUM_VALUES = 1  # of both
_ENCODING, _DEFINITION_ENCODING, _REPETITION_ENCODING = 2, 3, 4  # of a v1 page
_NUM_NULLS, _ENCODING_V2, _DEFINITION_BYTES, _REPETITION_BYTES = 2, 4, 5, 6  # of a v2 page

_VALUE_BYTES = 2
#: What is read to find a page's header, which takes some 30 bytes, or some 100 with statistics.
_HEADER_BYTES = 1024
#: Column chunks with less than this between them are read at once.
_HOLE_BYTES = 64 << 10


#: (count, position) -> bytes; fewer at the end of the file.
Read = Callable[[int, int], bytes | pa.Buffer | memoryview]


class _NotPlain(Exception):
    """For Arrow to read."""


@dataclass(frozen=True)
class _Chunk:
    """One column of one row group, and the rows of the result that it fills."""

    column: int  # of the result
    start: int  # in the file
    size: int
    first_row: int
    num_rows: int
    width: int  # values of a row


def plain_matrices(
    read: Read, parquet: pq.ParquetFile, columns: Sequence[str], *, whole: bool
) -> list[np.ndarray] | None:
    """Matrices (rows, length) float16 of some columns of fixed-size lists; None where any of them is not plain.

    `read(count, position)` gives bytes of the file that `parquet` was opened on; nothing but these columns is read.
    `whole`: each in one request, and neighbours together, as suits a store; otherwise page by page, which on a local
    disk costs less memory and so less time.
    """
    try:
        chunks = [chunk for number, name in enumerate(columns) for chunk in _chunks(parquet, number, name)]
        widths = [parquet.schema_arrow.field(name).type.list_size for name in columns]
        matrices = [np.empty((parquet.metadata.num_rows, width), np.float16) for width in widths]
        for span in _spans(chunks):
            source = _held(read, span) if whole else read
            for chunk in span:
                _fill(matrices[chunk.column][chunk.first_row : chunk.first_row + chunk.num_rows], source, chunk)
    except (_NotPlain, Malformed):
        return None
    return matrices


def _held(read: Read, span: Sequence[_Chunk]) -> Read:
    """`read` out of the bytes of neighbouring chunks, which are read now."""
    start = span[0].start
    data = memoryview(read(span[-1].start + span[-1].size - start, start))
    return lambda count, position: data[position - start : position - start + count]


def _chunks(parquet: pq.ParquetFile, number: int, name: str) -> Iterator[_Chunk]:
    """Where the column lies, as far as the footer knows. Raises _NotPlain."""
    metadata, kind = parquet.metadata, parquet.schema_arrow.field(name).type
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_float16(kind.value_type)):
        raise _NotPlain
    (place,) = (
        place for place in range(metadata.num_columns) if parquet.schema.column(place).path.startswith(f"{name}.")
    )
    levels = parquet.schema.column(place)
    if levels.physical_type != "FIXED_LEN_BYTE_ARRAY" or levels.length != _VALUE_BYTES:
        raise _NotPlain
    if (levels.max_repetition_level, levels.max_definition_level) not in ((1, 1), (1, 2), (1, 3)):
        raise _NotPlain
    first_row = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        chunk = metadata.row_group(group).column(place)
        if chunk.compression != "UNCOMPRESSED" or chunk.dictionary_page_offset is not None or chunk.file_path:
            raise _NotPlain
        if chunk.num_values != rows * kind.list_size:
            raise _NotPlain
        yield _Chunk(number, chunk.data_page_offset, chunk.total_compressed_size, first_row, rows, kind.list_size)
        first_row += rows


def _spans(chunks: list[_Chunk]) -> Iterator[list[_Chunk]]:
    """Chunks in the order of the file, those close to each other together."""
    span: list[_Chunk] = []
    for chunk in sorted(chunks, key=lambda chunk: chunk.start):
        if span and chunk.start - (span[-1].start + span[-1].size) > _HOLE_BYTES:
            yield span
            span = []
        span.append(chunk)
    if span:
        yield span


def _fill(matrix: np.ndarray, read: Read, chunk: _Chunk) -> None:
    """The values of a chunk's pages. Raises _NotPlain and Malformed unless they are exactly those of `matrix`."""
    flat = matrix.reshape(-1)
    position, end = chunk.start, chunk.start + chunk.size
    done = 0
    starts: list[np.ndarray] = []  # of lists, as numbers of values
    while position < end:
        header, length = read_struct(memoryview(read(min(_HEADER_BYTES, end - position), position)), 0)
        position += length
        size = _count(header, _COMPRESSED_SIZE)
        if size != _count(header, _UNCOMPRESSED_SIZE) or position + size > end:
            raise _NotPlain
        page = memoryview(read(size, position))
        repetition, values, count = _page(header, page)
        # A null has no value: as many values as levels are lists and items without a null.
        if len(page) != size or len(values) != count * _VALUE_BYTES or done + count > len(flat):
            raise _NotPlain
        flat[done : done + count] = np.frombuffer(values, np.dtype("<f2"))
        starts.append(done + _zeros(bytes(repetition), count))
        position, done = position + size, done + count
    expected = np.arange(len(matrix)) * matrix.shape[1]
    if done != len(flat) or not np.array_equal(np.concatenate([expected[:0], *starts]), expected):
        raise _NotPlain


def _page(header: dict, page: memoryview) -> tuple[memoryview, memoryview, int]:
    """(repetition levels, values, number of values) of a page."""
    kind = header.get(_TYPE)
    if kind == _DATA_PAGE and isinstance(v1 := header.get(_HEADER_V1), dict):
        encodings = [v1.get(field) for field in (_ENCODING, _DEFINITION_ENCODING, _REPETITION_ENCODING)]
        if encodings != [_PLAIN, _RLE, _RLE]:
            raise _NotPlain
        repetition, rest = _sized(page)
        _, values = _sized(rest)  # definition levels: that nothing is null says the number of values
        return repetition, values, _count(v1, _NUM_VALUES)
    if kind == _DATA_PAGE_V2 and isinstance(v2 := header.get(_HEADER_V2), dict):
        if v2.get(_ENCODING_V2) != _PLAIN or v2.get(_NUM_NULLS) != 0:
            raise _NotPlain
        repetition_bytes = _count(v2, _REPETITION_BYTES)
        values = page[repetition_bytes + _count(v2, _DEFINITION_BYTES) :]
        return page[:repetition_bytes], values, _count(v2, _NUM_VALUES)
    raise _NotPlain


def _count(fields: dict, number: int) -> int:
    """A field that has to be there and an integer from 0 on."""
    value = fields.get(number)
    if not isinstance(value, int) or value < 0:
        raise _NotPlain
    return value


def _sized(data: memoryview) -> tuple[memoryview, memoryview]:
    """Bytes behind their length of 4 bytes, and what comes after them."""
    end = 4 + int.from_bytes(data[:4], "little")
    if end > len(data):
        raise _NotPlain
    return data[4:end], data[end:]


@lru_cache(maxsize=256)  # pages of as many rows have the same levels, if pages end with rows
def _zeros(levels: bytes, count: int) -> np.ndarray:
    """Positions of the zeros among `count` levels of one bit, in Parquet's mixture of runs and packed bits."""
    found: list[np.ndarray] = []
    position = done = 0
    while done < count:
        head = shift = 0
        while True:
            if position >= len(levels) or shift > 28:
                raise _NotPlain
            byte = levels[position]
            head, shift, position = head | (byte & 0x7F) << shift, shift + 7, position + 1
            if byte < 0x80:
                break
        if head & 1:  # groups of 8 levels, a bit each, the lowest first
            packed = np.frombuffer(levels[position : position + (head >> 1)], np.uint8)
            bits = np.unpackbits(packed, bitorder="little")[: count - done]
            position += head >> 1
            length = len(bits)
            zeros = np.flatnonzero(bits == 0)
        else:
            length = min(head >> 1, count - done)
            value = levels[position] if position < len(levels) else -1
            position += 1
            zeros = np.arange(length if value == 0 else 0)
            if value not in (0, 1):
                raise _NotPlain
        if not length:
            raise _NotPlain
        found.append(done + zeros)
        done += length
    return np.concatenate([np.zeros(0, np.int64), *found])
