"""jobs.verify --redraw: some of a dataset's pictures drawn again from its plan and spec, compared with the stored ones.

Nothing on the store is changed. A picture is a pure function of (caption, spec, seed) on machines of one kind, so all
are identical there; elsewhere the summary says how far off the others are, and in what the environment differs.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.dataset.layout import Plan, load_manifest, load_plan, read_table, shard_number
from cluster.dataset.rows import read_shard
from cluster.dataset.verify import refuse_derived
from cluster.generation.environment import differences, environment
from cluster.generation.places import pools_of_cluster
from cluster.generation.stages.draw import DrawShard
from cluster.session import start_ray, user_error
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY, UNDRAWN
from pcm.images import open_image
from pcm.spec import DatasetSpec

log = logging.getLogger(__name__)

#: Pictures of one task, which loads the model once.
_AT_ONCE = 64
#: Pictures that differ, named in the summary.
_EXAMPLES = 10


@dataclass(frozen=True)
class Again:
    """A stored picture, and the one that was drawn now; b"" where none could be made."""

    sample_id: str
    stored: bytes
    drawn: bytes


#: Draws rows of a plan again: (store, spec, rows) -> their pictures and the environment that drew them.
DrawAgain = Callable[[Store, DatasetSpec, pa.Table], tuple[list[bytes], dict[str, Any]]]


def redraw_check(dataset: str, *, count: int, seed: int) -> dict[str, Any]:
    """Draw `count` stored pictures again, chosen by `seed`, on Ray. See `compare` for what is returned.

    Raises InputError, before Ray starts, where nothing was drawn here.
    """
    store = open_store(dataset)
    plan = planned(store)
    chosen = chosen_rows(store, plan, count=count, seed=seed)
    start_ray()
    pools = pools_of_cluster(device=plan.spec.generator.device)
    task: Any = ray.remote(draw_again).options(
        num_cpus=pools.generator_cpus, num_gpus=pools.generator_gpus, max_retries=3
    )
    work = list(batches(plan.spec, chosen))
    try:
        answers = ray.get([task.remote(store, spec, rows) for spec, rows in work])
    except ray.exceptions.RayError as error:
        raise user_error(error) or error from None
    return compare(store, [rows for _, rows in work], answers)


def planned(store: Store) -> Plan:
    """The plan of a finished dataset that was drawn here. Raises InputError for any other."""
    plan = load_plan(store)
    if plan is None:
        refuse_derived(store, "drawn again")
        raise InputError(f"{store.root}: not a dataset (no plan.json); give the --out of a jobs.generate run")
    if plan.spec.generator.model in (*UNDRAWN, TEXT_ONLY):
        raise InputError(f"--redraw: the pictures of {store.root} were not drawn here; leave it out")
    return plan


def chosen_rows(store: Store, plan: Plan, *, count: int, seed: int) -> pa.Table:
    """At most `count` stored rows, chosen at random by the seed, as plan rows with their picture, attempts and batch
    size. Raises InputError as read_shard does."""
    manifest = load_manifest(store)
    starts = np.cumsum([0, *(shard.rows for shard in manifest.stored_shards)])
    places = np.sort(np.random.default_rng(seed).permutation(starts[-1])[:count])
    tables = []
    for number, shard in enumerate(manifest.stored_shards):
        mine = places[(places >= starts[number]) & (places < starts[number + 1])] - starts[number]
        if not len(mine):
            continue
        stored = read_shard(store, shard, ["sample_id", "image", "attempts", "batch_size"]).take(mine)
        part = read_table(store, plan.part_key(shard_number(shard.key)))
        rows = part.take(pc.index_in(stored["sample_id"].combine_chunks(), part["sample_id"].combine_chunks()))
        images = stored["image"].combine_chunks().field("bytes")
        rows = rows.append_column("image", images).append_column("attempts", stored["attempts"])
        tables.append(rows.append_column("batch_size", stored["batch_size"]))
    if not tables:
        raise InputError(f"{store.root}: holds no stored picture to draw again")
    return pa.concat_tables(tables).combine_chunks()


def batches(spec: DatasetSpec, chosen: pa.Table) -> Iterator[tuple[DatasetSpec, pa.Table]]:
    """The rows in tasks, each with the spec by which its pictures were drawn: perhaps in smaller batches, for want of
    memory."""
    for size in sorted(set(chosen["batch_size"].to_pylist())):
        alike = chosen.filter(pc.equal(chosen["batch_size"], size))
        drawn = replace(spec, generator=replace(spec.generator, batch_size=size, max_attempts=1))
        for start in range(0, len(alike), _AT_ONCE):
            yield drawn, alike.slice(start, _AT_ONCE).combine_chunks()


def draw_again(store: Store, spec: DatasetSpec, rows: pa.Table) -> tuple[list[bytes], dict[str, Any]]:
    """The pictures of these rows, drawn by this process, and what it is. With the attempt that was stored then."""
    tried = pc.subtract(rows["attempts"], 1).cast(pa.int32())
    rows = rows.drop_columns(["image", "batch_size", "attempts"])
    drawn = DrawShard(store, spec).draw(rows.append_column("attempts", tried))
    found = environment(device=spec.generator.device, loads_models=spec.generator.model != "null")
    return drawn["image"].to_pylist(), found


def compare(
    store: Store, rows: Sequence[pa.Table], answers: Sequence[tuple[list[bytes], dict[str, Any]]]
) -> dict[str, Any]:
    """redrawn, identical (byte for byte), failed (nothing could be drawn), other_size, and of those that differ
    largest_difference and mean_difference of their pixels (0 to 255), with examples; environment_differs. `ok` is False
    where pictures differ and the environment does not say why."""
    pairs = [
        Again(sample_id, stored, drawn)
        for table, (pictures, _) in zip(rows, answers, strict=True)
        for sample_id, stored, drawn in zip(
            table["sample_id"].to_pylist(), table["image"].to_pylist(), pictures, strict=True
        )
    ]
    before = load_manifest(store).environments
    elsewhere = list(dict.fromkeys(line for _, now in answers for line in differences(before, now)))
    if not before:
        elsewhere = ["not known: the dataset does not say where it was drawn"]
    different = [each for each in pairs if each.drawn != each.stored]
    off = {each.sample_id: pixel_difference(each) for each in different if each.drawn}
    measured = [each for each in off.values() if each is not None]
    for line in elsewhere if different else ():
        log.info("environment: %s", line)
    return {
        "redrawn": len(pairs),
        "identical": len(pairs) - len(different),
        "failed": sum(not each.drawn for each in different),
        "other_size": sum(each is None for each in off.values()),
        "largest_difference": max((each[0] for each in measured), default=None),
        "mean_difference": float(np.mean([each[1] for each in measured])) if measured else None,
        "environment_differs": elsewhere,
        "examples": [
            {"sample_id": each.sample_id, "largest_difference": (off.get(each.sample_id) or (None,))[0]}
            for each in different[:_EXAMPLES]
        ],
        "ok": not different or bool(elsewhere),
    }


def pixel_difference(pair: Again) -> tuple[int, float] | None:
    """(largest, mean) absolute difference of the pixels' values, 0 to 255; None for pictures of two sizes."""
    stored, drawn = (
        np.asarray(open_image(data, name=pair.sample_id).convert("RGB"), np.int16) for data in (pair.stored, pair.drawn)
    )
    if stored.shape != drawn.shape:
        return None
    difference = np.abs(stored - drawn)
    return int(difference.max()), float(difference.mean())
