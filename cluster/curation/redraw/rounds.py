"""A round of redraws: a dataset of its own below the view, drawn by the pipeline that draws every dataset.

    redraws/round-000/    plan.json, plan/, shards/, stats/, ..., dataset.json last

Its record n is the round's n-th redraw; its corpus id and seed are those of pcm.generation.seeds. A round whose
dataset.json is there is complete, and is never touched again.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from cluster.curation.rows import IndexRows
from cluster.dataset.documents import Plan, Segment, find_manifest, load_plan
from cluster.dataset.keys import PLAN_KEY, plan_part_key
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.dataset.plan import corpus_lines, sample_id, write_plan_part
from cluster.dataset.rows import read_shard, scores_of
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.generation.seeds import redraw_id, redraw_seed
from pcm.reasons import PROMPT_TRUNCATED
from pcm.records import PLAN_SCHEMA
from pcm.spec import DatasetSpec

#: Draws what a plan asks for and the store lacks, and writes its manifest.
Draw = Callable[[Store, Plan], object]

_READS_AT_ONCE = 8


@dataclass(frozen=True)
class Redraws:
    """p redraws in the order of their round: (p,) the row of the source, and which redraw of it: from 1, in
    the first step that draws the row again."""

    row: np.ndarray
    attempt: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class Drawn:
    """A complete round: what each redraw scored (p,), NaN where it could not be made; its seed; and where it is."""

    data: OpenDataset
    redraws: Redraws
    score: np.ndarray
    seed: np.ndarray
    shard: np.ndarray
    place: np.ndarray  # row of the shard


def round_store(out: Store, number: int) -> Store:
    return open_store(f"{out.address}/redraws/round-{number:03d}")


def draw_round(
    store: Store,
    redraws: Redraws,
    rows: IndexRows,
    seeds: np.ndarray,
    spec: DatasetSpec,
    draw: Draw,
    *,
    corpus: str,
    shard_size: int,
    is_truncated: Callable[[str], bool],
) -> Drawn:
    """Draw a round, or finish it, or read what it gave. `seeds`: (n,) of the rows' stored pictures.

    Raises InputError where something else was begun there, and as `draw` does.
    """
    plan = _plan(store, redraws, rows, seeds, spec, corpus=corpus, shard_size=shard_size, is_truncated=is_truncated)
    if find_manifest(store) is None:
        draw(store, plan)
    return _read(store, redraws)


def _plan(
    store: Store,
    redraws: Redraws,
    rows: IndexRows,
    seeds: np.ndarray,
    spec: DatasetSpec,
    *,
    corpus: str,
    shard_size: int,
    is_truncated: Callable[[str], bool],
) -> Plan:
    own = [str(rows.sample_id[row]) for row in redraws.row.tolist()]
    captions = [str(rows.caption[row]) for row in redraws.row.tolist()]
    stored = seeds[redraws.row].tolist()
    ids = [redraw_id(*each) for each in zip(own, stored, redraws.attempt.tolist(), strict=True)]
    columns = {
        "sample_id": [sample_id(number, 0) for number in range(len(redraws))],
        "record_index": list(range(len(redraws))),
        "image_index": [0] * len(redraws),
        "corpus_id": ids,
        "caption": captions,
        "seed": [redraw_seed(each, caption) for each, caption in zip(ids, captions, strict=True)],
        "reason": [PROMPT_TRUNCATED if is_truncated(spec.generator.prompt(caption)) else "" for caption in captions],
    }
    # A caption that the model cuts has a remark in the plan, and none in the fingerprint.
    fingerprint = hashlib.sha256(corpus_lines(ids, captions, [""] * len(redraws))).hexdigest()
    shards = -(-len(redraws) // shard_size)
    plan = Plan(
        spec=replace(spec, images_per_caption=1),
        corpus=corpus,
        corpus_fingerprint=fingerprint,
        records=len(redraws),
        expected=len(redraws),
        usable=len(redraws),
        shard_size=shard_size,
        segments=(Segment(0, len(redraws), 0, shards, fingerprint),),
        redraws=True,
    )
    found = load_plan(store)
    if found is not None:
        if found.spec.differences(plan.spec) or found.asked() != replace(plan, spec=found.spec).asked():
            raise InputError(
                f"{store.root}: holds a round of other redraws (changed from outside, or begun by an earlier release); "
                "give another --out"
            )
        return found.at_places_of(plan.spec)
    table = pa.table(columns, schema=PLAN_SCHEMA)
    folder = plan.segments[0].parts
    for shard in range(shards):
        part = table.slice(shard * shard_size, shard_size).combine_chunks()
        write_plan_part(store, plan_part_key(folder, shard), part)
    store.write_bytes(PLAN_KEY, plan.to_json())
    return plan


def _read(store: Store, redraws: Redraws) -> Drawn:
    data = open_dataset(store, offer=False)
    count = len(redraws)
    score, seed = np.full(count, np.nan), np.zeros(count, np.int64)
    shard, place = np.full(count, -1), np.full(count, -1)

    def read(number: int) -> tuple[list[str], np.ndarray, np.ndarray]:
        stored = data.shards[number]
        table = read_shard(store, stored, ["sample_id", "seed", "clip_score"], checksum=False)
        return table["sample_id"].to_pylist(), scores_of(store, stored, table), table["seed"].to_numpy()

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        for number, (ids, scores, seeds) in enumerate(pool.map(read, range(len(data.shards)))):
            records = np.array([int(each.partition("-")[0]) for each in ids], np.int64)
            if not np.isfinite(scores).all() or (len(records) and records.max() >= count):
                raise InputError(f"{store.root}/{data.shards[number].key}: damaged; run jobs.verify on {store.root}")
            score[records], seed[records] = scores, seeds
            shard[records], place[records] = number, np.arange(len(records))
    return Drawn(data, redraws, score, seed, shard, place)
