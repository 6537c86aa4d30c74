"""Quarantined samples tried again: those that failed through the generator or by their seeds, not the bad captions."""

import logging
import secrets

from cluster.dataset.committed import committed, summaries
from cluster.dataset.documents import Plan
from cluster.generation.limits import FaultPolicy
from cluster.generation.pipeline import run_pipeline
from cluster.generation.pools import Pools
from cluster.generation.retrying import Retry, interrupted_retry, samples_left, wanted
from cluster.generation.stages.draw import DrawShard
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.reasons import RETRYABLE, of_stage

log = logging.getLogger(__name__)

#: Stands for every reason of the stage "generator".
ALL_GENERATOR = "all-generator"


def parse_reason(reason: str) -> frozenset[str]:
    """The reasons that a --retry-quarantined argument means. Raises InputError."""
    if reason == ALL_GENERATOR:
        return frozenset(of_stage("generator"))
    if reason not in RETRYABLE:
        raise InputError(
            f"retry of {reason!r}: allowed are {', '.join(RETRYABLE)} and {ALL_GENERATOR}; captions that were refused "
            "for what they are stay so"
        )
    return frozenset([reason])


def require_finished(store: Store, plan: Plan) -> None:
    """Raises InputError for a dataset with shards to make yet, unless a retry of it was interrupted."""
    if not committed(store, plan).complete and interrupted_retry(store) is None:
        raise InputError(f"{store.root}: an unfinished dataset; finish it with its jobs.generate command first")


def retry_quarantined(
    store: Store,
    plan: Plan,
    reason: str,
    pools: Pools,
    *,
    faults: FaultPolicy | None = None,
    draw: type[DrawShard] = DrawShard,
) -> dict:
    """Draw the samples quarantined for a reason once more, and put those that succeed into their shards.

    A defective picture goes on with the seeds after those that were tried, as many as the spec allows; anything else
    is tried with the seed at which it failed. What is stored keeps its bytes. Killed midway, the same call ends what
    it began, as does a run that makes the dataset, and tries nothing twice; until then the dataset has no manifest, and
    verification sees samples that are stored and quarantined.

    Returns the summary of a run, and `tried_again`: how many samples were tried again. Raises InputError when the
    dataset is unfinished, and when a retry for other reasons was interrupted.
    """
    reasons = parse_reason(reason)
    require_finished(store, plan)
    retry = interrupted_retry(store)
    if retry is None:
        retry = Retry(reasons, secrets.token_hex(8))
        retried = {part["shard"]: count for part in summaries(store, plan) if (count := wanted(part, retry))}
    elif retry.reasons == reasons:
        on_store = committed(store, plan)
        retried = samples_left(store, [shard for shard in range(plan.num_shards) if shard in on_store], retry)
    else:
        raise InputError(
            f"{store.root}: a retry of {', '.join(sorted(retry.reasons))} was interrupted; finish it first, with its "
            "--retry-quarantined or the jobs.generate command of the dataset"
        )
    tried_again = sum(retried.values())
    log.info("%d samples in %d shards are tried again", tried_again, len(retried))
    result = run_pipeline(store, plan, pools, faults=faults, redo=retried, retry=retry, retried=retried, draw=draw)
    return {**result.summary(), "tried_again": tried_again}
