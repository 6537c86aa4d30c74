"""Ray's TorchTrainer as training uses it: where workers are placed, where checkpoints go, what is tried again."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig

from cluster.ray_internals import (
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    FailureDecision,
    NoopDecision,
    PolicyTrainer,
    ResizeDecision,
    TorchBackend,
    TrainingFailedError,
)
from cluster.session import free_room, room_for, user_error
from cluster.store.store import Store
from cluster.training.ray_storage import ray_storage
from pcm.errors import InputError, OneLineError

CHECKPOINTS = "checkpoints"

#: glibc returns what a step has freed to the system, which clears each page before the next step gets it back. Told to
#: keep it, in one arena for all threads: a step on a CPU is 4 % shorter, and reading some faster. Read when a
#: process starts.
MEMORY_KEPT = {
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # Arrow's own gives freed memory back at once too
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32 - 1),
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
}


def make_trainer(
    train_loop: Callable[[dict[str, Any]], str],
    loop_config: dict[str, Any],
    *,
    out: Store,
    score: str,
    sizes: tuple[int, ...],
    cpus: int,
    gpus: float,
    labels: Mapping[str, str],
    keep_checkpoints: int,
    max_failures: int,
    joined: bool,
) -> PolicyTrainer:
    """A trainer of a group of workers with `cpus` CPUs and `gpus` GPUs each: one, a share of one, or none.

    `sizes`: how many workers the group may have, ascending. With several it takes as many as there is room for, goes on
    with fewer from its last checkpoint when a node is lost, and with more after a checkpoint when there is room.
    `labels`: workers are placed on nodes that have these. Of the checkpoints those with the `keep_checkpoints` highest
    `score` are kept, and the newest. `joined`: the cluster is not this process's own.
    """
    elastic: dict[str, Any] = {"elastic_resize_monitor_interval_s": 0.0} if len(sizes) > 1 else {}
    trainer = (_Trainer if joined else _LocalTrainer)(
        train_loop,  # type: ignore[arg-type]  # V2 takes a return value; Ray's annotations here are still V1's
        train_loop_config=loop_config,
        torch_config=_TorchConfig(),
        scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]
            num_workers=(sizes[0], sizes[-1]) if len(sizes) > 1 else sizes[0],  # type: ignore[arg-type]
            **elastic,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
            label_selector=dict(labels) or None,
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=CHECKPOINTS,
            **ray_storage(out),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": MEMORY_KEPT},
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=keep_checkpoints, checkpoint_score_attribute=score
            ),
        ),
    )
    if len(sizes) > 1:
        worker = {"cpus": cpus, "gpus": gpus, "labels": labels}
        trainer.scaling_policy = lambda scaling_config: _GroupSizes(scaling_config, sizes, worker)
    return trainer


class _Backend(TorchBackend):
    """NCCL only where torch knows the workers' GPUs; else they train on CPUs, and say so (worker.worker_device)."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        has_gpus = worker_group.get_resources_per_worker().get("GPU", 0) > 0
        if has_gpus and not all(worker_group.execute(_torch_finds_gpu)):
            backend_config = replace(backend_config, backend="gloo")
        super().on_start(worker_group, backend_config)


def _torch_finds_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass
class _TorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


class _FailurePolicy(DefaultFailurePolicy):
    """What is wrong with the input is wrong with it the next time too."""

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if worker_input_error(training_failed_error) is not None:
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _GroupSizes(ElasticScalingPolicy):
    """Ray's elastic group, in sizes that can share a batch. It grows right after a checkpoint: no step is lost."""

    def __init__(self, scaling_config: Any, sizes: tuple[int, ...], worker: Mapping[str, Any]) -> None:
        """`worker`: cpus, gpus and labels of each, as `room_for` takes them."""
        super().__init__(scaling_config)
        self._sizes, self._worker = sizes, worker
        self._reports: Counter[int] = Counter()  # by rank
        self._complete = 0
        self._group_started: float | None = None

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        reserved = super()._count_possible_workers(reserved_resources)  # of any nodes, whatever their labels
        return self._largest(min(reserved, room_for(**self._worker)))

    def _largest(self, room: int) -> int:
        return max((size for size in self._sizes if size <= room), default=0)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        self._maybe_send_resource_request()  # Ray forgets in three minutes what is not asked for again
        if not self._has_new_checkpoint(worker_group_state.start_time, worker_group_status.worker_statuses):
            return NoopDecision()
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        now = worker_group_state.num_workers
        if isinstance(decision, ResizeDecision) and decision.num_workers > now:
            # Ray counts what other jobs have as well: the group would be stopped, and wait for them to end.
            decision.num_workers = self._largest(min(decision.num_workers, now + free_room(**self._worker)))
            return decision if decision.num_workers > now else NoopDecision()
        return decision

    def _has_new_checkpoint(self, started: float, statuses: Mapping[int, Any]) -> bool:
        """Whether a checkpoint has become whole: every rank has reported it, the first with its files, the others with
        none (Checkpoints.save). Nothing else is reported.
        """
        if started != self._group_started:
            self._group_started = started
            self._reports.clear()
            self._complete = 0
        self._reports.update(rank for rank, status in statuses.items() if status.training_report is not None)
        before, self._complete = self._complete, min(self._reports[rank] for rank in statuses)
        return self._complete > before


class _Trainer(PolicyTrainer):
    failure_policy = _FailurePolicy


class _LocalTrainer(_Trainer):
    """On a Ray that ends with this process, and has no dashboard."""

    cleans_up = False


def worker_input_error(error: BaseException) -> OneLineError | None:
    """What a worker, or Ray's keeper of the checkpoints, raised that ends a job in one line, if that is why training
    failed.
    """
    failures = [*getattr(error, "worker_failures", {}).values()]
    if (of_controller := getattr(error, "controller_failure", None)) is not None:
        failures.append(of_controller)
    return next((found for failure in failures if (found := user_error(failure))), None)


def check_labels(labels: Mapping[str, str], *, joined: bool) -> None:
    """Raises InputError for labels on a Ray of this machine alone, whose one node has none: Ray would wait for it."""
    if labels and not joined:
        named = " ".join(f"{name}={value}" for name, value in labels.items())
        raise InputError(f"--worker-label {named}: only on a cluster (RAY_ADDRESS), whose nodes have labels")
