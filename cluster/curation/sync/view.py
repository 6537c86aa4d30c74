"""SynC's rows of a dataset as a view."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.curation.curate import EXAMPLES, shown
from cluster.curation.refine_request import RefineRequest
from cluster.curation.sync.sentences import SentenceSpec
from cluster.curation.sync.settings import UNIT
from cluster.dataset.derived import lineage_source
from cluster.dataset.documents import Manifest
from cluster.dataset.environment import made_by
from cluster.dataset.lineage import Lineage, RuleCount
from cluster.dataset.opened import OpenDataset
from cluster.dataset.view import ViewRows, write_view
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.reasons import CLIP_ERROR

if TYPE_CHECKING:
    from cluster.curation.sync.stages import Refined
    from cluster.curation.tasks import Tasks

#: What the summary says of the rows. moved: kept captions whose picture was another's. pictures: how many they show.
#: mean_score_before, mean_score_after: clip_score of all pairs as they were, and of the kept ones. mean_sync_score: of
#: the kept ones.
FACTS = ("moved", "pictures", "mean_score_before", "mean_score_after", "mean_sync_score")
#: With --probes also: the share of the exact candidates and describers that was found (sync.stages.Recall).
RECALL = ("recall_candidates", "recall_describers")
#: The score of a row that the dataset of --retrieval has not: its CLIP raised on the picture.
_NOT_SEEN = np.iinfo(np.int64).min


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


@dataclass(frozen=True)
class Retrieval:
    """The dataset whose features find the pictures, and where its CLIP is."""

    data: OpenDataset
    clip: str


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
