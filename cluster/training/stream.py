"""Training that starts while its pictures are still being made.

Generation persists a shard, then training reads it from the store: epoch 0 takes the shards in the order of the plan as
they are committed (cluster.training.data.arriving), later epochs are shuffled over the finished dataset as always.
The two sides meet nowhere but on the store, so each resumes by its own rules: a shard that is there is not drawn
again, a step that a checkpoint has counted is not trained again. Everything training needs before the first picture -
vocabulary, concepts, CLIP head - comes from the captions: the first generator stores it before it draws.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from typing import Any, TypeVar

from ray.data import DataContext, ExecutionResources

from cluster.dataset.documents import Plan, refuse_dataset
from cluster.dataset.vocabularies import stored_features, vocabularies_stored
from cluster.generation.make import prepare
from cluster.generation.pinning import require_joint_patches
from cluster.generation.pipeline import GenerationResult
from cluster.generation.pools import Pools
from cluster.generation.presets import with_preset
from cluster.generation.retrying import interrupted_retry
from cluster.numbers import duration
from cluster.only_job import TRAINS, only_job, place
from cluster.session import cluster_cpus, cluster_gpus, cpus_for_each, is_joined, who_has
from cluster.store.store import Store, open_store
from cluster.training.data.mixture import arriving_set
from cluster.training.reporting import FIRST_STEP_KEY
from cluster.training.request import StreamRequest, TrainRequest
from cluster.training.run_document import CONFIG_KEY
from cluster.training.train import check_settings, train
from pcm.errors import InputError
from pcm.spec import DatasetSpec
from pcm.text.metrics import require_metrics

log = logging.getLogger(__name__)

#: How often training looks whether the first generator has stored the vocabularies, which it does before it draws.
VOCABULARY_POLL_SECONDS = 0.5

_Result = TypeVar("_Result")


def stream(request: StreamRequest) -> dict[str, Any]:
    """Generate and train at once: `_generate_and_train`, whose summary it is, on a cluster shared between both sides.

    Raises InputError for what cannot be used, before Ray is started wherever that can be told before.
    """
    asked = with_preset(request, request.generation_preset)
    if (asked.clip or asked.t2i) == "null":
        raise InputError("--clip null: gives no features to train on; name an open_clip model")
    training = request.training
    check_settings(training)
    require_metrics()
    run = open_store(training.out)
    refuse_dataset(open_store(request.out), shown="--out")
    if place(run) == place(open_store(request.dataset)):
        raise InputError(f"--out {request.out}: is the place of the dataset too (--data); give two places")
    prepared = prepare(open_store(request.dataset), asked, check=_check_clip)
    device = prepared.plan.spec.generator.device
    workers, cpus, gpus = _training_share(request, device=device)
    pools = _pools(request, device=device, cpus=workers * cpus, gpus=workers * gpus)
    with only_job(run, TRAINS, waits=False):
        summary = _generate_and_train(
            prepared.store,
            prepared.plan,
            replace(training, device=device, num_workers=workers, cpus_per_worker=cpus),
            replace(prepared, pools=pools).generate,
            cpus=workers * cpus,
            gpus=workers * gpus,
        )
    return {**summary, "dataset": request.dataset}


def _check_clip(spec: DatasetSpec) -> None:
    require_joint_patches(spec.clip.model, spec.clip.revision)


def _training_share(request: StreamRequest, *, device: str) -> tuple[int, int, float]:
    """(workers, CPUs of each, GPUs of each): on GPUs one worker with one of them, on CPUs half of them."""
    assert not isinstance(request.num_workers, tuple)
    workers = request.num_workers or 1
    if device == "cuda":
        return workers, request.cpus_per_worker or 1, request.gpus_per_worker
    labels = request.worker_labels
    half = max(1, int(cluster_cpus(labels)) // 2 // workers)
    return workers, request.cpus_per_worker or min(half, cpus_for_each(workers, labels=labels)), 0


def _pools(request: StreamRequest, *, device: str, cpus: float, gpus: float) -> Pools:
    """Generation's actors on what training leaves of the nodes with their label. Raises InputError when that is
    nothing.

    On a cluster that is joined the generators that are named are waited for, because it may grow.
    """
    labels, of_training = request.node_labels, request.worker_labels
    if any(of_training.get(name, value) != value for name, value in labels.items()):  # its workers are on other nodes
        cpus = gpus = 0.0
    has = {"cpus": cluster_cpus(labels), "gpus": cluster_gpus(labels)}
    left = {"cpus": max(0.0, has["cpus"] - cpus), "gpus": max(0.0, has["gpus"] - gpus)}
    waits = request.generators is not None and is_joined()
    if not waits and (left["cpus"] < 1 or (device == "cuda" and left["gpus"] < 1)):
        raise InputError(
            f"training takes {cpus:g} CPUs and {gpus:g} GPUs, and {who_has(labels)} {has['cpus']:g} and "
            f"{has['gpus']:g}, which leaves none for generation; lower --num-workers or --cpus-per-worker, name "
            "--generators on a cluster that grows, or run jobs.generate first and jobs.train then"
        )
    pools = Pools.of(request, device=device, **left)
    if not is_joined():
        pools.require_room_for_clip(left["gpus"])
    return pools


def _generate_and_train(
    store: Store,
    plan: Plan,
    request: TrainRequest,
    generating: Callable[[], GenerationResult],
    *,
    cpus: float,
    gpus: float,
) -> dict[str, Any]:
    """Generate and train at once; both summaries, and

    first_step_seconds: from the call to the first optimiser step (None when an earlier run made it);
    generation_seconds: from the call to the manifest.

    `generating` makes the dataset; `cpus` and `gpus` are the workers' and left alone by it. Whichever side fails first
    ends both: what it raised is raised. Run it again to go on. Raises InputError where a retry was interrupted.
    """
    if interrupted_retry(store) is not None:  # it replaces shards, which training would read before or after
        raise InputError(
            f"{store.root}: a --retry-quarantined was interrupted; end it with jobs.verify {store.root} --repair first"
        )
    started, began = time.monotonic(), time.time()
    request = replace(request, overrides={**request.overrides, "first_epoch": "plan"}, resume=_is_begun(request))
    context = DataContext.get_current()
    context.execution_options.exclude_resources = ExecutionResources(cpu=cpus, gpu=gpus)
    generated = _in_thread("generation", generating)
    while not (generated.done() or vocabularies_stored(store, plan)):
        time.sleep(VOCABULARY_POLL_SECONDS)
    if generated.done():
        generated.result()  # raises what ended it
    arriving = arriving_set(store, plan, stored_features(store, plan))
    trained = _in_thread("training", lambda: train(request, arriving=(arriving,)))
    generation_seconds = None
    waiting: set[Future] = {generated, trained}
    while waiting:
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for side in done:
            side.result()  # raises what ended it; the threads and their actors end with this process
        if generated in done:
            generation_seconds = time.monotonic() - started
            log.info("all pictures are there after %s; training goes on", duration(generation_seconds))
    assert generation_seconds is not None
    return {
        **generated.result().summary(),
        **trained.result(),
        "generation_seconds": round(generation_seconds, 2),
        "first_step_seconds": _first_step_seconds(open_store(request.out), began),
        "seconds": round(time.monotonic() - started, 2),
    }


def _is_begun(request: TrainRequest) -> bool:
    return open_store(request.out).exists(CONFIG_KEY)


def _in_thread(name: str, work: Callable[[], _Result]) -> "Future[_Result]":
    """Like an executor's, but a daemon: a process that gives up does not wait for the other side."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _first_step_seconds(out: Store, started: float) -> float | None:
    at = json.loads(out.read_bytes(FIRST_STEP_KEY))["at"]
    return round(at - started, 2) if at >= started else None
