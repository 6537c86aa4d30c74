"""Which pictures of a dataset are shown, and the pictures themselves, small."""

import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cluster.charts.markup import data_uri
from cluster.dataset.rows import read_shard
from cluster.dataset.vocabulary_files import stored_concepts
from cluster.report.dataset_facts import DatasetFacts, Row, in_parallel
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.images import open_image
from pcm.text.concepts import lexicon_nouns

GROUP_SIZE = 12
WALL_SIZE = 24
CONCEPTS, CONCEPT_SIZE = 12, 6
#: Concepts whose mean score is shown: the most frequent ones with so many captions.
SCORED_CONCEPTS, MIN_CAPTIONS = 14, 3
THUMBNAIL_SIDE, WALL_SIDE = 256, 96
#: Smaller pictures are kept as they are, without loss.
LOSSLESS_SIDE = 128


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A row and its picture as a data URI; `error` says why there is none."""

    row: Row
    uri: str = ""
    width: int = 0
    height: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One noun in the captions."""

    name: str
    captions: int  # that hold it
    mean_score: float
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Best and worst by score (empty without scores), random ones, and the most frequent concepts."""

    wall: tuple[Picture, ...]
    best: tuple[Picture, ...]
    worst: tuple[Picture, ...]
    random: tuple[Picture, ...]
    concepts: tuple[Concept, ...]
    concept_scores: tuple[tuple[str, float, int], ...]  # (name, mean score, captions), best first


def make_gallery(store: Store, facts: DatasetFacts, *, seed: int) -> Gallery:
    """Pictures of the sampled rows; which ones are random is decided by the seed."""
    shuffled = [facts.rows[place] for place in np.random.default_rng(seed).permutation(len(facts.rows))]
    ranked = sorted(facts.rows, key=lambda row: (-row.clip_score, row.sample_id)) if facts.scored else []
    best = ranked[:GROUP_SIZE]
    worst = ranked[GROUP_SIZE:][: -GROUP_SIZE - 1 : -1]  # none that is among the best
    random, wall = shuffled[:GROUP_SIZE], shuffled[-WALL_SIZE:]
    by_concept = _by_concept(facts.rows, _concept_names(store))
    frequent = sorted(by_concept, key=lambda name: (-len(by_concept[name]), name))
    shown = {name: _spread(by_concept[name]) for name in frequent[:CONCEPTS]}
    pictures = _pictures(store, facts, [*best, *worst, *random, *(row for rows in shown.values() for row in rows)])
    tiles = _pictures(store, facts, wall, side=WALL_SIDE)

    def of(rows: Iterable[Row]) -> tuple[Picture, ...]:
        return tuple(pictures[row] for row in rows)

    scored = [name for name in frequent[:SCORED_CONCEPTS] if len(by_concept[name]) >= MIN_CAPTIONS]
    means = [(name, _mean_score(by_concept[name]), len(by_concept[name])) for name in scored] if facts.scored else []
    return Gallery(
        wall=tuple(tiles[row] for row in wall),
        best=of(best),
        worst=of(worst),
        random=of(random),
        concepts=tuple(
            Concept(
                name=name,
                captions=len(by_concept[name]),
                mean_score=_mean_score(by_concept[name]),
                pictures=of(rows),
            )
            for name, rows in shown.items()
        ),
        concept_scores=tuple(sorted(means, key=lambda each: (-each[1], each[0]))),
    )


def thumbnail(image: Image.Image, *, side: int = THUMBNAIL_SIDE) -> str:
    """A data URI of the picture, at most `side` pixels wide and high."""
    lossless = max(image.size) <= min(side, LOSSLESS_SIDE)
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=lossless, quality=80, method=4)
    return data_uri(buffer.getvalue(), "image/webp")


def _concept_names(store: Store) -> frozenset[str] | None:
    """The concepts that training retrieves; None where the dataset has none yet, and every noun counts."""
    try:
        return frozenset(stored_concepts(store).names)
    except FileNotFoundError:
        return None


def _by_concept(rows: Sequence[Row], names: frozenset[str] | None) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        for noun in set(lexicon_nouns([row.caption])):
            if names is None or noun in names:
                found[noun].append(row)
    return found


def _spread(rows: Sequence[Row]) -> list[Row]:
    """A few of the rows, evenly spread over their scores: the best, the worst and some between."""
    ranked = sorted(rows, key=lambda row: (-row.clip_score, row.sample_id))
    places = np.linspace(0, len(ranked) - 1, min(CONCEPT_SIZE, len(ranked))).round().astype(int)
    return [ranked[place] for place in places.tolist()]


def _mean_score(rows: Sequence[Row]) -> float:
    return sum(row.clip_score for row in rows) / len(rows)


def _pictures(
    store: Store, facts: DatasetFacts, rows: Iterable[Row], *, side: int = THUMBNAIL_SIDE
) -> dict[Row, Picture]:
    """Each row's picture; the picture column of a shard is read once."""
    wanted: dict[int, set[Row]] = defaultdict(set)
    for row in rows:
        wanted[row.shard].add(row)

    shards = facts.manifest.stored_shards

    def read(shard: int) -> list[tuple[Row, Picture]]:
        column = read_shard(store, shards[shard], ["image"], checksum=False)["image"]
        cells = {row: column[row.row].as_py() or {} for row in wanted[shard]}
        return [(row, _picture(row, cell.get("bytes") or b"", side)) for row, cell in cells.items()]

    return dict(pair for pairs in in_parallel(read, sorted(wanted)) for pair in pairs)


def _picture(row: Row, data: bytes, side: int) -> Picture:
    try:
        image = open_image(data, name=row.sample_id)
    except InputError as error:
        return Picture(row=row, error=str(error))
    return Picture(row=row, uri=thumbnail(image, side=side), width=image.width, height=image.height)
