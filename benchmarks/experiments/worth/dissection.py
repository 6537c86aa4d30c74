"""Why a setting gains or loses: what the mix-up and the loss do to right and to wrong pictures, before any training,
and on which test pictures captions get better or worse.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.dissect import found_pairs, patch_figures
from benchmarks.experiments.scenes import scenes_of
from benchmarks.experiments.settings import DOMAINS, MAIN
from benchmarks.experiments.worth.archive import keep_figures, known_figures
from benchmarks.experiments.worth.pictures import (
    data_folder,
    dataset_pictures,
    recognised,
    record_of,
)
from benchmarks.experiments.worth.runs import planned
from benchmarks.experiments.worth.settings import CAPTIONS, DRAWN, FIRST_SEED, PCM_NET, Setting
from cluster.dataset.documents import load_manifest
from cluster.dataset.rows import Rows, read_rows
from cluster.store.store import open_store
from pcm.text.concepts import ConceptVocabulary

#: Rows that are looked at: each takes a pass of the mix-up.
ROWS = 1000


def training_figures(out: Path, painter: str) -> dict[str, Any]:
    """Of the pictures as a painter drew them, by the independent classifier's verdict, with PCM-Net's settings.

    weight: c_I of eq. 11, mean of right pairs, of wrong pairs, and the standard deviation of all; patches: as
    benchmarks.experiments.dissect tells them, of things that are shown and of things that are not. Kept once computed.
    """
    name = f"{painter}/dissection.json"
    if (kept := known_figures(out, name)) is not None:
        return kept
    run = planned(Setting(painter, DRAWN, PCM_NET), FIRST_SEED, out, steps=1, lr_factor=1.0).spec
    store = open_store(data_folder(out, painter))
    manifest = load_manifest(store)
    rows = Rows.concatenate([read_rows(store, shard, None, manifest.features) for shard in manifest.stored_shards])
    rows = rows.take(np.arange(min(ROWS, len(rows))))
    pairs = scenes_of(DOMAINS[MAIN], CAPTIONS)
    scenes = [pairs[record_of(name)][0] for name in rows.sample_ids]
    images = dataset_pictures(store, manifest)[: len(rows)]
    seen = recognised(out, images, [sorted(scene.nouns) for scene in scenes])
    fates = [[thing.noun in found for thing in scene.things] for scene, found in zip(scenes, seen, strict=True)]
    right = np.array([all(each) for each in fates])
    weight = np.clip(run.config.clip_weight * rows.clip_score, 0, 1)
    names = ConceptVocabulary.from_bytes(run.vocabularies.concepts).names
    found = {
        "weight_right": round(float(weight[right].mean()), 3),
        "weight_wrong": round(float(weight[~right].mean()), 3),
        "weight_std": round(float(weight.std()), 3),
        "patches": patch_figures(found_pairs(run, rows), scenes, fates, names),
    }
    keep_figures(out, name, found)
    return found


def by_kinds(difference: np.ndarray, nouns: Sequence[Sequence[str]]) -> dict[int, np.ndarray]:
    """Of a difference (S, n), the columns of the test pictures with one, two, three kinds of things."""
    kinds = np.array([len(each) for each in nouns])
    return {count: difference[:, kinds == count] for count in sorted(set(kinds.tolist()))}
