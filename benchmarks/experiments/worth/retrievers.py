"""What SynC makes of the same pairs when something else than the small CLIP finds the pictures.

SynC takes what its CLIP finds for true. Here its CLIP is weak, and the paper's is not. So the same pairs are refined
once more by the nouns that a second classifier sees in each picture. It has other initial weights, and has learned from
other scenes, than the classifier that judges the result.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.experiments.scenes import scenes_of
from benchmarks.experiments.settings import DOMAINS, MAIN
from benchmarks.experiments.worth.datasets import data_folder, dataset_pictures
from benchmarks.experiments.worth.pictures import judge_folder, train_judge, worth_folder, write_whole
from benchmarks.experiments.worth.settings import CAPTIONS, KEEP
from cluster.curation.sync.choice import Parts, refine_in_memory
from cluster.curation.sync.nearest import nearest
from cluster.curation.sync.settings import SyncSettings
from cluster.curation.sync.vectors import unit
from cluster.dataset.layout import load_manifest
from cluster.dataset.rows import read_rows
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder
from pcm.embedded.making.classifier import judge
from pcm.embedded.making.world import NOUNS

_NAMES = tuple(noun.name for noun in NOUNS)
#: Of the second classifier and of its scenes; the judge has 0, 5 and 6.
SEED = 1
SCENE_SEEDS = {"train": 7, "check": 8}


def retriever_folder(out: Path) -> Path:
    return worth_folder(out) / "second_classifier"


def kept_figures(out: Path, painter: str) -> dict[str, dict[str, float]] | None:
    """What `make_figures` found, if it was there."""
    kept = _place(out, painter)
    return json.loads(kept.read_text()) if kept.exists() else None


def make_figures(out: Path, painter: str, art: Path) -> None:
    """By retriever: what `figures` says of the pairs as a painter drew them. Kept once computed."""
    if kept_figures(out, painter) is not None:
        return
    store = open_store(data_folder(out, painter))
    manifest = load_manifest(store)
    parts = [read_rows(store, shard, None, manifest.features) for shard in manifest.stored_shards]
    numbers = [int(name.partition("-")[0]) for part in parts for name in part.sample_ids]
    pairs = scenes_of(DOMAINS[MAIN], CAPTIONS)
    nouns = [sorted(pairs[number][0].nouns) for number in numbers]
    images = dataset_pictures(store, manifest)
    train_judge(retriever_folder(out), art, seed=SEED, scene_seeds=SCENE_SEEDS)
    seen = judge(retriever_folder(out), images).nouns
    shown = judge(judge_folder(out), images).nouns
    pictures = unit(np.concatenate([part.global_feature for part in parts]).astype(np.float32))
    captions = unit(ClipEncoder("embedded", device="cpu").encode_texts([pairs[number][1] for number in numbers]))
    by_nouns = unit(np.array([[float(name in names) for name in _NAMES] for names in nouns], np.float32))
    found = {
        "the small CLIP": figures(captions, pictures, captions, nouns, shown),
        "a second classifier": figures(by_nouns, unit(seen), captions, nouns, shown),
        "a second classifier, which compares the captions too": figures(by_nouns, unit(seen), by_nouns, nouns, shown),
    }
    write_whole(_place(out, painter), json.dumps(found, indent=1) + "\n")


def _place(out: Path, painter: str) -> Path:
    return worth_folder(out) / "figures" / painter / "retrievers.json"


def figures(
    captions: np.ndarray,
    pictures: np.ndarray,
    sentences: np.ndarray,
    nouns: Sequence[Sequence[str]],
    shown: np.ndarray,
) -> Mapping[str, float]:
    """Of N pairs refined with tau = 0.9, by the classifier that judges.

    `captions` (N, D), `pictures` (N, D), `sentences` (N, E): unit vectors; `nouns`: of each caption; `shown` (N,
    nouns): how surely the judge sees each in each picture. wrong_before, wrong_after: the share of pairs whose picture
    does not show all nouns; right_among_candidates: the share of the K candidates that do; moved: the share of kept
    captions that get another's picture; pictures: how many different ones are left.
    """
    settings = SyncSettings(keep=KEEP)
    choice, kept = refine_in_memory(captions, pictures, sentences, settings)
    candidates = nearest(captions, Parts(pictures), settings.candidates).indices
    surest = np.argsort(-shown, axis=1, kind="stable")
    columns = [{_NAMES.index(name) for name in names} for names in nouns]

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
        "moved": round(float(np.mean(choice.picture[kept] != kept)), 4),
        "pictures": len(np.unique(choice.picture[kept])),
    }
