"""Read a corpus of captions from a local path or a URI, as a stream of `CorpusRecord`.

Formats: `pcm.text.formats`. Which captions are kept, which are quarantined, and why: `pcm.text.rules` (the one place
where that rule is written). Nothing is dropped: every record comes out, with a reason where it cannot be used.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import hashlib
import io
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from cluster.store.store import join, open_store
from pcm.errors import InputError, first_line
from pcm.reasons import MISSING_CAPTION
from pcm.text import detect
from pcm.text.formats import FORMATS, CaptionRow, ReadOptions, in_split, read_rows
from pcm.text.gzip_files import open_gzip
from pcm.text.rules import check_caption, quarantined

__all__ = ["FORMATS", "CorpusRecord", "corpus_bytes", "detect_format", "read_corpus", "source_digest"]

logger = logging.getLogger(__name__)

_BUFFER = 1 << 20
#: Characters that make a pattern of a name.
_WILD = re.compile(r"[*?\[]")
_SPLITS = "train|validation|valid|val|dev|test"
#: How the parts of a Hugging Face dataset begin: `validation-00000-of-00002.parquet`.
_SPLIT_IN_NAME = re.compile(rf"({_SPLITS})[-_.]")
#: What it calls their folder where it converts to Parquet: `default/validation/0000.parquet`; Spark `split=validation`.
_SPLIT_IN_FOLDER = re.compile(rf"(?:partial-|split=)?({_SPLITS})")


@dataclass(frozen=True, slots=True)
class CorpusRecord:
    """One caption of a corpus.

    index: position among the records of the split, from 0; unique.
    corpus_id: the caption's own id (sentid, annotation id, name.jpg#k) or its position in the file; the same whatever
        split and limit are asked for. Unique in a well-formed corpus; a file may repeat its own ids.
    caption: normalised; in quarantine as `pcm.text.rules` says.
    image_id: the picture it was written for, where the format says so.
    reason: "" for a usable caption, else a caption reason of `pcm.reasons`.
    """

    index: int
    corpus_id: str
    caption: str
    image_id: str | None
    reason: str


def read_corpus(
    uri: str,
    *,
    format: str = "auto",
    split: str | None = None,
    limit: int | None = None,
    options: ReadOptions | None = None,
) -> Iterator[CorpusRecord]:
    """Stream the records of a corpus, in file order. Memory stays flat, except that a JSON document is loaded whole.

    uri: a path or URI, as `cluster.store.store` opens them; `.gz` is decompressed. A folder of Parquet files, or a
        pattern of them (`s3://b/p/train-*.parquet`), is one corpus: its parts in the order of their names.
    format: one of `FORMATS`, or "auto".
    split: None or "all" for every split. "train" takes Karpathy's "restval" too; a record naming no split is "train".
    limit: at most this many records, bad ones included.
    options: which columns are captions, and how fields are quoted, where the file does not say so itself.

    Raises InputError (while iterating): the file cannot be opened or told apart, has the wrong shape, has no record of
    the split, or, after its last record, had no usable caption at all.
    """
    if format not in ("auto", *FORMATS):
        raise InputError(f"caption format {format!r} is not known; allowed: auto, {', '.join(FORMATS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit} leaves no caption; it must be at least 1")
    uri = str(uri)
    base, parts = _parts(uri)
    if parts and format not in ("auto", "parquet"):
        raise InputError(f"{uri}: several files are read as one corpus only where they are Parquet, not {format}")
    if parts:
        logger.info("%s: %d Parquet files, from %s to %s", uri, len(parts), parts[0], parts[-1])
    if format == "auto":
        format = "parquet" if parts else detect_format(uri)
    reasons: Counter[str] = Counter()
    splits: Counter[str] = Counter()
    index = 0
    rows = _rows_of_parts(base, parts, options) if parts else _rows_of_file(uri, format, options)
    for row in rows:
        splits[row.split] += 1
        if split is not None and not in_split(row, split):
            continue
        caption, reason = _judge(row)
        reasons[reason] += 1
        yield CorpusRecord(index, row.row_id, caption, row.image_id, reason)
        index += 1
        if index == limit:
            break
    if not index and splits:
        held = ", ".join(f"{name} ({count:,})" for name, count in splits.most_common(8))
        raise InputError(
            f"{uri}: no caption in split {split!r}; its splits are {held}; give one of them, or --split all"
        )
    if split is None and splits.keys() - {"train", "restval"}:
        logger.warning(
            "%s: captions of all its splits are read (%s); --split train keeps the test's out", uri, dict(splits)
        )
    if not reasons[""]:
        found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "no record at all"
        is_unnamed = format == "jsonl" and set(reasons) == {MISSING_CAPTION}
        more = "; name the captions' field with --caption-column NAME" if is_unnamed else ""
        raise InputError(f"{uri}: no usable caption (read as {format}: {found}){more}")


def detect_format(uri: str) -> str:
    """The format of a corpus; "json" stands for Karpathy's or COCO's, told apart when it is read. Raises InputError."""
    with _open(str(uri)) as stream:
        return _detect(str(uri), stream)


def corpus_parts(uri: str) -> list[str]:
    """The Parquet files that a folder or a pattern stands for, sorted by name whatever the store's order is; [] for one
    file. Raises InputError for a folder or pattern without any.
    """
    base, keys = _parts(uri)
    return [join(base, key) for key in keys]


def _parts(uri: str) -> tuple[str, list[str]]:
    """(folder that is named, keys of the parts below it)."""
    if "::" in uri or uri.startswith(("http://", "https://")):
        return uri, []  # one file: they cannot be listed
    store = open_store(uri)
    if store.is_file():
        return uri, []
    if keys := store.list():
        # Hugging Face keeps the parts in data/. What lies deeper may be anything: a pattern says it.
        if parts := [key for key in keys if _is_part(key) and "/" not in key.removeprefix("data/")]:
            return uri, parts
        raise InputError(f"{uri}: a folder; name one caption file, or a folder or pattern of Parquet files")
    folder, pattern = _split_pattern(uri)
    if not pattern:
        return uri, []
    keys = open_store(folder).list()
    if parts := [key for key in keys if _is_part(key) and _matches(key.split("/"), pattern)]:
        return folder, parts
    raise InputError(
        f"{uri}: no Parquet file is so named; name a caption file, or a folder or pattern of Parquet files "
        "(* stands for a name, ** for any folders)"
    )


def _split_pattern(uri: str) -> tuple[str, list[str]]:
    """("s3://b/p", ["train-*.parquet"]) of a pattern; (uri, []) where there is none. A folder that is there as it is
    written, such as `data [v2]`, is no pattern."""
    parts = uri.split("/")
    for number, part in enumerate(parts):
        if _WILD.search(part) and not open_store("/".join(parts[: number + 1])).exists(""):
            return "/".join(parts[:number]) or ("/" if number else "."), parts[number:]
    return uri, []


def _matches(key: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a key are those of a pattern, one by one; `**` stands for any number of them."""
    if not pattern:
        return not key
    if pattern[0] == "**":
        return any(_matches(key[start:], pattern[1:]) for start in range(len(key) + 1))
    return bool(key) and fnmatch.fnmatchcase(key[0], pattern[0]) and _matches(key[1:], pattern[1:])


def _is_part(key: str) -> bool:
    """Whether a file is a part: not one that Spark, Hive or macOS keep beside them (`_metadata`, `._x`)."""
    return key.endswith(".parquet") and not any(part.startswith(("_", ".")) for part in key.split("/"))


def _rows_of_file(uri: str, format: str, options: ReadOptions | None) -> Iterator[CaptionRow]:
    with _open(uri) as stream:
        yield from _rows(stream, format, uri, options)


def _rows_of_parts(base: str, parts: Sequence[str], options: ReadOptions | None) -> Iterator[CaptionRow]:
    """The rows of one table in parts, numbered through. A part without a column `split` has that of its name, or of its
    folder's where its own says none. What is named by the user says nothing: it is asked for, whatever it is called.
    """
    before = 0
    for key in parts:
        uri = join(base, key)
        *_, folder, name = ["", *key.split("/")]
        named = _SPLIT_IN_NAME.match(name) or _SPLIT_IN_FOLDER.fullmatch(folder)
        number = -1
        for row in _rows_of_file(uri, "parquet", options):
            position, hash_mark, k = row.row_id.partition("#")
            number = int(position)
            split = named[1] if named and row.split == "train" else row.split
            yield row._replace(row_id=f"{before + number}{hash_mark}{k}", split=split)
        before += number + 1


def _judge(row: CaptionRow) -> tuple[str, str]:
    return (quarantined(row.text), row.reason) if row.reason else check_caption(row.text)


def _detect(uri: str, stream: io.BufferedReader) -> str:
    try:
        head = stream.peek(1 << 16)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{uri}: cannot be read ({error})") from error
    return detect.detect_format(uri.removesuffix(".gz"), head)


def _rows(stream: io.BufferedReader, format: str, uri: str, options: ReadOptions | None) -> Iterator[CaptionRow]:
    try:
        if format != "parquet":
            detect.refuse_packed(uri, stream.peek(1 << 16))
        yield from read_rows(cast(BinaryIO, stream), format, name=uri, options=options)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{uri}: its gzip data is damaged or cut short ({error})") from error


def source_digest(uri: str) -> str:
    """sha256 of a corpus file as it lies there: a size or a date does not prove that it is unchanged, and reading bytes
    costs little beside reading captions. Of parts: over their digests, in the order of their names. Raises InputError
    when the file cannot be opened."""
    digest = hashlib.sha256()
    if parts := corpus_parts(str(uri)):
        for part in parts:
            digest.update(source_digest(part).encode())
        return digest.hexdigest()
    with _open_raw(str(uri)) as raw:
        while data := raw.read(8 * _BUFFER):
            digest.update(data)
    return digest.hexdigest()


def corpus_bytes(uri: str) -> int | None:
    """Bytes of a corpus file, or of its parts; None where the place does not tell. Raises InputError as
    `corpus_parts` does, FileNotFoundError where there is none."""
    if "::" in uri or uri.startswith(("http://", "https://")):
        return None
    return sum(open_store(part).size("") for part in corpus_parts(uri) or [uri])


@contextlib.contextmanager
def _open(uri: str) -> Iterator[io.BufferedReader]:
    with _open_raw(uri) as raw:
        if uri.endswith(".gz"):
            yield open_gzip(raw, name=uri)
        else:
            yield cast(io.BufferedReader, raw)


@contextlib.contextmanager
def _open_raw(uri: str) -> Iterator[BinaryIO]:
    store = open_store(uri)
    try:
        raw = store.open()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{uri}: no such file") from error
    except IsADirectoryError as error:
        raise InputError(f"{uri}: a folder; name one caption file") from error
    except (OSError, ImportError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{uri}: cannot be opened ({first_line(error)})") from error
    with raw:
        yield raw
