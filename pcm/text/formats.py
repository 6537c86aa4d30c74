"""Read the files captions come in, one row at a time, from a binary stream.

Nothing here judges a caption (`pcm.text.rules` does) or knows where the bytes come from. A record that cannot be read
is a row with the reason `bad_record` or `missing_caption`; a file that cannot be read at all is an `InputError`.

| format       | what it is                                                                                          |
|--------------|-----------------------------------------------------------------------------------------------------|
| karpathy     | `dataset_*.json`: {"images": [{"filename", "split", "cocoid", "sentences": [{"raw", "sentid"}]}]}     |
| coco         | `captions_*.json`: {"annotations": [{"id", "image_id", "caption"}]}; NoCaps, VizWiz are written so   |
| caption_list | BLIP's, ALBEF's [{"image", "caption"}] and TextCaps' {"data": [{"image_id", "caption_str"}]}         |
| flickr_token | `name.jpg#0<TAB>caption` a line                                                                      |
| csv          | a header with a column `caption`, `text` or `comment`; comma, tab, semicolon or bar                   |
| jsonl        | one JSON object a line with `caption` or `text` (or a list of strings: `captions`, `references`)     |
| parquet      | the same columns as jsonl; lists of strings allowed                                                  |
| text         | one caption a line; blank lines are no records                                                       |

A record that names no split belongs to the split `train`. Which columns of a CSV, JSONL or Parquet file hold captions
can be named (`ReadOptions`); a CSV file whose columns are named by number has no header.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from pcm.errors import InputError, one_line
from pcm.reasons import BAD_RECORD, MISSING_CAPTION, REJECTED
from pcm.text.csv_records import QUOTINGS, CsvRecords, split_quoted
from pcm.text.detect import FORMATS
from pcm.text.rules import normalise

log = logging.getLogger(__name__)

CAPTION_FIELDS = ("caption", "text")
#: Of CSV files only: Kaggle's Flickr30k.
CSV_CAPTION_FIELDS = (*CAPTION_FIELDS, "comment")
CAPTION_LIST_FIELDS = ("captions", "references", "sentences")
IMAGE_FIELDS = ("image_id", "image", "filename", "file_name", "image_name")
DELIMITERS = (",", "\t", ";", "|")

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


def read_rows(stream: BinaryIO, format: str, *, name: str, options: ReadOptions | None = None) -> Iterator[CaptionRow]:
    """All rows of a caption file, every split. `name` is what error messages call it.

    Raises InputError: for an unknown format, an option that the format does not take, or a file that cannot be read.
    """
    options = options or ReadOptions()
    if options.csv_quoting != "auto" and format != "csv":
        raise InputError(f"{name}: --csv-quoting {options.csv_quoting} is for CSV files; this is read as {format}")
    if format in COLUMN_READERS:
        return COLUMN_READERS[format](stream, name, options)
    if format not in READERS:
        raise InputError(f"caption format {format!r} is not known; allowed: {', '.join(FORMATS)}")
    if options.caption_columns:
        formats = ", ".join(COLUMN_READERS)
        raise InputError(f"{name}: --caption-column is for files with columns ({formats}); this is read as {format}")
    return READERS[format](stream, name)


def in_split(row: CaptionRow, split: str | None) -> bool:
    """Whether a row belongs to a split; None and "all" take every row.

    "train" takes Karpathy's "restval" too: COCO's usual training set is both (113,287 images).
    """
    return split in (None, "all", row.split) or (split == "train" and row.split == "restval")


# --- one JSON document a file ---


def _read_json(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    document = _load_json(stream, name)
    if _is_karpathy(document):
        return _karpathy_rows(document, name)
    if _is_coco(document):
        return _coco_rows(document, name)
    if (entries := _caption_list(document)) is not None:
        return _caption_list_rows(entries)
    raise InputError(
        f"{name}: neither Karpathy's JSON {{'images': [{{'sentences': ...}}]}} nor COCO's {{'annotations': [...]}} nor "
        f"a list of {{'image', 'caption'}}: it is {_shape(document)}; use one of those, or jsonl"
    )


def _read_karpathy(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    document = _load_json(stream, name)
    if not _is_karpathy(document):
        raise InputError(
            f"{name}: not Karpathy's JSON: wanted {{'images': [...]}} with sentences, got {_shape(document)}"
        )
    return _karpathy_rows(document, name)


def _read_coco(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    document = _load_json(stream, name)
    if not _is_coco(document):
        raise InputError(f"{name}: not COCO's JSON: wanted {{'annotations': [...]}}, got {_shape(document)}")
    return _coco_rows(document, name)


def _read_caption_list(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    document = _load_json(stream, name)
    entries = _caption_list(document)
    if entries is None:
        raise InputError(f"{name}: not a list of {{'image', 'caption'}}, got {_shape(document)}")
    return _caption_list_rows(entries)


def _load_json(stream: BinaryIO, name: str) -> Any:
    text = _decode(stream.read().removeprefix(b"\xef\xbb\xbf"))
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{name}: not valid JSON ({error})") from error
        except ValueError:  # a number of more digits than Python reads: as text it is the fault of one record
            return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else digits)
    except RecursionError as error:
        raise InputError(f"{name}: JSON nested too deeply to be a caption file") from error


def _is_karpathy(document: Any) -> bool:
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        return False
    return "annotations" not in document or any(isinstance(i, dict) and "sentences" in i for i in document["images"])


def _is_coco(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("annotations"), list)


def _caption_list(document: Any) -> list | None:
    """The entries of BLIP's list, or of TextCaps' `data`."""
    entries = document.get("data") if isinstance(document, dict) else document
    known = isinstance(entries, list) and any(
        isinstance(entry, dict) and ("caption" in entry or "caption_str" in entry) for entry in entries
    )
    return entries if known else None


def _caption_list_rows(entries: list) -> Iterator[CaptionRow]:
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            yield CaptionRow(f"row{position}", repr(entry), reason=BAD_RECORD)
            continue
        split = _label(entry.get("split") or entry.get("set_name")) or "train"
        # BLIP's image_id numbers its own training set; pictures are known by their file.
        path = _label(entry.get("image"))
        image_id = PurePosixPath(path).name if path else _label(entry.get("image_id"))
        row_id = _label(entry.get("caption_id")) or f"row{position}"
        value = entry.get("caption", entry.get("caption_str"))
        for k, item in enumerate(value if isinstance(value, list) else [value]):
            text, reason = _caption_of(item)
            yield CaptionRow(f"{row_id}#{k}" if isinstance(value, list) else row_id, text, image_id, split, reason)


def _karpathy_rows(document: dict, name: str) -> Iterator[CaptionRow]:
    images = document["images"]
    if images and not any(isinstance(image, dict) and "sentences" in image for image in images):
        raise InputError(
            f"{name}: none of its {len(images)} images has 'sentences'; Karpathy's files list captions there"
        )
    for position, image in enumerate(images):
        if not isinstance(image, dict):
            yield CaptionRow(f"image{position}", repr(image), reason=BAD_RECORD)
            continue
        split = _label(image.get("split")) or "train"
        file_name = _label(image.get("filename"))
        # COCO is known by its number everywhere; Flickr30k's files by their name.
        image_id = _label(image.get("cocoid")) or file_name or _label(image.get("imgid"))
        sentences = image.get("sentences")
        if not isinstance(sentences, list):
            reason = MISSING_CAPTION if sentences is None else BAD_RECORD
            text = "" if sentences is None else repr(sentences)
            yield CaptionRow(f"image{position}", text, image_id, split, reason)
            continue
        for k, sentence in enumerate(sentences):
            row_id = f"image{position}#{k}"
            text, reason = repr(sentence), BAD_RECORD
            if isinstance(sentence, dict):
                row_id = _label(sentence.get("sentid")) or row_id
                text, reason = _caption_of(sentence.get("raw"))
                tokens = sentence.get("tokens")
                if reason == MISSING_CAPTION and isinstance(tokens, list) and all(isinstance(t, str) for t in tokens):
                    text, reason = " ".join(tokens), ""
            yield CaptionRow(row_id, text, image_id, split, reason)


def _coco_rows(document: dict, name: str) -> Iterator[CaptionRow]:
    annotations = document["annotations"]
    if annotations and not any(isinstance(a, dict) and "caption" in a for a in annotations):
        raise InputError(
            f"{name}: none of its {len(annotations)} annotations has a 'caption'; use a captions_*.json file"
        )
    images = document.get("images")
    file_names = {
        _label(image.get("id")): _label(image.get("file_name"))
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict)
    }
    for position, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            yield CaptionRow(f"row{position}", repr(annotation), reason=BAD_RECORD)
            continue
        text, reason = _caption_of(annotation.get("caption"))
        if annotation.get("is_rejected") is True or annotation.get("is_precanned") is True:  # VizWiz
            reason = REJECTED
        if _is_too_long(annotation.get("id")) or _is_too_long(annotation.get("image_id")):
            reason = BAD_RECORD
        image_id = _label(annotation.get("image_id"))
        image_id = _picture_key(image_id, file_names.get(image_id))
        row_id = _label(annotation.get("id")) or f"row{position}"
        yield CaptionRow(row_id, text, image_id, reason=reason)


def coco_image_id(image: dict) -> str | None:
    """The id of an entry of COCO's `images`, as its annotations' rows have it."""
    return _picture_key(_label(image.get("id")), _label(image.get("file_name")))


def _picture_key(number: str | None, file_name: str | None) -> str | None:
    """COCO's number if the picture's file name ends in it, else the file name: another number would find no picture."""
    if number is None or file_name is None:
        return number
    ending = re.search(r"([0-9]+)$", file_name.rpartition(".")[0])
    same = ending is not None and number.isdecimal() and ending[1].lstrip("0") == number.lstrip("0")
    return number if same else file_name


# --- one record a line ---


def _read_text(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    for position, line in enumerate(_lines(stream)):
        yield CaptionRow(str(position), line)


def _read_flickr_token(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    for position, line in enumerate(_lines(stream)):
        key, tab, caption = line.partition("\t")
        image, hash_mark, number = key.strip().rpartition("#")
        if tab and hash_mark and number.isdigit():
            yield CaptionRow(_storable(key.strip()), caption, _storable(image))
        else:
            yield CaptionRow(f"row{position}", line, reason=BAD_RECORD)


def _read_jsonl(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[CaptionRow]:
    wanted = tuple(column.lower() for column in options.caption_columns)
    named = False
    for position, line in enumerate(_lines(stream)):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: no JSON, or a number of more digits than Python reads
            record = None
        if not isinstance(record, dict):
            yield CaptionRow(str(position), line, reason=BAD_RECORD)
            continue
        if wanted or not any(field in record for field in (*CAPTION_FIELDS, *CAPTION_LIST_FIELDS)):
            record = {str(key).lower(): value for key, value in reversed(record.items())}
        named = named or not wanted or any(field in record for field in wanted)
        yield from _record_rows(record, position, wanted)
    if not named:
        raise InputError(f"{name}: no record has a field {' or '.join(map(repr, wanted))} (--caption-column)")


def _read_csv(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[CaptionRow]:
    lines = _raw_lines(stream)
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
        yield from _record_rows(record, position, fields)
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


def _no_caption_column(name: str, columns: Sequence[str], wanted: Sequence[str]) -> str:
    """The error for a file whose caption column is not to be found: its columns, and the flag that helps."""
    shown = ", ".join(f"{number} {_storable(column)!r}" for number, column in enumerate(columns[:40], 1))
    more = f" and {len(columns) - 40} more" if len(columns) > 40 else ""
    missing = " or ".join(map(repr, wanted)) if wanted else "'caption' (or 'text')"
    return (
        f"{name}: no column {missing}; its columns are {shown}{more}; name the caption's with --caption-column NAME, "
        "or by its number (from 1) where a CSV file has no header"
    )


# --- Parquet ---


def _read_parquet(stream: BinaryIO, name: str, options: ReadOptions) -> Iterator[CaptionRow]:
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
    position = 0
    for batch in file.iter_batches(batch_size=8192, columns=list(read.values())):
        cells = {field: _cells(batch.column(column)) for field, column in read.items()}
        for i in range(batch.num_rows):
            record = {field: column[i] for field, column in cells.items()}
            yield from _record_rows(record, position, fields, lists=True)
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
    return _decode(cell) if isinstance(cell, bytes) else cell


# --- shared ---


def _record_rows(
    record: dict[str, Any], position: int, fields: Sequence[str] = (), *, lists: bool = False
) -> list[CaptionRow]:
    """Rows of one flat record: a row for each of its captions.

    fields: where they are; () = the first field that is known to hold them. lists: a list in such a field is meant,
    since a Parquet schema says so.
    """
    image_id = split = None
    for field in IMAGE_FIELDS:
        if image_id is None and field in record and field not in fields:
            image_id = _label(record[field])
    if "split" in record:
        split = _label(record["split"])
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
    found = [_caption_of(value) for value in values] or [("", MISSING_CAPTION)]
    return [
        CaptionRow(f"{position}#{k}" if several else str(position), text, image_id, split or "train", reason)
        for k, (text, reason) in enumerate(found)
    ]


def _caption_of(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return value, ""
    return ("", MISSING_CAPTION) if value is None else (repr(value), BAD_RECORD)


def _label(value: Any) -> str | None:
    """An id or a name as a string; None for anything else (a struct of image bytes, a missing field).

    pandas makes floats of whole numbers in a column that has gaps: 391895.0 is 391895, in text too.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        text = _storable(value.strip())
        whole = text.removesuffix(".0")
        return (whole if whole.isdecimal() else text) or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _is_too_long(value: Any) -> bool:
    return isinstance(value, str) and len(value) > MAX_LABEL_CHARACTERS


def _lines(stream: BinaryIO) -> Iterator[str]:
    """The lines that are not blank. Only a line feed ends one, not U+2028; in a file without any, a carriage return."""
    for line in _raw_lines(stream):
        text = line.rstrip("\r\n")
        if text and not (text.isspace() and not normalise(text)):
            yield text


def _raw_lines(stream: BinaryIO) -> Iterator[str]:
    """The lines of a file, their ends with them; one that is longer than MAX_LINE_BYTES is cut there."""
    first = stream.readline(MAX_LINE_BYTES)
    if b"\r" in first and not first.endswith(b"\n") and len(first) < MAX_LINE_BYTES:  # as classic Macs wrote
        yield from _decode(first.removeprefix(b"\xef\xbb\xbf")).split("\r")
        return
    yield _decode(_whole(first, stream).removeprefix(b"\xef\xbb\xbf"))
    while line := stream.readline(MAX_LINE_BYTES):
        yield _decode(_whole(line, stream))


def _whole(line: bytes, stream: BinaryIO) -> bytes:
    """`line`; where it is only the beginning of one, the rest has been passed over."""
    rest = line
    while rest and len(rest) == MAX_LINE_BYTES and not rest.endswith(b"\n"):
        rest = stream.readline(MAX_LINE_BYTES)
    return line


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _storable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _shape(document: Any) -> str:
    if isinstance(document, dict):
        return f"an object with the keys {', '.join(map(repr, list(document)[:6])) or 'none'}"
    return {list: "a list", str: "a string", type(None): "null"}.get(type(document), f"a {type(document).__name__}")


READERS: dict[str, Callable[[BinaryIO, str], Iterator[CaptionRow]]] = {
    "karpathy": _read_karpathy,
    "coco": _read_coco,
    "caption_list": _read_caption_list,
    "json": _read_json,
    "flickr_token": _read_flickr_token,
    "text": _read_text,
}
#: Formats with columns: `ReadOptions` can name those of the captions.
COLUMN_READERS: dict[str, Callable[[BinaryIO, str, ReadOptions], Iterator[CaptionRow]]] = {
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}
