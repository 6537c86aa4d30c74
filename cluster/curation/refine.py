"""jobs.refine: a dataset's captions and pictures matched anew, as a view.

A method finds rows and hands them to cluster.dataset.view; `--method` names it: SynC in cluster.curation.sync.view,
best-of-n and redraw in cluster.curation.redraw.view. Another method is a function like `sync_view`, called here, with a
name in `METHODS` and its options in `_OF_METHOD` (cluster.curation.refine_request).
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from cluster.curation.refine_request import SYNC, RefineRequest
from cluster.curation.sync.sentences import SentenceSpec, resolve_sentences
from cluster.curation.sync.settings import WORK
from cluster.curation.sync.view import FACTS, RECALL, Retrieval, lineage_of, sync_view
from cluster.dataset.derived import begun_settings, claimed_alone, open_source
from cluster.dataset.documents import Manifest, Plan, find_whole_manifest
from cluster.dataset.keys import LINEAGE_KEY
from cluster.dataset.lineage import Lineage
from cluster.dataset.opened import OpenDataset
from cluster.store.store import Store, open_store
from cluster.weights.node_copy import local_name
from pcm.clip.names import folder_revision, is_known, refuse_place, resolve_clip_name
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY
from pcm.spec import DIGEST, DatasetSpec

log = logging.getLogger(__name__)

#: What the summary of best-of-n and redraw says. moved: rows that show a new picture. drawn, failed: new pictures, and
#: those that could not be made. expected_seconds: of all pictures, before they were drawn. curve: the mean score after
#: each round.
REDRAW_FACTS = (
    "moved",
    "drawn",
    "failed",
    "mean_score_before",
    "mean_score_after",
    "expected_mean_score",
    "expected_seconds",
    "curve",
)


def refine(request: RefineRequest) -> dict[str, Any]:
    """Write the view of the refined rows: pairs, kept, moved, mean_score_before, mean_score_after, fingerprint. With
    dry_run say what would be drawn: pairs, pictures, expected_mean_score, expected_seconds.

    Rerun the same command to go on after an interruption. Raises InputError, before Ray starts, for data that cannot
    be refined, a model that is not there, and an `out` that holds anything else.
    """
    started = time.monotonic()
    source = open_source(request.data, request.out, unfinished=request.unfinished)
    _check(source, request)
    if request.out is None:
        made: dict[str, Any] = _dry_run(source, request)
    else:
        out = open_store(request.out)
        made = _by_sync(source, out, request) if request.method == SYNC else _by_redraws(source, out, request)
        made["dataset"] = request.out
    return {**made, "seconds": round(time.monotonic() - started, 2)}


def _by_sync(source: OpenDataset, out: Store, request: RefineRequest) -> dict[str, Any]:
    clip = _clip(source, request.clip, request.data, "clip")
    retrieval = _retrieval(source, request)
    _check_keep(request.keep, (retrieval.data if retrieval is not None else source).manifest.stored)
    before = begun_settings(out).get("sentences")
    sentences = _by_its_release(resolve_sentences(request.sentences, before), before, out)
    lineage = lineage_of(source, sentences, request, retrieval)
    read = [*source.landmarks, *(retrieval.data.landmarks if retrieval is not None else ())]
    with _claimed(out, lineage, request, read) as manifest:
        if manifest is not None:
            log.info("%s: is complete", out.root)
        else:
            manifest = _on_ray(source, out, lineage, sentences, request, clip, retrieval)
        for key in out.list(f"{WORK}/"):
            out.delete(key)
    assert manifest.lineage is not None
    facts = manifest.lineage.facts
    return {
        "pairs": manifest.lineage.rows_in,
        "kept": manifest.stored,
        **{name: facts[name] for name in FACTS},
        **{name: facts[name] for name in RECALL if name in facts},
        "sentences": facts["sentences"],
        "fingerprint": manifest.fingerprint,
    }


def _by_its_release(sentences: SentenceSpec, begun: object, out: Store) -> SentenceSpec:
    """The encoder; of a finished view, for which nothing is encoded any more, by the release that made it.

    Raises InputError where an unfinished view was begun with another release of the same encoder (`begun`: what its
    lineage says of its sentences).
    """
    library = begun.get("library") if isinstance(begun, dict) else None
    of_begun = dataclasses.replace(sentences, library=str(library))
    if library == sentences.library or of_begun.decides() != begun:
        return sentences  # the same, or more than the release differs, which is named when it is compared
    if find_whole_manifest(out) is not None:
        return of_begun
    raise InputError(
        f"--out {out.root}: was begun with {library}, and {sentences.library} is installed; install {library} to "
        "finish it, or give another --out"
    )


def _dry_run(source: OpenDataset, request: RefineRequest) -> dict[str, Any]:
    from cluster.curation.redraw.view import dry_run

    _drawing_spec(source, request)  # what the job itself would refuse
    return {"pairs": source.manifest.stored, **dry_run(source, request), "fingerprint": None}


def _drawing_spec(source: OpenDataset, request: RefineRequest) -> DatasetSpec:
    from cluster.curation.redraw.own_generator import own_generator  # brings Ray, which takes seconds
    from cluster.curation.redraw.view import check_attempts

    spec = source.manifest.spec
    clip = dataclasses.replace(spec.clip, model=_clip(source, request.clip, request.data, "clip"))
    generator = own_generator(source, request)
    check_attempts(generator, data=request.data)
    return dataclasses.replace(spec, generator=generator, clip=clip)


def _by_redraws(source: OpenDataset, out: Store, request: RefineRequest) -> dict[str, Any]:
    from cluster.curation.redraw.view import keep_plan, kept_plan, redraw_lineage

    spec = _drawing_spec(source, request)
    planned = keep_plan(source, out, request, source.manifest.stored)
    lineage = redraw_lineage(source, request)
    with _claimed(out, lineage, request, ()) as manifest:
        if manifest is not None:
            log.info("%s: is complete", out.root)
        else:
            planned = kept_plan(out) or planned  # of another job that was waited for, and was killed
            manifest = _redraws_on_ray(source, out, lineage, request, spec, planned)
    assert manifest.lineage is not None
    return {
        "pairs": manifest.lineage.rows_in,
        "kept": manifest.stored,
        **{name: manifest.lineage.facts[name] for name in REDRAW_FACTS},
        "fingerprint": manifest.fingerprint,
    }


def _redraws_on_ray(
    source: OpenDataset,
    out: Store,
    lineage: Lineage,
    request: RefineRequest,
    spec: DatasetSpec,
    planned: dict[str, Any],
) -> Manifest:
    from cluster.curation.redraw.view import redraw_view
    from cluster.generation.capacity import pools_of_cluster
    from cluster.generation.pipeline import run_pipeline

    pools = pools_of_cluster(device=spec.generator.device)

    def draw(store: Store, plan: Plan) -> None:
        run_pipeline(store, plan, pools)

    return redraw_view(source, out, lineage, request, spec, planned, draw)


def _retrieval(source: OpenDataset, request: RefineRequest) -> Retrieval | None:
    """None: the dataset's own. Raises InputError for anything but the dataset itself by another CLIP."""
    if request.retrieval is None:
        return None
    found = open_source(request.retrieval, request.out)
    lineage = found.manifest.lineage
    if lineage is None or lineage.method != "featurise":
        raise InputError(
            f"--retrieval {request.retrieval}: not made by jobs.featurise --data; run it on {request.data} first"
        )
    if lineage.sources[0].sha256 != source.sha256:
        raise InputError(
            f"--retrieval {request.retrieval}: made of {lineage.sources[0].path} or of another state of it, not of "
            f"{request.data} as it is; featurise that"
        )
    return Retrieval(found, _clip(found, request.retrieval_clip, request.retrieval, "retrieval-clip"))


def _clip(source: OpenDataset, given: str | None, data: str, option: str) -> str:
    """Where a dataset's CLIP is. Raises InputError where the dataset alone names a place, and for another CLIP."""
    spec = source.manifest.spec.clip
    if given is None:
        refuse_place(spec.model, source=source.store.root, option=option)
        return spec.model
    own, asked = (name.replace("-quickgelu/", "/") for name in (spec.model, given))  # the same weights
    if own != asked and is_known(spec.model) and is_known(given):
        raise InputError(f"--{option} {given}: {data} was made with {spec.model}; give that, or leave the option out")
    architecture, pretrained = resolve_clip_name(local_name(given))
    place = Path(pretrained or architecture.removeprefix("local-dir:"))
    now = folder_revision(place, spec.revision) if spec.revision.startswith(DIGEST) and place.exists() else None
    if now not in (None, spec.revision):
        raise InputError(
            f"--{option} {given}: its files are {now}, but {data} was made with {spec.revision}; give the CLIP that "
            "made its features"
        )
    return given


def _check(source: OpenDataset, request: RefineRequest) -> None:
    manifest, place = source.manifest, f"--data {request.data}"
    if manifest.spec.clip.model == "null":
        raise InputError(f"{place}: has no CLIP features (--clip null); give a dataset with features")
    if manifest.spec.generator.model == TEXT_ONLY:
        raise InputError(f"{place}: has no pictures, only texts; give a dataset of pictures")


def _check_keep(keep: float, pairs: int) -> None:
    if int(keep * pairs) < 1:
        raise InputError(f"--keep {keep:g}: keeps none of {pairs} pairs; give more data or a larger share")


def _claimed(
    out: Store, lineage: Lineage, request: RefineRequest, read: Sequence[tuple[Store, str]]
) -> AbstractContextManager[Manifest | None]:
    """`claimed_alone` on Ray. Raises InputError where a node does not see the folder that its tasks write to, or those
    that they read (stores with an object of each)."""
    from cluster.session import start_ray
    from cluster.store.reach import check_landmarks

    check = partial(check_landmarks, (out, LINEAGE_KEY), read)
    return claimed_alone(out, lineage, materialise=request.materialise, join=start_ray, check=check)


def _on_ray(
    source: OpenDataset,
    out: Store,
    lineage: Lineage,
    sentences: SentenceSpec,
    request: RefineRequest,
    clip: str,
    retrieval: Retrieval | None,
) -> Manifest:
    # Torch and Ray take seconds, and a user's mistake is told before them.
    from cluster.curation.tasks import OnRay
    from cluster.device import device_of_cluster
    from cluster.session import waiting_for

    device = device_of_cluster(request.device)
    tasks = OnRay(gpus=device == "cuda")
    with waiting_for(cpus=1, gpus=1 if device == "cuda" else 0):
        return sync_view(source, out, lineage, sentences, request, tasks, clip=clip, device=device, retrieval=retrieval)
