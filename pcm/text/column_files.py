"""Caption files with columns or fields: CSV, JSONL, Parquet. Formats: `pcm.text.formats`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pcm.errors import InputError, one_line
from pcm.reasons import BAD_RECORD
from pcm.text.caption_rows import (
    CAPTION_FIELDS,
    CAPTION_LIST_FIELDS,
    IMAGE_FIELDS,
    CaptionRow,
    ReadOptions,
    decode,
    lines_of,
    raw_lines,
    record_rows,
    storable,
)
from pcm.text.csv_records import CsvRecords, split_quoted

log = logging.getLogger(__name__)

#: Of CSV files only: Kaggle's Flickr30k.
CSV_CAPTION_FIELDS = (*CAPTION_FIELDS, "comment")
DELIMITERS = (",", "\t", ";", "|")


def read_jsonl(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[CaptionRow]:
    wanted = tuple(column.lower() for column in options.caption_columns)
    fields = wanted or (*CAPTION_FIELDS, *CAPTION_LIST_FIELDS)
    first: dict[str, Any] | None = None
    named = False
    for position, line in enumerate(lines_of(stream)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: no JSON, or a number of more digits than Python reads
            record = None
        if not isinstance(record, dict):
            yield CaptionRow(str(position), line, reason=BAD_RECORD)
            continue
        first = first or record
        if wanted or not any(field in record for field in fields):
            record = {str(key).lower(): value for key, value in reversed(record.items())}
        named = named or any(field in record for field in fields)
        yield from record_rows(record, position, wanted)
    if not named and (wanted or first):
        missing = " or ".join(map(repr, wanted)) if wanted else "'caption' (or 'text')"
        there = ", ".join(repr(storable(str(field))) for field in list(first or ())[:40]) or "none"
        raise InputError(
            f"{name}: no record has a field {missing}; the fields of the first are {there}; name the caption's with "
            "--caption-column NAME"
        )


def read_csv(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[CaptionRow]:
    lines = raw_lines(stream)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise InputError(f"{name}: empty; a CSV needs a header line with a column 'caption'")
    first = first.rstrip("\r\n")
    wanted = options.caption_columns
    numbered = bool(wanted) and all(column.isdecimal() for column in wanted)
    delimiter = csv_delimiter(first, wanted)
    cells = [column.strip() for column in _csv_fields(first, delimiter, options)]
    columns = [column.lower() for column in cells]
    if numbered:
        captions = [_numbered(column, columns, name) for column in wanted]
        is_header = any(columns[at] in CSV_CAPTION_FIELDS for at in captions)
        header: list[str] = columns if is_header else [""] * len(columns)
        if not is_header:
            lines = _before(first, lines)
    else:
        header = columns
        captions = _named(cells, wanted or CSV_CAPTION_FIELDS, all_of_them=bool(wanted))
        if not captions:
            raise InputError(_no_caption_column(name, cells, wanted))
        for at in captions:
            _refuse_twice(cells, cells[at], name)
    records = CsvRecords(lines, delimiter, len(columns), options.csv_quoting)
    fields = [f"#{k}" for k in range(len(captions))]
    last = len(columns) - 1
    for position, row in enumerate(records):
        if len(row) < len(columns) or (len(row) > len(columns) and last not in captions):
            yield CaptionRow(str(position), delimiter.join(row), reason=BAD_RECORD)
            continue
        # Unquoted delimiters are the commonest mistake in hand-made files; a caption in the last column survives them.
        row[last:] = [delimiter.join(row[last:])]
        record: dict[str, Any] = dict(zip(header, row, strict=True))
        record |= {field: row[at] for field, at in zip(fields, captions, strict=True)}
        yield from record_rows(record, position, fields)
    if records.counts.records_over_lines or records.counts.literal_quotes:
        log.info(
            "%s: %d records run over several lines; in %d a quote at the beginning of a field is a character "
            "(--csv-quoting %s)",
            name, records.counts.records_over_lines, records.counts.literal_quotes, options.csv_quoting,
        )  # fmt: skip


def csv_delimiter(header: str, wanted: Sequence[str] = ()) -> str:
    """The delimiter under which a header names a caption column, else the one that occurs most often in it.

    wanted: names of the caption columns, where they are known. A comma where nothing decides.
    """
    names = {column.lower() for column in wanted} or set(CSV_CAPTION_FIELDS)
    for delimiter in DELIMITERS:
        if names & {column.strip().strip('"').lower() for column in header.split(delimiter)} and delimiter in header:
            return delimiter
    most = max(DELIMITERS, key=header.count)
    return most if header.count(most) else ","


def _csv_fields(line: str, delimiter: str, options: ReadOptions) -> list[str]:
    fields = split_quoted(line, delimiter)
    return fields if isinstance(fields, list) and options.csv_quoting != "none" else line.split(delimiter)


def _before(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


def _numbered(column: str, columns: list[str], name: str) -> int:
    """Position of a column that is given by its number, from 1."""
    if not 1 <= int(column[:9]) <= len(columns):
        raise InputError(f"{name}: no column {column}; its first line has {len(columns)} (--caption-column, from 1)")
    return int(column) - 1


def _named(columns: Sequence[str], wanted: Sequence[str], *, all_of_them: bool) -> list[int]:
    """Positions of the wanted columns: of all of them, or of the first that is there; [] where that fails."""
    lower = [column.lower() for column in columns]
    found = [lower.index(column.lower()) for column in wanted if column.lower() in lower]
    if all_of_them:
        return found if len(found) == len(wanted) else []
    return found[:1]


def _refuse_twice(columns: Sequence[str], column: str, name: str) -> None:
    """Raises InputError where two columns have this name in upper or lower case: which is meant is not known."""
    alike = [repr(storable(each)) for each in columns if each.lower() == column.lower()]
    if len(alike) > 1:
        raise InputError(f"{name}: two columns {', '.join(alike[:2])}; rename or leave out one")


def _no_caption_column(name: str, columns: Sequence[str], wanted: Sequence[str]) -> str:
    """The error for a file whose caption column is not to be found: its columns, and the flag that helps."""
    shown = ", ".join(f"{number} {storable(column)!r}" for number, column in enumerate(columns[:40], 1))
    more = f" and {len(columns) - 40} more" if len(columns) > 40 else ""
    missing = " or ".join(map(repr, wanted)) if wanted else "'caption' (or 'text')"
    return (
        f"{name}: no column {missing}; its columns are {shown}{more}; name the caption's with --caption-column NAME, "
        "or by its number (from 1) where a CSV file has no header"
    )


def read_parquet(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[CaptionRow]:
    try:
        file = pq.ParquetFile(stream)
        yield from _parquet_rows(file, name, options.caption_columns)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not a readable Parquet file ({one_line(error)})") from error


def _parquet_rows(file: pq.ParquetFile, name: str, wanted: Sequence[str]) -> Iterator[CaptionRow]:
    columns = {field.name.lower(): field for field in file.schema_arrow}
    names = [field.name for field in file.schema_arrow]
    captions = _named(names, wanted or (*CAPTION_FIELDS, *CAPTION_LIST_FIELDS), all_of_them=bool(wanted))
    if not captions:
        raise InputError(_no_caption_column(name, names, wanted))
    fields = [names[at].lower() for at in captions]
    for field in fields:
        if not _is_text(_item_type(columns[field].type)):
            raise InputError(f"{name}: column {columns[field].name!r} is {columns[field].type}; wanted strings")
    # `image` is often a struct of bytes: read it only where it is a name.
    read = {
        field: columns[field].name
        for field in dict.fromkeys((*fields, *IMAGE_FIELDS, "split"))
        if field in columns and (field in fields or _is_plain(columns[field].type))
    }
    for field in read:
        _refuse_twice(names, field, name)
    position = 0
    for batch in file.iter_batches(batch_size=8192, columns=list(read.values())):
        cells = {field: _cells(batch.column(column)) for field, column in read.items()}
        for i in range(batch.num_rows):
            record = {field: column[i] for field, column in cells.items()}
            yield from record_rows(record, position, fields, lists=True)
            position += 1


def _item_type(type_: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(type_):
        return type_.value_type
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_):
        return type_.value_type
    return type_


def _is_text(type_: pa.DataType) -> bool:
    return (
        pa.types.is_string(type_)
        or pa.types.is_large_string(type_)
        or pa.types.is_string_view(type_)
        or pa.types.is_binary(type_)
        or pa.types.is_large_binary(type_)
        or pa.types.is_null(type_)
    )


def _is_plain(type_: pa.DataType) -> bool:
    type_ = type_.value_type if pa.types.is_dictionary(type_) else type_
    return _is_text(type_) or pa.types.is_integer(type_) or pa.types.is_floating(type_)


def _cells(column: pa.Array) -> list:
    """Python values of a column. Strings go by way of bytes: Arrow does not check that they are UTF-8, Python does."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _item_type(column.type) is not column.type:
        return [None if cell is None else [_text_of(item) for item in _cells(cell)] for cell in _list_items(column)]
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column.to_pylist()
    return [_text_of(cell) for cell in column.cast(pa.large_binary()).to_pylist()]


def _list_items(column: pa.Array) -> Iterator[pa.Array | None]:
    return (scalar.values if scalar.is_valid else None for scalar in column)


def _text_of(cell: bytes | str | int | float | None) -> str | int | float | None:
    return decode(cell) if isinstance(cell, bytes) else cell
