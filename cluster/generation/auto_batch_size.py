"""`--batch-size auto`: measured once on a machine of the cluster, then part of the dataset's spec."""

import logging
from dataclasses import replace

import ray

from cluster.dataset.layout import load_plan
from cluster.generation.pools import Pools
from cluster.session import user_error
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.generation.batch_search import Trial, best_size, table
from pcm.spec import DatasetSpec

log = logging.getLogger(__name__)

#: Of a GPU's memory, what a search leaves to CLIP where it shares the process: ViT-L/14 in bfloat16 needs 1 to 2 GB.
MEMORY_OF_CLIP = 0.2


def with_batch_size(store: Store, spec: DatasetSpec, pools: Pools) -> DatasetSpec:
    """The spec with the batch size that this dataset was begun with, or the best one measured on a generator's node.

    The measurement runs in one task that reserves what a generator reserves; on an autoscaling cluster it brings the
    first node. Where a generator scores too, a part of its GPU's memory is left to CLIP. All generators
    then draw in this size (a smaller GPU halves it for itself when its memory ends, and its rows say so).

    Raises InputError when not even one picture fits into the device's memory.
    """
    if (existing := load_plan(store)) is not None:
        size = existing.spec.generator.batch_size
        log.info("batch size %d: what this dataset was begun with", size)
    elif spec.generator.model == "null":
        return spec
    else:
        options = pools.draw_options(1)
        options.pop("compute")
        task = ray.remote(_try_generator).options(**options, max_retries=3)
        try:
            trials: list[Trial] = ray.get(task.remote(spec, 1.0 if pools.scorers else 1 - MEMORY_OF_CLIP))
        except ray.exceptions.RayError as error:
            raise user_error(error) or error from None
        found = best_size(trials)
        if found is None:
            raise InputError(
                f"batch size auto: one picture of {spec.generator.model} does not fit into the device's memory; "
                "give a smaller --width and --height, --dtype float16, or --vae-slicing"
            )
        size = found
        log.info("batch size %d chosen; images/s by batch size: %s", size, table(trials))
    return replace(spec, generator=replace(spec.generator, batch_size=size))


def _try_generator(spec: DatasetSpec, memory: float) -> list[Trial]:
    from pcm.generation.batch_search import try_generator  # torch and diffusers, only on the worker

    if spec.generator.device == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(memory)
    return try_generator(spec.generator)
