"""Where the workers of a training run are: how many, on which device, with how many CPUs."""

import logging
from dataclasses import dataclass

import ray.train

from cluster.device import device_of_cluster, require_gpu_here
from cluster.session import cluster_cpus, cluster_gpus, cpus_for_each, is_joined, room_for, who_has
from cluster.training.config import TrainConfig
from cluster.training.request import TrainRequest
from pcm.errors import InputError

log = logging.getLogger(__name__)


def group_sizes(config: TrainConfig, asked: int | tuple[int, int]) -> tuple[int, ...]:
    """How many workers a group may have, ascending: of a number itself, of (least, most) those that can share a batch.

    Raises InputError where none can.
    """
    least, most = asked if isinstance(asked, tuple) else (asked, asked)
    found = [size for size in range(least, most + 1) if _shares_batch(config, size)]
    if not found:
        named = f"{least}:{most}" if isinstance(asked, tuple) else f"{asked}"
        possible = [str(size) for size in range(1, config.batch_size + 1) if _shares_batch(config, size)]
        raise InputError(
            f"--num-workers {named}: batch size {config.batch_size} with grad_accumulation {config.grad_accumulation} "
            f"cannot be divided evenly among so many; possible are {', '.join(possible)}, or change batch_size"
        )
    return tuple(found)


def _most_workers(config: TrainConfig, *, gpus: int) -> int:
    """One for each GPU, or as many fewer as can share a batch, which is said; one where there are no GPUs."""
    workers = max((size for size in range(1, gpus + 1) if _shares_batch(config, size)), default=1)
    if workers < gpus:
        log.info(
            "training on %d of %d GPUs: batch size %d with grad_accumulation %d cannot be divided evenly among more; "
            "--set batch_size=N changes that",
            workers, gpus, config.batch_size, config.grad_accumulation,
        )  # fmt: skip
    return workers


def _shares_batch(config: TrainConfig, workers: int) -> bool:
    return config.batch_size % workers == 0 and config.batch_size // workers % config.grad_accumulation == 0


@dataclass(frozen=True)
class Placement:
    """Where a run is trained: so many workers with so many CPUs each, and where the device is cuda with so much GPU."""

    device: str
    sizes: tuple[int, ...]  # that the group of workers may have, ascending
    cpus: int
    gpus_per_worker: float  # 0 on CPUs

    @property
    def num_workers(self) -> int:
        """The least that training begins with."""
        return self.sizes[0]


def placement_of(request: TrainRequest, config: TrainConfig, *, joined: bool, before: str | None = None) -> Placement:
    """What is asked of the cluster: where the device is named, also what it has not yet, for a cluster may grow; with
    nothing there at all, the device that the run was begun on `before` names it.

    Raises InputError where nobody says what to wait for, for what the cluster cannot give, and for another device than
    the run was begun on: its numbers would be others.
    """
    labels = request.worker_labels
    cpus, gpus = int(cluster_cpus(labels)), int(cluster_gpus(labels))
    named = joined and (request.device != "auto" or not (cpus or gpus))
    device = device_of_cluster(request.device, before=before, labels=labels)
    if before not in (None, device):
        raise InputError(
            f"{request.out}: was begun on {before}, and this is {device}; give --device {before}, or another --out"
        )
    sizes = group_sizes(config, request.num_workers or _most_workers(config, gpus=gpus if device == "cuda" else 0))
    workers = sizes[-1]
    if device == "cpu" and request.gpus_per_worker < 1:
        raise InputError(
            f"--gpus-per-worker {request.gpus_per_worker:g}: {who_has(labels)} no GPU; leave it out, or give --device "
            "cuda on a cluster that grows"
        )
    share = request.gpus_per_worker if device == "cuda" else 0
    each = request.cpus_per_worker or cpus_for_each(workers, gpus=share, labels=labels)
    place = Placement(device, sizes, each, share)
    if len(sizes) > 1 and not joined:
        raise InputError(
            f"--num-workers {sizes[0]}:{workers}: no nodes come to this machine; give a number, or join a cluster "
            "(RAY_ADDRESS)"
        )
    if named or len(sizes) > 1:
        return place
    if place.gpus_per_worker * workers > gpus:
        raise InputError(f"--num-workers {workers}: {who_has(labels)} {gpus} GPUs, and each worker takes one")
    if room_for(cpus=place.cpus, gpus=place.gpus_per_worker, labels=labels) < workers:
        split = ", too few on one node" if workers * place.cpus <= cpus else ""
        raise InputError(
            f"--num-workers {workers} with {place.cpus} CPUs each: {who_has(labels)} {cpus} CPUs{split}; take fewer"
        )
    return place


def check_gpu_here(device: str) -> None:
    """Raises InputError where a GPU is asked for and this machine, which is to start Ray alone, has none."""
    if not (is_joined() or ray.is_initialized()):
        require_gpu_here(device, "leave --device out, or join a cluster that has one (RAY_ADDRESS)")
