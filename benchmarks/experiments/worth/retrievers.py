"""What SynC makes of the same pairs when something else than the small CLIP finds the pictures.

SynC takes what its CLIP finds for true. Here its CLIP is weak, and the paper's is not. So the same pairs are refined
once more by the nouns and the place that a second classifier sees in each picture. It has other initial weights, and
has learned from other scenes, than the classifier that judges the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.experiments.scenes import scenes_of
from benchmarks.experiments.settings import DOMAINS, MAIN
from benchmarks.experiments.worth.archive import keep_figures, known_figures
from benchmarks.experiments.worth.pictures import (
    data_folder,
    dataset_pictures,
    judge_folder,
    record_of,
    train_judge,
    worth_folder,
)
from benchmarks.experiments.worth.settings import CAPTIONS, KEEP
from cluster.curation.sync.choice import Parts, refine_in_memory
from cluster.curation.sync.nearest import nearest
from cluster.curation.sync.settings import SyncSettings
from cluster.curation.sync.stages import Refined
from cluster.curation.sync.vectors import unit
from cluster.curation.sync.view import refined_rows, view_rows
from cluster.dataset.derived import lineage_source
from cluster.dataset.lineage import Lineage, RuleCount
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.dataset.rows import read_rows, read_shard
from cluster.dataset.view import write_view
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder
from pcm.embedded.making.classifier import Verdict, judge
from pcm.embedded.making.world import NOUNS, PLACES

_NAMES = tuple(noun.name for noun in NOUNS)
#: Of the second classifier and of its scenes; the judge has 0, 5 and 6.
SEED = 1
SCENE_SEEDS = {"train": 7, "check": 8}
SETTINGS = SyncSettings(keep=KEEP)


def kept_figures(out: Path, painter: str) -> dict[str, dict[str, float]] | None:
    """What `make_figures` found, if it was there."""
    return known_figures(out, _figures_name(painter))


def make_figures(out: Path, painter: str, art: Path) -> None:
    """By retriever: what `figures` says of the pairs as a painter drew them. Kept once computed."""
    if kept_figures(out, painter) is not None:
        return
    pairs = Pairs.of(out, painter)
    shown = judge(judge_folder(out), pairs.images)
    words, sight, said = pairs.by_words(), pairs.by_sight(out, art), pairs.scenes
    nouns_of_words, nouns_of_sight = (unit(vectors[:, : len(_NAMES)]) for vectors in (words, sight))
    found = {
        "the small CLIP": figures(pairs.captions, pairs.pictures, pairs.captions, said, shown),
        "a second classifier": figures(words, sight, pairs.captions, said, shown),
        "a second classifier, which compares the captions too": figures(words, sight, words, said, shown),
        "a second classifier, by nouns alone": figures(nouns_of_words, nouns_of_sight, pairs.captions, said, shown),
    }
    keep_figures(out, _figures_name(painter), found)


def make_view(out: Path, painter: str, folder: Path, art: Path) -> None:
    """The view at `folder` of the pairs that SynC makes when the second classifier finds the pictures; the small CLIP
    compares the captions and gives the scores."""
    pairs = Pairs.of(out, painter)
    write_pairs(pairs, pairs.by_sight(out, art), folder)


def write_pairs(pairs: "Pairs", by_sight: np.ndarray, folder: Path) -> None:
    """The view of the pairs whose pictures were found by unit vectors `by_sight` (N, nouns + places)."""
    choice, kept = refine_in_memory(pairs.by_words(), by_sight, pairs.captions, SETTINGS)
    cosine = (pairs.captions.astype(np.float64) * pairs.pictures[choice.picture]).sum(axis=1)
    rows = refined_rows(
        Refined(choice.picture, choice.score, cosine, kept, recall=None), pairs.table["clip_score"].to_numpy()
    )
    settings = {"method": "sync", **asdict(SETTINGS), "sentences": "clip", "retrieval": "a second classifier"}
    lineage = Lineage(
        method="refine",
        settings=settings,
        sources=(lineage_source(pairs.source),),
        rows_in=len(pairs.scenes),
        rules=(RuleCount(rule="keep", setting=KEEP, dropped=len(pairs.scenes) - len(kept)),),
        facts=rows.facts,
    )
    write_view(open_store(folder), [pairs.source], view_rows(rows, pairs.table, pairs.source), lineage)


@dataclass(frozen=True)
class Pairs:
    """N pairs as a painter drew them. captions, pictures: (N, D) unit vectors of the small CLIP; scenes: the nouns and
    the place that each caption names."""

    source: OpenDataset
    table: pa.Table  # sample_id, caption, clip_score, weight, place
    images: np.ndarray
    scenes: "Sequence[Named]"
    captions: np.ndarray
    pictures: np.ndarray

    @staticmethod
    def of(out: Path, painter: str) -> "Pairs":
        source = open_dataset(open_store(data_folder(out, painter)))
        manifest = source.manifest
        columns = ["sample_id", "caption", "clip_score"]
        table = pa.concat_tables([read_shard(source.store, shard, columns) for shard in manifest.stored_shards])
        parts = [read_rows(source.store, shard, None, manifest.features) for shard in manifest.stored_shards]
        table = table.append_column("weight", pa.array(np.ones(len(table), np.int64)))
        table = table.append_column("place", pa.array(np.arange(len(table))))
        pairs = scenes_of(DOMAINS[MAIN], CAPTIONS)
        scenes = [pairs[record_of(name)][0] for name in table["sample_id"].to_pylist()]
        return Pairs(
            source=source,
            table=table,
            images=dataset_pictures(source.store, manifest),
            scenes=[Named(sorted(scene.nouns), scene.place) for scene in scenes],
            captions=unit(ClipEncoder("embedded", device="cpu").encode_texts(table["caption"].to_pylist())),
            pictures=unit(np.concatenate([part.global_feature for part in parts]).astype(np.float32)),
        )

    def by_words(self) -> np.ndarray:
        """(N, nouns + places) unit vectors: what the captions name."""
        nouns = np.array([[float(name in scene.nouns) for name in _NAMES] for scene in self.scenes], np.float32)
        return _vectors(nouns, np.array([PLACES.index(scene.place) for scene in self.scenes]))

    def by_sight(self, out: Path, art: Path) -> np.ndarray:
        """(N, nouns + places) unit vectors: what the second classifier, which is trained where it is missing, sees."""
        folder = worth_folder(out) / "second_classifier"
        train_judge(folder, art, seed=SEED, scene_seeds=SCENE_SEEDS)
        seen = judge(folder, self.images)
        return _vectors(seen.nouns, seen.places)


@dataclass(frozen=True)
class Named:
    """What a caption names."""

    nouns: Sequence[str]
    place: str


def _vectors(nouns: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(n, nouns) and indices into PLACES (n,) -> (n, nouns + places): the place counts as much as all nouns."""
    return unit(np.concatenate([unit(nouns), np.eye(len(PLACES), dtype=np.float32)[places]], axis=1))


def _figures_name(painter: str) -> str:
    return f"{painter}/retrievers.json"


def figures(
    captions: np.ndarray,
    pictures: np.ndarray,
    sentences: np.ndarray,
    scenes: Sequence[Named],
    shown: Verdict,
) -> Mapping[str, float]:
    """Of N pairs refined with tau = 0.9, by the classifier that judges.

    `captions` (N, D), `pictures` (N, D), `sentences` (N, E): unit vectors; `scenes`: what each caption names; `shown`:
    what the judge sees in the pictures. wrong_before, wrong_after: the share of pairs whose picture does not show all
    nouns; wrong_places_before, wrong_places_after: the place; right_among_candidates: the share of the K candidates
    that show all nouns; moved: the share of kept captions that get another's picture; pictures: how many different ones
    are left.
    """
    choice, kept = refine_in_memory(captions, pictures, sentences, SETTINGS)
    candidates = nearest(captions, Parts(pictures), SETTINGS.candidates).indices
    surest = np.argsort(-shown.nouns, axis=1, kind="stable")
    columns = [{_NAMES.index(name) for name in scene.nouns} for scene in scenes]
    place = np.array([PLACES.index(scene.place) for scene in scenes])

    def is_right(caption: int, picture: int) -> bool:
        wanted = columns[caption]
        return wanted <= set(surest[picture, : len(wanted)].tolist())

    rows = range(len(columns))
    return {
        "wrong_before": round(float(np.mean([not is_right(row, row) for row in rows])), 4),
        "right_among_candidates": round(
            float(np.mean([[is_right(row, other) for other in candidates[row].tolist()] for row in rows])), 4
        ),
        "wrong_after": round(float(np.mean([not is_right(row, choice.picture[row]) for row in kept.tolist()])), 4),
        "wrong_places_before": round(float((shown.places != place).mean()), 4),
        "wrong_places_after": round(float((shown.places[choice.picture[kept]] != place[kept]).mean()), 4),
        "moved": round(float(np.mean(choice.picture[kept] != kept)), 4),
        "pictures": len(np.unique(choice.picture[kept])),
    }
