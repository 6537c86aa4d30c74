"""A damaged dataset made whole: what verification finds missing or corrupt is made again, and nothing else."""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator

import pyarrow as pa

from cluster.dataset.documents import OtherSchema, Plan, find_manifest, load_plan
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, group_key
from cluster.dataset.parquet import UNREADABLE, read_table
from cluster.dataset.plan import plan_parts, write_plan_part
from cluster.dataset.request import VerifyRequest
from cluster.dataset.verify import Inspection, inspect
from cluster.dataset.vocabularies import vocabularies_stored
from cluster.dataset.vocabulary_files import refuse_rebuilding
from cluster.generation.capacity import pools_of_cluster
from cluster.generation.limits import FaultPolicy
from cluster.generation.moved_models import NOT_MOVED, ModelPlaces
from cluster.generation.pipeline import run_pipeline
from cluster.generation.pools import Pools
from cluster.generation.retrying import interrupted_retry
from cluster.session import start_ray
from cluster.sources.corpus import CorpusRecord, read_corpus
from cluster.store.store import Store, open_store
from cluster.weights.node_copy import local_spec
from pcm import embedded
from pcm.errors import InputError
from pcm.generation.prompt_length import truncation_check
from pcm.reasons import USABLE
from pcm.spec import DatasetSpec
from pcm.text.formats import ReadOptions

log = logging.getLogger(__name__)


def repair(
    store: Store,
    *,
    draw: Callable[[Inspection], None],
    read_records: Callable[[Plan], Iterator[CorpusRecord]],
    truncation_check: Callable[[DatasetSpec], Callable[[str], bool]],
    run_on: str = VerifyRequest.run_on,
) -> dict:
    """Make again the shards of which anything is missing or not to be trusted, then the manifest, and verify once more.

    draw: makes the damaged shards again, and the manifest. Another run may have stored absent ones meanwhile.
    read_records: the corpus of the plan; asked for only when plan parts are damaged.
    truncation_check: of a spec, as `pcm.generation.prompt_length.truncation_check`; likewise.
    run_on: who reads the shards (cluster.shard_work.RUN_ON).

    Returns what `verify` does, and `repaired`, how many shards were damaged or absent. Objects that nobody planned are
    told of and stay. Raises InputError when there is no dataset, when its plan is damaged and the corpus cannot rebuild
    it, and when imported words, concepts or head, or concepts that a user gave, are damaged.
    """
    _drop_damaged_manifest(store)
    found = inspect(store, run_on=run_on)
    if found.damaged_plan_parts or found.captions_differ:
        rebuilt = _rebuild_plan_parts(store, found.plan, read_records, truncation_check)
        log.info("rebuilt %d plan parts from the corpus", rebuilt)
        found = inspect(store, run_on=run_on)
    if found.ok:
        return found.to_dict() | {"repaired": 0}
    if found.damaged_vocabularies:
        refuse_rebuilding(store, found.plan)
    for group in found.wrong_groups:
        store.delete(group_key(group))
    for key in filter(store.exists, found.damaged_vocabularies):
        store.delete(key)  # missing until it is stored again
    log.info("shards to be made again: %d of %d", len(found.damaged_shards), found.plan.num_shards)
    draw(found)
    return inspect(store, run_on=run_on).to_dict() | {"repaired": len(found.damaged_shards)}


def repair_dataset(
    dataset: str,
    *,
    corpus: str | None = None,
    run_on: str = VerifyRequest.run_on,
    places: ModelPlaces = NOT_MOVED,
    other_bytes: bool = VerifyRequest.other_bytes,
) -> dict:
    """`repair` of the dataset at a path or URI; `corpus`: where its captions are now, where they were by default, and
    `places` where its models are. `other_bytes`: as of `run_pipeline`, which raises InputError without it.

    Ray is started only where there is something to mend, or where the shards are many.
    """
    store = open_store(dataset)
    planned = load_plan(store)
    here = places.plan_at(store, planned).spec_to_load if planned else None  # another model is told of at once

    def read_records(plan: Plan) -> Iterator[CorpusRecord]:
        uri = embedded.caption_file(corpus or plan.corpus)
        if plan.source is None:
            return read_corpus(uri, limit=plan.records)
        options = ReadOptions.of(plan.source.caption_column, plan.source.csv_quoting)
        return read_corpus(uri, format=plan.source.format, split=plan.source.split, limit=plan.records, options=options)

    def draw(found: Inspection) -> None:
        plan = found.plan.at_places_of(here or found.plan.spec)
        device = plan.spec.generator.device
        start_ray()  # another run may be at work, also where nothing is to be drawn
        is_retried = interrupted_retry(store) is not None
        if found.damaged_shards or is_retried or not vocabularies_stored(store, plan):
            pools = pools_of_cluster(device=device)
        else:
            pools = Pools.for_cluster(device=device, cpus=1, gpus=0)  # nothing to draw
        # What is absent still is made anyway; what another run has stored meanwhile stays.
        redo = sorted(set(found.damaged_shards) - set(found.absent_shards))
        if redo and is_retried:  # one may be damaged because the retry was killed: whole again, it is tried once more
            run_pipeline(store, plan, pools, shards=redo, redo=redo, other_bytes=other_bytes)
            redo = []
        # What fails once more stays quarantined: a repair ends the retry whatever share of it fails.
        faults = FaultPolicy(max_error_share=1.0) if is_retried else None
        run_pipeline(store, plan, pools, redo=redo, faults=faults, other_bytes=other_bytes)

    def check_prompts(spec: DatasetSpec) -> Callable[[str], bool]:
        return truncation_check(local_spec(here or spec))

    return repair(store, draw=draw, read_records=read_records, truncation_check=check_prompts, run_on=run_on)


def _drop_damaged_manifest(store: Store) -> None:
    """A manifest that cannot be read says nothing that the shards do not say."""
    try:
        find_manifest(store)
    except OtherSchema:  # it says much, to another release
        raise
    except InputError as error:
        if load_plan(store) is None:  # nothing says what should be there
            raise InputError(
                f"{store.root}: not a dataset that can be repaired ({MANIFEST_KEY} is damaged, and there is no "
                f"{PLAN_KEY}); rerun the command that made it, into another --out"
            ) from None
        log.warning("%s", error)
        store.delete(MANIFEST_KEY)


def _rebuild_plan_parts(
    store: Store,
    plan: Plan,
    read_records: Callable[[Plan], Iterator[CorpusRecord]],
    truncation_check: Callable[[DatasetSpec], Callable[[str], bool]],
) -> int:
    """Write the parts that differ from what the corpus says, once the whole corpus proved to be the planned one."""
    records = read_records(plan)
    is_truncated = truncation_check(plan.spec)
    fingerprint = hashlib.sha256()
    differ = {}
    for segment in plan.segments:
        captions = itertools.islice(records, segment.records)
        parts = plan_parts(captions, plan.spec, plan.shard_size, is_truncated, segment.first_record, fingerprint)
        for shard, part in enumerate(parts, segment.first_shard):
            try:
                stored = read_table(store, plan.part_key(shard))
                intact = stored.schema == part.schema and _without_remarks(stored).equals(_without_remarks(part))
            except UNREADABLE:
                intact = False
            if not intact:
                differ[shard] = part
    if fingerprint.hexdigest() != plan.corpus_fingerprint:
        raise InputError(
            f"{store.root}: its plan is damaged, and corpus {plan.corpus} is not the one that it was made from any "
            "more; give the original by --corpus, or generate into another --out"
        )
    for shard, part in differ.items():
        write_plan_part(store, plan.part_key(shard), part)
    return len(differ)


def _without_remarks(part: pa.Table) -> pa.Table:
    """Whether a prompt is too long may have been judged by an earlier release's rule, and is not worth a new part."""
    reasons = ["" if reason in USABLE else reason for reason in part["reason"].to_pylist()]
    at = part.schema.get_field_index("reason")
    return part.set_column(at, part.schema.field(at), pa.array(reasons, part.schema.field(at).type))
