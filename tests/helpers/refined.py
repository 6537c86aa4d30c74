"""jobs.refine in this process, without Ray."""

from pathlib import Path

from cluster.curation.redraw.view import keep_plan, redraw_lineage, redraw_view
from cluster.curation.refine_request import RefineRequest
from cluster.curation.sync.sentences import SentenceSpec
from cluster.curation.sync.settings import WORK
from cluster.curation.sync.view import Retrieval, lineage_of, sync_view
from cluster.curation.tasks import InThisProcess
from cluster.dataset.committed import committed
from cluster.dataset.derived import claim
from cluster.dataset.documents import Manifest, Plan
from cluster.dataset.opened import open_dataset
from cluster.dataset.vocabularies import store_vocabularies
from cluster.generation.pipeline import write_manifest
from cluster.generation.stages.draw import DrawShard
from cluster.store.store import Store, open_store
from pcm.clip.encoder import ClipEncoder
from pcm.spec import DatasetSpec
from tests.helpers.tiny_generation import draw_in_process


def sync_in_process(
    data: Path, out: Path, sentences: SentenceSpec, *, clean: bool = False, **options: object
) -> Manifest:
    """SynC. With `clean` the work is deleted in the end, as the job does."""
    request = RefineRequest(data=str(data), out=str(out), method="sync", **options)  # type: ignore[arg-type]
    source, store = open_dataset(open_store(data)), open_store(out)
    retrieval = None
    if request.retrieval is not None:
        by = open_dataset(open_store(request.retrieval))
        retrieval = Retrieval(by, by.manifest.spec.clip.model)
    lineage = lineage_of(source, sentences, request, retrieval)
    if (made := claim(store, lineage, materialise=request.materialise)) is None:
        clip = source.manifest.spec.clip.model
        tasks = InThisProcess()
        made = sync_view(
            source, store, lineage, sentences, request, tasks, clip=clip, device="cpu", retrieval=retrieval
        )
    for key in store.list(f"{WORK}/") if clean else ():
        store.delete(key)
    return made


class Killed(Exception):
    """Stands for kill -9: nothing below catches it."""


def redraw_in_process(
    data: Path,
    out: Path,
    *,
    draw: type[DrawShard] = DrawShard,
    rounds_until_killed: int | None = None,
    spec: DatasetSpec | None = None,
    **options: object,
) -> Manifest:
    """Best-of-n and redraw. Killed in the middle of the round of that number: one shard of it is there. `spec`: with
    the models where they are now."""
    request = RefineRequest(data=str(data), out=str(out), **options)  # type: ignore[arg-type]
    source, store = open_dataset(open_store(data)), open_store(out)
    planned = keep_plan(source, store, request, source.manifest.stored)
    lineage = redraw_lineage(source, request)
    if (found := claim(store, lineage, materialise=request.materialise)) is not None:
        return found
    done: list[Store] = []

    def draw_all(at: Store, plan: Plan) -> None:
        made = committed(at, plan)
        missing = [shard for shard in range(plan.num_shards) if shard not in made]
        if rounds_until_killed == len(done):
            draw_in_process(at, plan, missing[:1], draw=draw)
            raise Killed
        draw_in_process(at, plan, missing, draw=draw)
        done.append(at)
        encoder = ClipEncoder.from_spec(plan.spec_to_load.clip)
        write_manifest(at, plan, store_vocabularies(at, plan, encoder=encoder))

    return redraw_view(source, store, lineage, request, spec or source.manifest.spec, planned, draw_all)
