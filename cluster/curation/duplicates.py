"""Near duplicates, exactly: of rows that are alike the first stays, as far as no earlier one that stays is like it.

Rows are looked at in a given order. A row goes if it is like a row that stays; so of a chain a ~ b ~ c, in which a and
c are not alike, a and c stay.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pcm.line_timer import LineTimer

log = logging.getLogger(__name__)

#: Similarities are rounded to this before they are compared, in float64: neither block size nor machine matters.
DECIMALS = 6
#: Of a product in float32: what differs from the threshold by less is computed again in float64.
_MARGIN = 1e-4
_BLOCK, _COLUMNS = 1024, 16_384

_WORD = re.compile(r"\w+")
_STAYS = -1


def near_vectors(vectors: np.ndarray, threshold: float, *, block: int = _BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """(partner, similarity) of each row of (n, D) by the cosine: partner -1 stays, else the first row that stays and
    whose cosine is the threshold or more.

    All pairs are compared, block by block, on a GPU where there is one: n^2 D operations, n D * 4 bytes.
    """
    import torch  # seconds to import

    count = len(vectors)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unit = torch.from_numpy(_unit(vectors).astype(np.float32)).to(device)  # (n, D)
    partner = np.full(count, _STAYS)
    stays = torch.ones(count, dtype=torch.bool, device=device)
    similarity = np.zeros(count)
    timer = LineTimer()
    for start in range(0, count, block):
        rows = unit[start : start + block]
        for left in range(0, start + len(rows), _COLUMNS):
            right = min(left + _COLUMNS, start)
            if left >= right:
                break
            near = rows @ unit[left:right].T >= threshold - _MARGIN  # (b, columns)
            near &= stays[left:right]
            for row in torch.nonzero(near.any(dim=1)).flatten().tolist():
                if partner[start + row] == _STAYS:
                    candidates = left + torch.nonzero(near[row]).flatten().cpu().numpy()
                    _decide(vectors, start + row, candidates, threshold, partner, similarity)
        inside = (rows @ rows.T >= threshold - _MARGIN).cpu().numpy()  # (b, b)
        for row in range(len(rows)):
            if partner[start + row] == _STAYS:
                candidates = np.array([c for c in np.flatnonzero(inside[row, :row]) if partner[start + c] == _STAYS])
                _decide(vectors, start + row, start + candidates.astype(np.int64), threshold, partner, similarity)
        done = min(start + block, count)
        stays[start:done] = torch.from_numpy(partner[start:done] == _STAYS).to(device)
        if timer.due():
            log.info("near duplicates: %d of %d pictures compared", done, count)
    return partner, similarity


def _decide(
    vectors: np.ndarray, row: int, candidates: np.ndarray, threshold: float, partner: np.ndarray, similarity: np.ndarray
) -> None:
    """The first candidate that is near enough in float64 becomes the row's partner; a few at a time, for one is
    mostly enough."""
    own = vectors[row].astype(np.float64)
    length = math.sqrt(float((own * own).sum()))
    for start in range(0, len(candidates), 64):
        some = candidates[start : start + 64]
        others = vectors[some].astype(np.float64)
        found = np.round(
            (others * own).sum(axis=1) / np.maximum(np.sqrt((others**2).sum(axis=1)) * length, 1e-30), DECIMALS
        )
        near = np.flatnonzero(found >= round(threshold, DECIMALS))
        if len(near):
            partner[row], similarity[row] = some[near[0]], found[near[0]]
            return


def near_captions(captions: Sequence[str], threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """The same by the Jaccard index of their sets of words, letter case and punctuation aside.

    Exact: two sets with an index of t share one of the rarest |x| - ceil(t |x|) + 1 words of each (prefix filter), so
    only captions that share a rare word are compared.
    """
    sets = [frozenset(_WORD.findall(caption.lower())) or frozenset([caption]) for caption in captions]
    frequency = Counter(word for words in sets for word in words)
    rank = {word: place for place, word in enumerate(sorted(frequency, key=lambda word: (frequency[word], word)))}
    partner, similarity = np.full(len(sets), _STAYS), np.zeros(len(sets))
    same: dict[frozenset[str], int] = {}
    found_by: dict[tuple[int, str], list[int]] = {}  # (size of the set, rare word) -> rows that stay
    timer = LineTimer()
    for row, words in enumerate(sets):
        if words in same:
            partner[row], similarity[row] = same[words], 1.0
            continue
        size = len(words)
        rare = sorted(words, key=rank.__getitem__)[: size - _at_least(threshold * size) + 1]
        if threshold < 1:
            sizes = range(_at_least(threshold * size), int(size / threshold + 1e-9) + 1)
            candidates = {other for length in sizes for word in rare for other in found_by.get((length, word), ())}
            for other in sorted(candidates):
                shared = len(words & sets[other])
                index = round(shared / (size + len(sets[other]) - shared), DECIMALS)
                if index >= round(threshold, DECIMALS):
                    partner[row], similarity[row] = other, index
                    break
        if partner[row] == _STAYS:
            same[words] = row
            for word in rare:
                found_by.setdefault((size, word), []).append(row)
        if timer.due():
            log.info("near duplicates: %d of %d captions compared", row + 1, len(sets))
    return partner, similarity


def _at_least(value: float) -> int:
    """ceil, but for what a float adds to a whole number."""
    return max(1, math.ceil(value - 1e-6))


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
