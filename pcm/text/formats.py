"""Read the files captions come in, one row at a time, from a binary stream.

Nothing here judges a caption (`pcm.text.rules` does) or knows where the bytes come from. A record that cannot be read
is a row with the reason `bad_record` or `missing_caption`; a file that cannot be read at all is an `InputError`.

| format       | what it is                                                                                          |
|--------------|-----------------------------------------------------------------------------------------------------|
| karpathy     | `dataset_*.json`: {"images": [{"filename", "split", "cocoid", "sentences": [{"raw", "sentid"}]}]}     |
| coco         | `captions_*.json`: {"annotations": [{"id", "image_id", "caption"}]}                                  |
| flickr_token | `name.jpg#0<TAB>caption` a line                                                                      |
| csv          | a header with a column `caption` or `text`; comma, tab or semicolon                                  |
| jsonl        | one JSON object a line with `caption` or `text` (or a list of strings: `captions`, `references`)     |
| parquet      | the same columns as jsonl; lists of strings allowed                                                  |
| text         | one caption a line; blank lines are no records                                                       |

A record that names no split belongs to the split `train`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pcm.errors import InputError, one_line
from pcm.reasons import BAD_RECORD, MISSING_CAPTION
from pcm.text.detect import FORMATS
from pcm.text.rules import normalise

CAPTION_FIELDS = ("caption", "text")
CAPTION_LIST_FIELDS = ("captions", "references", "sentences")
IMAGE_FIELDS = ("image_id", "image", "filename", "file_name", "image_name")


class CaptionRow(NamedTuple):
    """One record as read. A NamedTuple, not a dataclass: a corpus has millions and this is a third of the cost.

    `row_id` is the same for every split and limit. `text` may hold lone surrogates (bytes that are no UTF-8).
    """

    row_id: str
    text: str = ""
    image_id: str | None = None
    split: str = "train"
    reason: str = ""


def read_rows(stream: BinaryIO, format: str, *, name: str) -> Iterator[CaptionRow]:
    """All rows of a caption file, every split. `name` is what error messages call it. Raises InputError."""
    if format not in READERS:
        raise InputError(f"caption format {format!r} is not known; allowed: {', '.join(FORMATS)}")
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
    raise InputError(
        f"{name}: neither Karpathy's JSON {{'images': [{{'sentences': ...}}]}} nor COCO's {{'annotations': [...]}}: "
        f"it is {_shape(document)}; use one of those, or jsonl"
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


def _load_json(stream: BinaryIO, name: str) -> Any:
    try:
        return json.loads(_decode(stream.read().removeprefix(b"\xef\xbb\xbf")))
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise InputError(f"{name}: JSON nested too deeply to be a caption file") from error


def _is_karpathy(document: Any) -> bool:
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        return False
    return "annotations" not in document or any(isinstance(i, dict) and "sentences" in i for i in document["images"])


def _is_coco(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("annotations"), list)


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
    ending = re.search(r"(\d+)$", file_name.rpartition(".")[0])
    return number if ending and int(ending[1]) == int(number if number.isdecimal() else -1) else file_name


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


def _read_jsonl(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    for position, line in enumerate(_lines(stream)):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            record = None
        if isinstance(record, dict):
            yield from _record_rows(record, position)
        else:
            yield CaptionRow(str(position), line, reason=BAD_RECORD)


def _read_csv(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    lines = _raw_lines(stream)
    header = next((line for line in lines if line.strip()), None)
    if header is None:
        raise InputError(f"{name}: empty; a CSV needs a header line with a column 'caption'")
    delimiter = csv_delimiter(header)
    columns = [column.strip().lower() for column in next(csv.reader([header], delimiter=delimiter))]
    caption_column = next((field for field in CAPTION_FIELDS if field in columns), None)
    if caption_column is None:
        shown = ", ".join(repr(_storable(column)) for column in columns[:8])
        raise InputError(f"{name}: no column 'caption' (or 'text') in its header; it has {shown}")
    at = columns.index(caption_column)
    rows = csv.reader(lines, delimiter=delimiter)
    position = -1
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:  # a stray quote or carriage return spoils this row alone
            position += 1
            yield CaptionRow(str(position), str(error), reason=BAD_RECORD)
            continue
        if not row:
            continue
        position += 1
        if len(row) < len(columns) or (len(row) > len(columns) and at != len(columns) - 1):
            yield CaptionRow(str(position), delimiter.join(row), reason=BAD_RECORD)
            continue
        # Unquoted delimiters are the commonest mistake in hand-made files; a caption in the last column survives them.
        record: dict[str, Any] = dict(zip(columns, row, strict=False))
        record[caption_column] = delimiter.join(row[at:]) if at == len(columns) - 1 else row[at]
        yield from _record_rows(record, position)


def csv_delimiter(header: str) -> str:
    """The delimiter under which a header names a caption column; a comma where none does."""
    for delimiter in (",", "\t", ";"):
        columns = next(csv.reader([header], delimiter=delimiter), [])
        if any(column.strip().lower() in CAPTION_FIELDS for column in columns):
            return delimiter
    return ","


# --- Parquet ---


def _read_parquet(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    try:
        file = pq.ParquetFile(stream)
        yield from _parquet_rows(file, name)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not a readable Parquet file ({one_line(error)})") from error


def _parquet_rows(file: pq.ParquetFile, name: str) -> Iterator[CaptionRow]:
    columns = {field.name.lower(): field for field in file.schema_arrow}
    caption_field = next((f for f in (*CAPTION_FIELDS, *CAPTION_LIST_FIELDS) if f in columns), None)
    if caption_field is None:
        raise InputError(f"{name}: no column 'caption' (or 'text', 'references'); it has {', '.join(columns)}")
    if not _is_text(_item_type(columns[caption_field].type)):
        raise InputError(f"{name}: column {caption_field!r} is {columns[caption_field].type}; wanted strings")
    # `image` is often a struct of bytes: read it only where it is a name.
    wanted = {
        field: columns[field].name
        for field in dict.fromkeys((caption_field, *IMAGE_FIELDS, "split"))
        if field in columns and (field == caption_field or _is_plain(columns[field].type))
    }
    position = 0
    for batch in file.iter_batches(batch_size=8192, columns=list(wanted.values())):
        cells = {field: _cells(batch.column(column)) for field, column in wanted.items()}
        for i in range(batch.num_rows):
            yield from _record_rows({field: column[i] for field, column in cells.items()}, position, lists=True)
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
    return _is_text(type_) or pa.types.is_integer(type_)


def _cells(column: pa.Array) -> list:
    """Python values of a column. Strings go by way of bytes: Arrow does not check that they are UTF-8, Python does."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _item_type(column.type) is not column.type:
        return [None if cell is None else [_text_of(item) for item in _cells(cell)] for cell in _list_items(column)]
    if pa.types.is_integer(column.type):
        return column.to_pylist()
    return [_text_of(cell) for cell in column.cast(pa.large_binary()).to_pylist()]


def _list_items(column: pa.Array) -> Iterator[pa.Array | None]:
    return (scalar.values if scalar.is_valid else None for scalar in column)


def _text_of(cell: bytes | str | int | None) -> str | int | None:
    return _decode(cell) if isinstance(cell, bytes) else cell


# --- shared ---


def _record_rows(record: dict[str, Any], position: int, *, lists: bool = False) -> list[CaptionRow]:
    """Rows of one flat record. `lists`: a list in the caption column is meant, since a Parquet schema says so."""
    image_id = split = None
    for field in IMAGE_FIELDS:
        if image_id is None and field in record:
            image_id = _label(record[field])
    if "split" in record:
        split = _label(record["split"])
    field = next((field for field in CAPTION_FIELDS if field in record), "")
    if not field:
        field = next((field for field in CAPTION_LIST_FIELDS if field in record), "")
    value = record.get(field)
    if isinstance(value, list) and value and (lists or field in CAPTION_LIST_FIELDS):
        return [
            CaptionRow(f"{position}#{k}", text, image_id, split or "train", reason)
            for k, (text, reason) in enumerate(map(_caption_of, value))
        ]
    text, reason = _caption_of(value)
    return [CaptionRow(str(position), text, image_id, split or "train", reason)]


def _caption_of(value: Any) -> tuple[str, str]:
    if isinstance(value, str):
        return value, ""
    return ("", MISSING_CAPTION) if value is None else (repr(value), BAD_RECORD)


def _label(value: Any) -> str | None:
    """An id or a name as a string; None for anything else (a struct of image bytes, a missing field)."""
    if isinstance(value, str):
        return _storable(value.strip()) or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _lines(stream: BinaryIO) -> Iterator[str]:
    """The lines that are not blank. Only a line feed ends one, not U+2028 nor a lone carriage return."""
    for line in _raw_lines(stream):
        text = line.rstrip("\r\n")
        if text and not (text.isspace() and not normalise(text)):
            yield text


def _raw_lines(stream: BinaryIO) -> Iterator[str]:
    first = next(stream, b"")
    yield _decode(first.removeprefix(b"\xef\xbb\xbf"))
    yield from map(_decode, stream)


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _storable(text: str) -> str:
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _shape(document: Any) -> str:
    if isinstance(document, dict):
        return f"an object with the keys {', '.join(map(repr, list(document)[:6])) or 'none'}"
    return {list: "a list", str: "a string", type(None): "null"}.get(type(document), f"a {type(document).__name__}")


_Reader = Callable[[BinaryIO, str], Iterator[CaptionRow]]
READERS: dict[str, _Reader] = {
    "karpathy": _read_karpathy,
    "coco": _read_coco,
    "json": _read_json,
    "flickr_token": _read_flickr_token,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "text": _read_text,
}
