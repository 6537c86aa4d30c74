"""A process that uses a GPU keeps to the share of it that it reserved, and a task's gives it back as the task ends.

All keep to it but one: the task that embeds a dataset's concepts (cluster.dataset.vocabularies.run_with_clip) reserves
a fifth of a GPU and may take more. It loads a whole CLIP for some seconds, and a very large one does not fit into a
fifth of a GPU of 24 GB.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

#: Memory grows in segments that can be extended, so that two sizes of batch do not leave holes between them.
ALLOCATOR = "expandable_segments:True"


def keep_to_gpu_share(device: str, *, part: float = 1.0) -> None:
    """Take no more than `part` of what Ray reserved of its GPU for this process, as long as it runs; nothing on a CPU.

    To be called before the first tensor is on the GPU: then only is the allocator's setting read. What a user has set
    stays.
    """
    if device != "cuda":
        return
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
    import torch  # reads the setting

    if (share := part * min(1.0, gpu_share() or 1.0)) < 1:
        torch.cuda.set_per_process_memory_fraction(share)


def keep_to_shared_gpu() -> None:
    """The same for a process that may have a whole GPU, or none: then nothing is changed."""
    import torch

    if 0 < gpu_share() < 1 and torch.cuda.is_available():
        keep_to_gpu_share("cuda")


def worker_has_gpu(doing: str) -> bool:
    """Whether Ray gave this worker a GPU that torch finds. One that torch does not find is said in a warning, with what
    the worker is `doing` without it: a CPU is slow. From a worker that reserved none Ray does not hide the GPUs."""
    import torch

    if not gpu_share():
        return False
    if not torch.cuda.is_available():
        log.warning("Ray gave this worker a GPU, but torch finds none: %s on the CPU", doing)
        return False
    return True


def gpu_task(work: Callable[..., Any], **options: Any) -> Any:
    """A task of Ray with these options. One that takes a GPU has a process of its own, which ends with it: an idle one
    would keep its CUDA context, and all that it loaded, beside whoever has that GPU next.

    Ray does so where the GPUs are named in ray.remote(...), and does not where .options(...) names them.
    """
    import ray

    return ray.remote(**options)(work)


def gpu_share() -> float:
    """GPUs that Ray reserved for this task or actor; 0 outside of one."""
    import ray  # the stages are usable without it

    if not ray.is_initialized() or ray.get_runtime_context().worker.mode != ray.WORKER_MODE:
        return 0.0
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
