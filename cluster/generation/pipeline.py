"""Generation: plan -> Ray Data actor pools -> shards on the store -> manifest. Rerun it to resume."""

import logging
from collections.abc import Collection, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ray.actor import ActorHandle

from cluster.dataset.clip_scores import check_gate
from cluster.dataset.committed import CommittedShards, committed, manifest_of, summaries
from cluster.dataset.documents import Manifest, Plan, find_whole_manifest, load_plan, store_manifest
from cluster.dataset.environment import joined_versions, stored_environments, versions, warn_of_other_releases
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.vocabularies import (
    ConceptsOfShard,
    GivenConcepts,
    NounFinder,
    made_with,
    store_vocabularies,
    stored_features,
)
from cluster.generation.cost import Billing
from cluster.generation.display import Display, Room
from cluster.generation.limits import FaultPolicy, RunLimits
from cluster.generation.other_releases import needed_pyarrow, warn_of_mixed_releases
from cluster.generation.pools import Pools
from cluster.generation.progress import RunProgress, Status
from cluster.generation.retrying import Retry, interrupted_retry, samples_left
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.generator import Generator
from cluster.generation.stages.monitor import shards_begun_again, start_monitor
from cluster.generation.stages.scorer import Scorer
from cluster.generation.stages.write import OF_THIS_RUN
from cluster.generation.telemetry import Telemetry
from cluster.generation.turns import Stages, made_in_turns
from cluster.only_job import MAKES, only_job
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.records import FeatureShape

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What a run did, and how it went."""

    manifest: Manifest | None  # None: only some shards were asked for
    shard_size: int
    status: Status  # counts, rates and cost of this run
    startup_seconds: float | None  # until the first drawing; None: nothing was drawn
    stage_seconds: dict[str, float]
    longest_pause_seconds: float  # in which nothing was drawn or stored, after the first picture
    begun_again: int | None  # shards that were drawn a second time; None: the monitor did not say
    billing: Billing
    watch: RunLimits

    @property
    def skipped(self) -> int:
        """Samples that were there already."""
        return self.status.skipped

    @property
    def generated(self) -> int:
        """Pictures stored by this run."""
        return self.status.images

    def summary(self) -> dict[str, Any]:
        """What a job prints: the dataset's counts if it is complete, and what this run did and cost."""
        status, scores = self.status, self.status.scores
        whole = self.manifest and {
            "expected": self.manifest.expected,
            "stored": self.manifest.stored,
            "quarantined": self.manifest.quarantined,
            "quarantined_by_reason": self.manifest.quarantined_by_reason,
            "clip_score_mean": self.manifest.clip_score_mean,
        }
        rate, startup = status.images_per_second, self.startup_seconds
        per_1000 = 1000 * status.cost / status.images if status.cost is not None and status.images else None
        return {
            **(whole or {}),
            "shard_size": self.shard_size,
            "skipped": status.skipped,
            "generated": status.images,
            "retried": status.retried,
            "images_per_second": None if rate is None else round(rate, 3),
            "seconds": round(status.seconds, 2),
            "startup_seconds": None if startup is None else round(startup, 2),
            "stage_seconds": {stage: round(spent, 3) for stage, spent in self.stage_seconds.items()},
            "longest_pause_seconds": round(self.longest_pause_seconds, 2),
            "shards_begun_again": self.begun_again,
            "utilisation": {stage: round(share, 4) for stage, share in status.utilisation.items()},
            "bytes": status.bytes,
            "clip_score_histogram": list(scores.histogram),
            "clip_score_percentiles": {
                f"p{percent}": None if value is None else round(value, 2)  # right to 0.05
                for percent in (5, 25, 50, 75, 95)
                for value in (scores.percentile(percent),)
            },
            "generator_hours": round(status.generator_hours, 6),
            "gpu_hours": round(status.unit_hours, 6) if self.billing.unit == "GPU" else None,
            "cost": None if status.cost is None else round(status.cost, 6),
            "cost_per_1000_images": None if per_1000 is None else round(per_1000, 6),
            "price_basis": self.billing.basis(spot=self.watch.spot),
        }


def run_pipeline(
    store: Store,
    plan: Plan,
    pools: Pools,
    *,
    faults: FaultPolicy | None = None,
    watch: RunLimits | None = None,
    shards: Collection[int] | None = None,
    redo: Collection[int] = (),
    retry: Retry | None = None,
    retried: Mapping[int, int] | None = None,
    given: GivenConcepts | NounFinder | None = None,
    draw: type[DrawShard] = DrawShard,
    other_bytes: bool = False,
) -> GenerationResult:
    """Make every shard that the plan asks for and the store lacks, then write the manifest.

    With `shards`, only those of them that the store lacks, and no manifest. Shards in `redo` are made again and put in
    the place of those that are there; with `retry`, only their samples that are quarantined for one of its reasons
    (`retried`: how many, by shard), and the manifest is deleted first. A run of all shards also ends a retry that was
    interrupted. Another run that makes the same dataset is waited for (cluster.only_job): also where no shard is
    missing and there is no manifest, which is so while one retries. `given`: of what the concepts are made, for a
    dataset that is begun; what another run was given stays. `other_bytes`: shards of a finished dataset may be made
    again by another release of pyarrow, whose bytes are others.

    Raises InputError when the scores fall below the watch's threshold, where shards were to be made again that another
    run may have changed or, without `other_bytes`, that pyarrow would write otherwise, and where the dataset was begun
    with other concepts than are `given`.
    """
    watch = watch or RunLimits()
    faults = faults or FaultPolicy()
    wanted = range(plan.num_shards) if shards is None else sorted(shards)

    again, pyarrow = set(redo), None

    def lacking(there: CommittedShards) -> list[int]:
        return [shard for shard in wanted if shard in again or shard not in there]

    on_store = committed(store, plan)
    missing = lacking(on_store)
    with ExitStack() as only_run:
        if missing or (shards is None and find_whole_manifest(store) is None):
            only = only_job(store, MAKES, waits=True, start=partial(start_monitor, faults))
            monitor, waited = only_run.enter_context(only)
            if waited and redo:
                raise InputError(f"{store.root}: another run has changed this dataset meanwhile; run the command again")
            on_store = committed(store, plan)  # another run may just have ended
            if shards is None and not redo and retry is None and (retry := interrupted_retry(store)) is not None:
                retried = samples_left(store, [shard for shard in wanted if shard in on_store], retry)
                log.info("a retry was interrupted: %d samples are to be tried again", sum(retried.values()))
                again.update(retried)
            missing = lacking(on_store)
            if missing:
                warn_of_other_releases(store)
            if missing and retry:
                retry.begin(store)
            elif missing and not other_bytes:
                pyarrow = needed_pyarrow(store, plan, missing, on_store)
            on_store.forget(again)
        else:
            retry = None  # there is nothing to try again
        if given is not None:
            given.store(store)
        total = sum(plan.shard_rows(shard) for shard in wanted)
        skipped = total - sum((retried or {}).get(shard, plan.shard_rows(shard)) for shard in missing)
        if skipped:
            log.info("%d of %d samples are on the store already", skipped, total)
        billing = Billing.of(pools, device=plan.spec.generator.device, price_per_hour=watch.price_per_hour)
        progress = RunProgress(
            total=total,
            skipped=skipped,
            actors=actors(pools, len(missing)),
            billing=billing,
            scorers=min(pools.scorers, len(missing)),
            scored=plan.spec.clip.model != "null",
        )
        if not missing or plan.spec.clip.model == "null":
            store_vocabularies(store, plan, node_label=pools.node_label)
        begun_again: int | None = 0
        if missing:
            _make_missing(
                store, plan, pools, missing, on_store, progress,
                billing=billing, watched_by=(monitor, faults), watch=watch, again=redo, pyarrow=pyarrow, retry=retry,
                draw=draw,
            )  # fmt: skip
            begun_again = shards_begun_again(monitor)
        status = progress.status()  # what costs something ends here
        manifest = write_manifest(store, plan, stored_features(store, plan)) if shards is None else None
        if retry:
            retry.end(store)
    return GenerationResult(
        shard_size=plan.shard_size,
        manifest=manifest,
        status=status,
        startup_seconds=progress.startup_seconds,
        stage_seconds=progress.stage_seconds,
        longest_pause_seconds=progress.longest_pause_seconds,
        begun_again=begun_again,
        billing=billing,
        watch=watch,
    )


def _make_missing(
    store: Store,
    plan: Plan,
    pools: Pools,
    missing: list[int],
    on_store: CommittedShards,
    progress: RunProgress,
    *,
    billing: Billing,
    watched_by: tuple[ActorHandle, FaultPolicy],
    watch: RunLimits,
    again: Collection[int],
    pyarrow: str | None,
    retry: Retry | None,
    draw: type[DrawShard],
) -> None:
    """Draw and store shards until none is missing; what is stored is added to `on_store` and `progress`.

    `again`, `pyarrow`: as of WriteShard.
    """
    telemetry = Telemetry(store.root, has_clip_scores=plan.spec.clip.model != "null")
    room = Room(pools.generator_takes(), pools.node_labels)
    clip_room = Room(pools.scorer_takes(), pools.node_labels)
    environments: set[str] = set()
    with Display(progress, telemetry, watched_by[0], room=room, clip_room=clip_room) as display:
        stages = partial(
            _stages, store, plan, pools,
            watched_by=watched_by, again=again, pyarrow=pyarrow, retry=retry, draw=draw,
        )  # fmt: skip
        made = made_in_turns(missing, stages, pools, watched_by[0], scorers=pools.scorers)
        with closing(made):  # at once, whatever is raised here: its actors hold CPUs and GPUs
            for stats in made:
                on_store.add(stats)
                warn_of_mixed_releases(store, stats, environments)
                display.add(stats.get(OF_THIS_RUN, stats))
                check_gate(progress.scores, watch.stop_below_clip_score, store=store, shard=stats["shard"])


def actors(pools: Pools, shards: int) -> dict[str, int]:
    """How many actors work at each stage of so many shards; what scores a shard also encodes and stores it."""
    last = min(pools.scorers or pools.generators, shards)
    return {"draw": min(pools.generators, shards), "featurise": last, "encode": last, "store": last}


def _stages(
    store: Store,
    plan: Plan,
    pools: Pools,
    shards: list[int],
    *,
    watched_by: tuple[ActorHandle, FaultPolicy],
    again: Collection[int],
    pyarrow: str | None,
    retry: Retry | None,
    draw: type[DrawShard],
) -> Stages:
    """The actors that draw, score and store these shards in one pass."""
    concepts = ConceptsOfShard.of(store, plan, shards[0])
    writing = {"concepts": concepts, "again": again, "pyarrow": pyarrow}
    drawing = {"scores": True, **writing} if not pools.scorers else {"scores": False}
    generator = {
        "fn_constructor_args": (draw, store, plan, watched_by, retry),
        "fn_constructor_kwargs": drawing,
        **pools.draw_options(len(shards)),
    }
    if not pools.scorers:
        return [(Generator, generator)]
    scoring = {"fn_constructor_args": (store, plan, watched_by), "fn_constructor_kwargs": writing}
    return [(Generator, generator), (Scorer, {**scoring, **pools.score_options(len(shards))})]


def write_manifest(store: Store, plan: Plan, features: FeatureShape) -> Manifest:
    """Collect every shard's counts into dataset.json, the last object of a dataset.

    It is not written where the plan has grown meanwhile: that is left to the run that grew it. One that is there and
    says the same of the rows stays as it is, with what it says of how they were made: by its bytes runs, views and
    exports know the data again. Raises InputError when the stats of a shard are damaged or missing.
    """
    environments = stored_environments(store)
    manifest = replace(
        manifest_of(plan, features, summaries(store, plan)),
        versions=joined_versions(environments) or versions(),
        environments=environments,
        made_with=made_with(store, plan),
    )
    before = find_whole_manifest(store)
    if before is not None:
        same_making = replace(manifest, versions=before.versions, environments=before.environments)
        if before.made_with is None:  # of an earlier release
            same_making = replace(same_making, made_with=None)
        if before == same_making:
            return before
    if (found := load_plan(store)) is not None and found.asked() == plan.asked():
        store_manifest(store, manifest)
    else:
        log.warning("the corpus has grown meanwhile; %s is left to the run that planned it", MANIFEST_KEY)
    return manifest
