"""Corpora of any size for benchmarks that need no picture."""

import itertools
import random
from pathlib import Path

from pcm.text.concepts import LEXICON

VERBS = ("stands beside", "lies in front of", "is shown next to", "moves slowly past", "can be seen behind")
PLACES = ("on a street near", "in a field with", "in a room with", "at night under", "on the ground by")
_AT_ONCE = 10_000


def write_captions(path: Path, count: int) -> None:
    """Captions of COCO's length, a line each: ten to twelve words, some of them frequent and many rare, and a few
    captions more than once.

    Their nouns are the lexicon's, the k-th of them about 1/k times as often as the first.
    """
    draw = random.Random(0)
    nouns = LEXICON.read_text(encoding="utf-8").split()
    draw.shuffle(nouns)
    weights = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(nouns))))
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, _AT_ONCE):
            rows = min(_AT_ONCE, count - start)
            some = [draw.choices(nouns, cum_weights=weights, k=rows) for _ in range(3)]
            phrases = [draw.choices(choice, k=rows) for choice in (VERBS, PLACES)]
            file.writelines(
                f"A {one} {verb} a {two} {place} the {three}.\n"
                for one, two, three, verb, place in zip(*some, *phrases, strict=True)
            )
