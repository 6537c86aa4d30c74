"""Caption files that are one JSON document: Karpathy's, COCO's, and lists of captions. Formats: `pcm.text.formats`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pcm.errors import InputError
from pcm.reasons import BAD_RECORD, MISSING_CAPTION, REJECTED
from pcm.text.caption_rows import CaptionRow, caption_of, decode, is_too_long, label_of


def read_json(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
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


def read_karpathy(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    document = _load_json(stream, name)
    if not _is_karpathy(document):
        raise InputError(
            f"{name}: not Karpathy's JSON: wanted {{'images': [...]}} with sentences, got {_shape(document)}"
        )
    return _karpathy_rows(document, name)


def read_coco(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    document = _load_json(stream, name)
    if not _is_coco(document):
        raise InputError(f"{name}: not COCO's JSON: wanted {{'annotations': [...]}}, got {_shape(document)}")
    return _coco_rows(document, name)


def read_caption_list(stream: BinaryIO, name: str) -> Iterator[CaptionRow]:
    document = _load_json(stream, name)
    entries = _caption_list(document)
    if entries is None:
        raise InputError(f"{name}: not a list of {{'image', 'caption'}}, got {_shape(document)}")
    return _caption_list_rows(entries)


def _load_json(stream: BinaryIO, name: str) -> Any:
    text = decode(stream.read().removeprefix(b"\xef\xbb\xbf"))
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
        split = label_of(entry.get("split") or entry.get("set_name")) or "train"
        # BLIP's image_id numbers its own training set; pictures are known by their file.
        path = label_of(entry.get("image"))
        image_id = PurePosixPath(path).name if path else label_of(entry.get("image_id"))
        row_id = label_of(entry.get("caption_id")) or f"row{position}"
        value = entry.get("caption", entry.get("caption_str"))
        for k, item in enumerate(value if isinstance(value, list) and value else [value]):
            text, reason = caption_of(item)
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
        split = label_of(image.get("split")) or "train"
        file_name = label_of(image.get("filename"))
        # COCO is known by its number everywhere; Flickr30k's files by their name.
        image_id = label_of(image.get("cocoid")) or file_name or label_of(image.get("imgid"))
        sentences = image.get("sentences")
        if not isinstance(sentences, list) or not sentences:
            reason = MISSING_CAPTION if sentences is None else BAD_RECORD
            text = "" if sentences is None else repr(sentences)
            yield CaptionRow(f"image{position}", text, image_id, split, reason)
            continue
        for k, sentence in enumerate(sentences):
            row_id = f"image{position}#{k}"
            text, reason = repr(sentence), BAD_RECORD
            if isinstance(sentence, dict):
                row_id = label_of(sentence.get("sentid")) or row_id
                text, reason = caption_of(sentence.get("raw"))
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
        label_of(image.get("id")): label_of(image.get("file_name"))
        for image in (images if isinstance(images, list) else [])
        if isinstance(image, dict)
    }
    for position, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            yield CaptionRow(f"row{position}", repr(annotation), reason=BAD_RECORD)
            continue
        text, reason = caption_of(annotation.get("caption"))
        if annotation.get("is_rejected") is True or annotation.get("is_precanned") is True:  # VizWiz
            reason = REJECTED
        if is_too_long(annotation.get("id")) or is_too_long(annotation.get("image_id")):
            reason = BAD_RECORD
        image_id = label_of(annotation.get("image_id"))
        image_id = _picture_key(image_id, file_names.get(image_id))
        row_id = label_of(annotation.get("id")) or f"row{position}"
        yield CaptionRow(row_id, text, image_id, reason=reason)


def coco_image_id(image: dict) -> str | None:
    """The id of an entry of COCO's `images`, as its annotations' rows have it."""
    return _picture_key(label_of(image.get("id")), label_of(image.get("file_name")))


def _picture_key(number: str | None, file_name: str | None) -> str | None:
    """COCO's number if the picture's file name ends in it, else the file name: another number would find no picture."""
    if number is None or file_name is None:
        return number
    same = number.isdecimal() and picture_number(file_name) == (number.lstrip("0") or "0")
    return number if same else file_name


#: The name of a picture in Open Images, of which NoCaps is made, and longer hashes: their last digits are no number.
_HASH = re.compile(r"(?=.*[a-f])[0-9a-f]{16,}", re.IGNORECASE)


def picture_number(file_name: str) -> str | None:
    """The number that a picture's file name ends in, without leading zeros: "42" of "COCO_val2014_000000000042.jpg" and
    of "val2014\\img42.jpg". None of a hash, and of a name without an ending such as ".jpg".
    """
    stem = re.split(r"[/\\]", file_name)[-1].rpartition(".")[0]
    found = re.search(r"[0-9]+$", stem)
    return None if found is None or _HASH.fullmatch(stem) else found[0].lstrip("0") or "0"


def _shape(document: Any) -> str:
    if isinstance(document, dict):
        return f"an object with the keys {', '.join(map(repr, list(document)[:6])) or 'none'}"
    return {list: "a list", str: "a string", type(None): "null"}.get(type(document), f"a {type(document).__name__}")
