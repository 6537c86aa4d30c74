"""On which device work runs, and in which precision, where that is left to us."""

import logging
from collections.abc import Mapping

from cluster.session import cluster_cpus, cluster_gpus, who_has
from pcm.errors import InputError

log = logging.getLogger(__name__)


def device_of_cluster(asked: str, *, before: str | None = None, labels: Mapping[str, str] | None = None) -> str:
    """'auto' is cuda where the cluster has a GPU now, else cpu. Where it has nothing for work yet nobody can say what
    will come: it is what the dataset was begun with `before`. Raises InputError for one that was not.

    `labels`: only nodes with these count.
    """
    gpus = cluster_gpus(labels)
    if asked == "auto" and not (cluster_cpus(labels) or gpus):
        if before is not None:
            return before
        raise InputError(
            f"--device auto: {who_has(labels)} no CPUs and GPUs for work now; give --device cuda or --device cpu, and "
            "they are waited for"
        )
    return resolve_device(asked, cluster_gpus=gpus)


def resolve_device(device: str, *, cluster_gpus: float) -> str:
    """'auto' is cuda where the cluster has a GPU now, else cpu."""
    if device != "auto":
        return device
    return "cuda" if cluster_gpus else "cpu"


def resolve_dtype(dtype: str, *, device: str) -> str:
    """'auto' is bfloat16 on a GPU, float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" else "float32"


def require_gpu_here(device: str, or_else: str) -> None:
    """Raises InputError where a GPU is asked for and torch finds none on this machine; `or_else`: what to do then."""
    if device == "cuda":
        import torch  # seconds to import

        if not torch.cuda.is_available():
            raise InputError(f"--device cuda: torch finds no GPU on this machine; {or_else}")


def warn_of_slow_bfloat16_here(device: str, dtype: str) -> None:
    """Warn where CLIP of a new dataset is to run in bfloat16 on a GPU of this machine that has none."""
    if device != "cuda" or dtype != "bfloat16":
        return
    import torch

    from pcm.precision import is_slow_in_bfloat16

    if is_slow_in_bfloat16(device):
        log.warning(
            "%s: has no bfloat16 of its own, and is slow in it; end this and give --dtype float16, for a dataset keeps "
            "what it was begun with",
            torch.cuda.get_device_name(),
        )
