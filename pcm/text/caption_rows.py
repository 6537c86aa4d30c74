"""Rows of caption files: what one is, and what all formats need to make one of a record or a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Self

from pcm.errors import InputError
from pcm.reasons import BAD_RECORD, MISSING_CAPTION
from pcm.text.csv_records import QUOTINGS
from pcm.text.rules import normalise

CAPTION_FIELDS = ("caption", "text")
CAPTION_LIST_FIELDS = ("captions", "references", "sentences")
IMAGE_FIELDS = ("image_id", "image", "filename", "file_name", "image_name")

#: A longer line is no record: it is kept as far as this, and the rest is passed over without being held in memory.
MAX_LINE_BYTES = 16 << 20
#: A longer id or name is nobody's.
MAX_LABEL_CHARACTERS = 1024


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a user says of a file that does not say it itself. Raises InputError for an unknown quoting.

    caption_columns: names, or numbers from 1 in a CSV file without a header; () = found by name.
    csv_quoting: one of `pcm.text.csv_records.QUOTINGS`.
    """

    caption_columns: tuple[str, ...] = ()
    csv_quoting: str = "auto"

    @classmethod
    def of(cls, caption_column: str | None, csv_quoting: str) -> Self:
        """What --caption-column, "NAME[,NAME...]" or None, and --csv-quoting say."""
        columns = (column.strip() for column in (caption_column or "").split(","))
        return cls(caption_columns=tuple(filter(None, columns)), csv_quoting=csv_quoting)

    def __post_init__(self) -> None:
        if self.csv_quoting not in QUOTINGS:
            raise InputError(f"CSV quoting {self.csv_quoting!r}: allowed are {', '.join(QUOTINGS)}")


class CaptionRow(NamedTuple):
    """One record as read. A NamedTuple, not a dataclass: a corpus has millions and this is a third of the cost.

    `row_id` is the same for every split and limit. `text` may hold lone surrogates (bytes that are no UTF-8).
    """

    row_id: str
    text: str = ""
    image_id: str | None = None
    split: str = "train"
    reason: str = ""


def record_rows(
    record: dict[str, Any], position: int, fields: Sequence[str] = (), *, lists: bool = False
) -> list[CaptionRow]:
    """Rows of one flat record: a row for each of its captions.

    fields: where they are; () = the first field that is known to hold them. lists: a list in such a field is meant,
    since a Parquet schema says so.
    """
    image_id = split = None
    for field in IMAGE_FIELDS:
        if image_id is None and field in record and field not in fields:
            image_id = label_of(record[field])
    if "split" in record:
        split = label_of(record["split"])
    if not fields:
        fields = [field for field in (*CAPTION_FIELDS, *CAPTION_LIST_FIELDS) if field in record][:1]
    values: list[Any] = []
    several = len(fields) > 1
    for field in fields:
        value = record.get(field)
        if isinstance(value, list) and value and (lists or field in CAPTION_LIST_FIELDS):
            values.extend(value)
            several = True
        else:
            values.append(value)
    found = [caption_of(value) for value in values] or [("", MISSING_CAPTION)]
    return [
        CaptionRow(f"{position}#{k}" if several else str(position), text, image_id, split or "train", reason)
        for k, (text, reason) in enumerate(found)
    ]


def caption_of(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return value, ""
    return ("", MISSING_CAPTION) if value is None else (repr(value), BAD_RECORD)


def label_of(value: Any) -> str | None:
    """An id or a name as a string; None for anything else (a struct of image bytes, a missing field).

    pandas makes floats of whole numbers in a column that has gaps: 391895.0 is 391895, in text too.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        text = storable(value.strip())
        whole = text.removesuffix(".0")
        return (whole if whole.isdecimal() else text) or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def is_too_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) > MAX_LABEL_CHARACTERS


def lines_of(stream: BinaryIO) -> Iterator[str]:
    """The lines that are not blank. Only a line feed ends one, not U+2028; in a file without any, a carriage return."""
    for line in raw_lines(stream):
        text = line.rstrip("\r\n")
        if text and not (text.isspace() and not normalise(text)):
            yield text


def raw_lines(stream: BinaryIO) -> Iterator[str]:
    """The lines of a file, their ends with them; one that is longer than MAX_LINE_BYTES is cut there."""
    first = stream.readline(MAX_LINE_BYTES)
    if b"\r" in first and not first.endswith(b"\n"):  # as classic Macs wrote
        yield from map(decode, _between_returns(first.removeprefix(b"\xef\xbb\xbf"), stream))
        return
    yield decode(_whole(first, stream).removeprefix(b"\xef\xbb\xbf"))
    while line := stream.readline(MAX_LINE_BYTES):
        yield decode(_whole(line, stream))


def _between_returns(piece: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream that began with `piece`, without the carriage returns, or later line feeds, that end them;
    one that is longer than MAX_LINE_BYTES is cut there."""
    line = b""
    while piece:
        first, *others = piece.replace(b"\n", b"\r").split(b"\r")
        line = (line + first)[:MAX_LINE_BYTES]
        for other in others:
            yield line
            line = other
        piece = stream.read(MAX_LINE_BYTES)
    yield line


def _whole(line: bytes, stream: BinaryIO) -> bytes:
    """`line`; where it is only the beginning of one, the rest has been passed over."""
    rest = line
    while rest and len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
        rest = stream.readline(MAX_LINE_BYTES)
    return line


def decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def storable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
