"""The training data of every setting, made by the product's own jobs under OUT/worth/data: drawn, curated, refined.

Everything here is resumable as these jobs are; what is complete is not touched again.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmarks.experiments.dissect import auc
from benchmarks.experiments.scenes import render, scenes_of
from benchmarks.experiments.settings import DOMAINS, MAIN
from benchmarks.experiments.worth.archive import keep_figures, known_figures
from benchmarks.experiments.worth.pictures import (
    data_folder,
    dataset_pictures,
    judge_folder,
    recognised,
    record_of,
    worth_folder,
)
from benchmarks.experiments.worth.retrievers import make_view
from benchmarks.experiments.worth.settings import (
    CAPTIONS,
    DRAWN,
    PAINTERS,
    RENDERED,
    SHARD_SIZE,
    STEPS_OF_DATA,
    Setting,
)
from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.curation.refine import refine
from cluster.curation.refine_request import RefineRequest
from cluster.dataset.documents import load_manifest
from cluster.dataset.rows import read_shard
from cluster.generation import GenerateRequest, generate
from cluster.ingest.photos import featurise_photos
from cluster.ingest.request import FeaturiseRequest
from cluster.store.store import open_store
from pcm.embedded.making.classifier import judge
from pcm.embedded.making.world import PLACES

log = logging.getLogger(__name__)


def make_data(settings: Iterable[Setting], out: Path, art: Path) -> None:
    """What these settings are trained on, each after what it is made of."""
    for painter, data in dict.fromkeys((setting.painter, setting.data) for setting in settings):
        _make(painter, data, out, art)
    ray.shutdown()  # trainings run in this process, and Ray's would take a part of the machine


def is_made(out: Path, painter: str, data: str) -> bool:
    return open_store(data_folder(out, painter, data)).exists("dataset.json")


def _make(painter: str, data: str, out: Path, art: Path) -> None:
    folder = data_folder(out, painter, data)
    if is_made(out, painter, data):
        return
    log.info("making %s / %s", painter, data)
    if painter == RENDERED:
        pictures, table = render(scenes_of(DOMAINS[MAIN], CAPTIONS), worth_folder(out) / "rendered_pictures", art)
        request = FeaturiseRequest(
            images=str(pictures), captions=str(table), out=str(folder), shard_size=SHARD_SIZE, device="cpu"
        )
        featurise_photos(request)
    elif data == DRAWN:
        how = PAINTERS[painter]
        generate(
            GenerateRequest(
                corpus=DOMAINS[MAIN].corpus, out=str(folder), limit=CAPTIONS, shard_size=SHARD_SIZE, steps=how.steps,
                guidance_scale=how.guidance_scale, width=how.side, height=how.side, generators=1, device="cpu",
            )
        )  # fmt: skip
    else:
        step = STEPS_OF_DATA[data]
        _make(painter, step.of, out, art)
        source = str(data_folder(out, painter, step.of))
        if step.job == "curate":
            curate(CurateRequest(data=(source,), out=str(folder), **step.options))
        elif step.job == "classifier":
            make_view(out, painter, folder, art)
        else:
            refine(RefineRequest(data=source, out=str(folder), **step.options))


def data_figures(out: Path, painter: str, data: str) -> dict[str, Any]:
    """rows, mean_clip_score, and by the independent classifier: wrong_pictures, the share of pairs whose picture does
    not show all things of its caption; missing_things, the share of things that are not shown; wrong_places, the share
    of pictures that do not show the place; and how well the score tells right pairs from wrong ones (score_auc).
    Computed once, kept beside the data.
    """
    name = figures_name(painter, data)
    if (kept := known_figures(out, name)) is not None:
        return kept
    store = open_store(data_folder(out, painter, data))
    manifest = load_manifest(store)
    pairs = scenes_of(DOMAINS[MAIN], CAPTIONS)
    nouns, places, scores = [], [], []
    for shard in manifest.stored_shards:
        table = read_shard(store, shard, ["sample_id", "clip_score"])
        scenes = [pairs[record_of(name)][0] for name in table["sample_id"].to_pylist()]
        nouns += [sorted(scene.nouns) for scene in scenes]
        places += [PLACES.index(scene.place) for scene in scenes]
        scores += table["clip_score"].to_pylist()
    pictures = dataset_pictures(store, manifest)
    seen = recognised(out, pictures, nouns)
    right = np.array([len(found) == len(names) for found, names in zip(seen, nouns, strict=True)])
    score = np.array(scores)
    figures = {
        "rows": len(nouns),
        "mean_clip_score": round(float(score.mean()), 4),
        "wrong_pictures": round(float(1 - right.mean()), 4),
        "missing_things": round(1 - sum(map(len, seen)) / sum(map(len, nouns)), 4),
        "wrong_places": round(float((judge(judge_folder(out), pictures).places != np.array(places)).mean()), 4),
        "score_auc": auc(score[right], score[~right]),
    }
    keep_figures(out, name, figures)
    return figures


def figures_name(painter: str, data: str) -> str:
    return f"{painter}/{data_folder(Path(), painter, data).name}.json"
