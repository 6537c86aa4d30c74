"""Reference captions of real pictures, read from the formats users have.

The formats are those of `pcm.text.formats`; here a file must be sound: a reference that cannot be used is an
error, not a quarantined row, because every score would silently change with it. Only empty captions are passed
over.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from pcm.errors import InputError, one_line
from pcm.reasons import EMPTY, MISSING_CAPTION
from pcm.text.detect import detect_format
from pcm.text.formats import CaptionRow, coco_image_id, in_split, read_rows
from pcm.text.rules import check_caption


def load_references(path: str | Path, *, split: str | None = None) -> dict[str, list[str]]:
    """Image id -> its reference captions, in file order.

    The id is COCO's number where the picture's file name ends in it (`COCO_val2014_000000000042.jpg` is "42"), else
    the file name ("1000092795.jpg"); outside JSON documents, what the record says. split: as in
    `cluster.sources.corpus.read_corpus`; for Karpathy's files usually "val" or "test". A `.gz` file is decompressed.

    Raises InputError: the file or its format, no caption for the split, a caption without an image, an unusable
    caption.
    """
    references: dict[str, list[str]] = {}
    splits = set()
    for row in _rows(Path(path)):
        splits.add(row.split)
        if not in_split(row, split):
            continue
        caption, reason = check_caption(row.text)
        reason = row.reason or reason
        if reason in (EMPTY, MISSING_CAPTION):
            continue
        if reason:
            raise InputError(f"{path}: reference {row.row_id} of image {row.image_id} cannot be used: {reason}")
        if row.image_id is None:
            raise InputError(f"{path}: reference {row.row_id} names no image; give it an `image` or `image_id`")
        references.setdefault(row.image_id, []).append(caption)
    if not references:
        raise InputError(
            f"{path}: no references in split {split or 'all'!r}; its splits are {', '.join(sorted(splits))}"
        )
    return references


def load_domains(path: str | Path) -> dict[str, str]:
    """Image id, as in `load_references`, -> `domain` of the picture, where a COCO JSON gives it, as NoCaps' does
    (in-domain, near-domain, out-domain); empty for any other file.
    """
    path = Path(path)
    if not path.name.removesuffix(".gz").endswith(".json"):
        return {}
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            document = json.load(stream)
    except (ValueError, EOFError):  # not one document: jsonl under this name
        return {}
    images = document.get("images") if isinstance(document, dict) else None
    return {
        image_id: image["domain"]
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict) and isinstance(image.get("domain"), str)
        if (image_id := coco_image_id(image)) is not None
    }


def _rows(path: Path) -> Iterator[CaptionRow]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            head = stream.read(1 << 16)
            stream.seek(0)
            format = detect_format(str(path).removesuffix(".gz"), head)
            yield from read_rows(cast(BinaryIO, stream), format, name=str(path))
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: references cannot be read ({one_line(error)})") from error
