"""A dataset's pictures with the scores and features of another CLIP: a derived dataset. Rerun to resume.

Sample ids, captions, seeds and picture bytes stay, so the fingerprint is that of the rows that it was made of. The
pictures are copied: features cannot be read without the shard that holds them, and they are the larger part of it (a
picture of 512 pixels has some 60 kB as JPEG, its ViT-L/14 features 133 kB). Nothing is drawn.

On the store, in this order: lineage.json, which says what is made; featurising/spec.json, the CLIP as it runs; for each
shard of the source first featurising/part-000000.parquet, what the manifest needs of its rows, then the shard;
vocabulary, concepts and CLIP head; dataset.json. Then featurising/ is deleted.
"""

import hashlib
import io
import json
import logging
import math
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.derived import begun_settings, claimed_alone, lineage_source, open_source
from cluster.dataset.documents import DATASET, Manifest, StoredShard, store_manifest
from cluster.dataset.environment import made_by, tell_encoder
from cluster.dataset.keys import CLIP_HEAD_KEY, CONCEPTS_KEY, LINEAGE_KEY, VOCABULARY_KEY, shard_key
from cluster.dataset.lineage import Lineage, RuleCount
from cluster.dataset.opened import OpenDataset
from cluster.dataset.view import view_fingerprint
from cluster.dataset.vocabularies import (
    clip_head_bytes,
    features_of_head,
    least_count,
    run_with_clip,
)
from cluster.dataset.vocabulary_files import stored_concepts
from cluster.device import device_of_cluster, resolve_dtype
from cluster.generation.capacity import pools_of_cluster
from cluster.generation.fit import warn_of_slow_bfloat16_on_cluster
from cluster.generation.limits import FaultPolicy
from cluster.generation.pinning import clip_spec, joint_dimensions, pin_clip
from cluster.generation.pools import Pools
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.monitor import start_monitor
from cluster.generation.turns import Stages, made_in_turns
from cluster.ingest.agreement import agreement, most_different
from cluster.ingest.featurise_again import WORK, FeaturiseAgain, facts_key, is_scored, read_facts, refuse_finished
from cluster.ingest.request import FeaturiseRequest
from cluster.numbers import duration
from cluster.ray_state import actors_are_placed
from cluster.session import start_ray, waiting_for
from cluster.sources.concept_file import fitting_concepts
from cluster.store.reach import check_landmarks
from cluster.store.store import Store, open_store
from cluster.weights.load_clip import load_clip
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY
from pcm.line_timer import LineTimer
from pcm.reasons import CLIP_ERROR
from pcm.records import SCHEMA_VERSION
from pcm.spec import ClipSpec
from pcm.text.concepts import ConceptVocabulary, embed
from pcm.text.vocabulary import Vocabulary, count_words

if TYPE_CHECKING:
    from pcm.clip.encoder import ClipEncoder

log = logging.getLogger(__name__)

_SPEC_KEY = f"{WORK}/spec.json"

#: Pictures on which CLIP raises are left out and counted, however many: here they stop no run.
_FAULTS = FaultPolicy(max_error_share=1.0)


def featurise_dataset(request: FeaturiseRequest) -> dict[str, Any]:
    """Make the dataset, or go on making it: rows, quarantined (rows on which CLIP raised, which are left out),
    agreement of the scores, fingerprint.

    Raises InputError for data without pictures, a CLIP that is not there, another CLIP, device or source than those
    with which `out` was begun, and a source that cannot be read.
    """
    assert request.data is not None
    started = time.monotonic()
    source = open_source(request.data, request.out, unfinished=request.unfinished)
    if source.manifest.spec.generator.model == TEXT_ONLY:
        raise InputError(f"--data {request.data}: has no pictures, only texts; give a dataset of pictures")
    out = open_store(request.out)
    begun = begun_clip(out)
    concepts = None
    if request.concepts is not None:
        revision, _ = pin_clip(request.clip, None, begun)
        concepts = fitting_concepts(request.concepts, embed_dim=joint_dimensions(request.clip, revision))
    lineage = lineage_of(source, as_begun(request, out), concepts, begun=begun)
    check = partial(check_landmarks, (out, LINEAGE_KEY), source.landmarks)
    with claimed_alone(out, lineage, join=start_ray, check=check) as manifest:
        if manifest is not None:
            made = manifest.spec.clip
            if request.device not in ("auto", made.device) or request.dtype not in ("auto", made.dtype):
                raise _made_elsewhere(out, made, "is asked for otherwise")
            log.info("%s: is complete", out.root)
            skipped, working = manifest.stored, 0.0
        else:
            manifest, skipped, working = _make(source, out, lineage, request, concepts)
        for key in out.list(f"{WORK}/"):
            out.delete(key)
    assert manifest.lineage is not None
    facts = manifest.lineage.facts
    made_now = manifest.stored - skipped
    return {
        "rows": manifest.stored,
        "quarantined": manifest.lineage.dropped[CLIP_ERROR],
        "skipped": skipped,
        "clip_score_mean": manifest.clip_score_mean,
        "agreement": facts["agreement"] and {key: facts["agreement"][key] for key in ("rows", "pearson", "spearman")},
        "fingerprint": manifest.fingerprint,
        "rows_per_second": round(made_now / working, 1) if made_now else 0.0,
        "seconds": round(time.monotonic() - started, 2),
        "dataset": request.out,
    }


def begun_clip(out: Store) -> ClipSpec | None:
    """The CLIP of the repo with which the dataset at `out` was begun; None where there is none."""
    named = begun_settings(out).get("clip")
    if not isinstance(named, dict) or not {"model", "revision"} <= named.keys():
        return None
    return ClipSpec(model=named["model"], revision=named["revision"], weights=named.get("weights"))


def as_begun(request: FeaturiseRequest, out: Store) -> FeaturiseRequest:
    """The request with device and precision as they were asked for when the dataset at `out` was begun. Whether these
    are the same now shows where they are known: `keep_spec`."""
    begun = begun_settings(out)
    return replace(request, **{name: begun[name] for name in ("device", "dtype") if name in begun})


def lineage_of(
    source: OpenDataset,
    request: FeaturiseRequest,
    concepts: ConceptVocabulary | None,
    *,
    begun: ClipSpec | None = None,
) -> Lineage:
    """What decides the dataset, before any of it is made. Device and precision as they were asked for: what they are on
    this cluster stands in featurising/spec.json, and in the manifest's spec. `begun`: as in pin_clip."""
    clip = clip_spec(request.clip, device="cpu", dtype="float32", begun=begun)
    named = {name: value for name, value in clip.identity().items() if name != "dtype"}
    if str(clip.revision).startswith("sha256:") and request.clip != "embedded":
        del named["model"]  # where a folder lies does not matter
    given = hashlib.sha256(concepts.to_bytes()).hexdigest() if concepts else None
    return Lineage(
        method="featurise",
        settings={"clip": named, "device": request.device, "dtype": request.dtype, "concepts": given},
        sources=(lineage_source(source),),
        rows_in=source.manifest.stored,
    )


def _make(
    source: OpenDataset, out: Store, lineage: Lineage, request: FeaturiseRequest, concepts: ConceptVocabulary | None
) -> tuple[Manifest, int, float]:
    """The manifest, how many rows were there already, and the seconds in which the others were made."""
    begun = _begun_spec(out)
    device = device_of_cluster(request.device, before=begun.device if begun else None)
    dtype = resolve_dtype(request.dtype, device=device)
    spec = clip_spec(request.clip, device=device, dtype=dtype, begun=begun_clip(out))
    keep_spec(out, spec)
    missing = missing_shards(source, out)
    working = 0.0
    if missing:
        pools = pools_of_cluster(device=device)
        if begun is None:
            warn_of_slow_bfloat16_on_cluster(device, dtype)
        working = _featurise_on_ray(source, out, spec, missing, pools)
    run_with_clip(store_vocabularies_of, source.store, out, spec, concepts, clip=spec)
    manifest = finish(source, out, spec, lineage)
    made_now = set(missing)
    skipped = sum(shard["rows"] for number, shard in enumerate(manifest.shards) if number not in made_now)
    return manifest, skipped, working


def keep_spec(out: Store, spec: ClipSpec) -> None:
    """Say how CLIP runs, the first time. Raises InputError where the dataset was begun with another device or
    precision, whose last bits would be others."""
    begun = _begun_spec(out)
    if begun is None:
        out.write_bytes(_SPEC_KEY, document_bytes(spec.to_dict()))
        return
    mine = (spec.device, spec.dtype, spec.batch_size, spec.cpu_threads)
    if (begun.device, begun.dtype, begun.batch_size, begun.cpu_threads) != mine:
        raise _made_elsewhere(out, begun, f"this is {spec.device} in {spec.dtype}")


def _begun_spec(out: Store) -> ClipSpec | None:
    """The CLIP as it runs for the dataset that was begun at `out`; None before `keep_spec`."""
    try:
        return ClipSpec.from_dict(json.loads(out.read_bytes(_SPEC_KEY)))
    except FileNotFoundError:
        return None


def _made_elsewhere(out: Store, begun: ClipSpec, now: str) -> InputError:
    return InputError(
        f"--out {out.root}: was begun on {begun.device} in {begun.dtype}, and {now}; give --device {begun.device} "
        f"--dtype {begun.dtype}, or another --out"
    )


def missing_shards(source: OpenDataset, out: Store) -> list[int]:
    """Shards that are not there yet, or whose facts are not: those of a dataset that was finished are deleted, and its
    dataset.json may have been damaged since. Raises InputError where a job of another cluster has just finished it."""
    facts, there = set(out.list(f"{WORK}/")), set(out.list("shards/"))
    refuse_finished(out)
    return [
        number
        for number in range(len(source.shards))
        if shard_key(number) not in there or facts_key(number) not in facts
    ]


def _featurise_on_ray(
    source: OpenDataset,
    out: Store,
    spec: ClipSpec,
    missing: list[int],
    pools: Pools,
    *,
    faults: FaultPolicy = _FAULTS,
    featurise: type[FeaturiseShard] = FeaturiseShard,
) -> float:
    """Make these shards; the seconds since work on the first of them began, with CLIP loaded."""
    lineage = source.manifest.lineage
    if lineage is not None:  # that there is one says how to read its shards; its examples no worker needs
        lineage = replace(lineage, sources=(), rules=(), facts={})
    source = replace(source, manifest=replace(source.manifest, lineage=lineage))
    monitor = start_monitor(faults)
    arguments = (source, out, spec, (monitor, faults), featurise)

    def stages(shards: list[int]) -> Stages:
        return [(FeaturiseAgain, {"fn_constructor_args": arguments, **pools.draw_options(len(shards))})]

    waiting = waiting_for(cpus=pools.generator_cpus, gpus=pools.generator_gpus, placed=actors_are_placed)
    done, rows, total, timer = 0, 0, sum(source.shards[number].rows for number in missing), LineTimer()
    working = 0.0
    with waiting, closing(made_in_turns(missing, stages, pools, monitor, scorers=pools.generators)) as made:
        for stored in made:
            done, rows = done + 1, rows + stored["rows"]
            timer.began(stored["seconds"])
            working = timer.elapsed
            if timer.due():
                left = (total - rows) * timer.elapsed / max(rows, 1)
                log.info(
                    "%d of %d shards, %.0f pictures/s, %s left",
                    done, len(missing), rows / timer.elapsed, duration(left),
                )  # fmt: skip
    return working


def finish(source: OpenDataset, out: Store, spec: ClipSpec, lineage: Lineage) -> Manifest:
    """Write dataset.json of the shards, all of which are there. Memory: the rows without pictures, 300 bytes each."""
    parts = [read_facts(out, shard) for shard in range(len(source.shards))]
    rows = pa.concat_tables([part.rows for part in parts]).combine_chunks()
    if not len(rows):
        raise InputError(f"{out.root}: CLIP failed on every picture; see the log, and give another --clip")
    refused = [sample for part in parts for sample in part.refused]
    entries = tuple(part.entry for part in parts)
    scores = rows["clip_score"].to_pylist()
    manifest = Manifest(
        spec=replace(source.manifest.spec, clip=spec),
        corpus=source.manifest.corpus,
        corpus_fingerprint=source.manifest.corpus_fingerprint,
        features=features_of_head(out),
        expected=len(rows),
        stored=len(rows),
        quarantined=0,
        quarantined_by_reason={},
        clip_score_mean=math.fsum(scores) / len(rows),  # exact, so that the order of rows does not matter
        shard_bytes=sum(entry["bytes"] for entry in entries),
        shards=entries,
        schema_version=SCHEMA_VERSION,
        kind=DATASET,
        **made_by(out),
        fingerprint=view_fingerprint(rows),
        lineage=replace(
            lineage,
            rules=(RuleCount(rule=CLIP_ERROR, setting=spec.model, dropped=len(refused)),),
            facts={
                "clip": spec.model,
                "clip_before": source.manifest.spec.clip.model,
                "agreement": _agreement(rows, entries) if is_scored(source) else None,
            },
        ),
    )
    store_manifest(out, manifest)
    return manifest


def _agreement(rows: pa.Table, entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of the two CLIPs' scores, and the pairs of which they think most differently, with where their pictures are."""
    shards = [StoredShard.of(entry) for entry in entries]
    starts = np.cumsum([0, *(shard.rows for shard in shards)])
    before, after = rows["score_before"].to_numpy(), rows["clip_score"].to_numpy()
    sample_ids = np.array(rows["sample_id"].to_pylist())
    examples = []
    for row in most_different(before, after, sample_ids).tolist():
        shard = int(np.searchsorted(starts, row, side="right")) - 1
        stored = {name: getattr(shards[shard], name) for name in ("key", "rows", "bytes", "sha256")}
        examples.append(
            {
                "sample_id": str(sample_ids[row]),
                "caption": rows["caption"][row].as_py(),
                "score_before": float(before[row]),
                "clip_score": float(after[row]),
                "why": f"scored {before[row]:.3f} before, {after[row]:.3f} by this CLIP",
                "picture": {"shard": stored, "row": row - int(starts[shard])},  # no path: of this very dataset
            }
        )
    return {**agreement(before, after), "examples": examples}


def store_vocabularies_of(source: Store, out: Store, spec: ClipSpec, concepts: ConceptVocabulary | None) -> None:
    """The source's words and the names of its concepts, these embedded by the new CLIP, and that CLIP's head. Where the
    source has none of them (its CLIP was null), both are of the captions. Runs where CLIP may be loaded."""
    encoder = load_clip(spec)
    tell_encoder(out, spec)
    if source.exists(VOCABULARY_KEY):
        words = source.read_bytes(VOCABULARY_KEY)
    else:
        captions = _captions(out)
        counts = count_words(captions)
        words = Vocabulary.of_counts(counts, min_count=least_count(counts, len(captions))).to_text().encode()
    out.write_bytes(VOCABULARY_KEY, words)
    out.write_bytes(CONCEPTS_KEY, (concepts or _concepts(source, out, encoder)).to_bytes())
    out.write_bytes(CLIP_HEAD_KEY, clip_head_bytes(encoder, spec.model))


def _concepts(source: Store, out: Store, encoder: "ClipEncoder") -> ConceptVocabulary:
    if source.exists(CONCEPTS_KEY):
        found = stored_concepts(source)
        return ConceptVocabulary(found.names, embed(found.names, encoder.encode_texts), found.source)
    captions = _captions(out)
    least = least_count(count_words(captions), len(captions))
    return ConceptVocabulary.build(captions, encoder, at_least=0, min_count=least)


def _captions(out: Store) -> list[str]:
    """Of all shards that are there: of a whole run all."""
    shards = sorted(key for key in out.list(f"{WORK}/") if key.endswith(".parquet"))
    return [
        caption
        for key in shards
        for caption in pq.read_table(io.BytesIO(out.read_bytes(key)), columns=["caption"])["caption"].to_pylist()
    ]
