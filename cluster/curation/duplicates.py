"""Near duplicates, exactly: of rows that are alike the first stays, as far as no earlier one that stays is like it.

Rows are looked at in a given order. A row goes if it is like a row that stays; so of a chain a ~ b ~ c, in which a and
c are not alike, a and c stay.
"""

import itertools
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pcm.errors import first_line
from pcm.line_timer import LineTimer
from pcm.model_faults import free_memory, is_out_of_memory, is_sticky

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

#: Similarities are rounded to this before they are compared, in float64: neither block size nor machine matters.
DECIMALS = 6
#: Of a product in float32: what differs from the threshold by less is computed again in float64.
_MARGIN = 1e-4
_BLOCK, _COLUMNS = 1024, 4096
#: A bound is a product of so much shorter vectors, but not of fewer directions than these; found on some of the rows.
_SHORTER, _LEAST_DIRECTIONS, _SAMPLE = 8, 16, 10_000
#: From one pair in so many on, whole products are computed before pairs are looked at in float64.
_SPARSE = 200
_PAIRS_AT_ONCE = 4096

_WORD = re.compile(r"\w+")
_STAYS = -1


def near_vectors(vectors: np.ndarray, threshold: float, *, block: int = _BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """(partner, similarity) of each row of (n, D) by the cosine: partner -1 stays, else the first row that stays and
    whose cosine is the threshold or more.

    All pairs are compared, block by block, on a GPU where there is one, else, or where that fails, by all threads of
    torch. Of nearly all pairs an eighth of the numbers proves that they are not near (`_bounding`): some n^2 D / 8
    operations. Memory: n D * 4.5 bytes, and of a block's products 32 MiB.
    """
    import torch  # seconds to import

    if torch.cuda.is_available():
        from pcm.precision import whole_float32  # brings torch

        whole_float32()
        try:
            return _near_vectors(vectors, threshold, block, "cuda")
        except Exception as error:
            if not ((is_short := is_out_of_memory(error)) or is_sticky(error)):
                raise
            log.warning("near duplicates: the GPU fails (%s); pictures are compared on the CPU", first_line(error))
        if is_short:
            free_memory()  # which others wait for
    return _near_vectors(vectors, threshold, block, "cpu")


def _near_vectors(vectors: np.ndarray, threshold: float, block: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    import torch

    count = len(vectors)
    unit = torch.from_numpy(_unit(vectors).astype(np.float32)).to(device)  # (n, D)
    short = _bounding(unit)  # (n, m)
    partner = np.full(count, _STAYS)
    stays = torch.ones(count, dtype=torch.bool, device=device)
    similarity = np.zeros(count)
    timer = LineTimer()
    for start in range(0, count, block):
        done = min(start + block, count)
        open_rows = torch.arange(start, done, device=device)  # those without a partner so far
        for left in range(0, start, _COLUMNS):
            right = min(left + _COLUMNS, start)
            rows, columns = _candidates(unit, short, open_rows, left, right, threshold, stays[left:right])
            _decide(vectors, rows, columns, threshold, partner, similarity)
            open_rows = open_rows[torch.from_numpy(partner[open_rows.cpu().numpy()] == _STAYS).to(device)]
        rows, columns = _candidates(unit, short, open_rows, start, done, threshold, stays[start:done])
        cuts = np.flatnonzero(np.diff(rows, prepend=-1, append=-1))
        for first, last in itertools.pairwise(cuts):  # one row after the other, for each may go
            row, others = int(rows[first]), columns[first:last]
            others = others[(others < row) & (partner[others] == _STAYS)]
            _decide(vectors, np.full(len(others), row), others, threshold, partner, similarity)
        stays[start:done] = torch.from_numpy(partner[start:done] == _STAYS).to(device)
        if timer.due():
            log.info("near duplicates: %d of %d pictures compared", done, count)
    return partner, similarity


def _bounding(unit: "torch.Tensor") -> "torch.Tensor":
    """(n, m + 1) of (n, D) unit rows, m < D: no product of two of these rows is less than the cosine of the two.

    In an orthonormal basis whose first m directions hold most of the vectors, x = (x1, x2) and y = (y1, y2) have the
    cosine x1 y1 + x2 y2 <= x1 y1 + |x2| |y2| (Cauchy-Schwarz): the product of (x1, |x2|) and (y1, |y2|).
    """
    import torch

    dimensions = unit.shape[1]
    kept = max(min(_LEAST_DIRECTIONS, dimensions), dimensions // _SHORTER)
    some = unit[:: max(1, len(unit) // _SAMPLE)]
    _, directions = torch.linalg.eigh(some.T.double() @ some.double())  # ascending
    first = unit @ directions[:, dimensions - kept :].float()  # (n, m)
    rest = (1 - (first.double() ** 2).sum(dim=1)).clamp(min=0).sqrt().float()
    return torch.cat([first, rest[:, None]], dim=1)


def _candidates(
    unit: "torch.Tensor",
    short: "torch.Tensor",
    rows: "torch.Tensor",
    left: int,
    right: int,
    threshold: float,
    stays: "torch.Tensor",
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row, column), in this order, that may be near: row among `rows`, column from left to right that stays."""
    least = threshold - _MARGIN
    bound = short[rows] @ short[left:right].T  # (b, columns)
    hit = (bound.amax(dim=1) >= least).nonzero().flatten()  # mostly few, and one pass tells
    places, columns = (bound[hit] >= least).nonzero(as_tuple=True)
    if len(places) * _SPARSE > bound.numel():  # so many that their whole products are cheaper than a look at each
        places, columns = (unit[rows[hit]] @ unit[left:right].T >= least).nonzero(as_tuple=True)
    places, columns = hit[places][stays[columns]], columns[stays[columns]]
    return rows[places].cpu().numpy(), columns.cpu().numpy() + left


def _decide(
    vectors: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    threshold: float,
    partner: np.ndarray,
    similarity: np.ndarray,
) -> None:
    """Of each row's candidates the first that is near enough in float64 becomes its partner."""
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        some, others = rows[start : start + _PAIRS_AT_ONCE], columns[start : start + _PAIRS_AT_ONCE]
        one, other = vectors[some].astype(np.float64), vectors[others].astype(np.float64)
        lengths = np.sqrt((one**2).sum(axis=1) * (other**2).sum(axis=1))
        found = np.round((one * other).sum(axis=1) / np.maximum(lengths, 1e-30), DECIMALS)
        near = np.flatnonzero((found >= round(threshold, DECIMALS)) & (partner[some] == _STAYS))
        first = near[np.unique(some[near], return_index=True)[1]]
        partner[some[first]], similarity[some[first]] = others[first], found[first]


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
