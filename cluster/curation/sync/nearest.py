"""The nearest vectors by cosine, exactly, in little memory: candidates in float32, their order in float64.

One rule orders everything: cosines rounded to 1e-6, the larger first; of equals, the vector that comes first. So the
result depends neither on how the vectors are cut into pieces, nor on the processor or GPU that multiplied them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cluster.curation.sync.settings import UNIT
from pcm.model_faults import enough_memory
from pcm.precision import whole_float32

#: Columns of a float32 product at once: with 4,096 queries, 64 MiB.
TILE = 4096
#: Pairs whose cosine is computed in float64 at once: few, so that they fit a processor's cache, which halves the time.
PAIRS_AT_ONCE = 1 << 9
#: Candidates of one tile that are looked at together. More are there only where very many cosines are equal.
CANDIDATES_AT_ONCE = 1 << 20
#: A cosine has fewer units of 1e-6, and a row times this is an int64.
_MOST_UNITS = 1 << 30

_FITS = enough_memory("while vectors are compared; give a smaller --block-size, or --device cpu where it is a GPU")


@dataclass(frozen=True)
class Nearest:
    """For each of B queries its k nearest vectors, best first; k is less where there are fewer vectors."""

    indices: np.ndarray  # (B, k) int64
    cosines: np.ndarray  # (B, k) float64


def rounded(scores: np.ndarray) -> np.ndarray:
    """Scores in whole units of 1e-6, int64: what is compared wherever scores are."""
    return np.rint(scores / UNIT).astype(np.int64)


@_FITS
def nearest(queries: np.ndarray, parts: Iterable[np.ndarray], k: int, *, device: str = "cpu") -> Nearest:
    """The k nearest of all vectors to each query.

    `queries` (B, D) and every part (n, D): float32, L2-normalised and finite. Parts are read once, in order, and one
    is held at a time. Memory beside it: B x TILE float32 for the product, and B x k results.

    A float32 product of D numbers is off by at most D * 2**-24 (times the vectors' lengths): what lies within that of
    the k-th best is a candidate, so none is missed. Candidates are few; float64 decides among them.
    """
    whole_float32()
    given = _on(queries, device)  # (B, D)
    best = _Best.unknown(len(given), k, device)
    seen = 0
    for part in parts:
        numbers = torch.arange(seen, seen + len(part), device=device)
        best = _looked_through(best, given, _on(part, device), numbers, k)
        seen += len(part)
    return Nearest(best.indices[:, :seen].cpu().numpy(), best.cosines[:, :seen].cpu().numpy())


@dataclass(frozen=True)
class PartForSome:
    """n vectors, and the queries that are compared with them."""

    rows: np.ndarray  # (R,) int64: which queries, each once
    numbers: np.ndarray  # (n,) int64: the vectors' numbers among all
    vectors: np.ndarray  # (n, D) float32


@_FITS
def nearest_for_some(queries: np.ndarray, parts: Iterable[PartForSome], k: int, *, device: str = "cpu") -> Nearest:
    """The k nearest to each query of the vectors that it is compared with: as `nearest`, and in any order.

    A vector is compared with a query at most once. A query that is compared with fewer than k has the number -1 and a
    cosine of minus infinity in the places left.
    """
    whole_float32()
    given = _on(queries, device)
    best = _Best.unknown(len(given), k, device)
    for part in parts:
        rows = torch.from_numpy(part.rows).to(device)
        numbers = torch.from_numpy(part.numbers).to(device)
        some = _Best(best.indices[rows], best.cosines[rows])
        some = _looked_through(some, given[rows], _on(part.vectors, device), numbers, k)
        best.indices[rows], best.cosines[rows] = some.indices, some.cosines
    return Nearest(best.indices.cpu().numpy(), best.cosines.cpu().numpy())


def pair_cosines(queries: np.ndarray, parts: Iterable[np.ndarray], wanted: np.ndarray) -> np.ndarray:
    """(B, M) float64: the cosine of query b and vector wanted[b, m]; minus infinity where wanted is -1.

    `queries` (B, D) and every part (n, D) float32, L2-normalised; `wanted` (B, M) int64 numbers of vectors. Parts are
    read once, in order. Raises IndexError for a number beyond the last vector.
    """
    cosines = np.full(wanted.size, -np.inf)
    order = np.argsort(wanted, axis=None, kind="stable")
    numbers = wanted.reshape(-1)[order]
    given = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
    seen, done = 0, int(np.searchsorted(numbers, 0))
    for part in parts:
        end = int(np.searchsorted(numbers, seen + len(part)))
        places = order[done:end]
        columns = torch.from_numpy(numbers[done:end] - seen)
        rows = torch.from_numpy(places // wanted.shape[1])
        vectors = torch.from_numpy(np.ascontiguousarray(part, np.float32))
        cosines[places] = _cosines(given, vectors, rows, columns).numpy()
        seen, done = seen + len(part), end
    if done < len(numbers):
        raise IndexError(f"vector {numbers[-1]}: there are {seen}")
    return cosines.reshape(wanted.shape)


@dataclass(frozen=True)
class _Best:
    """The best so far of every query, in order; -1 and minus infinity where fewer than k were seen.

    Every query has k places at any time: where a tile is looked at in pieces, one query may find more than another.
    """

    indices: torch.Tensor  # (B, k) int64
    cosines: torch.Tensor  # (B, k) float64

    @staticmethod
    def unknown(rows: int, k: int, device: str) -> "_Best":
        """Places for k, which any vector takes."""
        return _Best(
            torch.full((rows, k), -1, dtype=torch.int64, device=device),
            torch.full((rows, k), -torch.inf, dtype=torch.float64, device=device),
        )


def _on(vectors: np.ndarray, device: str) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(vectors, np.float32)).to(device)


def _looked_through(best: _Best, queries: torch.Tensor, vectors: torch.Tensor, numbers: torch.Tensor, k: int) -> _Best:
    """The best so far with those of other vectors, which have `numbers` (n,) int64."""
    error = _product_error(queries, vectors)
    for start in range(0, len(vectors), TILE):
        tile = vectors[start : start + TILE]
        products = queries @ tile.T  # (B, T)
        floor = _floor(products, best, k, error)
        best = _merged(best, queries, tile, products, floor, numbers[start : start + TILE], k)
    return best


def _product_error(one: torch.Tensor, other: torch.Tensor) -> float:
    """How far a float32 product can be from the exact one: D u |x| |y| / (1 - D u), u = 2**-24 (Higham, 2002, 3.5)."""
    if not len(one) or not len(other):
        return 0.0
    unit = one.shape[1] * 2.0**-24
    longest = one.norm(dim=1).max() * other.norm(dim=1).max() * 1.01  # float32 has a length to within a hundredth
    return float(unit / (1 - unit) * longest)


def _floor(products: torch.Tensor, best: _Best, k: int, error: float) -> torch.Tensor:
    """(B, 1): a product below it is certainly not among the k best. One unit beside, for the rounding."""
    floor = best.cosines[:, -1:].float() - (error + 2 * UNIT)
    unknown = floor[:, 0].isneginf()  # fewer than k were seen
    if bool(unknown.all()):  # without a copy of the products
        return _own_floor(products, k, error)
    if bool(unknown.any()):
        floor[unknown] = _own_floor(products[unknown], k, error)
    return floor


def _own_floor(products: torch.Tensor, k: int, error: float) -> torch.Tensor:
    if products.shape[1] < k:
        return torch.full_like(products[:, :1], -torch.inf)
    return products.topk(k, dim=1).values[:, -1:] - (2 * error + 2 * UNIT)


def _merged(
    best: _Best,
    queries: torch.Tensor,
    tile: torch.Tensor,
    products: torch.Tensor,
    floor: torch.Tensor,
    numbers: torch.Tensor,
    k: int,
) -> _Best:
    """The best so far with those of one tile, whose vectors have `numbers`."""
    chosen = products >= floor
    columns = max(1, int(CANDIDATES_AT_ONCE * products.shape[1] // max(int(chosen.sum()), 1)))
    for start in range(0, products.shape[1], columns):
        rows, places = chosen[:, start : start + columns].nonzero(as_tuple=True)
        cosines = _cosines(queries, tile, rows, places + start)
        best = _sorted(best, rows, numbers[places + start], cosines, k)
    return best


def _sorted(best: _Best, rows: torch.Tensor, indices: torch.Tensor, cosines: torch.Tensor, k: int) -> _Best:
    """The k best of those so far and of others."""
    count = len(best.indices)
    of_row = torch.arange(count, device=rows.device).repeat_interleave(k)
    rows = torch.cat([of_row, rows])
    indices = torch.cat([best.indices.reshape(-1), indices])
    cosines = torch.cat([best.cosines.reshape(-1), cosines])
    # By row, then by cosine, then by index: the second sort is stable.
    units = (cosines / UNIT).round().clamp(-_MOST_UNITS, _MOST_UNITS).long()
    order = indices.sort().indices
    order = order[(rows * (2 * _MOST_UNITS + 1) - units)[order].sort(stable=True).indices]
    of_each = torch.bincount(rows, minlength=count)
    starts = of_each.cumsum(0) - of_each
    rank = torch.arange(len(rows), device=rows.device) - starts[rows[order]]
    kept = order[rank < k]
    return _Best(indices[kept].reshape(count, k), cosines[kept].reshape(count, k))


def _cosines(one: torch.Tensor, other: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(P,) float64: the products of row rows[p] of one and row columns[p] of the other."""
    found = torch.empty(len(rows), dtype=torch.float64, device=one.device)
    for piece in _pieces(len(rows)):
        found[piece] = one[rows[piece]].double().mul_(other[columns[piece]]).sum(dim=1)  # in float64, as its left side
    return found


def _pieces(count: int) -> Iterator[slice]:
    return (slice(start, start + PAIRS_AT_ONCE) for start in range(0, count, PAIRS_AT_ONCE))
