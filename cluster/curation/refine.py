"""jobs.refine: a dataset's captions and pictures matched anew, as a view.

A method finds rows and hands them to cluster.dataset.view; `--method` names it: `sync_view` here, best-of-n and redraw
in cluster.curation.redraw_view. Another method is a function like these, and a name in `METHODS`.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.curation.curate import EXAMPLES, shown
from cluster.curation.refine_request import SYNC, RefineRequest
from cluster.curation.sync.sentences import SentenceSpec, resolve_sentences
from cluster.curation.sync.settings import UNIT, WORK
from cluster.dataset.layout import LINEAGE_KEY, Manifest, Plan, find_whole_manifest
from cluster.dataset.lineage import Lineage, RuleCount
from cluster.dataset.opened import OpenDataset
from cluster.dataset.view import ViewRows, begun_settings, claimed_alone, lineage_source, open_source, write_view
from cluster.generation.made_by import made_by
from cluster.store.store import Store, open_store
from cluster.weights.node_copy import local_name
from pcm.clip.names import folder_revision, is_known, refuse_place, resolve_clip_name
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY
from pcm.reasons import CLIP_ERROR
from pcm.spec import DIGEST, DatasetSpec

if TYPE_CHECKING:
    from cluster.curation.sync.stages import Refined
    from cluster.curation.tasks import Tasks

log = logging.getLogger(__name__)

#: What the summary says of the rows. moved: kept captions whose picture was another's. pictures: how many they show.
#: mean_score_before, mean_score_after: clip_score of all pairs as they were, and of the kept ones. mean_sync_score: of
#: the kept ones.
FACTS = ("moved", "pictures", "mean_score_before", "mean_score_after", "mean_sync_score")
#: With --probes also: the share of the exact candidates and describers that was found (sync.stages.Recall).
RECALL = ("recall_candidates", "recall_describers")
#: The score of a row that the dataset of --retrieval has not: its CLIP raised on the picture.
_NOT_SEEN = np.iinfo(np.int64).min
#: The same of best-of-n and redraw. moved: rows that show a new picture. drawn, failed: new pictures, and those that
#: could not be made. expected_seconds: of all pictures, before they were drawn. curve: the mean score after each round.
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


@dataclass(frozen=True)
class RefinedRows:
    """Rows that a method made of a dataset's, and what it has to say of them.

    caption_row, picture_row: (n,) int64, which of the dataset's rows the caption and the picture are of. clip_score:
    (n,) float32, the raw cosine of the two. facts: counts and means for the summary and the lineage.
    """

    caption_row: np.ndarray
    picture_row: np.ndarray
    clip_score: np.ndarray
    facts: dict[str, Any]


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
    read = [*source.places, *(retrieval.data.places if retrieval is not None else ())]
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
    from cluster.curation.redraw_view import dry_run

    _drawing_spec(source, request)  # what the job itself would refuse
    return {"pairs": source.manifest.stored, **dry_run(source, request), "fingerprint": None}


def _drawing_spec(source: OpenDataset, request: RefineRequest) -> DatasetSpec:
    from cluster.curation.redraw.own_generator import own_generator  # brings Ray, which takes seconds
    from cluster.curation.redraw_view import check_attempts

    spec = source.manifest.spec
    clip = dataclasses.replace(spec.clip, model=_clip(source, request.clip, request.data, "clip"))
    generator = own_generator(source, request)
    check_attempts(generator, data=request.data)
    return dataclasses.replace(spec, generator=generator, clip=clip)


def _by_redraws(source: OpenDataset, out: Store, request: RefineRequest) -> dict[str, Any]:
    from cluster.curation.redraw_view import keep_plan, kept_plan, redraw_lineage

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
    from cluster.curation.redraw_view import redraw_view
    from cluster.generation.pipeline import run_pipeline
    from cluster.generation.places import pools_of_cluster

    pools = pools_of_cluster(device=spec.generator.device)

    def draw(store: Store, plan: Plan) -> None:
        run_pipeline(store, plan, pools)

    return redraw_view(source, out, lineage, request, spec, planned, draw)


@dataclass(frozen=True)
class Retrieval:
    """The dataset whose features find the pictures, and where its CLIP is."""

    data: OpenDataset
    clip: str


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


def lineage_of(
    source: OpenDataset, sentences: SentenceSpec, request: RefineRequest, retrieval: Retrieval | None = None
) -> Lineage:
    """What decides the view, before anything of it is known."""
    settings = {"method": request.method, **request.settings.decides(), "sentences": sentences.decides()}
    sources = [lineage_source(source)]
    if retrieval is not None:
        settings["retrieval"] = retrieval.data.manifest.spec.clip.model
        sources.append(lineage_source(retrieval.data))
    return Lineage(method="refine", settings=settings, sources=tuple(sources), rows_in=source.manifest.stored)


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
    from cluster.generation.reach import check_places
    from cluster.session import start_ray

    check = partial(check_places, (out, LINEAGE_KEY), read)
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
    from cluster.generation.pinning import device_of_cluster
    from cluster.session import waiting_for

    device = device_of_cluster(request.device)
    tasks = OnRay(gpus=device == "cuda")
    with waiting_for(cpus=1, gpus=1 if device == "cuda" else 0):
        return sync_view(source, out, lineage, sentences, request, tasks, clip=clip, device=device, retrieval=retrieval)


def sync_view(
    source: OpenDataset,
    out: Store,
    lineage: Lineage,
    sentences: SentenceSpec,
    request: RefineRequest,
    tasks: "Tasks",
    *,
    clip: str,
    device: str,
    retrieval: Retrieval | None = None,
) -> Manifest:
    """SynC's rows of a dataset as a view at `out`, which `claim` has begun; `tasks` do the work. `clip`: where the
    dataset's CLIP is. Raises InputError where `retrieval` holds other rows."""
    from cluster.curation.sync.stages import refine_pairs, rows_by_id, work_folder

    by = retrieval or Retrieval(source, clip)
    work = work_folder(by.data.sha256, by.data.manifest, sentences, device)
    found = refine_pairs(
        by.data.store, by.data.manifest, out, work, request.settings, sentences, tasks,
        clip=by.clip, block_size=request.block_size, device=device,
    )  # fmt: skip
    table = rows_by_id(by.data.manifest, out, work)
    which = f" ({by.data.manifest.spec.clip.model})" if sentences.is_clip else ""
    facts: dict[str, Any] = {"sentences": f"{sentences.model}{which}", "device": device}
    if found.recall is not None:
        facts |= zip(RECALL, (found.recall.candidates, found.recall.describers), strict=True)
    if retrieval is not None:
        found, table = _scored_by_the_datasets_clip(found, table, source, out, request, tasks, clip=clip, device=device)
        facts["retrieval"] = retrieval.data.manifest.spec.clip.model
    rows = refined_rows(found, table["clip_score"].to_numpy())
    rules = _rules(found, table, source, keep=request.keep, clip=by.data.manifest.spec.clip.model)
    lineage = dataclasses.replace(lineage, rules=rules, facts={**rows.facts, **facts})
    return write_view(
        out, [source], view_rows(rows, table, source), lineage, materialise=request.materialise, made_by=made_by(out)
    )


def _scored_by_the_datasets_clip(
    found: "Refined",
    table: pa.Table,
    source: OpenDataset,
    out: Store,
    request: RefineRequest,
    tasks: "Tasks",
    *,
    clip: str,
    device: str,
) -> tuple["Refined", pa.Table]:
    """(what was found, the dataset's rows), by the numbers of the dataset's own rows by sample id, with cosines of its
    own CLIP.

    `found` and `table` number the rows that another CLIP saw. A row that it did not see keeps its own picture and
    clip_score, has the score _NOT_SEEN, and goes.
    """
    from cluster.curation.sync.stages import Refined, cosines_of, rows_by_id, store_vectors, work_folder

    of_clip = SentenceSpec(model="clip")
    work = work_folder(source.sha256, source.manifest, of_clip, device)
    own = store_vectors(source.store, source.manifest, out, work, of_clip, tasks, clip=clip, most=1, device=device)
    rows = rows_by_id(source.manifest, out, work)
    place = {sample_id: row for row, sample_id in enumerate(rows["sample_id"].to_pylist())}
    row_of = np.array([place.get(sample_id, -1) for sample_id in table["sample_id"].to_pylist()], np.int64)
    if (row_of < 0).any() or len(set(row_of.tolist())) < len(row_of):
        raise InputError(
            f"--retrieval {request.retrieval}: has other sample ids than {request.data}; featurise it again"
        )
    picture = np.arange(len(rows))
    picture[row_of] = row_of[found.picture]
    of_caption = picture[own.numbers.first_row]  # (U,) rows of one caption have one picture, where they were seen
    of_caption[own.numbers.of_row[row_of]] = picture[row_of]
    cosine = cosines_of(out, work, own, of_caption, tasks, block_size=request.block_size)[own.numbers.of_row]
    score = np.full(len(rows), _NOT_SEEN)
    score[row_of] = found.score
    cosine = np.where(score == _NOT_SEEN, rows["clip_score"].to_numpy(), cosine)
    return Refined(picture, score, cosine, row_of[found.kept], found.recall), rows


def refined_rows(found: "Refined", scores: np.ndarray) -> RefinedRows:
    """The rows that stay, in the order of their captions. `scores`: (N,) clip_score of the pairs as they were."""
    kept = np.sort(found.kept)
    picture, cosine = found.picture[kept], found.cosine[kept].astype(np.float32)
    return RefinedRows(
        caption_row=kept,
        picture_row=picture,
        clip_score=cosine,
        facts={
            "moved": int((picture != kept).sum()),
            "pictures": len(np.unique(picture)),
            "mean_score_before": float(scores.astype(np.float64).mean()),
            "mean_score_after": float(found.cosine[kept].mean()),
            "mean_sync_score": float(found.score[kept].mean() * UNIT),
        },
    )


def _rules(found: "Refined", table: pa.Table, source: OpenDataset, *, keep: float, clip: str) -> tuple[RuleCount, ...]:
    """Why captions go: the CLIP that finds the pictures did not see theirs, or others have better scores. Examples of
    these are the best of them, with the pictures that they chose."""

    def rule(name: str, setting: Any, goes: np.ndarray, why: Callable[[int], str]) -> RuleCount:
        some = goes[:EXAMPLES]
        view = view_rows(
            RefinedRows(some, found.picture[some], found.cosine[some].astype(np.float32), {}), table, source
        )
        examples = tuple({**shown(view, place, [source]), "why": why(row)} for place, row in enumerate(some))
        return RuleCount(rule=name, setting=setting, dropped=len(goes), examples=examples)

    seen = found.score != _NOT_SEEN
    goes = np.setdiff1d(np.flatnonzero(seen), found.kept)
    goes = goes[np.argsort(-found.score[goes], kind="stable")]
    score = found.score * UNIT
    last = f"all that stay have {score[found.kept[-1]]:.3f} or more"
    unseen = rule(CLIP_ERROR, clip, np.flatnonzero(~seen), lambda _: f"not seen by {clip}, which raised on the picture")
    kept = rule("keep", keep, goes, lambda row: f"SynC score {score[row]:.3f}; {last}")
    return (unseen, kept) if unseen.dropped else (kept,)


def view_rows(rows: RefinedRows, table: pa.Table, source: OpenDataset) -> ViewRows:
    """Rows as a view takes them: a row keeps its caption's weight. `table`: sample_id, caption, weight and place of all
    the dataset's rows (sync.stages.rows_by_id)."""
    starts = np.cumsum([0, *(shard.rows for shard in source.shards)])
    place = table["place"].to_numpy()[rows.picture_row]
    shard = np.searchsorted(starts, place, side="right") - 1
    return ViewRows(
        sample_id=table["sample_id"].take(rows.caption_row).to_pylist(),
        caption=table["caption"].take(rows.caption_row).to_pylist(),
        clip_score=rows.clip_score,
        source=np.zeros(len(shard), np.int64),
        shard=shard,
        row=place - starts[shard],
        weight=table["weight"].to_numpy()[rows.caption_row],
    )
