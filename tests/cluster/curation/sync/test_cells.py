"""The nearest vectors of a few cells: those of brute force over the same cells, and with all cells the exact ones."""

from pathlib import Path

import numpy as np
import pytest

from cluster.curation.sync import cells as module
from cluster.curation.sync.cells import Centroids, StoredCells, cells_of, probed, read_centroids, store_cells
from cluster.curation.sync.nearest import Nearest, nearest, rounded
from cluster.curation.sync.vectors import StoredParts, array_bytes, unit
from cluster.curation.tasks import InThisProcess
from cluster.store.store import Store, open_store

COUNT, DIM, GROUPS = 700, 16, 20


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """In groups, one larger than others; among them one vector forty times."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((GROUPS, DIM))
    of = np.minimum(rng.integers(0, 2 * GROUPS, COUNT), GROUPS - 1)
    matrix = unit(centres[of] + 0.4 * rng.standard_normal((COUNT, DIM)))
    matrix[rng.permutation(COUNT)[:40]] = matrix[7]
    return matrix


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.concatenate([unit(vectors[::9] + 0.1 * rng.standard_normal((78, DIM))), vectors[5:9]])


def parts_of(store: Store, matrix: np.ndarray, *sizes: int) -> StoredParts:
    """On the store, in pieces of these sizes and the rest."""
    pieces = np.split(matrix, np.cumsum(sizes))
    for number, piece in enumerate(pieces):
        store.write_bytes(f"given/{number}.npy", array_bytes(piece))
    return StoredParts(store, [f"given/{number}.npy" for number in range(len(pieces))], [len(one) for one in pieces])


def cells_in(folder: Path, matrix: np.ndarray, *sizes: int) -> StoredCells:
    store = open_store(folder)
    given = parts_of(store, matrix, *sizes)
    return store_cells(store, "work", "pictures", given, InThisProcess(), device="cpu")


def centroids(cells: StoredCells) -> Centroids:
    return read_centroids(cells.store, cells.folder)


def assert_same(one: Nearest, other: Nearest) -> None:
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_allclose(one.cosines, other.cosines, rtol=0, atol=1e-15)


def by_brute_force(queries: np.ndarray, vectors: np.ndarray, centroids: Centroids, k: int, probes: int) -> np.ndarray:
    """Cells, probes and ranks from whole matrices of cosines in float64, sorted by the rule."""
    directions = centroids.directions.astype(np.float64)
    of = np.argmax(rounded((vectors - centroids.mean).astype(np.float64) @ directions.T), axis=1)
    near = np.argsort(-rounded(queries.astype(np.float64) @ directions.T), axis=1, kind="stable")
    cosines = rounded(queries.astype(np.float64) @ vectors.astype(np.float64).T)
    found = []
    for row, cells in enumerate(near):
        most = probes
        while np.isin(of, cells[:most]).sum() < k:
            most += 1
        units = np.where(np.isin(of, cells[:most]), cosines[row], -2_000_000)
        found.append(np.argsort(-units, kind="stable")[:k])
    return np.stack(found)


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("k", [2, 15, 200])
def test_the_nearest_are_those_of_brute_force_over_the_probed_cells(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path, k: int, probes: int
) -> None:
    """A query whose cells hold fewer than k goes on to further ones: no cell holds 200."""
    cells = cells_in(tmp_path, vectors)
    assert len(centroids(cells)) == 64
    found = cells.nearest(queries, k, probes, device="cpu")
    np.testing.assert_array_equal(found.indices, by_brute_force(queries, vectors, centroids(cells), k, probes))
    exact = queries.astype(np.float64) @ vectors.astype(np.float64).T
    np.testing.assert_allclose(found.cosines, np.take_along_axis(exact, found.indices, axis=1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("more", [0, 50])
def test_as_many_probes_as_cells_find_what_an_exact_search_finds(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path, more: int
) -> None:
    cells = cells_in(tmp_path, vectors)
    found = cells.nearest(queries, 15, len(centroids(cells)) + more, device="cpu")
    assert_same(found, nearest(queries, [vectors], 15))
    one = cells.nearest(queries, 15, 1, device="cpu")
    assert (one.indices != found.indices).any(), "one cell does not hold all that is near"


def test_more_neighbours_than_vectors_are_all_vectors(vectors: np.ndarray, queries: np.ndarray, tmp_path: Path) -> None:
    cells = cells_in(tmp_path, vectors[:9])
    assert_same(cells.nearest(queries, 15, 1, device="cpu"), nearest(queries, [vectors[:9]], 15))


@pytest.mark.parametrize(
    ("count", "cells"), [(1, 2), (60, 16), (1000, 64), (100_000, 512), (10**7, 8192), (10**8, 16384)]
)
def test_there_are_about_twice_as_many_cells_as_the_square_root_of_the_vectors(count: int, cells: int) -> None:
    assert cells_of(count) == cells


def test_how_vectors_and_queries_are_cut_changes_nothing(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of a cell, cells of a piece, an empty piece, several tasks, and blocks of queries."""
    whole = cells_in(tmp_path / "whole", vectors)
    wanted = whole.nearest(queries, 15, 2, device="cpu")
    monkeypatch.setattr(module, "PIECE_ROWS", 11)
    monkeypatch.setattr(module, "PIECES_AT_ONCE", 3)
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 5)
    cut = cells_in(tmp_path / "cut", vectors, 300, 0, 77)
    np.testing.assert_array_equal(centroids(cut).directions, centroids(whole).directions)
    np.testing.assert_array_equal(cut.starts, whole.starts)
    assert len(cut.store.list("work/cells/pictures/sorted/")) == -(-COUNT // 11)
    assert_same(cut.nearest(queries, 15, 2, device="cpu"), wanted)
    blocks = [cut.nearest(queries[start : start + 13], 15, 2, device="cpu") for start in range(0, len(queries), 13)]
    np.testing.assert_array_equal(np.concatenate([block.indices for block in blocks]), wanted.indices)


def test_only_the_pieces_of_probed_cells_are_read(
    vectors: np.ndarray, queries: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_ROWS", 11)
    cells = cells_in(tmp_path, vectors)
    read: list[str] = []
    arrays = module.read_arrays
    monkeypatch.setattr(module, "read_arrays", lambda store, key: read.append(key) or arrays(store, key))
    cells.nearest(queries[:1], 2, 1, device="cpu")
    ((cell,),) = centroids(cells).nearest_to(queries[:1], 1)
    first, last = cells.starts[cell] // 11, (cells.starts[cell + 1] - 1) // 11
    assert read[0] == module.centroids_key(cells.folder)
    assert read[1 : read.index(read[0], 1)] == [
        module.sorted_key(cells.folder, piece) for piece in range(first, last + 1)
    ]


def test_equal_vectors_make_one_cell_and_the_others_stay_empty(tmp_path: Path) -> None:
    """Of nine different vectors in 32 cells."""
    rng = np.random.default_rng(2)
    different = unit(rng.standard_normal((9, DIM)))
    matrix = different[np.arange(300) % 9]
    cells = cells_in(tmp_path, matrix)
    sizes = np.diff(cells.starts)
    assert len(sizes) == 32 and sorted(sizes[sizes > 0].tolist()) == [33] * 6 + [34] * 3
    apart = unit(different - matrix.mean(axis=0))
    np.testing.assert_allclose((centroids(cells).directions @ apart.T).max(axis=0), 1, rtol=0, atol=1e-6)
    found = cells.nearest(different, 33, 1, device="cpu")
    np.testing.assert_array_equal(found.indices, [np.arange(start, 297, 9) for start in range(9)])


def test_vectors_that_are_all_equal_have_no_direction_and_are_found(tmp_path: Path) -> None:
    matrix = np.repeat(unit(np.ones((1, DIM))), 40, axis=0)
    assert_same(cells_in(tmp_path, matrix).nearest(matrix[:3], 5, 1, device="cpu"), nearest(matrix[:3], [matrix], 5))


def test_a_direction_that_all_pictures_share_and_captions_do_not_costs_no_recall(tmp_path: Path) -> None:
    """As CLIP's have. In cells that are made without taking the mean from them, one probe finds 0.72."""
    rng = np.random.default_rng(3)
    groups = unit(rng.standard_normal((150, 256)))[np.arange(3000) % 150] + unit(rng.standard_normal((3000, 256)))
    captions, pictures = (
        unit(0.7 * np.eye(256)[side] + 0.6 * unit(groups) + 0.4 * unit(rng.standard_normal((3000, 256))))
        for side in range(2)
    )
    exact = nearest(captions[:200], [pictures], 15).indices
    found = cells_in(tmp_path, pictures).nearest(captions[:200], 15, 1, device="cpu").indices
    assert (exact[:, :, np.newaxis] == found[:, np.newaxis, :]).any(axis=2).mean() > 0.9


def test_centroids_of_a_sample_are_those_of_every_sth_vector(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAMPLE", 5)  # of 64 cells: every second vector
    given = parts_of(open_store(tmp_path / "all"), vectors, 123)
    found = Centroids.of(given)
    monkeypatch.setattr(module, "SAMPLE", 64)
    monkeypatch.setattr(module, "cells_of", lambda count: 64)
    half = Centroids.of(parts_of(open_store(tmp_path / "half"), vectors[::2]))
    np.testing.assert_array_equal(found.directions, half.directions)
    np.testing.assert_array_equal(found.mean, half.mean)


def test_probes_go_on_until_there_are_enough_vectors() -> None:
    centres = Centroids(np.zeros(5, np.float32), np.eye(5, dtype=np.float32))
    query = unit(np.array([[5, 4, 3, 2, 1]], np.float32))
    sizes = np.array([1, 0, 3, 9, 9])
    for k, probes, wanted in ((1, 1, 1), (1, 2, 2), (2, 1, 3), (4, 3, 3), (5, 1, 4), (22, 1, 5), (1, 99, 5)):
        rows, cells = probed(query, centres, sizes, k, probes)
        assert rows.tolist() == [0] * wanted and cells.tolist() == list(range(wanted)), (k, probes)
