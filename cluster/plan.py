"""The plan: which samples a corpus and a spec ask for, shard by shard, with ids and seeds, before anything is drawn.

It is itself stored, so that workers read their own part, the driver's memory stays flat, a resume needs no guess, and
`jobs.verify` can prove completeness from the store alone.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from cluster.corpus import CorpusRecord
from cluster.dataset import PLAN_KEY, Plan, Segment, load_plan, parquet_bytes, plan_part_key
from cluster.storage import Store
from pcm.errors import InputError
from pcm.records import PLAN_SCHEMA, PROMPT_TRUNCATED
from pcm.spec import DatasetSpec

log = logging.getLogger(__name__)

#: Reasons with which a planned sample is generated all the same.
USABLE_REASONS = ("", PROMPT_TRUNCATED)


def sample_id(record_index: int, image_index: int) -> str:
    """Sorts as the plan is ordered: nine digits of caption, two of picture."""
    return f"{record_index:09d}-{image_index:02d}"


def parse_sample_id(value: str) -> tuple[int, int]:
    """(record_index, image_index). Raises InputError for anything that is no sample id."""
    record, dash, image = value.partition("-")
    if not (dash and record.isdecimal() and image.isdecimal()):
        raise InputError(f"sample id {value!r}: must look like 000000123-00; take one from the sample_id column")
    return int(record), int(image)


def make_plan(
    store: Store,
    records: Iterable[CorpusRecord],
    spec: DatasetSpec,
    *,
    corpus: str,
    shard_size: int,
    is_truncated: Callable[[str], bool],
) -> Plan:
    """Write the plan of a dataset, or check that the one on the store is the same.

    `is_truncated(prompt)` says whether the model will cut the prompt. Raises InputError when the corpus has no usable
    caption, or when another spec, corpus or shard size was begun at this place.
    """
    if shard_size < 1:
        raise InputError(f"shard size {shard_size}: must be at least 1")
    if spec.images_per_caption > 100:
        raise InputError(f"images per caption {spec.images_per_caption}: at most 100")
    existing = load_plan(store)
    if existing is not None:
        _refuse_other_spec(store, existing, spec, shard_size)
    digest = hashlib.sha256()
    counted = usable = shards = 0
    shard_rows: list[dict] = []
    parts: dict[int, bytes] = {}

    def flush() -> None:
        nonlocal shards
        table = pa.Table.from_pylist(shard_rows, schema=PLAN_SCHEMA)
        if existing is None:
            if usable:
                for number, data in parts.items():
                    store.write_bytes(plan_part_key(number), data)
                parts.clear()
                store.write_bytes(plan_part_key(shards), parquet_bytes(table))
            else:
                parts[shards] = parquet_bytes(table)  # held back: a corpus without a usable row leaves nothing behind
        shards += 1
        shard_rows.clear()

    for record in records:
        digest.update(json.dumps([record.corpus_id, record.caption, record.reason]).encode() + b"\n")
        counted += 1
        for row in _samples(record, spec, is_truncated):
            usable += row["reason"] in USABLE_REASONS
            shard_rows.append(row)
            if len(shard_rows) == shard_size:
                flush()
    if shard_rows:
        flush()
    if not usable:
        raise InputError(
            f"corpus {corpus}: no usable caption among {counted} records; check the file, --corpus-format and --split"
        )
    plan = Plan(
        spec=spec,
        corpus=corpus,
        corpus_fingerprint=digest.hexdigest(),
        records=counted,
        expected=counted * spec.images_per_caption,
        usable=usable,
        shard_size=shard_size,
        segments=(Segment(0, counted, 0, shards),),
    )
    if existing is None:
        store.write_bytes(PLAN_KEY, plan.to_json())
        log.info("planned %d samples of %d captions in %d shards", plan.expected, counted, plan.num_shards)
    elif existing.corpus_fingerprint != plan.corpus_fingerprint:
        raise InputError(
            f"{store.root}: was begun with another corpus ({existing.corpus}: {existing.records} records; "
            f"now {corpus}: {counted} records); use the same corpus, --split and --limit, or another --out"
        )
    return existing or plan


def _samples(record: CorpusRecord, spec: DatasetSpec, is_truncated: Callable[[str], bool]) -> Iterator[dict]:
    reason = record.reason
    if not reason and is_truncated(spec.generator.prompt(record.caption)):
        reason = PROMPT_TRUNCATED
    for image_index in range(spec.images_per_caption):
        yield {
            "sample_id": sample_id(record.index, image_index),
            "record_index": record.index,
            "image_index": image_index,
            "corpus_id": record.corpus_id,
            "caption": record.caption,
            "seed": spec.sample_seed(record.corpus_id, image_index),
            "reason": reason,
        }


def _refuse_other_spec(store: Store, existing: Plan, spec: DatasetSpec, shard_size: int) -> None:
    differences = existing.spec.differences(spec)
    if existing.shard_size != shard_size:
        differences.append(f"shard_size: {existing.shard_size} -> {shard_size}")
    if differences:
        raise InputError(
            f"{store.root}: was begun with another spec ({'; '.join(differences)}); "
            "use the same arguments to resume, or another --out"
        )
