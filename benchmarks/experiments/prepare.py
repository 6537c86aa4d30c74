"""The datasets of the experiments, under OUT/data/DOMAIN: drawn, text (the same captions alone), rendered (perfect)."""

import logging
from pathlib import Path
from typing import Any

from benchmarks.experiments.runs import data_path
from benchmarks.experiments.scenes import render, scenes_of
from benchmarks.experiments.settings import DOMAINS, MAIN, SHARD_SIZE, Domain
from cluster.dataset.documents import load_manifest
from cluster.generation import GenerateRequest, generate
from cluster.ingest.photos import featurise_photos
from cluster.ingest.request import FeaturiseRequest
from cluster.ingest.text_only import text_only_dataset
from cluster.store.store import open_store
from pcm.clip.encoder import ClipEncoder

log = logging.getLogger(__name__)


def prepare(out: Path, *, captions: int, art: Path | None, domains: tuple[str, ...]) -> dict[str, Any]:
    """Make what is missing; rows and mean clip score by dataset. Drawing resumes shard by shard."""
    made = {}
    for name in domains:
        domain = DOMAINS[name]
        stages = {"drawn": _draw(domain, out, captions)}
        if name == MAIN:
            stages |= {"text": _text(domain, out), "rendered": _render(domain, out, captions, art)}
        for data, path in stages.items():
            manifest = load_manifest(open_store(path))
            made[f"{name}/{data}"] = {"rows": manifest.stored, "mean_clip_score": manifest.clip_score_mean}
    return made


def _draw(domain: Domain, out: Path, captions: int) -> Path:
    path = data_path(out, domain.name, "drawn")
    generate(GenerateRequest(corpus=domain.corpus, out=str(path), limit=captions, shard_size=SHARD_SIZE))
    return path


def _text(domain: Domain, out: Path) -> Path:
    path = data_path(out, domain.name, "text")
    source = open_store(data_path(out, domain.name, "drawn"))
    spec = load_manifest(source).spec.clip
    text_only_dataset(source, open_store(path), ClipEncoder(spec.model, device="cpu", batch_size=spec.batch_size))
    return path


def _render(domain: Domain, out: Path, captions: int, art: Path | None) -> Path:
    from pcm.embedded.making.art import DEFAULT_ART_FOLDER, fetch_art

    path = data_path(out, domain.name, "rendered")
    pairs = scenes_of(domain, captions)
    pictures, table = render(pairs, out / "rendered" / domain.name, fetch_art(art or DEFAULT_ART_FOLDER))
    featurise_photos(FeaturiseRequest(images=str(pictures), captions=str(table), out=str(path), shard_size=SHARD_SIZE))
    return path
