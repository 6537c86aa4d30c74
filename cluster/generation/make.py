"""jobs.generate's work: from a request to a dataset, to a pilot of one, or to samples of one drawn again."""

import functools
import itertools
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cluster import shard_work
from cluster.dataset.documents import CorpusSource, Plan
from cluster.dataset.plan import MAX_SHARDS, begun_plan, make_plan, refuse_other_spec
from cluster.dataset.verify import require_plan
from cluster.dataset.vocabularies import GivenConcepts, NounFinder
from cluster.device import device_of_cluster, resolve_dtype
from cluster.generation.capacity import pools_of_cluster
from cluster.generation.fit import check_memory, warn_of_slow_bfloat16_on_cluster
from cluster.generation.like import check_alike, read_spec_manifest, with_settings
from cluster.generation.limits import FaultPolicy, PilotSize, RunLimits
from cluster.generation.measured import measured
from cluster.generation.moved_models import ModelPlaces
from cluster.generation.pilot import Prediction, run_pilot
from cluster.generation.pilot import summary as pilot_summary
from cluster.generation.pinning import dataset_spec, joint_dimensions, on_device
from cluster.generation.pipeline import GenerationResult, run_pipeline
from cluster.generation.pools import Pools
from cluster.generation.presets import with_preset
from cluster.generation.regenerate import regenerate
from cluster.generation.request import AUTO, GenerateRequest, GenerationOptions
from cluster.generation.retry_quarantined import parse_reason, require_finished, retry_quarantined
from cluster.generation.shard_limit import least_shard_size
from cluster.options import given
from cluster.session import start_ray
from cluster.sources.concept_file import fitting_concepts
from cluster.sources.corpus import CorpusRecord, read_corpus, source_digest
from cluster.store.reach import check_reach
from cluster.store.store import Store, open_store
from cluster.weights.node_copy import local_generator, local_spec
from pcm import embedded
from pcm.errors import InputError
from pcm.generation.model_memory import model_memory
from pcm.generation.prompt_length import truncation_check
from pcm.spec import GENERATOR_VERSION, DatasetSpec
from pcm.text.concepts import noun_finder
from pcm.text.formats import ReadOptions

log = logging.getLogger(__name__)


def generate(request: GenerateRequest) -> dict[str, Any]:
    """Make the dataset, or go on making it, and summarise; or do what `pilot`, `only` or `retry_quarantined` asks for.

    The summary: expected, stored, quarantined, skipped, images_per_second, seconds, dataset and more; see
    `GenerationResult.summary`, `pilot.summary`, `regenerate` and `retry_quarantined`. Raises InputError for what
    cannot be used, before Ray is started wherever that can be told before.
    """
    store = open_store(request.out)
    if request.only is not None:
        return regenerate(store, request.only, image_out=request.image_out, places=_places(request))
    if request.retry_quarantined is not None:
        return {**_retry(store, request, request.retry_quarantined), "dataset": request.out}
    if request.spec is not None:
        prepared = _prepare_like(store, request, request.spec)
    else:
        prepared = prepare(store, with_preset(request, request.preset))
    if request.pilot is not None:
        return {**pilot_summary(*prepared.pilot(PilotSize.parse(request.pilot))), "dataset": request.out}
    return {**prepared.generate().summary(), "dataset": request.out}


def _prepare_like(store: Store, request: GenerateRequest, uri: str) -> "Prepared":
    wanted, own = read_spec_manifest(uri), set(given(request))
    asked = with_settings(request, wanted, uri=uri)

    def check(spec: DatasetSpec) -> None:
        check_alike(spec, wanted.spec, own, uri=uri)

    return prepare(store, asked, version=wanted.spec.generator_version, own=own, check=check)


@dataclass(frozen=True)
class Prepared:
    """A plan that is on the store, and with what it is to be carried out."""

    store: Store
    plan: Plan
    pools: Pools
    faults: FaultPolicy
    watch: RunLimits
    given: GivenConcepts | NounFinder

    def generate(self) -> GenerationResult:
        return run_pipeline(self.store, self.plan, self.pools, faults=self.faults, watch=self.watch, given=self.given)

    def pilot(self, size: PilotSize) -> tuple[Prediction, GenerationResult]:
        return run_pilot(
            self.store, self.plan, self.pools, size, faults=self.faults, watch=self.watch, given=self.given
        )


def prepare(
    store: Store,
    asked: GenerationOptions,
    *,
    version: int = GENERATOR_VERSION,
    own: Collection[str] | None = None,
    check: Callable[[DatasetSpec], None] = lambda spec: None,
) -> Prepared:
    """Check the request, start Ray and write the plan. Raises InputError, before Ray is started where that can be.

    `version`: by whose rules a new dataset is drawn. `own`: as in `dataset_spec`. `check` sees the spec before anything
    is started.
    """
    if not asked.corpus:
        raise InputError("--corpus: missing; give a path or URI of captions, or 'embedded'")
    planned = begun_plan(store)
    version = planned.spec.generator_version if planned else version
    begun = planned.spec if planned else None
    spec = dataset_spec(asked, gpus=0, version=version, begun=begun, own=own)  # the device is known when Ray is
    check(spec)
    if spec.clip.model == "null" and asked.stop_below_clip_score is not None:
        raise InputError("--stop-below-clip-score: --clip null gives no scores; name a CLIP")
    uri = embedded.caption_file(asked.corpus)
    options = ReadOptions.of(asked.caption_column, asked.csv_quoting)
    source = CorpusSource(
        source_digest(uri), asked.corpus_format, asked.split, asked.limit, asked.caption_column, asked.csv_quoting
    )
    if planned is not None:
        shard_size = asked.shard_size or planned.shard_size
        refuse_other_spec(store, planned, _resumed(spec, planned, asked), shard_size)

    def read() -> Iterator[CorpusRecord]:
        return read_corpus(uri, format=asked.corpus_format, split=asked.split, limit=asked.limit, options=options)

    def least(shard_size: int) -> int:
        images = spec.images_per_caption
        return least_shard_size(uri, read, shard_size=shard_size, images_per_caption=images, limit=asked.limit)

    records = read()
    if planned is None or planned.source != source:
        records = _begun(records)
    if planned is None and asked.shard_size is not None and (enough := least(asked.shard_size)) > asked.shard_size:
        raise InputError(
            f"--shard-size {asked.shard_size}: {asked.corpus} would have more than {MAX_SHARDS:,} shards; give "
            f"{enough} or more"
        )
    memory = None if spec.generator.model == "null" else model_memory(local_generator(spec.generator))
    is_truncated = _TruncationCheck(spec)
    _check_here(spec)  # a model that is not there is told now
    noun_finder(asked.nouns)  # a model that is not installed is told now
    concepts = None
    if asked.concepts is not None:
        concepts = fitting_concepts(asked.concepts, embed_dim=joint_dimensions(spec.clip.model, spec.clip.revision))

    start_ray()
    before = planned.spec.generator.device if planned else None
    device = device_of_cluster(asked.device, before=before, labels=asked.node_labels)
    check_reach(store)
    spec = on_device(spec, device=device, dtype=resolve_dtype(asked.dtype, device=device))
    if planned is not None:
        if asked.batch_size == AUTO:
            spec = replace(spec, generator=replace(spec.generator, batch_size=planned.spec.generator.batch_size))
        refuse_other_spec(store, planned, spec, shard_size)  # the cluster may have another device than it had
    if asked.offload != "none" and device != "cuda":
        raise InputError(f"--offload {asked.offload}: is for GPUs, and this cluster has none now; give --device cuda")
    if memory is not None:
        measures = planned is None and (asked.batch_size == AUTO or asked.shard_size is None)
        check_memory(spec.generator, memory, labels=asked.node_labels, measures=measures)
    pools = pools_of_cluster(asked, device=device)
    if planned is None:
        warn_of_slow_bfloat16_on_cluster(
            device, spec.generator.dtype, labels=asked.node_labels
        )  # the first machine has come
        spec, shard_size = measured(spec, pools, batch_size=asked.batch_size == AUTO, shard_size=asked.shard_size)
        if asked.shard_size is None and (enough := least(shard_size)) > shard_size:
            log.info("shards of %d samples instead, as a plan has at most %s of them", enough, f"{MAX_SHARDS:,}")
            shard_size = enough
    check_reach(store)  # once more: the first machine may have come above
    plan = make_plan(
        store,
        records,
        spec,
        corpus=asked.corpus,
        shard_size=shard_size,
        is_truncated=is_truncated,
        source=source,
        run_on=shard_work.AUTO,
    )
    given = NounFinder(asked.nouns) if concepts is None else GivenConcepts(concepts)
    given.check(store)  # it is stored once no other run is at work, whose first generator would take it
    return Prepared(store, plan, pools, asked.faults, asked.limits, given)


def _resumed(spec: DatasetSpec, planned: Plan, asked: GenerationOptions) -> DatasetSpec:
    """The spec, what only the cluster decides as the plan has it."""
    before = planned.spec.generator
    if asked.device == AUTO:
        dtype = before.dtype if asked.dtype == AUTO else asked.dtype
        spec = on_device(spec, device=before.device, dtype=dtype)
    if asked.batch_size == AUTO:
        spec = replace(spec, generator=replace(spec.generator, batch_size=before.batch_size))
    return spec


@dataclass(frozen=True)
class _TruncationCheck:
    """Whether the spec's model cuts a prompt: by the tokenizers on the machine at work, one prompt at a time."""

    spec: DatasetSpec

    def __call__(self, prompt: str) -> bool:
        with _TOKENIZING:
            return _check_here(self.spec)(prompt)


#: A tokenizer must not be used by two threads at once.
_TOKENIZING = threading.Lock()


@functools.lru_cache(maxsize=1)
def _check_here(spec: DatasetSpec) -> Callable[[str], bool]:
    return truncation_check(local_spec(spec))


def _begun(records: Iterator[CorpusRecord]) -> Iterator[CorpusRecord]:
    """The same records, the first of them read: a corpus that cannot be read is refused now."""
    first = list(itertools.islice(records, 1))
    return itertools.chain(first, records)


def _places(request: GenerateRequest) -> ModelPlaces:
    return ModelPlaces(
        t2i=request.t2i, t2i_config=request.t2i_config, vae=request.vae, lora=request.lora, clip=request.clip
    )


def _retry(store: Store, request: GenerateRequest, reason: str) -> dict[str, Any]:
    parse_reason(reason)
    plan = require_plan(store, "retried")
    require_finished(store, plan)
    plan = _places(request).plan_at(store, plan)
    start_ray()
    pools = pools_of_cluster(request, device=plan.spec.generator.device)
    return retry_quarantined(store, plan, reason, pools, faults=request.faults)
