"""SynC over a dataset, stage by stage, each in pieces whose results lie on the store.

    vectors      pictures and captions of a group of shards              (vectors.py)
    candidates   of a block of captions: the K nearest pictures          (nearest.py)
    describers   of a block of pictures: the K_r nearest captions        (nearest.py)
    choices      of a block of captions: its picture and score           (choice.py)
    scores       of a block of captions and their pictures, by another CLIP than the one that found these

An object's key holds what decides it: `work` is named after the data and the encoders, a block's folder after K and
K_r, a block after its first and last row. So a run that was interrupted goes on where it was, with another block size
too, and nothing is taken for what it is not. A stage waits for the one before.

Memory of a task: its block's vectors, two pieces of the other side, and the product of the block and a tile
(nearest.py), whatever the number of pairs; for choices also K_r numbers a pair. The driver: some 40 bytes a pair.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import safetensors
import safetensors.numpy

from cluster.curation.sync.choice import (
    Choice,
    captions_of_pictures,
    choose,
    kept_in_order,
    sentence_scores,
)
from cluster.curation.sync.nearest import nearest, pair_cosines
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
from cluster.dataset.layout import Manifest, read_table
from cluster.store.store import Store
from pcm.errors import InputError

#: Part of a key: changes when the code begins to make other numbers of the same data.
_VERSION = 1


@dataclass(frozen=True)
class Refined:
    """What SynC made of N pairs, in the order of the dataset's rows.

    picture: (N,) int64, the row whose picture the caption takes. score: (N,) int64, SynC's score in units of 1e-6.
    cosine: (N,) float64, CLIP's of the caption and its picture. kept: int64, the rows that stay, best first.
    """

    picture: np.ndarray
    score: np.ndarray
    cosine: np.ndarray
    kept: np.ndarray


def work_folder(sha256: str, manifest: Manifest, sentences: SentenceSpec, device: str) -> str:
    """Where the objects of a run lie; `sha256` names the dataset's state. A GPU encodes with other last bits."""
    decides = [_VERSION, sha256, manifest.spec.clip.identity(), sentences.decides(), device]
    return f"{WORK}/{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Vectors:
    """The vectors of a dataset's pictures and of its U different captions, on the store; which rows have which caption.

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
    choice = match(out, work, vectors, settings, tasks, block_size=block_size, device=device)
    of_row = vectors.numbers.of_row
    score = choice.score[of_row]
    return Refined(choice.picture[of_row], score, choice.cosine[of_row], kept_in_order(score, settings.keep))


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
    groups, embed_dim = groups_of(manifest), manifest.features.embed_dim
    calls: dict[str, tuple] = {rows_key(work, group.number): (data, out, work, group, embed_dim) for group in groups}
    _run(tasks, out, work, store_pictures, calls, what="picture vectors")
    numbers = Captions.of(caption_digests(out, work, groups), most=most)
    first = [_within(numbers.first_row, group) for group in groups]
    calls = {
        piece_key(work, CAPTIONS, group.number): (out, work, group, rows, manifest.spec.clip, clip, sentences, device)
        for group, rows in zip(groups, first, strict=True)
    }
    _run(tasks, out, work, store_captions, calls, what="caption vectors")
    sizes = [len(rows) for rows in first]
    return Vectors(
        pictures=_parts(out, work, PICTURES, [group.rows for group in groups]),
        captions=_parts(out, work, CAPTIONS, sizes),
        sentences=_parts(out, work, CAPTIONS if sentences.is_clip else SENTENCES, sizes),
        numbers=numbers,
    )


def match(
    out: Store, work: str, vectors: Vectors, settings: SyncSettings, tasks: Tasks, *, block_size: int, device: str
) -> Choice:
    """The other stages: what each of the U different captions gets."""
    captions, pictures, per_picture = vectors.captions, vectors.pictures, settings.captions_per_picture
    candidates = _Blocks(f"{work}/candidates-{settings.candidates}", len(captions), block_size)
    calls = candidates.calls(out, captions, pictures, settings.candidates, device)
    _run(tasks, out, work, _nearest_block, calls, what="candidates")
    describers = _Blocks(f"{work}/describers-{per_picture}", len(pictures), block_size)
    calls = describers.calls(out, pictures, captions, per_picture, device)
    _run(tasks, out, work, _nearest_block, calls, what="describers")
    members = vectors.numbers.members
    described = [captions_of_pictures(block["indices"], block["cosines"], members) for block in describers.read(out)]
    shared = tasks.share(np.concatenate(described))
    choices = _Blocks(f"{work}/choices-{settings.candidates}-{per_picture}", len(captions), block_size)
    calls = {
        key: (out, key, candidates.key(start, end), vectors.sentences, start, end, shared)
        for key, start, end in choices.ranges()
    }
    _run(tasks, out, work, _choose_block, calls, what="choices")
    found = list(choices.read(out))
    return Choice(*(np.concatenate([block[name] for block in found]) for name in Choice.__dataclass_fields__))


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
    _run(tasks, out, work, _pair_block, calls, what="scores")
    return np.concatenate([block["cosine"] for block in blocks.read(out)])


def stored_rows(manifest: Manifest, out: Store, work: str) -> pa.Table:
    """sample_id, caption and clip_score of every row, once `refine_pairs` has been there."""
    return pa.concat_tables([read_table(out, rows_key(work, group.number)) for group in groups_of(manifest)])


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

    def calls(self, out: Store, queries: StoredParts, vectors: StoredParts, k: int, device: str) -> dict[str, tuple]:
        return {key: (out, key, queries, vectors, start, end, k, device) for key, start, end in self.ranges()}

    def read(self, out: Store) -> Iterator[dict[str, np.ndarray]]:
        return (_read(out, key) for key, _, _ in self.ranges())


def _run(
    tasks: Tasks, out: Store, work: str, function: Callable[..., None], calls: dict[str, tuple], *, what: str
) -> None:
    """The calls whose object is not there yet."""
    done = set(out.list(f"{work}/"))
    tasks.run(function, [call for key, call in calls.items() if key not in done], what=what)


def _nearest_block(
    out: Store, key: str, queries: StoredParts, vectors: StoredParts, start: int, end: int, k: int, device: str
) -> None:
    found = nearest(queries.rows(start, end), vectors, k, device=device)
    _write(out, key, indices=found.indices, cosines=found.cosines)


def _choose_block(
    out: Store, key: str, candidates: str, sentences: StoredParts, start: int, end: int, described: np.ndarray
) -> None:
    found = _read(out, candidates)
    scores = sentence_scores(sentences.rows(start, end), sentences, found["indices"], described)
    choice = choose(found["indices"], found["cosines"], scores)
    _write(out, key, picture=choice.picture, score=choice.score, cosine=choice.cosine)


def _pair_block(
    out: Store, key: str, captions: StoredParts, pictures: StoredParts, start: int, end: int, picture: np.ndarray
) -> None:
    wanted = picture[start:end, np.newaxis]  # (B, 1)
    _write(out, key, cosine=pair_cosines(captions.rows(start, end), pictures, wanted)[:, 0])


def _write(out: Store, key: str, **arrays: np.ndarray) -> None:
    out.write_bytes(key, safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def _read(out: Store, key: str) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load(out.read_bytes(key))
    except (safetensors.SafetensorError, ValueError):
        raise InputError(f"{out.root}/{key}: damaged; delete it and run the same command again") from None


def _parts(out: Store, work: str, kind: str, sizes: Sequence[int]) -> StoredParts:
    return StoredParts(out, [piece_key(work, kind, number) for number in range(len(sizes))], sizes)


def _within(rows: np.ndarray, group: Group) -> np.ndarray:
    """Those of ascending rows that lie in a group, as places in it."""
    start, end = np.searchsorted(rows, [group.first_row, group.first_row + group.rows])
    return rows[start:end] - group.first_row
