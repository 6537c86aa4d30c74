"""A pilot: some shards of the very plan that the full run will finish, and what they say about the whole.

Nothing is thrown away: the full run skips the pilot's shards. They are spread evenly over the plan, because a corpus is
rarely shuffled.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from cluster.dataset.clip_scores import ClipScores
from cluster.dataset.committed import read_stats
from cluster.dataset.documents import Plan
from cluster.dataset.vocabularies import GivenConcepts, NounFinder
from cluster.generation.cost import SECONDS_AN_HOUR, Billing
from cluster.generation.limits import FaultPolicy, PilotSize, RunLimits
from cluster.generation.pipeline import GenerationResult, actors, run_pipeline
from cluster.generation.pools import Pools
from cluster.numbers import duration, size
from cluster.session import cluster_nodes
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.reasons import of_stage

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the whole dataset will hold and take, at this number of generators. Hours and cost include one start-up,
    where it was measured."""

    pilot_samples: int
    pilot_shards: int
    predicted_images: int  # stored
    predicted_quarantined: int
    predicted_quarantined_share: float  # of all samples
    predicted_bytes: int  # of all shards
    predicted_images_per_second: float  # with models loaded
    predicted_seconds_an_image: float | None  # of one generator, with models loaded; None where none is predicted
    predicted_seconds: float
    predicted_generator_hours: float
    predicted_gpu_hours: float | None  # None on CPUs
    predicted_cost: float | None  # None without a price
    startup_seconds: float | None  # before the first picture; None: nothing was drawn now
    bottleneck: str  # the stage whose pool has most to do
    clip_score_mean: float | None
    clip_score_standard_error: float | None


def pilot_shards(plan: Plan, samples: int, *, generators: int) -> list[int]:
    """Evenly spaced shards of about so many samples, at least one a generator."""
    wanted = max(1, generators, round(samples / plan.shard_size))
    count = min(wanted, plan.num_shards)
    return [(2 * index + 1) * plan.num_shards // (2 * count) for index in range(count)]


def run_pilot(
    store: Store,
    plan: Plan,
    pools: Pools,
    asked: PilotSize,
    *,
    faults: FaultPolicy | None = None,
    watch: RunLimits,
    given: GivenConcepts | NounFinder | None = None,
) -> tuple[Prediction, GenerationResult]:
    """Make the pilot's shards (those that the store lacks) and predict the whole; no manifest is written.

    Raises InputError when the plan has fewer samples, or when the pilot drew no picture to judge by.
    """
    samples = asked.of(plan.expected)
    shards = pilot_shards(plan, samples, generators=pools.generators)
    rows = sum(plan.shard_rows(shard) for shard in shards)
    more = f", at least one for each of {pools.generators} generators" if rows > samples + plan.shard_size / 2 else ""
    log.info("pilot: %d samples in %d of %d shards%s", rows, len(shards), plan.num_shards, more)
    result = run_pipeline(store, plan, pools, faults=faults, watch=watch, shards=shards, given=given)
    with ThreadPoolExecutor(16) as pool:
        stats = list(pool.map(lambda shard: read_stats(store, shard), shards))
    made = result.status.samples
    prediction = predict(
        stats,
        expected=plan.expected,
        usable=plan.usable,
        pools=actors(pools, plan.num_shards),
        generators_score=not pools.scorers,
        scored=plan.spec.clip.model != "null",
        store_seconds=result.stage_seconds["store"] / made if made else 0.0,
        startup_seconds=result.startup_seconds,
        billing=Billing.of(pools, device=plan.spec.generator.device, price_per_hour=watch.price_per_hour),
        machines=len(cluster_nodes()),
    )
    for line in describe(prediction, generators=actors(pools, plan.num_shards)["draw"]):
        log.info("%s", line)
    return prediction, result


def predict(
    stats: Sequence[Mapping[str, Any]],
    *,
    expected: int,
    usable: int,
    pools: Mapping[str, int],
    generators_score: bool,
    store_seconds: float,
    startup_seconds: float | None,
    billing: Billing,
    machines: int,
    scored: bool = True,
) -> Prediction:
    """From the stats of some shards to the whole plan of `expected` samples, `usable` of which can be drawn.

    `pools`: actors by stage. Each stage's seconds a drawn sample, over its actors, is the time the stage needs; the
    slowest sets the pace, because the stages overlap, but for drawing and scoring by turns in one process
    (`generators_score`). `store_seconds` a sample come from the driver: a shard's own
    stats are written before it is. `scored`: by a CLIP, and not the null one. Raises InputError when no sample was
    drawn.
    """
    samples = sum(part["count"] for part in stats)
    stored = sum(part["successes"] for part in stats)
    unusable = of_stage("caption")
    drawn = samples - sum(count for reason, count in _reasons(stats) if reason in unusable)
    if not drawn:
        raise InputError(f"pilot: none of its {samples} captions is usable; give a larger --pilot")
    scores = sum((ClipScores.of_shard(dict(part)) for part in stats if scored), ClipScores())
    seconds = {stage: sum(part[f"{stage}_seconds"] for part in stats) / drawn for stage in ("draw", "featurise")}
    seconds["write"] = sum(part["encode_seconds"] for part in stats) / drawn + store_seconds
    if generators_score:
        seconds["draw"] += seconds.pop("featurise")
    workers = {"draw": pools["draw"], "featurise": pools["featurise"], "write": pools["store"]}
    pace = {stage: seconds[stage] / workers[stage] for stage in seconds}  # seconds a sample
    bottleneck = max(pace, key=lambda stage: pace[stage])
    images = round(usable * stored / drawn)
    drawing_seconds = usable * pace[bottleneck]
    total_seconds = (startup_seconds or 0.0) + drawing_seconds
    units = billing.units(generators=pools["draw"], machines=machines)
    return Prediction(
        pilot_samples=samples,
        pilot_shards=len(stats),
        predicted_images=images,
        predicted_quarantined=expected - images,
        predicted_quarantined_share=(expected - images) / expected,
        predicted_bytes=round(sum(part["bytes"] for part in stats) * usable / drawn),
        predicted_images_per_second=images / drawing_seconds if drawing_seconds else 0.0,
        predicted_seconds_an_image=pools["draw"] * drawing_seconds / images if images else None,
        predicted_seconds=total_seconds,
        predicted_generator_hours=pools["draw"] * total_seconds / SECONDS_AN_HOUR,
        predicted_gpu_hours=units * total_seconds / SECONDS_AN_HOUR if billing.unit == "GPU" else None,
        predicted_cost=billing.cost(units * total_seconds),
        startup_seconds=startup_seconds,
        bottleneck=bottleneck,
        clip_score_mean=scores.mean,
        clip_score_standard_error=scores.standard_error,
    )


def describe(prediction: Prediction, *, generators: int) -> list[str]:
    """What a person reads."""
    error = prediction.clip_score_standard_error
    spread = "" if error is None else f" +- {error:.4f} (standard error)"
    score = "none" if prediction.clip_score_mean is None else f"{prediction.clip_score_mean:.4f}{spread}"
    hours = f"{prediction.predicted_generator_hours:.3g} generator-hours"
    if prediction.predicted_gpu_hours is not None:
        hours += f", {prediction.predicted_gpu_hours:.3g} GPU-hours"
    each = prediction.predicted_seconds_an_image
    seconds = "" if each is None else f" ({each:.4g} s a picture and generator)"
    cost = "" if prediction.predicted_cost is None else f", cost {prediction.predicted_cost:.4g}"
    quarantined = (
        f"{prediction.predicted_quarantined:,} quarantined ({100 * prediction.predicted_quarantined_share:.2f}%)"
    )
    startup = prediction.startup_seconds
    said = (
        "start-up and storing not measured (nothing was drawn now): they come on top"
        if startup is None
        else f"start-up {duration(startup)}"
    )
    return [
        f"predicted for the whole, from {prediction.pilot_samples:,} samples in {prediction.pilot_shards} shards:",
        f"  {prediction.predicted_images:,} images, {quarantined}, {size(prediction.predicted_bytes)}",
        f"  {prediction.predicted_images_per_second:.4g} images/s with {generators} generators{seconds}, limited by "
        f"{prediction.bottleneck}; {said}",
        f"  {duration(prediction.predicted_seconds)}, {hours}{cost}",
        f"  mean clip score {score}",
        "the same command without --pilot goes on from here",
    ]


def summary(prediction: Prediction, result: GenerationResult) -> dict[str, Any]:
    """What the job prints: the prediction, and what this run made."""
    ours = asdict(prediction)
    return {**result.summary(), **{name: _rounded(value) for name, value in ours.items()}}


def _rounded(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


def _reasons(stats: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, int]]:
    return (item for part in stats for item in part["quarantined_by_reason"].items())
