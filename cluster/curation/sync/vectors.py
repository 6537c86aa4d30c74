"""The vectors of a dataset's pictures and captions, in pieces on the store.

Pieces follow the dataset's shards, so they do not depend on how the work is divided later. A caption that occurs more
than once is encoded once: its vectors are equal wherever it occurs, to the last bit, and so are its scores.

    rows/000003.parquet       of a group of shards: sample_id, caption, clip_score, weight, and place, the number among
                              the dataset's rows as they lie there; written after its pictures
    pictures/000003.npy       (n, D) float32, L2-normalised: global features
    ordered/                  where rows do not lie by sample id: both so, and what follows (ordered.py)
    sentences/000003.npy      (u, E): a sentence encoder's vectors of the captions that occur here first, if not CLIP's
    captions/000003.npy       (u, D): CLIP's; written after the sentences
"""

import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pyarrow as pa

from cluster.curation.sync.sentences import SentenceSpec, load_sentences
from cluster.dataset.documents import Manifest, StoredShard
from cluster.dataset.environment import tell_encoder
from cluster.dataset.parquet import parquet_bytes, read_table
from cluster.dataset.rows import features_of, read_shard, read_weights, scores_of
from cluster.store.retries import load_with_retries
from cluster.store.store import Store
from cluster.weights.node_copy import local_name
from pcm.errors import InputError
from pcm.model_faults import enough_memory, room_for_model
from pcm.spec import ClipSpec

if TYPE_CHECKING:
    from pcm.clip.encoder import ClipEncoder

#: Rows of a group of shards: about as many.
GROUP_ROWS = 8192

K = TypeVar("K")
V = TypeVar("V")

PICTURES, CAPTIONS, SENTENCES = "pictures", "captions", "sentences"
_DIGEST_BYTES = 16  # of a caption: of a billion, two have the same with a probability of 1e-21
_THREADS = 8


@dataclass(frozen=True)
class Group:
    """Rows whose vectors lie in one piece; `first_row` is the place of its first row among all. shards: those that it
    was read from; none where rows were put in order since."""

    number: int
    first_row: int
    rows: int
    shards: tuple[StoredShard, ...] = ()


def groups_of(manifest: Manifest) -> list[Group]:
    """The groups of a dataset: whole shards, up to GROUP_ROWS rows, or one larger shard."""
    groups: list[Group] = []
    held: list[StoredShard] = []
    first = rows = 0
    for shard in manifest.stored_shards:
        if held and rows + shard.rows > GROUP_ROWS:
            groups.append(Group(len(groups), first, rows, tuple(held)))
            first, held, rows = first + rows, [], 0
        held.append(shard)
        rows += shard.rows
    if held:
        groups.append(Group(len(groups), first, rows, tuple(held)))
    return groups


def piece_key(work: str, kind: str, number: int) -> str:
    return f"{work}/{kind}/{number:06d}.npy"


def rows_key(work: str, number: int) -> str:
    return f"{work}/rows/{number:06d}.parquet"


def store_pictures(data: Store, out: Store, work: str, group: Group, embed_dim: int) -> None:
    """Put the rows and picture vectors of a group there.

    Raises InputError for a shard that cannot be read and for features that are no direction: not finite, or zero.
    """
    tables, features = [], []
    for shard in group.shards:
        # A few small columns of a large shard: its size and rows are compared, its pictures not read for a checksum.
        names = ["sample_id", "caption", "clip_score", "global_feature"]
        table = read_shard(data, shard, names, checksum=False)
        scores = scores_of(data, shard, table)
        vectors = unit(features_of(data, shard, table, "global_feature", embed_dim))
        if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
            sample = table["sample_id"][int(bad[0])].as_py()
            raise InputError(
                f"{data.root}/{shard.key}: the features of {sample} are zero or not finite, and {len(bad) - 1} others; "
                "run jobs.verify, or leave these rows out with jobs.curate --drop-list"
            )
        table = table.select(["sample_id", "caption"]).append_column("clip_score", pa.array(scores))
        tables.append(table.append_column("weight", pa.array(read_weights(data, shard))))
        features.append(vectors)
    place = np.arange(group.first_row, group.first_row + group.rows)
    rows = pa.concat_tables(tables).combine_chunks().append_column("place", pa.array(place))
    out.write_bytes(piece_key(work, PICTURES, group.number), array_bytes(np.concatenate(features)))
    out.write_bytes(rows_key(work, group.number), parquet_bytes(rows))


@dataclass(frozen=True)
class Captions:
    """The captions of N rows, U of them different, numbered as they come.

    of_row: (N,) int64, the number of each row's caption. first_row: (U,) int64, where each occurs first. members:
    (U, most) int64, the first rows of each, -1 where there are fewer.
    """

    of_row: np.ndarray
    first_row: np.ndarray
    members: np.ndarray

    def __len__(self) -> int:
        return len(self.first_row)

    @staticmethod
    def of(digests: np.ndarray, *, most: int) -> "Captions":
        """Of (N,) digests, of which equal ones are of the same caption."""
        _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
        order = np.argsort(first)
        number = np.empty_like(order)
        number[order] = np.arange(len(order))
        of_row = number[inverse.reshape(-1)]
        rows = np.argsort(of_row, kind="stable")
        counts = np.bincount(of_row, minlength=len(order))
        rank = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        members = np.full((len(order), most), -1, np.int64)
        kept = rank < most
        members[of_row[rows[kept]], rank[kept]] = rows[kept]
        return Captions(of_row, first[order], members)


def caption_digests(out: Store, work: str, groups: Sequence[Group]) -> np.ndarray:
    """(N,) 16 bytes each: which captions are equal."""

    def digests(group: Group) -> list[bytes]:
        captions = read_table(out, rows_key(work, group.number), ["caption"])["caption"].to_pylist()
        return [hashlib.blake2b(caption.encode(), digest_size=_DIGEST_BYTES).digest() for caption in captions]

    found = np.empty(sum(group.rows for group in groups), f"V{_DIGEST_BYTES}")
    with ThreadPoolExecutor(_THREADS) as pool:
        for group, part in zip(groups, pool.map(digests, groups), strict=True):
            found[group.first_row : group.first_row + group.rows] = part
    return found


@enough_memory("while captions are encoded; end what else uses the device, or give --device cpu where it is a GPU")
def store_captions(
    out: Store,
    work: str,
    group: Group,
    rows: np.ndarray,
    spec: ClipSpec,
    clip: str,
    sentences: SentenceSpec,
    device: str,
) -> None:
    """Encode the captions that occur in a group first, in the order of its `rows` (their places in the group).

    Raises InputError when a model cannot be loaded.
    """
    tell_encoder(out, replace(spec, device=device))
    captions = read_table(out, rows_key(work, group.number), ["caption"])["caption"].take(rows).to_pylist()
    if not sentences.is_clip:
        encoder = load_sentences(sentences, device)
        out.write_bytes(piece_key(work, SENTENCES, group.number), array_bytes(unit(encoder.encode(captions))))
    vectors = _text_tower(spec, clip, device).encode_texts(captions)
    out.write_bytes(piece_key(work, CAPTIONS, group.number), array_bytes(unit(vectors)))


class StoredParts:
    """Pieces of vectors on the store, in order, as often as asked for; the next one is read ahead."""

    def __init__(self, store: Store, keys: Sequence[str], sizes: Sequence[int]) -> None:
        self._store, self._keys = store, keys
        self.sizes = sizes
        self._ends = np.cumsum(sizes)

    def __iter__(self) -> Iterator[np.ndarray]:
        return read_ahead(lambda key: read_array(self._store, key), self._keys)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def piece(self, number: int) -> np.ndarray:
        return read_array(self._store, self._keys[number])

    def rows(self, start: int, end: int) -> np.ndarray:
        """The vectors from one number up to another, which is larger."""
        return self.take(np.arange(start, end))

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The vectors of ascending numbers, of which there is at least one; one piece after the other is held."""
        starts = self._ends - np.diff(self._ends, prepend=0)
        places = np.searchsorted(numbers, np.append(starts, self._ends[-1]))
        wanted = np.flatnonzero(np.diff(places)).tolist()
        pieces = read_ahead(self.piece, wanted)
        found: np.ndarray | None = None
        for number, piece in zip(wanted, pieces, strict=True):
            here = slice(places[number], places[number + 1])
            if found is None:
                found = np.empty((len(numbers), *piece.shape[1:]), piece.dtype)
            found[here] = piece[numbers[here] - starts[number]]
        assert found is not None
        return found


def read_ahead(read: Callable[[K], V], keys: Sequence[K]) -> Iterator[V]:
    """What each key gives, in order; the next one is read meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        ahead = None
        for key in keys:
            coming = pool.submit(read, key)
            if ahead is not None:
                yield ahead.result()
            ahead = coming
        if ahead is not None:
            yield ahead.result()


def unit(matrix: np.ndarray) -> np.ndarray:
    """Rows of length one, float32. Of a row of zeros, or one that is not finite, no number is finite."""
    exact = matrix.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (exact / np.linalg.norm(exact, axis=1, keepdims=True)).astype(np.float32)


def array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def read_array(store: Store, key: str) -> np.ndarray:
    """Raises InputError for a damaged object."""
    try:
        return np.load(io.BytesIO(store.read_bytes(key)), allow_pickle=False)
    except (ValueError, EOFError):
        raise InputError(f"{store.root}/{key}: damaged; delete it and run the same command again") from None


@functools.lru_cache(maxsize=1)
def _text_tower(spec: ClipSpec, clip: str, device: str) -> "ClipEncoder":
    from pcm.clip.encoder import ClipEncoder  # seconds to import, and the driver needs none of it

    place = local_name(clip, spec.revision)
    with room_for_model(f"CLIP {clip}", device):
        return load_with_retries(lambda: ClipEncoder.from_spec(spec, model=place, device=device), model=clip)
