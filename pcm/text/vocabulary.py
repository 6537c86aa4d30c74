"""The words a captioner knows.

A caption becomes words as the field does it: lowercase, punctuation deleted, split at white space ("A man's T-shirt."
gives "a mans tshirt"). Ids follow the published `vocabulary.txt`: id 0 is beginning, end and padding in one and is
rendered "."; the file's first word is id 1. A vocabulary built here also has the word `UNKNOWN`, last in the file; an
imported one has it only if its file does, and otherwise rare words are left out of the caption.
"""

from __future__ import annotations

import itertools
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pcm.errors import InputError

SPECIAL_ID = 0
SPECIAL_TEXT = "."
UNKNOWN = "UNK"
# What published vocabularies call their unknown word. A real word is always lowercase and has no angle brackets.
_UNKNOWN_SPELLINGS = (UNKNOWN, "<unk>", "<UNK>", "[UNK]")
IGNORED_TARGET = -1
CAPTIONS_AT_ONCE = 1024

_DELETED = dict.fromkeys(
    (
        *map(ord, string.punctuation),
        *(
            code
            for code in range(0xA1, 0x3100)
            if unicodedata.category(chr(code)) in ("Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps")
        ),
        *(0x200B, 0x200E, 0x200F, 0x061C, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),
    )
)


def tokenise(caption: str) -> list[str]:
    """Lowercase words without punctuation. Composed and decomposed accents give the same word (NFC)."""
    if not caption.isascii():
        caption = unicodedata.normalize("NFC", caption)
    return caption.lower().translate(_DELETED).split()


def count_words(captions: Iterable[str]) -> Counter[str]:
    """How often each word occurs: as `tokenise` of one caption after the other finds them, but many captions at once.

    They are joined by line ends, which belong to no word and which no rule of lowercase or NFC reaches across.
    """
    counts: Counter[str] = Counter()
    remaining = iter(captions)
    while some := list(itertools.islice(remaining, CAPTIONS_AT_ONCE)):
        counts.update(tokenise("\n".join(some)))
    return counts


@dataclass(frozen=True)
class Vocabulary:
    """words: every word in id order from id 1. `len()` counts id 0 too: it is the model's `vocab_size`."""

    words: tuple[str, ...]

    @classmethod
    def build(cls, captions: Iterable[str], *, min_count: int = 5) -> Vocabulary:
        """The words that occur at least `min_count` times, most frequent first (ties by spelling), then `UNKNOWN`.

        Raises InputError where no word is frequent enough.
        """
        return cls.of_counts(count_words(captions), min_count=min_count)

    @classmethod
    def of_counts(cls, counts: Counter[str], *, min_count: int) -> Vocabulary:
        """`build` where the words are counted."""
        words = sorted((word for word, n in counts.items() if n >= min_count), key=lambda word: (-counts[word], word))
        if not counts:
            raise InputError("the captions have no word, only punctuation; give captions with words")
        if not words:
            raise InputError(
                f"no word occurs {min_count} times or more among {len(counts)} different words; "
                "lower the minimum count or give a larger corpus"
            )
        return cls((*words, UNKNOWN))

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a `vocabulary.txt`, ours or the published one: a word a line. Raises InputError."""
        try:
            return cls.from_text(Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise InputError(f"{path}: not a vocabulary ({error}); wanted one word a line in id order") from error

    @classmethod
    def from_text(cls, text: str) -> Vocabulary:
        """The inverse of `to_text`. Raises InputError for an empty list, a blank line or a repeated word."""
        words = tuple(line.strip() for line in text.rstrip().split("\n"))
        if "" in words:
            raise InputError(f"line {words.index('') + 1} is blank")
        repeated = [word for word, n in Counter(words).items() if n > 1]
        if repeated:
            raise InputError(f"the word {repeated[0]!r} occurs twice")
        return cls(words)

    def to_text(self) -> str:
        return "\n".join(self.words) + "\n"

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_text(), encoding="utf-8")

    def __len__(self) -> int:
        return len(self.words) + 1

    @cached_property
    def ids(self) -> dict[str, int]:
        return {word: position for position, word in enumerate(self.words, start=1)}

    @cached_property
    def unknown_id(self) -> int | None:
        return next((self.ids[spelling] for spelling in _UNKNOWN_SPELLINGS if spelling in self.ids), None)

    def encode(self, caption: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """A caption as (token_ids, target_ids), both int64 (max_length,); see `encode_all`."""
        token_ids, target_ids = self.encode_all([caption], max_length)
        return token_ids[0], target_ids[0]

    def encode_all(self, captions: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Captions as (token_ids, target_ids), both int64 (n, max_length).

        Inputs start with id 0 and are padded with 0; targets are the next words, end with id 0 and are padded with -1.
        At most `max_length - 1` words are kept, so the end is always among the targets.
        """
        id_of, unknown = self.ids.get, self.unknown_id
        token_ids, target_ids = [], []
        for caption in captions:
            found = (id_of(word, unknown) for word in tokenise(caption))
            words = [word_id for word_id in found if word_id is not None][: max_length - 1]
            padding = max_length - 1 - len(words)
            token_ids.append([SPECIAL_ID, *words, *[SPECIAL_ID] * padding])
            target_ids.append([*words, SPECIAL_ID, *[IGNORED_TARGET] * padding])
        shape = (len(token_ids), max_length)
        return np.array(token_ids, np.int64).reshape(shape), np.array(target_ids, np.int64).reshape(shape)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids as text up to the first 0, which is rendered "." as the published code does; ids beyond it are dropped.

        The unknown word is left out: it says nothing about a picture.
        """
        words = []
        for token_id in map(int, ids):
            if token_id == SPECIAL_ID:
                words.append(SPECIAL_TEXT)
                break
            if token_id != self.unknown_id:
                words.append(self.words[token_id - 1])
        return " ".join(words)
