"""Generation: plan -> Ray Data actor pools -> shards on the store -> manifest. Rerun it to resume."""

import json
import logging
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import ray
from ray.data import ActorPoolStrategy

from cluster.dataset import (
    MANIFEST_KEY,
    Manifest,
    Plan,
    shard_key,
    stats_key,
)
from cluster.pools import Pools
from cluster.progress import Progress, Watch
from cluster.session import user_error
from cluster.stages.draw import DrawShard
from cluster.stages.featurise import FeaturiseShard
from cluster.stages.write import WriteShard
from cluster.storage import Store
from cluster.vocabularies import store_vocabularies
from pcm.records import FeatureShape

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What a run did. Counts are samples; seconds are of the whole run; images_per_second from the first one drawn."""

    manifest: Manifest | None  # None: only some shards were asked for
    skipped: int
    generated: int
    seconds: float
    images_per_second: float
    stage_seconds: dict[str, float]


def generate(
    store: Store, plan: Plan, pools: Pools, *, watch: Watch | None = None, shards: Collection[int] | None = None
) -> GenerationResult:
    """Make every shard that the plan asks for and the store lacks, then write the manifest.

    With `shards`, only those of them that the store lacks, and no manifest.
    """
    started = time.time()
    done = {key for key in store.list("shards") if key.endswith(".parquet")}
    wanted = range(plan.num_shards) if shards is None else sorted(shards)
    missing = [shard for shard in wanted if shard_key(shard) not in done]
    total = sum(plan.shard_rows(shard) for shard in wanted)
    skipped = total - sum(plan.shard_rows(shard) for shard in missing)
    if skipped:
        log.info("%d of %d samples are on the store already", skipped, total)
    features = store_vocabularies(store, plan)
    progress = Progress(total=total, skipped=skipped)
    for stats in shard_stream(store, plan, missing, pools):
        progress.add(stats)
    manifest = write_manifest(store, plan, features) if shards is None else None
    progress.close()
    return GenerationResult(
        manifest=manifest,
        skipped=skipped,
        generated=progress.images,
        seconds=time.time() - started,
        images_per_second=progress.images_per_second,
        stage_seconds=progress.stage_seconds,
    )


def shard_stream(store: Store, plan: Plan, shards: list[int], pools: Pools) -> Iterable[dict]:
    """Run shards through the three pools; yields each shard's stats once it is committed.

    Raises InputError when a model a user named cannot be loaded by the workers.
    """
    if not shards:
        return
    # Made in this process, a block a shard; from_arrow would start a task for each only to look at it.
    source = ray.data.from_items([{"shard": shard} for shard in shards], override_num_blocks=len(shards))
    pipeline = (
        source.map_batches(
            DrawShard,
            fn_constructor_args=(store, plan.spec),
            compute=ActorPoolStrategy(size=min(pools.generators, len(shards))),
            num_cpus=pools.generator_cpus,
            num_gpus=pools.generator_gpus,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        .map_batches(
            FeaturiseShard,
            fn_constructor_args=(plan.spec.clip,),
            compute=ActorPoolStrategy(size=min(pools.scorers, len(shards))),
            num_cpus=pools.scorer_cpus,
            num_gpus=pools.scorer_gpus,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
        .map_batches(
            WriteShard,
            fn_constructor_args=(store,),
            compute=ActorPoolStrategy(size=min(pools.writers, len(shards))),
            num_cpus=pools.writer_cpus,
            batch_size=1,
            batch_format="pyarrow",
            zero_copy_batch=True,
        )
    )
    try:
        for batch in pipeline.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0):
            yield json.loads(batch["stats"][0].as_py())
    except ray.exceptions.RayError as error:
        raise user_error(error) or error from None


def write_manifest(store: Store, plan: Plan, features: FeatureShape) -> Manifest:
    """Collect every shard's stats into dataset.json, the last object of a dataset."""
    with ThreadPoolExecutor(16) as pool:
        stats = list(pool.map(lambda shard: json.loads(store.read_bytes(stats_key(shard))), range(plan.num_shards)))
    reasons: dict[str, int] = {}
    for part in stats:
        for reason, count in part["quarantined_by_reason"].items():
            reasons[reason] = reasons.get(reason, 0) + count
    stored = sum(part["successes"] for part in stats)
    manifest = Manifest(
        spec=plan.spec,
        corpus=plan.corpus,
        corpus_fingerprint=plan.corpus_fingerprint,
        features=features,
        expected=plan.expected,
        stored=stored,
        quarantined=sum(reasons.values()),
        quarantined_by_reason=dict(sorted(reasons.items())),
        clip_score_mean=sum(part["clip_score_sum"] for part in stats) / stored if stored else None,
        shard_bytes=sum(part["bytes"] for part in stats),
        shards=tuple(
            {
                "key": shard_key(part["shard"]),
                "rows": part["successes"],
                "quarantined": part["failed_to_generate"],
                "sha256": part["sha256"],
                "bytes": part["bytes"],
            }
            for part in stats
        ),
    )
    store.write_bytes(MANIFEST_KEY, manifest.to_json())
    return manifest
