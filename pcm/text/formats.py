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

from collections.abc import Callable, Iterator
from typing import BinaryIO

from pcm.errors import InputError
from pcm.reasons import BAD_RECORD
from pcm.text.caption_rows import CaptionRow, ReadOptions, lines_of, storable
from pcm.text.column_files import read_csv, read_jsonl, read_parquet
from pcm.text.detect import FORMATS
from pcm.text.json_documents import read_caption_list, read_coco, read_json, read_karpathy

__all__ = ["FORMATS", "CaptionRow", "ReadOptions", "in_split", "read_rows"]


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


def _read_text(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    for position, line in enumerate(lines_of(stream)):
        yield CaptionRow(str(position), line)


def _read_flickr_token(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    for position, line in enumerate(lines_of(stream)):
        key, tab, caption = line.partition("\t")
        image, hash_mark, number = key.strip().rpartition("#")
        if tab and hash_mark and number.isdigit():
            yield CaptionRow(storable(key.strip()), caption, storable(image))
        else:
            yield CaptionRow(f"row{position}", line, reason=BAD_RECORD)


READERS: dict[str, Callable[[BinaryIO, str], Iterator[CaptionRow]]] = {
    "karpathy": read_karpathy,
    "coco": read_coco,
    "caption_list": read_caption_list,
    "json": read_json,
    "flickr_token": _read_flickr_token,
    "text": _read_text,
}
#: Formats with columns: `ReadOptions` can name those of the captions.
COLUMN_READERS: dict[str, Callable[[BinaryIO, str, ReadOptions], Iterator[CaptionRow]]] = {
    "csv": read_csv,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
}
