"""SynC over a dataset, stage by stage, each in pieces whose results lie on the store.

    vectors      pictures and captions of a group of shards              (vectors.py)
    order        rows and pictures by sample id, if they lie otherwise   (ordered.py)
    cells        with probes: vectors sorted by cell                     (cells.py)
    candidates   of a block of captions: the K nearest pictures          (nearest.py)
    describers   of a block of pictures: the K_r nearest captions        (nearest.py)
    recall       with probes: what share of these an exact comparison finds
    choices      of a block of captions: its picture and score           (choice.py)
    scores       of a block of captions and their pictures, by another CLIP than the one that found these

An object's key holds what decides it: `work` is named after the data and the encoders, a block's folder after K, K_r
and the probes, a block after its first and last row. So a run that was interrupted goes on where it was, with another
block size too, and nothing is taken for what it is not. A stage waits for the one before.

Memory of a task: its block's vectors, two pieces of the other side, and the product of the block and a tile
(nearest.py), whatever the number of pairs; for choices also K_r numbers a pair. The driver: some 40 bytes a pair.

What is compared grows with the square of the number of pairs in candidates and describers. A block of choices compares
few pairs, but reads all sentence vectors for them: its reading grows with the square too.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.curation.sync.cells import StoredCells, store_cells
from cluster.curation.sync.choice import (
    Choice,
    captions_of_pictures,
    choose,
    kept_in_order,
    sentence_scores,
)
from cluster.curation.sync.nearest import nearest, pair_cosines
from cluster.curation.sync.objects import read_arrays, run_missing, write_arrays
from cluster.curation.sync.ordered import in_order
from cluster.curation.sync.sentences import SentenceSpec
from cluster.curation.sync.settings import WORK, SyncSettings
from cluster.curation.sync.vectors import (
    CAPTIONS,
    PICTURES,
    SENTENCES,
    Captions,
    Group,
    StoredParts,
    caption_digests,
    groups_of,
    piece_key,
    rows_key,
    store_captions,
    store_pictures,
)
from cluster.curation.tasks import Tasks
from cluster.dataset.documents import Manifest
from cluster.dataset.parquet import read_table
from cluster.store.store import Store

#: Part of a key: changes when the code begins to make other numbers of the same data.
_VERSION = 2
#: Queries that are compared with all vectors where only some cells are looked into.
RECALL_QUERIES = 1000
_RECALL_SEED = 0


@dataclass(frozen=True)
class Recall:
    """The share of the exact candidates, and describers, that were found, by a sample of RECALL_QUERIES captions, and
    pictures."""

    candidates: float
    describers: float


@dataclass(frozen=True)
class Refined:
    """What SynC made of N pairs, in the order of their sample ids.

    picture: (N,) int64, the row whose picture the caption takes. score: (N,) int64, SynC's score in units of 1e-6.
    cosine: (N,) float64, CLIP's of the caption and its picture. kept: int64, the rows that stay, best first. recall:
    None where all was compared with all.
    """

    picture: np.ndarray
    score: np.ndarray
    cosine: np.ndarray
    kept: np.ndarray
    recall: Recall | None


def work_folder(sha256: str, manifest: Manifest, sentences: SentenceSpec, device: str) -> str:
    """Where the objects of a run lie; `sha256` names the dataset's state. A GPU encodes with other last bits."""
    decides = [_VERSION, sha256, manifest.spec.clip.identity(), sentences.decides(), device]
    return f"{WORK}/{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Vectors:
    """The vectors of a dataset's pictures and of its U different captions, on the store; which rows have which caption.
    Rows are numbered by sample id.

    sentences: those by which captions are compared with each other.
    """

    pictures: StoredParts
    captions: StoredParts
    sentences: StoredParts
    numbers: Captions


def refine_pairs(
    data: Store,
    manifest: Manifest,
    out: Store,
    work: str,
    settings: SyncSettings,
    sentences: SentenceSpec,
    tasks: Tasks,
    *,
    clip: str,
    block_size: int,
    device: str,
) -> Refined:
    """SynC over every row of a dataset. The result depends on neither `block_size` nor `tasks`. `clip`: where the
    dataset's CLIP is.

    Raises InputError for rows whose features cannot be used, and for models that cannot be loaded.
    """
    most = settings.captions_per_picture
    vectors = store_vectors(data, manifest, out, work, sentences, tasks, clip=clip, most=most, device=device)
    choice, recall = match(out, work, vectors, settings, tasks, block_size=block_size, device=device)
    of_row = vectors.numbers.of_row
    score = choice.score[of_row]
    return Refined(choice.picture[of_row], score, choice.cosine[of_row], kept_in_order(score, settings.keep), recall)


def store_vectors(
    data: Store,
    manifest: Manifest,
    out: Store,
    work: str,
    sentences: SentenceSpec,
    tasks: Tasks,
    *,
    clip: str,
    most: int,
    device: str,
) -> Vectors:
    """The first stage. `most`: how many rows of each caption are known by number. Raises as `refine_pairs` does."""
    as_stored, embed_dim = groups_of(manifest), manifest.features.embed_dim
    calls: dict[tuple[str, ...], tuple] = {
        (piece_key(work, PICTURES, group.number), rows_key(work, group.number)): (data, out, work, group, embed_dim)
        for group in as_stored
    }
    run_missing(tasks, out, work, store_pictures, calls, what="picture vectors")
    work, groups = in_order(out, work, as_stored, tasks)
    numbers = Captions.of(caption_digests(out, work, groups), most=most)
    first = [_within(numbers.first_row, group) for group in groups]
    kinds = (CAPTIONS,) if sentences.is_clip else (SENTENCES, CAPTIONS)
    calls = {
        tuple(piece_key(work, kind, group.number) for kind in kinds): (
            out, work, group, rows, manifest.spec.clip, clip, sentences, device
        )
        for group, rows in zip(groups, first, strict=True)
    }  # fmt: skip
    run_missing(tasks, out, work, store_captions, calls, what="caption vectors", on_device=True)
    sizes = [len(rows) for rows in first]
    return Vectors(
        pictures=_parts(out, work, PICTURES, [group.rows for group in groups]),
        captions=_parts(out, work, CAPTIONS, sizes),
        sentences=_parts(out, work, CAPTIONS if sentences.is_clip else SENTENCES, sizes),
        numbers=numbers,
    )


def match(
    out: Store, work: str, vectors: Vectors, settings: SyncSettings, tasks: Tasks, *, block_size: int, device: str
) -> tuple[Choice, Recall | None]:
    """The other stages: what each of the U different captions gets, and what probes did not find."""
    captions, pictures, per_picture = vectors.captions, vectors.pictures, settings.captions_per_picture
    candidates = _Search("candidates", captions, pictures, PICTURES, settings.candidates, settings.probes)
    describers = _Search("describers", pictures, captions, CAPTIONS, per_picture, settings.probes)
    of_caption, of_picture = (
        _searched(out, work, search, tasks, block_size=block_size, device=device) for search in (candidates, describers)
    )
    members = vectors.numbers.members
    described = [captions_of_pictures(block["indices"], block["cosines"], members) for block in of_picture.read(out)]
    shared = tasks.share(np.concatenate(described))
    probes = _of_probes(settings.probes)
    choices = _Blocks(f"{work}/choices-{settings.candidates}-{per_picture}{probes}", len(captions), block_size)
    calls = {
        key: (out, key, of_caption.key(start, end), vectors.sentences, start, end, shared)
        for key, start, end in choices.ranges()
    }
    run_missing(tasks, out, work, _choose_block, calls, what="choices")
    found = list(choices.read(out))
    choice = Choice(*(np.concatenate([block[name] for block in found]) for name in Choice.__dataclass_fields__))
    if settings.probes is None:
        return choice, None
    return choice, Recall(
        _recall(out, work, candidates, of_caption, tasks, device=device),
        _recall(out, work, describers, of_picture, tasks, device=device),
    )


def cosines_of(
    out: Store, work: str, vectors: Vectors, picture: np.ndarray, tasks: Tasks, *, block_size: int
) -> np.ndarray:
    """(U,) float64: the cosine of each of the U different captions and the picture of row `picture` (U,) int64; minus
    infinity where that is -1."""
    decides = hashlib.sha256(np.ascontiguousarray(picture, np.int64).tobytes()).hexdigest()[:16]
    blocks = _Blocks(f"{work}/cosines-{decides}", len(vectors.captions), block_size)
    shared = tasks.share(picture)
    calls = {
        key: (out, key, vectors.captions, vectors.pictures, start, end, shared) for key, start, end in blocks.ranges()
    }
    run_missing(tasks, out, work, _pair_block, calls, what="scores")
    return np.concatenate([block["cosine"] for block in blocks.read(out)])


def rows_by_id(manifest: Manifest, out: Store, work: str) -> pa.Table:
    """sample_id, caption, clip_score, weight and place of every row, by sample id, once `refine_pairs` has been there.
    place: the number among the dataset's rows as they lie there."""
    tables = [read_table(out, rows_key(work, group.number)) for group in groups_of(manifest)]
    table = pa.concat_tables(tables)
    ids = table["sample_id"]
    if pc.all(pc.less(ids.slice(0, len(ids) - 1), ids.slice(1))).as_py():
        return table  # of a dataset, which has no need of a copy
    return table.sort_by("sample_id")


@dataclass(frozen=True)
class _Blocks:
    """Rows in blocks, and the objects of their results."""

    folder: str
    rows: int
    size: int

    def key(self, start: int, end: int) -> str:
        return f"{self.folder}/{start:09d}-{end:09d}.safetensors"

    def ranges(self) -> list[tuple[str, int, int]]:
        found = [(start, min(start + self.size, self.rows)) for start in range(0, self.rows, self.size)]
        return [(self.key(start, end), start, end) for start, end in found]

    def read(self, out: Store) -> Iterator[dict[str, np.ndarray]]:
        return (read_arrays(out, key) for key, _, _ in self.ranges())

    def take(self, out: Store, rows: np.ndarray) -> np.ndarray:
        """(n, k) int64: the indices of ascending rows."""
        found = []
        for key, start, end in self.ranges():
            here = rows[slice(*np.searchsorted(rows, [start, end]))]
            if len(here):
                found.append(read_arrays(out, key)["indices"][here - start])
        return np.concatenate(found)


@dataclass(frozen=True)
class _Search:
    """The k vectors nearest to each query: of all, or of the cells that `probes` finds. kind: what the vectors are."""

    name: str
    queries: StoredParts
    vectors: StoredParts
    kind: str
    k: int
    probes: int | None

    @property
    def key(self) -> str:
        return f"{self.name}-{self.k}{_of_probes(self.probes)}"


def _of_probes(probes: int | None) -> str:
    return "" if probes is None else f"-probes-{probes}"


def _searched(out: Store, work: str, search: _Search, tasks: Tasks, *, block_size: int, device: str) -> _Blocks:
    """Where the nearest lie, once this is done."""
    blocks = _Blocks(f"{work}/{search.key}", len(search.queries), block_size)
    ranges = blocks.ranges()
    if search.probes is None:
        calls: dict[str, tuple] = {
            key: (out, key, search.queries, search.vectors, start, end, search.k, device) for key, start, end in ranges
        }
        run_missing(tasks, out, work, _nearest_block, calls, what=search.name, on_device=True)
    else:
        cells = tasks.share(store_cells(out, work, search.kind, search.vectors, tasks, device=device))
        calls = {
            key: (out, key, search.queries, cells, start, end, search.k, search.probes, device)
            for key, start, end in ranges
        }
        run_missing(tasks, out, work, _probing_block, calls, what=search.name, on_device=True)
    return blocks


def _recall(out: Store, work: str, search: _Search, blocks: _Blocks, tasks: Tasks, *, device: str) -> float:
    key = f"{work}/recall/{search.key}.safetensors"
    call = (out, key, search.queries, search.vectors, search.k, blocks, device)
    run_missing(tasks, out, work, _compare_sample, {key: call}, what=f"recall of {search.name}", on_device=True)
    return float(read_arrays(out, key)["found"].mean())


def _nearest_block(
    out: Store, key: str, queries: StoredParts, vectors: StoredParts, start: int, end: int, k: int, device: str
) -> None:
    found = nearest(queries.rows(start, end), vectors, k, device=device)
    write_arrays(out, key, indices=found.indices, cosines=found.cosines)


def _probing_block(
    out: Store,
    key: str,
    queries: StoredParts,
    cells: StoredCells,
    start: int,
    end: int,
    k: int,
    probes: int,
    device: str,
) -> None:
    found = cells.nearest(queries.rows(start, end), k, probes, device=device)
    write_arrays(out, key, indices=found.indices, cosines=found.cosines)


def _compare_sample(
    out: Store, key: str, queries: StoredParts, vectors: StoredParts, k: int, blocks: _Blocks, device: str
) -> None:
    """found: (n, k) bool, which of the exact ones of n queries are in the blocks."""
    count = len(queries)
    sample = np.sort(np.random.default_rng(_RECALL_SEED).permutation(count)[:RECALL_QUERIES])
    exact = nearest(queries.take(sample), vectors, k, device=device).indices
    given = blocks.take(out, sample)
    write_arrays(out, key, found=(exact[:, :, np.newaxis] == given[:, np.newaxis, :]).any(axis=2))


def _choose_block(
    out: Store, key: str, candidates: str, sentences: StoredParts, start: int, end: int, described: np.ndarray
) -> None:
    found = read_arrays(out, candidates)
    scores = sentence_scores(sentences.rows(start, end), sentences, found["indices"], described)
    choice = choose(found["indices"], found["cosines"], scores)
    write_arrays(out, key, picture=choice.picture, score=choice.score, cosine=choice.cosine)


def _pair_block(
    out: Store, key: str, captions: StoredParts, pictures: StoredParts, start: int, end: int, picture: np.ndarray
) -> None:
    wanted = picture[start:end, np.newaxis]  # (B, 1)
    write_arrays(out, key, cosine=pair_cosines(captions.rows(start, end), pictures, wanted)[:, 0])


def _parts(out: Store, work: str, kind: str, sizes: Sequence[int]) -> StoredParts:
    return StoredParts(out, [piece_key(work, kind, number) for number in range(len(sizes))], sizes)


def _within(rows: np.ndarray, group: Group) -> np.ndarray:
    """Those of ascending rows that lie in a group, as places in it."""
    start, end = np.searchsorted(rows, [group.first_row, group.first_row + group.rows])
    return rows[start:end] - group.first_row
