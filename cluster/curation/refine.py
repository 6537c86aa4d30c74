"""jobs.refine: a dataset's captions and pictures matched anew, as a view.

A method finds rows and hands them to cluster.dataset.view; `--method` names it. Another method is a function beside
`sync_view`, and a name in `METHODS`.
"""

import dataclasses
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from cluster.curation.curate import EXAMPLES, shown
from cluster.curation.refine_request import RefineRequest
from cluster.curation.sync.sentences import SentenceSpec, resolve_sentences
from cluster.curation.sync.settings import UNIT, WORK
from cluster.dataset.layout import Manifest
from cluster.dataset.lineage import Lineage, RuleCount
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.dataset.view import ViewRows, claim, lineage_source, write_view
from cluster.store.store import Store, open_store
from cluster.weights.node_copy import local_name
from pcm.clip.names import folder_revision, refuse_place, resolve_clip_name
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY
from pcm.spec import DIGEST

if TYPE_CHECKING:
    from cluster.curation.sync.stages import Refined
    from cluster.curation.tasks import Tasks

log = logging.getLogger(__name__)

#: What the summary says of the rows. moved: kept captions whose picture was another's. pictures: how many they show.
#: mean_score_before, mean_score_after: clip_score of all pairs as they were, and of the kept ones. mean_sync_score: of
#: the kept ones.
FACTS = ("moved", "pictures", "mean_score_before", "mean_score_after", "mean_sync_score")


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
    """Write the view of the refined rows: pairs, kept, moved, mean_score_before, mean_score_after, fingerprint.

    Rerun the same command to go on after an interruption. Raises InputError, before Ray starts, for data that cannot
    be refined, an encoder that is not there, and an `out` that holds anything else.
    """
    started = time.monotonic()
    source = open_dataset(open_store(request.data), unfinished=request.unfinished)
    _check(source, request)
    clip = _clip(source, request)
    sentences = resolve_sentences(request.sentences)
    out = open_store(request.out)
    lineage = lineage_of(source, sentences, request)
    manifest = claim(out, lineage, materialise=request.materialise)
    if manifest is not None:
        log.info("%s: is complete", out.root)
    else:
        manifest = _on_ray(source, out, lineage, sentences, request, clip)
    for key in out.list(f"{WORK}/"):
        out.delete(key)
    assert manifest.lineage is not None
    facts = manifest.lineage.facts
    return {
        "pairs": manifest.lineage.rows_in,
        "kept": manifest.stored,
        **{name: facts[name] for name in FACTS},
        "sentences": facts["sentences"],
        "fingerprint": manifest.fingerprint,
        "dataset": request.out,
        "seconds": round(time.monotonic() - started, 2),
    }


def _clip(source: OpenDataset, request: RefineRequest) -> str:
    """Where the dataset's CLIP is. Raises InputError where the dataset alone names a place, and for another CLIP."""
    spec = source.manifest.spec.clip
    if request.clip is None:
        refuse_place(spec.model, source=source.store.root)
        return spec.model
    architecture, pretrained = resolve_clip_name(local_name(request.clip))
    place = Path(pretrained or architecture.removeprefix("local-dir:"))
    if spec.revision.startswith(DIGEST) and place.exists() and (now := folder_revision(place)) != spec.revision:
        raise InputError(
            f"--clip {request.clip}: its files are {now}, but {request.data} was made with {spec.revision}; give the "
            "CLIP that made its features"
        )
    return request.clip


def lineage_of(source: OpenDataset, sentences: SentenceSpec, request: RefineRequest) -> Lineage:
    """What decides the view, before anything of it is known."""
    return Lineage(
        method="refine",
        settings={"method": request.method, **dataclasses.asdict(request.settings), "sentences": sentences.decides()},
        sources=(lineage_source(source),),
        rows_in=source.manifest.stored,
    )


def _check(source: OpenDataset, request: RefineRequest) -> None:
    manifest, place = source.manifest, f"--data {request.data}"
    if manifest.spec.clip.model == "null":
        raise InputError(f"{place}: has no CLIP features (--clip null); give a dataset with features")
    if manifest.spec.generator.model == TEXT_ONLY:
        raise InputError(f"{place}: has no pictures, only texts; give a dataset of pictures")
    if int(request.keep * manifest.stored) < 1:
        raise InputError(
            f"--keep {request.keep:g}: keeps none of {manifest.stored} pairs; give more data or a larger share"
        )


def _on_ray(
    source: OpenDataset, out: Store, lineage: Lineage, sentences: SentenceSpec, request: RefineRequest, clip: str
) -> Manifest:
    # Torch and Ray take seconds, and a user's mistake is told before them.
    from cluster.curation.tasks import OnRay
    from cluster.generation.pinning import resolve_device
    from cluster.session import cluster_gpus, start_ray, waiting_for

    start_ray()
    device = resolve_device(request.device, cluster_gpus=cluster_gpus())
    gpus = device == "cuda"
    with waiting_for(cpus=1, gpus=1 if gpus else 0):
        return sync_view(source, out, lineage, sentences, request, OnRay(gpus=gpus), clip=clip, device=device)


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
) -> Manifest:
    """SynC's rows of a dataset as a view at `out`, which `claim` has begun; `tasks` do the work. `clip`: where the
    dataset's CLIP is."""
    from cluster.curation.sync.stages import refine_pairs, stored_rows, work_folder

    work = work_folder(source.sha256, source.manifest, sentences, device)
    found = refine_pairs(
        source.store, source.manifest, out, work, request.settings, sentences, tasks,
        clip=clip, block_size=request.block_size, device=device,
    )  # fmt: skip
    table = stored_rows(source.manifest, out, work)
    rows = refined_rows(found, table["clip_score"].to_numpy())
    rule = RuleCount(
        rule="keep",
        setting=request.keep,
        dropped=len(table) - len(rows.caption_row),
        examples=_examples(found, table, source),
    )
    facts = {**rows.facts, "sentences": sentences.model, "device": device}
    lineage = dataclasses.replace(lineage, rules=(rule,), facts=facts)
    return write_view(out, [source], view_rows(rows, table, source), lineage, materialise=request.materialise)


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


def _examples(found: "Refined", table: pa.Table, source: OpenDataset) -> tuple[dict[str, Any], ...]:
    """The best of the captions that go, with the pictures that they chose."""
    goes = np.setdiff1d(np.arange(len(table)), found.kept)
    best = goes[np.argsort(-found.score[goes], kind="stable")][:EXAMPLES]
    rows = RefinedRows(best, found.picture[best], found.cosine[best].astype(np.float32), {})
    view = view_rows(rows, table, source)
    last = float(found.score[found.kept[-1]] * UNIT)
    return tuple(
        {
            **shown(view, place, [source]),
            "why": f"SynC score {float(found.score[row] * UNIT):.3f}; all that stay have {last:.3f} or more",
        }
        for place, row in enumerate(best)
    )


def view_rows(rows: RefinedRows, table: pa.Table, source: OpenDataset) -> ViewRows:
    """Rows as a view takes them. `table`: sample_id and caption of all the dataset's rows."""
    starts = np.cumsum([0, *(shard.rows for shard in source.shards)])
    shard = np.searchsorted(starts, rows.picture_row, side="right") - 1
    return ViewRows(
        sample_id=table["sample_id"].take(rows.caption_row).to_pylist(),
        caption=table["caption"].take(rows.caption_row).to_pylist(),
        clip_score=rows.clip_score,
        source=np.zeros(len(shard), np.int64),
        shard=shard,
        row=rows.picture_row - starts[shard],
    )
