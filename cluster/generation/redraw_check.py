"""jobs.verify --redraw: some of a dataset's pictures drawn again from its plan and spec, compared with the stored ones.

Nothing on the store is changed. The pictures of a view are those of the datasets that hold them. What may differ:
`cluster.generation.redraw_compare`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.dataset.documents import Manifest, Plan, StoredShard, load_manifest, load_plan, read_plan_part
from cluster.dataset.environment import drawn_in, environment, load_environment
from cluster.dataset.keys import shard_number, stats_key
from cluster.dataset.rows import read_shard, read_view_part
from cluster.dataset.verify import require_plan
from cluster.generation.capacity import pools_of_cluster
from cluster.generation.moved_models import NOT_MOVED, ModelPlaces
from cluster.generation.picture_spec import other_models
from cluster.generation.redraw_compare import compare, paired
from cluster.generation.stages.draw import DrawShard
from cluster.gpu_share import gpu_task
from cluster.session import start_ray, user_error, waiting_for
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY, UNDRAWN
from pcm.spec import DatasetSpec

#: Pictures of one task, which loads the model once.
_AT_ONCE = 64


@dataclass(frozen=True)
class Chosen:
    """Stored pictures of one dataset that was drawn here.

    rows: of its plan, and of each its picture, attempts, batch size, and `environments`: digests of where its shard was
    drawn. known: the environment of each of these digests that the dataset says.
    """

    store: Store
    spec: DatasetSpec
    rows: pa.Table
    known: Mapping[str, dict[str, Any]]


def redraw_check(store: Store, plans: Mapping[str, Plan], *, count: int, seed: int) -> dict[str, Any]:
    """Draw `count` stored pictures again, chosen by `seed`, on Ray. `plans`: what `plans_of` says. See `compare` for
    what is returned, and `not_drawn_here`: rows of a view that were chosen and whose pictures no plan says how to draw.

    Raises InputError, before Ray starts, where nothing was drawn here.
    """
    chosen, others = choose(store, plans, count=count, seed=seed)
    start_ray()
    work = [(each, *task) for each in chosen for task in batches(each.spec, each.rows)]
    try:
        answers = _on_ray(work)
    except ray.exceptions.RayError as error:
        raise user_error(error) or error from None
    pairs = [
        pair
        for (each, _, rows), (pictures, now) in zip(work, answers, strict=True)
        for pair in paired(rows, pictures, each.known, now)
    ]
    return {**compare(pairs), "not_drawn_here": others}


def _on_ray(work: Sequence[tuple[Chosen, DatasetSpec, pa.Table]]) -> list[tuple[list[bytes], dict[str, Any]]]:
    """What `draw_again` gives for each of these, with a generator's resources. The log says what is waited for."""
    devices = {spec.generator.device for _, spec, _ in work}
    pools_on = {device: pools_of_cluster(device=device) for device in devices}
    tasks = {
        device: gpu_task(draw_again, num_cpus=pools.generator_cpus, num_gpus=pools.generator_gpus, max_retries=3)
        for device, pools in pools_on.items()
    }
    answers = []
    with ExitStack() as waits:
        for pools in pools_on.values():
            waits.enter_context(waiting_for(cpus=pools.generator_cpus, gpus=pools.generator_gpus))
        for each, spec, rows in work:
            answers.append(tasks[spec.generator.device].remote(each.store, spec, rows))
        return list(ray.get(answers))


def plans_of(store: Store, places: ModelPlaces = NOT_MOVED) -> dict[str, Plan]:
    """Where pictures of a finished dataset or view lie that were drawn here: address -> the plan there. `places`: of
    what has moved, for those whose generator is not where it was.

    Raises InputError where there are none, and where a model that drew them is not there or another now.
    """
    manifest = load_manifest(store)
    if not manifest.is_view:
        drawn = {store.address: _planned(store)}
    else:
        plans = {each.path: load_plan(open_store(each.path)) for each in manifest.pictures}
        drawn = {path: plan for path, plan in plans.items() if plan is not None and _is_drawn(plan)}
    if not drawn:
        raise InputError(f"--redraw: no pictures of {store.root} were drawn here; leave it out")
    # A dataset and its redraws have the same generator, whose files are read once.
    generators = {path: (plan.spec.generator, plan.spec.generator_version) for path, plan in drawn.items()}
    others = {each: other_models(each[0], version=each[1]) for each in set(generators.values())}
    if places != NOT_MOVED:
        moved = [path for path, each in generators.items() if others[each]] or list(drawn)
        return drawn | {path: places.plan_at(open_store(path), drawn[path]) for path in moved}
    for path, each in generators.items():
        for other in others[each]:
            what = (
                "only the release that drew it has that one"
                if other.name == "embedded"
                else f"put that one there again, or give --{other.option} with its place"
            )
            raise InputError(
                f"--redraw: {path} was drawn with --{other.option} {other.name} at {other.pinned}, which is "
                f"{other.now} now; {what}, or leave --redraw out"
            )
    return drawn


def _planned(store: Store) -> Plan:
    plan = require_plan(store, "drawn again")
    if not _is_drawn(plan):
        raise InputError(f"--redraw: the pictures of {store.root} were not drawn here; leave it out")
    return plan


def _is_drawn(plan: Plan) -> bool:
    return plan.spec.generator.model not in (*UNDRAWN, TEXT_ONLY)


def choose(store: Store, plans: Mapping[str, Plan], *, count: int, seed: int) -> tuple[list[Chosen], int]:
    """(at most `count` stored pictures, chosen at random by the seed, each once; how many more were chosen that are in
    none of `plans`). Raises InputError as read_shard does, and where none is left."""
    shards: dict[tuple[str, StoredShard], np.ndarray] = {}
    for dataset, shard, rows in _places(store, load_manifest(store), count=count, seed=seed):
        shards[dataset, shard] = np.union1d(rows, shards.get((dataset, shard), rows))
    others = sum(len(rows) for (dataset, _), rows in shards.items() if dataset not in plans)
    chosen = []
    for dataset, plan in plans.items():
        source = open_store(dataset)
        tables = [_rows(source, plan, shard, rows) for (where, shard), rows in shards.items() if where == dataset]
        if tables:
            rows = pa.concat_tables(tables).combine_chunks()
            digests = {digest for each in rows["environments"].to_pylist() for digest in each}
            found = ((digest, load_environment(source, digest)) for digest in sorted(digests))
            chosen.append(Chosen(source, plan.spec_to_load, rows, {digest: each for digest, each in found if each}))
    if not chosen:
        none = "none of the chosen pictures was drawn here; choose more" if others else "holds no stored picture"
        raise InputError(f"--redraw: {store.root}: {none}")
    return chosen, others


def _places(
    store: Store, manifest: Manifest, *, count: int, seed: int
) -> Iterator[tuple[str, StoredShard, np.ndarray]]:
    """(dataset, shard, rows of it) of the pictures of rows chosen at random."""
    starts = np.cumsum([0, *(shard.rows for shard in manifest.stored_shards)])
    places = np.sort(np.random.default_rng(seed).permutation(starts[-1])[:count])
    for number, shard in enumerate(manifest.stored_shards):
        mine = places[(places >= starts[number]) & (places < starts[number + 1])] - starts[number]
        if not len(mine):
            continue
        if not manifest.is_view:
            yield store.address, shard, mine
            continue
        for pictures, rows, _ in read_view_part(store, shard).groups(mine):
            yield shard.pictures[pictures.pictures], pictures.stored, rows


def _rows(store: Store, plan: Plan, shard: StoredShard, rows: np.ndarray) -> pa.Table:
    number = shard_number(shard.key)
    stored = read_shard(store, shard, ["sample_id", "image", "attempts", "batch_size"]).take(rows)
    part = read_plan_part(store, plan.part_key(number))
    found = part.take(pc.index_in(stored["sample_id"].combine_chunks(), part["sample_id"].combine_chunks()))
    found = found.append_column("image", stored["image"].combine_chunks().field("bytes"))
    for name in ("attempts", "batch_size"):
        found = found.append_column(name, stored[name])
    digests = [drawn_in(_stats(store, number))] * len(rows)
    return found.append_column("environments", pa.array(digests, pa.list_(pa.string())))


def _stats(store: Store, shard: int) -> dict[str, Any]:
    try:
        return dict(json.loads(store.read_bytes(stats_key(shard))))
    except (FileNotFoundError, ValueError, TypeError):  # verify has told of it
        return {}


def batches(spec: DatasetSpec, rows: pa.Table) -> Iterator[tuple[DatasetSpec, pa.Table]]:
    """The rows in tasks, each with the spec by which its pictures were drawn: perhaps in smaller batches, for want of
    memory."""
    for size in sorted(set(rows["batch_size"].to_pylist())):
        alike = rows.filter(pc.equal(rows["batch_size"], size))
        drawn = replace(spec, generator=replace(spec.generator, batch_size=size, max_attempts=1))
        for start in range(0, len(alike), _AT_ONCE):
            yield drawn, alike.slice(start, _AT_ONCE).combine_chunks()


def draw_again(store: Store, spec: DatasetSpec, rows: pa.Table) -> tuple[list[bytes], dict[str, Any]]:
    """The pictures of these rows, drawn by this process, and what it is. With the attempt that was stored then."""
    tried = pc.subtract(rows["attempts"], 1).cast(pa.int32())
    rows = rows.drop_columns(["image", "batch_size", "attempts", "environments"])
    drawn = DrawShard(store, spec).draw(rows.append_column("attempts", tried))
    found = environment(device=spec.generator.device, loads_models=spec.generator.model != "null")
    return drawn["image"].to_pylist(), found
