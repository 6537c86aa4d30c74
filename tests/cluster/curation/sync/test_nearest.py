"""The nearest vectors are the exact ones, however the vectors are cut and however many are equal."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cluster.curation.sync import nearest as module
from cluster.curation.sync.nearest import PartForSome, nearest, nearest_for_some, pair_cosines, rounded
from tests.helpers.vectors import unit


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """All cosines in float64, sorted by the rule: rounded to 1e-6, then the first."""
    cosines = queries.astype(np.float64) @ vectors.astype(np.float64).T
    return np.argsort(-rounded(cosines), axis=1, kind="stable")[:, :k]


def in_parts(matrix: np.ndarray, *sizes: int) -> list[np.ndarray]:
    return np.split(matrix, np.cumsum(sizes))


@pytest.fixture
def vectors() -> np.ndarray:
    """400 vectors; among them one eight times, and groups that differ by less than float32 can tell in a product."""
    rng = np.random.default_rng(0)
    matrix = unit(rng.standard_normal((400, 32)))
    matrix[[5, 60, 61, 130, 131, 300, 301, 399]] = matrix[5]
    for group in range(40):
        base = matrix[200 + group].astype(np.float64)
        matrix[240 + group] = unit(base[None] + 3e-8 * rng.standard_normal(32))[0]
    return matrix


@pytest.fixture
def own_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_products_are_in_whole_float32_whatever_the_container_says(vectors: np.ndarray, own_precision: None) -> None:
    """TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set in some: a GPU would round to ten bits, and miss neighbours."""
    part = PartForSome(np.arange(5), np.arange(400), vectors)
    for search in (lambda: nearest(vectors[:5], [vectors], 3), lambda: nearest_for_some(vectors[:5], [part], 3)):
        torch.backends.cuda.matmul.allow_tf32 = True
        search()
        assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("tile", [1, 16, 4096])
@pytest.mark.parametrize("sizes", [(), (1, 0, 199), (150, 150)])
def test_the_nearest_are_those_of_brute_force(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch, tile: int, sizes: tuple[int, ...]
) -> None:
    monkeypatch.setattr(module, "TILE", tile)
    queries = np.concatenate([vectors[::9], unit(np.random.default_rng(1).standard_normal((20, 32)))])
    found = nearest(queries, in_parts(vectors, *sizes), 9)
    np.testing.assert_array_equal(found.indices, brute_force(queries, vectors, 9))
    exact = queries.astype(np.float64) @ vectors.astype(np.float64).T
    np.testing.assert_allclose(found.cosines, np.take_along_axis(exact, found.indices, axis=1), rtol=0, atol=1e-15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_what_a_processor_finds(vectors: np.ndarray) -> None:
    queries = np.concatenate([vectors[::9], unit(np.random.default_rng(1).standard_normal((20, 32)))])
    found = nearest(queries, in_parts(vectors, 150, 150), 9, device="cuda")
    np.testing.assert_array_equal(found.indices, brute_force(queries, vectors, 9))


def test_what_float32_confuses_float64_tells_apart() -> None:
    """Cosines one unit of 1e-6 apart, in 4,096 dimensions, where float32 is off by more than that in one sum."""
    rng = np.random.default_rng(2)
    query = unit(rng.standard_normal((1, 4096)))
    others = unit(rng.standard_normal((500, 4096)))
    towards = 0.5 + 1e-6 * np.arange(500)[:, None]
    vectors = others - (others @ query.T) * query
    vectors = unit(towards * query + np.sqrt(1 - towards**2) * unit(vectors))
    found = nearest(query, in_parts(vectors, 123, 200), 20)
    np.testing.assert_array_equal(found.indices, brute_force(query, vectors, 20))


def test_equal_vectors_in_any_number_need_no_more_memory(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CANDIDATES_AT_ONCE", 64)
    same = np.repeat(vectors[:1], 500, axis=0)
    looked_at = []
    sort = module._sorted
    monkeypatch.setattr(module, "_sorted", lambda *given: looked_at.append(len(given[1])) or sort(*given))
    found = nearest(vectors[:8], [same], 5)
    np.testing.assert_array_equal(found.indices, np.tile(np.arange(5), (8, 1)))
    assert max(looked_at) <= 64


@pytest.mark.parametrize("k", [15, 40])
def test_where_half_the_vectors_are_equal_each_query_finds_its_own(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    """So many candidates that the first tile is looked at in pieces, in which one query finds many and another few."""
    monkeypatch.setattr(module, "CANDIDATES_AT_ONCE", 1 << 14)
    rng = np.random.default_rng(3)
    vectors = unit(rng.standard_normal((2048, 16)))
    vectors[rng.permutation(2048)[:1024]] = vectors[7]
    queries = unit(rng.standard_normal((256, 16)))
    for sizes in ((), (3, 0, 1000)):
        found = nearest(queries, in_parts(vectors, *sizes), k)
        np.testing.assert_array_equal(found.indices, brute_force(queries, vectors, k))


def test_fewer_vectors_than_asked_for_are_all_there(vectors: np.ndarray) -> None:
    assert nearest(vectors[:3], [vectors[:2], vectors[2:4]], 9).indices.shape == (3, 4)
    assert nearest(vectors[:0], [vectors], 9).indices.shape == (0, 9)


@pytest.mark.parametrize("tile", [7, 4096])
def test_each_query_finds_the_nearest_of_the_vectors_it_is_compared_with_in_any_order(
    vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    """The last vectors come first, so of equal ones the later is seen first; the first query is compared with six."""
    monkeypatch.setattr(module, "TILE", tile)
    rng = np.random.default_rng(5)
    queries = vectors[:40]
    compared = np.zeros((40, 400), bool)
    parts = []
    for start, end in ((394, 400), (300, 394), (150, 300), (60, 150), (0, 60)):
        numbers = np.arange(start, end)
        wants = rng.random(40) < 0.7
        wants[0], wants[5] = start == 394, True
        compared[np.ix_(wants, numbers)] = True
        parts.append(PartForSome(np.flatnonzero(wants), numbers, vectors[numbers]))
    found = nearest_for_some(queries, parts, 9)
    units = np.where(compared, rounded(queries.astype(np.float64) @ vectors.astype(np.float64).T), -(10**9))
    wanted = np.where(
        np.arange(9) < compared.sum(axis=1, keepdims=True), np.argsort(-units, axis=1, kind="stable")[:, :9], -1
    )
    np.testing.assert_array_equal(found.indices, wanted)
    assert found.indices[5, :8].tolist() == [5, 60, 61, 130, 131, 300, 301, 399], "all equal ones, first to last"
    assert np.isneginf(found.cosines[0, 6:]).all() and np.isfinite(found.cosines[1:][wanted[1:] >= 0]).all()


@pytest.mark.parametrize("sizes", [(), (1, 0, 199), (150, 150)])
def test_cosines_of_pairs_are_found_wherever_the_vector_lies(vectors: np.ndarray, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    wanted = rng.integers(-1, 400, (30, 7))
    exact = np.take_along_axis(vectors[:30].astype(np.float64) @ vectors.astype(np.float64).T, wanted, axis=1)
    found = pair_cosines(vectors[:30], in_parts(vectors, *sizes), wanted)
    np.testing.assert_allclose(found, np.where(wanted < 0, -np.inf, exact), rtol=0, atol=1e-15)
    with pytest.raises(IndexError, match="vector 400"):
        pair_cosines(vectors[:1], [vectors], np.array([[400]]))
