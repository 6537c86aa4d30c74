"""Read a corpus of captions from a local path or a URI, as a stream of `CorpusRecord`.

Formats: `pcm.text.formats`. Which captions are kept, which are quarantined, and why: `pcm.text.rules` (the one place
where that rule is written). Nothing is dropped: every record comes out, with a reason where it cannot be used.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from cluster.store.store import open_store
from pcm.errors import InputError, first_line
from pcm.text import detect
from pcm.text.formats import FORMATS, CaptionRow, ReadOptions, in_split, read_rows
from pcm.text.gzip_files import open_gzip
from pcm.text.rules import check_caption, quarantined

__all__ = ["FORMATS", "CorpusRecord", "detect_format", "read_corpus", "source_digest"]

logger = logging.getLogger(__name__)

_BUFFER = 1 << 20


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

    uri: a path or URI, as `cluster.store.store` opens them; `.gz` is decompressed.
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
    with _open(uri) as stream:
        if format == "auto":
            format = _detect(uri, stream)
        reasons: Counter[str] = Counter()
        splits: Counter[str] = Counter()
        index = 0
        for row in _rows(stream, format, uri, options):
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
        raise InputError(f"{uri}: no caption in split {split!r}; its splits are {held}")
    if split is None and splits.keys() - {"train", "restval"}:
        logger.warning(
            "%s: captions of all its splits are read (%s); --split train keeps the test's out", uri, dict(splits)
        )
    if not reasons[""]:
        found = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common()) or "no record at all"
        raise InputError(f"{uri}: no usable caption (read as {format}: {found})")


def detect_format(uri: str) -> str:
    """The format of a corpus; "json" stands for Karpathy's or COCO's, told apart when it is read. Raises InputError."""
    with _open(str(uri)) as stream:
        return _detect(str(uri), stream)


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
        yield from read_rows(cast(BinaryIO, stream), format, name=uri, options=options)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{uri}: its gzip data is damaged or cut short ({error})") from error


def source_digest(uri: str) -> str:
    """sha256 of a corpus file as it lies there: a size or a date does not prove that it is unchanged, and reading bytes
    costs little beside reading captions. Raises InputError when the file cannot be opened."""
    digest = hashlib.sha256()
    with _open_raw(str(uri)) as raw:
        while data := raw.read(8 * _BUFFER):
            digest.update(data)
    return digest.hexdigest()


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
