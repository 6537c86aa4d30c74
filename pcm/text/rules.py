"""What makes a caption usable: the one rule for bad captions, written down here and nowhere else.

Every record of a corpus is kept or quarantined, never dropped, never a crash. A caption is first normalised: each run
of Unicode white space (tab, newline, no-break space, ...) becomes one space and both ends are trimmed. Then the first
caption reason of `pcm.reasons` that applies quarantines it; if none does, it is kept.

Kept on purpose: duplicates (each gets a picture of its own), emoji, right-to-left text with its bidirectional marks,
composed and decomposed accents (NFC and NFD are not touched), captions of punctuation or digits alone, and captions
longer than the text encoder's context (the generator marks those; their words are still trained on).

A quarantined caption is stored with two changes: bytes that are not UTF-8 (and lone surrogates, which no encoder can
write) become U+FFFD, and past `MAX_CHARACTERS` characters it is cut and ends in `CUT_MARK`.
"""

from __future__ import annotations

import re

from pcm.reasons import CONTROL_CHARACTERS, EMPTY, INVALID_UTF8, TOO_LONG

MAX_CHARACTERS = 2000
CUT_MARK = " […]"

# The White_Space property of Unicode. str.split() would also take U+001C..U+001F, which are control characters.
_WHITE_SPACE = re.compile("[\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_SURROGATES = re.compile("[\ud800-\udfff]")
_INVISIBLE = re.compile("[\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff]+")


def normalise(text: str) -> str:
    """Collapse white space and trim. Captions that differ only in white space are the same caption."""
    return _WHITE_SPACE.sub(" ", text).strip(" ")


def check_caption(text: str) -> tuple[str, str]:
    """Apply the rule to one caption, as decoded with the error handler `surrogateescape`.

    Returns (caption, reason): the normalised caption and "", or the caption as it is stored in quarantine and a reason
    of `pcm.reasons`.
    """
    # Nearly every caption takes this way out: printable (so no control, surrogate or zero-width character), short.
    if text.isprintable() and len(text) <= MAX_CHARACTERS:
        caption = normalise(text) if "  " in text else text.strip(" ")
        if caption and (caption.isascii() or _INVISIBLE.sub("", caption)):
            return caption, ""
        return caption, EMPTY
    caption = normalise(text)
    if _SURROGATES.search(caption):
        return quarantined(caption), INVALID_UTF8
    if _CONTROL.search(caption):
        return quarantined(caption), CONTROL_CHARACTERS
    if not _INVISIBLE.sub("", caption).strip(" "):
        return quarantined(caption), EMPTY
    if len(caption) > MAX_CHARACTERS:
        return quarantined(caption), TOO_LONG
    return caption, ""


def quarantined(text: str) -> str:
    """Make any text storable as UTF-8 and of bounded size."""
    text = _SURROGATES.sub("\ufffd", text)
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + CUT_MARK
