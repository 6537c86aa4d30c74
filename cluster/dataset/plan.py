"""The plan: which samples a corpus and a spec ask for, shard by shard, with ids and seeds, before anything is drawn.

It is itself stored, so that workers read their own part, the driver's memory stays flat, a resume needs no guess, and
`jobs.verify` can prove completeness from the store alone.

A corpus may grow: as long as its first captions are the planned ones, what follows them is planned as a new segment
with shards of its own. plan.json is written after the parts it speaks of, so a driver that dies leaves the old plan
valid, or the new one; two drivers that plan the same write the same bytes.

Two drivers that plan different things at the same moment never mix. Each writes its parts into a folder of its own,
which plan.json names. And of two different plans one at most becomes plan.json (`_put_plan`), by a rule that asks of a
store only that a read or a listing shows what was written before it, as local disks, S3, GCS and Azure do; no
conditional put is needed.
"""

import hashlib
import itertools
import json
import logging
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from json.encoder import encode_basestring_ascii as json_string

import pyarrow as pa

import pcm
from cluster.dataset.layout import (
    CLAIMS,
    MANIFEST_KEY,
    PLAN_KEY,
    CorpusSource,
    Plan,
    Segment,
    claim_key,
    load_plan,
    parquet_bytes,
    plan_part_key,
)
from cluster.sources.corpus import CorpusRecord
from cluster.store.store import Store
from pcm.credentials import refuse_credentials
from pcm.errors import InputError
from pcm.generation.seeds import sample_seeds
from pcm.reasons import PROMPT_TRUNCATED, USABLE
from pcm.records import PLAN_SCHEMA, SCHEMA_VERSION
from pcm.spec import DatasetSpec

log = logging.getLogger(__name__)

#: Shard numbers have six digits, sample ids nine: keys and ids sort as the plan is ordered.
MAX_SHARDS = 10**6
MAX_RECORDS = 10**9

_RECORDS_AT_ONCE = 4096
_WRITERS = 8


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
    source: CorpusSource | None = None,
) -> Plan:
    """Write the plan of a dataset; where there is one, check that it is the same, or append what the corpus grew by.

    `is_truncated(prompt)` says whether the model will cut the prompt. With the `source` that the stored plan was made
    from, `records` are not read at all: the same bytes read in the same way are the same captions.

    Raises InputError when the corpus has no usable caption, or when another spec, corpus or shard size was begun at
    this place.
    """
    if shard_size < 1:
        raise InputError(f"shard size {shard_size}: must be at least 1")
    if spec.images_per_caption > 100:
        raise InputError(f"images per caption {spec.images_per_caption}: at most 100")
    refuse_credentials(corpus)  # it goes into the plan and the manifest
    planned = load_plan(store)
    if planned is None:
        _refuse_foreign_objects(store)
    records = iter(records)
    fingerprint = hashlib.sha256()
    if planned is not None:
        refuse_other_spec(store, planned, spec, shard_size)
        if source is not None and source == planned.source:
            return planned
        _refuse_other_corpus(store, planned, records, corpus, fingerprint)
    first_record, first_shard = (planned.records, planned.num_shards) if planned else (0, 0)
    parts = _parts_folder(spec, shard_size, planned, source)
    written = _PartWriter(store, parts, first_shard, held_back=planned is None)
    with written:
        for table in plan_parts(records, spec, shard_size, is_truncated, first_record, fingerprint):
            written.add(table)
    if planned is not None and not written.samples:
        return planned
    usable = written.usable + (planned.usable if planned else 0)
    counted = first_record + written.samples // spec.images_per_caption
    if not usable:
        raise InputError(
            f"corpus {corpus}: no usable caption among {counted} records; check the file, --corpus-format and --split"
        )
    segment = Segment(first_record, counted - first_record, first_shard, written.parts, fingerprint.hexdigest(), parts)
    plan = Plan(
        spec=spec,
        corpus=corpus,
        corpus_fingerprint=fingerprint.hexdigest(),
        records=counted,
        expected=counted * spec.images_per_caption,
        usable=usable,
        shard_size=shard_size,
        segments=(*(planned.segments if planned else ()), segment),
        source=source,
        schema_version=planned.schema_version if planned else SCHEMA_VERSION,  # a dataset is of one version
    )
    plan = _put_plan(store, planned, plan)
    added = f" (new: {segment.records} captions in {segment.num_shards} shards)" if planned else ""
    log.info("planned %d samples of %d captions in %d shards%s", plan.expected, counted, plan.num_shards, added)
    return plan


def corpus_lines(corpus_ids: Iterable[str], captions: Iterable[str], reasons: Iterable[str]) -> bytes:
    """What the corpus fingerprint is the sha256 of: a line of JSON for each record."""
    return "".join(
        f"[{json_string(corpus_id)}, {json_string(caption)}, {json_string(reason)}]\n"
        for corpus_id, caption, reason in zip(corpus_ids, captions, reasons, strict=True)
    ).encode()


def plan_parts(
    records: Iterator[CorpusRecord],
    spec: DatasetSpec,
    shard_size: int,
    is_truncated: Callable[[str], bool],
    first_record: int,
    fingerprint: "hashlib._Hash",
) -> Iterator[pa.Table]:
    """The plan parts of a segment, in order, of `shard_size` samples but for the last. `fingerprint` is updated."""
    pending: list[pa.Table] = []
    rows = 0
    while chunk := list(itertools.islice(records, _RECORDS_AT_ONCE)):
        fingerprint.update(_lines(chunk))
        pending.append(_samples(chunk, first_record, spec, is_truncated))
        rows += len(pending[-1])
        first_record += len(chunk)
        if rows >= shard_size:
            table = pa.concat_tables(pending)
            whole = rows - rows % shard_size
            for start in range(0, whole, shard_size):
                yield table.slice(start, shard_size).combine_chunks()
            pending, rows = [table.slice(whole)], rows - whole
    if rows:
        yield pa.concat_tables(pending).combine_chunks()


def _samples(
    records: list[CorpusRecord], first_record: int, spec: DatasetSpec, is_truncated: Callable[[str], bool]
) -> pa.Table:
    if first_record + len(records) > MAX_RECORDS:
        raise InputError(f"corpus: more than {MAX_RECORDS} records; sample ids have nine digits, so split the corpus")
    images = range(spec.images_per_caption)
    repeated = [record for record in records for _ in images]
    indices = range(first_record, first_record + len(records))
    reasons = [
        PROMPT_TRUNCATED if not record.reason and is_truncated(spec.generator.prompt(record.caption)) else record.reason
        for record in records
    ]
    columns = {
        "sample_id": [sample_id(index, image) for index in indices for image in images],
        "record_index": [index for index in indices for _ in images],
        "image_index": [*images] * len(records),
        "corpus_id": [record.corpus_id for record in repeated],
        "caption": [record.caption for record in repeated],
        "seed": sample_seeds(spec, [record.corpus_id for record in records]),
        "reason": [reason for reason in reasons for _ in images],
    }
    return pa.table(columns, schema=PLAN_SCHEMA)


class _PartWriter:
    """Writes plan parts, several at a time; `held_back`: nothing before the first usable sample, for a corpus without
    one leaves nothing behind."""

    def __init__(self, store: Store, folder: str, first_shard: int, *, held_back: bool) -> None:
        self._store = store
        self._folder = folder
        self._first_shard = first_shard
        self._held: list[tuple[int, pa.Table]] | None = [] if held_back else None
        self._pool = ThreadPoolExecutor(_WRITERS)
        self._writing: deque[Future] = deque()
        self.parts = self.samples = self.usable = 0

    def add(self, table: pa.Table) -> None:
        shard = self._first_shard + self.parts
        if shard >= MAX_SHARDS:
            raise InputError(f"more than {MAX_SHARDS} shards: give a larger --shard-size, so that there are fewer")
        self.parts += 1
        self.samples += len(table)
        self.usable += sum(reason in USABLE for reason in table["reason"].to_pylist())
        if self._held is None:
            self._write(shard, table)
            return
        self._held.append((shard, table))
        if self.usable:
            held, self._held = self._held, None
            for number, part in held:
                self._write(number, part)

    def _write(self, shard: int, table: pa.Table) -> None:
        if len(self._writing) >= 2 * _WRITERS:
            self._writing.popleft().result()
        key = plan_part_key(self._folder, shard)
        self._writing.append(self._pool.submit(write_plan_part, self._store, key, table))

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *failed: object) -> None:
        with self._pool:
            while self._writing:
                self._writing.popleft().result()


def write_plan_part(store: Store, key: str, table: pa.Table) -> None:
    store.write_bytes(key, parquet_bytes(table))


def _parts_folder(spec: DatasetSpec, shard_size: int, planned: Plan | None, source: CorpusSource | None) -> str:
    """Named by all that decides the parts of a segment, so that the same command, run again, writes the same objects.

    Where the source of the captions is not known, by chance.
    """
    if source is None:
        return f"plan/{uuid.uuid4().hex[:16]}"
    before = (planned.records, planned.corpus_fingerprint) if planned else None
    decides = [pcm.__version__, spec.digest(), shard_size, before, asdict(source)]
    return f"plan/{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}"


def _lines(records: list[CorpusRecord]) -> bytes:
    return corpus_lines(
        (record.corpus_id for record in records),
        (record.caption for record in records),
        (record.reason for record in records),
    )


def _refuse_foreign_objects(store: Store) -> None:
    """Raises InputError where something that looks like ours lies at a place that nothing was planned for."""
    for place in (MANIFEST_KEY, "shards/", "stats/", "quarantine/"):
        if found := store.list(place):
            raise InputError(
                f"{store.root}: holds {found[0]} but no {PLAN_KEY}, so it is not a dataset that was begun here; "
                "give another --out"
            )


def refuse_other_spec(store: Store, planned: Plan, spec: DatasetSpec, shard_size: int) -> None:
    """Raises InputError, with the differences, unless the dataset was begun with this spec and shard size."""
    differences = planned.spec.differences(spec)
    if planned.shard_size != shard_size:
        differences.append(f"shard_size: {planned.shard_size} -> {shard_size}")
    if differences:
        raise InputError(
            f"{store.root}: was begun with another spec ({'; '.join(differences)}); "
            "use the same arguments to resume, or another --out"
        )


def _refuse_other_corpus(
    store: Store, planned: Plan, records: Iterator[CorpusRecord], corpus: str, fingerprint: "hashlib._Hash"
) -> None:
    """Take the planned number of records from `records`; they must be the planned ones."""
    counted = 0
    known = itertools.islice(records, planned.records)
    while chunk := list(itertools.islice(known, _RECORDS_AT_ONCE)):
        fingerprint.update(_lines(chunk))
        counted += len(chunk)
    if fingerprint.hexdigest() == planned.corpus_fingerprint:
        return
    now = f"{counted} records" if counted < planned.records else f"the first {counted} differ"
    raise InputError(
        f"{store.root}: was begun with another corpus ({planned.corpus}: {planned.records} records; "
        f"now {corpus}: {now}); use the same corpus, --split and --limit (captions may be appended), or another --out"
    )


def _put_plan(store: Store, planned: Plan | None, plan: Plan) -> Plan:
    """Make `plan` plan.json, where `planned` was when this run began; the plan that is there then: the same samples.

    First comes a claim, an object with a name of its own that tells the plan by its digest. Whoever lists a claim to
    another plan gives up. Whoever lists none looks at plan.json once more, and only then writes it; its claim goes
    last. Of two runs with different plans the one that lists later sees the claim of the other, or, where that is gone
    already, the plan that it left. Both may give up, never both go on.

    Raises InputError for the one that gives up.
    """
    digest = hashlib.sha256(plan.asked().to_json()).hexdigest()[:16]
    claim = claim_key(digest, uuid.uuid4().hex[:16])
    store.write_bytes(claim, plan.to_json())
    try:
        others = [key for key in store.list(CLAIMS) if not key.startswith(f"{CLAIMS}{digest}-")]
        if others:
            raise InputError(
                f"{store.root}: another run plans something else here at this moment ({others[0]}); run the command "
                "again when it is done, or use another --out. If no run is at work here, one was killed in that "
                "moment: delete this object"
            )
        found = load_plan(store)
        if found is not None and found.asked() == plan.asked():
            return found
        if found != planned:
            records = found.records if found else 0
            raise InputError(
                f"{store.root}: another run planned {records} records here meanwhile (this one {plan.records}); "
                "run the command again"
            )
        store.write_bytes(PLAN_KEY, plan.to_json())
        return plan
    finally:
        store.delete(claim)
