"""What is measured once on a machine of the cluster and then part of a dataset: `--batch-size auto`, the shard size."""

import logging
from collections.abc import Iterator
from dataclasses import replace

from cluster.dataset.request import ShardOptions
from cluster.generation.capacity import Result, with_generator_resources
from cluster.generation.picture_spec import refuse_other_models
from cluster.generation.pools import Pools
from cluster.gpu_share import keep_to_gpu_share
from cluster.store.retries import load_with_retries
from cluster.weights.node_copy import local_generator
from pcm.errors import InputError
from pcm.generation.batch_search import Trial, best_size, rate_of, table
from pcm.spec import DatasetSpec

log = logging.getLogger(__name__)

#: Of a GPU's memory, what a search leaves to CLIP where it shares the process: ViT-L/14 in bfloat16 needs 1 to 2 GB.
MEMORY_OF_CLIP = 0.2

#: A death costs a generator what it has drawn of its shard, and the last shards of a run are drawn by few.
SHARD_SECONDS = 600.0

#: Models that draw several pictures a second on one core: a shard of the default size takes them a minute.
_FAST = ("null", "embedded")


def measured(spec: DatasetSpec, pools: Pools, *, batch_size: bool, shard_size: int | None) -> tuple[DatasetSpec, int]:
    """(spec, shard size) of a new dataset: with `batch_size` the best one measured, and with no `shard_size` one that
    takes ten minutes at most.

    The measurement runs in one task that reserves what a generator reserves; on an autoscaling cluster it brings the
    first node. It is as patient as generators are (`with_generator_resources`), and the log says what it waits for.
    Where a generator scores too, a part of its GPU's memory is left to CLIP. All generators then draw in this size (a
    smaller GPU halves it for itself when its memory ends, and its rows say so).

    Raises InputError when not even one picture fits into the device's memory.
    """
    generator = spec.generator
    batch_size = batch_size and generator.model != "null"
    if not batch_size and (shard_size is not None or generator.model in _FAST):
        return spec, shard_size or ShardOptions.shard_size
    memory = 1.0 if pools.scorers else 1 - MEMORY_OF_CLIP
    what = f"speed of {generator.model}"
    trials = with_generator_resources(_try_generator, pools, spec, memory, search=batch_size, what=what)
    size = best_size(trials)
    if size is None:
        raise InputError(
            f"{generator.model}: one picture does not fit into the device's memory; give a smaller --width and "
            "--height, --dtype float16, or --vae-slicing"
        )
    if batch_size:
        log.info("batch size %d chosen; images/s by batch size: %s", size, table(trials))
        spec = replace(spec, generator=replace(generator, batch_size=size))
    if shard_size is None:
        shard_size = shard_size_at(rate_of(trials, size), batch_size=size)
        log.info("%.3g images/s: shards of %d samples (--shard-size %d)", rate_of(trials, size), shard_size, shard_size)
    return spec, shard_size


def shard_size_at(images_per_second: float, *, batch_size: int) -> int:
    """The default, or whole batches that take SHARD_SECONDS at most, or at least one picture."""
    most = int(images_per_second * SHARD_SECONDS)
    if most >= ShardOptions.shard_size:
        return ShardOptions.shard_size
    return max(1, most - most % batch_size if most > batch_size else most)


def _try_generator(spec: DatasetSpec, memory: float, *, search: bool) -> Iterator[str | Result[list[Trial]]]:
    keep_to_gpu_share(spec.generator.device, part=memory)
    yield "loading the model"
    # Torch and diffusers, only on the worker.
    from pcm.generation.batch_search import try_generator
    from pcm.generation.diffusers_pipeline import DiffusersTextToImage

    def load() -> DiffusersTextToImage:
        refuse_other_models(spec)
        return DiffusersTextToImage(local_generator(spec.generator))

    generator = load_with_retries(load, model=spec.generator.model)
    yield "drawing batches of several sizes" if search else f"drawing two batches of {generator.batch_size}"
    yield Result(try_generator(generator, search=search))
