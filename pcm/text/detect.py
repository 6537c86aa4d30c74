"""Tell the format of a caption file from its name and its first bytes."""

from __future__ import annotations

import json
import re

from pcm.errors import InputError

# `json` (Karpathy's or COCO's, told apart by its keys) is what detection answers for *.json; users name the format.
FORMATS = ("karpathy", "coco", "caption_list", "flickr_token", "csv", "jsonl", "parquet", "text")

_EXTENSIONS = {
    "parquet": "parquet",
    "pq": "parquet",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "csv": "csv",
    "tsv": "csv",
    "token": "flickr_token",
}
_TEXT_EXTENSIONS = ("", "txt", "text", "lst")
#: How packed files begin. No text does.
_PACKED = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
    "zip": re.compile(rb"PK\x03\x04"),
}
_TOKEN_LINE = re.compile(rb"^[^\t\n]+#\d+\t")


def detect_format(name: str, head: bytes) -> str:
    """The format of a caption file from its name (without .gz) and its first bytes (64 KB are plenty).

    Returns one of `FORMATS`, or "json" where only the whole document tells Karpathy from COCO. Raises InputError.
    """
    refuse_packed(name, head)
    extension = name.rsplit("/", 1)[-1].rpartition(".")[2].lower() if "." in name.rsplit("/", 1)[-1] else ""
    head = head.removeprefix(b"\xef\xbb\xbf")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{name}: UTF-16; captions are read as UTF-8: convert it first (iconv -f UTF-16 -t UTF-8)")
    if extension in _EXTENSIONS:
        return _EXTENSIONS[extension]
    if head.startswith(b"PAR1"):
        return "parquet"
    if extension == "json" or (head.lstrip()[:1] == b"{" and extension not in _TEXT_EXTENSIONS):
        return "jsonl" if _first_line_is_record(head) else "json"
    first = next((line for line in head.split(b"\n") if line.strip()), b"")
    if _TOKEN_LINE.match(first):
        return "flickr_token"
    if extension in _TEXT_EXTENSIONS:
        # Kaggle's Flickr8k is a captions.txt with the header `image,caption`.
        fields = [field.strip().lower() for field in re.split(rb"[,\t;]", first)]
        if len(fields) > 1 and b"caption" in fields and b"image" in fields:
            return "csv"
        if first.lstrip()[:1] == b"{" and _first_line_is_record(head):
            return "jsonl"
        if extension or b"\x00" not in head:
            return "text"
    raise InputError(
        f"{name}: cannot tell its caption format, one of {', '.join(FORMATS)}; give the file the ending of its format, "
        "such as .csv, or the option for it where the job has one"
    )


def refuse_packed(name: str, head: bytes) -> None:
    """Raises InputError for a file whose first bytes are those of packed data: read as text, it would be captions."""
    for kind, beginning in _PACKED.items():
        if beginning.match(head):
            named = ", or name it .gz" if kind == "gzip" else ""
            raise InputError(f"{name}: {kind} data; decompress it first{named}")


def _first_line_is_record(head: bytes) -> bool:
    line = next((line for line in head.split(b"\n") if line.strip()), b"")
    try:
        record = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return False
    is_document = isinstance(record, dict) and (
        not {"images", "annotations"}.isdisjoint(record) or isinstance(record.get("data"), list)
    )
    return isinstance(record, dict) and not is_document
