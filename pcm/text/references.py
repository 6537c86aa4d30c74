"""Reference captions of real pictures, read from the formats users have.

The formats are those of `pcm.text.formats`. A reference that cannot be used is left out and counted by its reason, as a
caption of a corpus is; the pictures and their other references stay.
"""

import contextlib
import io
import logging
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from pcm.documents import read_document
from pcm.errors import InputError, one_line
from pcm.text.detect import detect_format
from pcm.text.formats import CaptionRow, in_split, read_rows
from pcm.text.gzip_files import open_gzip
from pcm.text.json_documents import coco_image_id
from pcm.text.rules import check_caption

log = logging.getLogger(__name__)


class References(NamedTuple):
    """by_image: image id -> its reference captions, in file order. left_out: reason -> how many could not be used."""

    by_image: dict[str, list[str]]
    left_out: Counter[str]


class CocoPicture(NamedTuple):
    """What COCO's `images` say of a picture: its number, and its domain where there is one, as in NoCaps' file."""

    number: int
    domain: str | None


def load_references(path: str | Path, *, split: str | None = None) -> References:
    """The references of a file, and how many were left out.

    The id is COCO's number where the picture's file name ends in it (`COCO_val2014_000000000042.jpg` is "42"), else
    the file name ("1000092795.jpg"); outside JSON documents, what the record says. split: as in
    `cluster.sources.corpus.read_corpus`; for Karpathy's files usually "val" or "test". A `.gz` file is decompressed.

    Raises InputError: the file or its format, or no usable reference for the split.
    """
    references: dict[str, list[str]] = {}
    left_out: Counter[str] = Counter()
    splits = set()
    for row in _rows(Path(path)):
        splits.add(row.split)
        if not in_split(row, split):
            continue
        caption, reason = check_caption(row.text)
        reason = row.reason or reason or ("no_image" if row.image_id is None else "")
        if reason:
            left_out[reason] += 1
        else:
            references.setdefault(cast(str, row.image_id), []).append(caption)
    if left_out:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
        log.warning("%s: %d references left out (%s)", path, left_out.total(), counts)
    if not references:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
        raise InputError(
            f"{path}: no references in split {split or 'all'!r}; its splits are {', '.join(sorted(splits))}"
            + (f"; left out: {counts}" if counts else "")
        )
    return References(references, left_out)


def load_coco_pictures(path: str | Path) -> dict[str, CocoPicture]:
    """Image id, as in `load_references`, -> number and domain of the picture; empty for a file that is not COCO's."""
    path = Path(path)
    if not path.name.removesuffix(".gz").endswith(".json"):
        return {}
    try:
        with _open(path) as stream:
            document = read_document(stream.read())
    except InputError:
        raise
    except ValueError:  # not one document: jsonl under this name
        return {}
    images = document.get("images") if isinstance(document, dict) else None
    return {
        image_id: CocoPicture(image["id"], image["domain"] if isinstance(image.get("domain"), str) else None)
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict) and type(image.get("id")) is int
        if (image_id := coco_image_id(image)) is not None
    }


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """A file of references, unpacked. What goes wrong in reading it inside is an InputError that names it."""
    try:
        with path.open("rb", buffering=1 << 20) as raw:
            yield open_gzip(raw, name=str(path)) if path.suffix == ".gz" else cast(io.BufferedReader, raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: references cannot be read ({one_line(error)})") from error


def _rows(path: Path) -> Iterator[CaptionRow]:
    with _open(path) as stream:
        head = stream.peek(1 << 16)
        format = detect_format(str(path).removesuffix(".gz"), head)
        yield from read_rows(cast(BinaryIO, stream), format, name=str(path))
