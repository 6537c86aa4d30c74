"""The nearest vectors of a few cells: an inverted file, for more vectors than can all be compared with all.

Spherical k-means puts every vector into the cell of its nearest centroid, once the mean is taken from it: CLIP's
pictures all lie around one direction, and its captions around another, and without this a few cells near the mean would
take most of them. A query is compared with the vectors of the P cells whose centroids are nearest to it, and of further
cells where these hold fewer than k. All comparisons are those of nearest.py, so the result depends on the vectors and P
alone, and with as many probes as there are cells it is exact.

    cells/pictures/centroids.safetensors      mean (D,), directions (C, D) float32
    cells/pictures/of/000003.npy              (n,) int32: the cell of each vector of a piece
    cells/pictures/sorted/000003.safetensors  numbers, vectors: PIECE_ROWS of all vectors, by cell and then by number

Memory of a task. The centroids: SAMPLE vectors a cell. The sorted vectors: PIECES_AT_ONCE pieces, half a GiB of 512
dimensions. The driver: 12 bytes a vector.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cluster.curation.sync.nearest import Nearest, PartForSome, nearest, nearest_for_some
from cluster.curation.sync.objects import read_arrays, run_missing, write_arrays
from cluster.curation.sync.vectors import StoredParts, array_bytes, read_ahead, unit
from cluster.curation.tasks import Tasks
from cluster.store.store import Store

#: Vectors a cell from which centroids are made, and how often these move.
SAMPLE, ROUNDS = 64, 8
#: Sorted vectors of an object, and how many objects a task writes. It reads all vectors for them.
PIECE_ROWS, PIECES_AT_ONCE = 8192, 32
#: Queries that are compared with a cell at once, which bounds the product.
QUERIES_AT_ONCE = 4096


def cells_of(count: int) -> int:
    """How many cells `count` vectors have: about twice the square root, as a power of two."""
    return 2 ** round(math.log2(count) / 2 + 1)


@dataclass(frozen=True)
class Centroids:
    """mean: (D,) float32, of the vectors. directions: (C, D) float32, from there, of length one (or zero)."""

    mean: np.ndarray
    directions: np.ndarray

    def __len__(self) -> int:
        return len(self.directions)

    @staticmethod
    def of(vectors: StoredParts, *, device: str = "cpu") -> "Centroids":
        """k-means of every s-th vector, begun with some of them. A cell that holds none keeps its centroid."""
        cells = cells_of(len(vectors))
        sample = vectors.take(np.arange(0, len(vectors), max(1, len(vectors) // (SAMPLE * cells))))
        mean = sample.mean(axis=0, dtype=np.float64).astype(np.float32)
        found = Centroids(mean, _directions(sample[np.arange(cells) * len(sample) // cells] - mean))
        for _ in range(ROUNDS):
            of = found.cells_of(sample, device=device)
            sums = np.zeros(found.directions.shape)
            np.add.at(sums, of, sample - mean)
            moved = np.bincount(of, minlength=cells) > 0
            found = Centroids(mean, np.where(moved[:, np.newaxis], _directions(sums), found.directions))
        return found

    def cells_of(self, vectors: np.ndarray, *, device: str = "cpu") -> np.ndarray:
        """(n,) int64: the cell of each vector."""
        found = np.empty(len(vectors), np.int64)
        for start in range(0, len(vectors), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            found[some] = nearest(vectors[some] - self.mean, [self.directions], 1, device=device).indices[:, 0]
        return found

    def nearest_to(self, queries: np.ndarray, count: int, *, device: str = "cpu") -> np.ndarray:
        """(B, count) int64: the cells nearest to each query, best first. The mean is as far from it in all cells."""
        return nearest(queries, [self.directions], count, device=device).indices


def _directions(matrix: np.ndarray) -> np.ndarray:
    """Rows of length one, float32; a row of zeros stays."""
    return np.nan_to_num(unit(matrix))


@dataclass(frozen=True)
class StoredCells:
    """N vectors on the store, sorted by cell. starts: (C + 1,) int64, where each cell begins among them."""

    store: Store
    folder: str
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def nearest(self, queries: np.ndarray, k: int, probes: int, *, device: str) -> Nearest:
        """The k nearest of the vectors in the `probes` cells nearest to each of B queries. Of each, as many as an exact
        search would give. Memory: B x (probes + k) numbers, two pieces, and a product."""
        k = min(k, len(self))
        centroids = read_centroids(self.store, self.folder)
        rows, cells = probed(queries, centroids, np.diff(self.starts), k, probes, device=device)
        return nearest_for_some(queries, self._parts(rows, cells), k, device=device)

    def _parts(self, rows: np.ndarray, cells: np.ndarray) -> Iterator[PartForSome]:
        """What to compare: query rows[m] with the vectors of cell cells[m], which ascend."""
        wanted = np.unique(cells)
        first, last = self.starts[wanted] // PIECE_ROWS, (self.starts[wanted + 1] - 1) // PIECE_ROWS
        pieces = sorted({piece for one, other in zip(first, last, strict=True) for piece in range(one, other + 1)})
        read = functools.partial(read_arrays, self.store)
        for piece, arrays in zip(
            pieces, read_ahead(read, [sorted_key(self.folder, piece) for piece in pieces]), strict=True
        ):
            for cell in wanted[(first <= piece) & (piece <= last)].tolist():
                begin, end = (max(int(place) - piece * PIECE_ROWS, 0) for place in self.starts[cell : cell + 2])
                those = rows[slice(*np.searchsorted(cells, [cell, cell + 1]))]
                for start in range(0, len(those), QUERIES_AT_ONCE):
                    some = those[start : start + QUERIES_AT_ONCE]
                    yield PartForSome(some, arrays["numbers"][begin:end], arrays["vectors"][begin:end])


def probed(
    queries: np.ndarray, centroids: Centroids, sizes: np.ndarray, k: int, probes: int, *, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """(M,) int64 twice: the row of a query and a cell that it looks into, sorted by cell.

    That are the `probes` cells whose centroids are nearest, and further ones until they hold k vectors. `sizes` (C,):
    how many each holds, k or more together.
    """
    found = [
        _probed(queries[start : start + QUERIES_AT_ONCE], centroids, sizes, k, probes, device)
        + np.array([[start], [0]])
        for start in range(0, len(queries), QUERIES_AT_ONCE)
    ]
    rows, cells = np.concatenate(found, axis=1)
    order = np.lexsort((rows, cells))
    return rows[order], cells[order]


def _probed(
    queries: np.ndarray, centroids: Centroids, sizes: np.ndarray, k: int, probes: int, device: str
) -> np.ndarray:
    """(2, M) int64: rows and cells."""
    found = []
    left, looked = np.arange(len(queries)), min(probes, len(centroids))
    while len(left):
        cells = centroids.nearest_to(queries[left], looked, device=device)  # (R, looked)
        held = sizes[cells].cumsum(axis=1)
        enough = held[:, -1] >= k
        needed = np.maximum(probes, (held < k).sum(axis=1) + 1)
        rows, places = np.nonzero(enough[:, np.newaxis] & (np.arange(looked) < needed[:, np.newaxis]))
        found.append(np.stack([left[rows], cells[rows, places]]))
        left, looked = left[~enough], min(2 * looked, len(centroids))
    return np.concatenate(found, axis=1)


def store_cells(out: Store, work: str, kind: str, vectors: StoredParts, tasks: Tasks, *, device: str) -> StoredCells:
    """Put vectors on the store, sorted by cell. `kind`: which, such as "pictures"."""
    folder = f"{work}/cells/{kind}"
    key = centroids_key(folder)
    run_missing(
        tasks,
        out,
        work,
        _store_centroids,
        {key: (out, key, vectors, device)},
        what=f"centroids of {kind}",
        on_device=True,
    )
    numbered = [(_of_key(folder, number), size) for number, size in enumerate(vectors.sizes)]
    calls: dict[str, tuple] = {
        key: (out, folder, key, vectors, number, device) for number, (key, _) in enumerate(numbered)
    }
    run_missing(tasks, out, work, _store_of, calls, what=f"cells of {kind}", on_device=True)
    of = np.concatenate(list(StoredParts(out, [key for key, _ in numbered], vectors.sizes)))
    order = np.argsort(of, kind="stable")
    keys = [sorted_key(folder, piece) for piece in range(-(-len(order) // PIECE_ROWS))]
    tasks_of: dict[tuple[str, ...], tuple] = {}
    for piece in range(0, len(keys), PIECES_AT_ONCE):
        some = keys[piece : piece + PIECES_AT_ONCE]
        numbers = order[piece * PIECE_ROWS : (piece + PIECES_AT_ONCE) * PIECE_ROWS]
        tasks_of[tuple(some)] = (out, some, vectors, numbers)
    run_missing(tasks, out, work, _store_sorted, tasks_of, what=f"{kind} by cell")
    sizes = np.bincount(of, minlength=cells_of(len(vectors)))
    return StoredCells(out, folder, np.concatenate([[0], np.cumsum(sizes)]))


def centroids_key(folder: str) -> str:
    return f"{folder}/centroids.safetensors"


def read_centroids(store: Store, folder: str) -> Centroids:
    """Raises InputError where they are damaged."""
    return Centroids(**read_arrays(store, centroids_key(folder)))


def sorted_key(folder: str, piece: int) -> str:
    return f"{folder}/sorted/{piece:06d}.safetensors"


def _of_key(folder: str, number: int) -> str:
    return f"{folder}/of/{number:06d}.npy"


def _store_centroids(out: Store, key: str, vectors: StoredParts, device: str) -> None:
    found = Centroids.of(vectors, device=device)
    write_arrays(out, key, mean=found.mean, directions=found.directions)


def _store_of(out: Store, folder: str, key: str, vectors: StoredParts, number: int, device: str) -> None:
    of = read_centroids(out, folder).cells_of(vectors.piece(number), device=device)
    out.write_bytes(key, array_bytes(of.astype(np.int32)))


def _store_sorted(out: Store, keys: list[str], vectors: StoredParts, numbers: np.ndarray) -> None:
    place = np.argsort(numbers)
    found = vectors.take(numbers[place])
    back = np.empty_like(place)
    back[place] = np.arange(len(place))
    for start, key in zip(range(0, len(numbers), PIECE_ROWS), keys, strict=True):
        some = slice(start, start + PIECE_ROWS)
        write_arrays(out, key, numbers=numbers[some], vectors=found[back[some]])
