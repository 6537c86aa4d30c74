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
import math
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from json.encoder import encode_basestring_ascii as json_string

import pyarrow as pa

import pcm
from cluster.dataset.documents import CorpusSource, Plan, Segment, load_plan
from cluster.dataset.keys import CLAIMS, PARTS, PLAN_KEY, claim_key, plan_part_key
from cluster.dataset.parquet import parquet_bytes
from cluster.shard_work import AUTO, MANY_SAMPLES, PROCESS, shard_work
from cluster.sources.corpus import CorpusRecord
from cluster.store.outputs import refuse_other_things
from cluster.store.reach import marker
from cluster.store.store import Store
from pcm.credentials import refuse_credentials
from pcm.errors import InputError
from pcm.generation.seeds import sample_seeds
from pcm.line_timer import LineTimer
from pcm.reasons import PROMPT_TRUNCATED, USABLE
from pcm.records import PLAN_SCHEMA, SCHEMA_VERSION
from pcm.spec import DatasetSpec

log = logging.getLogger(__name__)

#: Shard numbers have six digits, sample ids nine: keys and ids sort as the plan is ordered.
MAX_SHARDS = 10**6
MAX_RECORDS = 10**9

_RECORDS_AT_ONCE = 4096
#: Fields of a spec that --device auto decides by what the cluster has now.
_OF_DEVICE = ("generator.device", "generator.dtype", "clip.device", "clip.dtype")
#: Samples that are planned in one go (whole shards, so they may be more), such goes at once, and writers of each.
_SAMPLES_A_CHUNK, _CHUNKS_AT_ONCE, _WRITERS = 8192, 2, 8


def sample_id(record_index: int, image_index: int) -> str:
    """Sorts as the plan is ordered: nine digits of caption, two of picture."""
    return f"{record_index:09d}-{image_index:02d}"


def parse_sample_id(value: str) -> tuple[int, int]:
    """(record_index, image_index). Raises InputError for anything that is no sample id."""
    record, dash, image = value.partition("-")
    if not (dash and record.isdecimal() and image.isdecimal()):
        raise InputError(f"sample id {value!r}: must look like 000000123-00; take one from the sample_id column")
    return int(record), int(image)


def begun_plan(store: Store) -> Plan | None:
    """The plan of the dataset that was begun in OUT; None where nothing was, or only its planning. Raises InputError
    where OUT holds anything else."""
    if (planned := load_plan(store)) is None:
        refuse_other_things(store, f"no dataset that was begun here (no {PLAN_KEY})", own=(PLAN_KEY, PARTS, CLAIMS))
    return planned


def make_plan(
    store: Store,
    records: Iterable[CorpusRecord],
    spec: DatasetSpec,
    *,
    corpus: str,
    shard_size: int,
    is_truncated: Callable[[str], bool],
    source: CorpusSource | None = None,
    run_on: str = PROCESS,
) -> Plan:
    """Write the plan of a dataset; where there is one, check that it is the same, or append what the corpus grew by.

    `is_truncated(prompt)` says whether the model will cut the prompt. With the `source` that the stored plan was made
    from, `records` are not read at all: the same bytes read in the same way are the same captions. `run_on`: one of
    cluster.shard_work.RUN_ON; on Ray the captions are read here, and the parts made and written by tasks, to which
    `is_truncated` travels. The plan is the same.

    What is stored names the models where they were when the dataset was begun. The plan that is returned loads them
    from where they are in `spec`.

    Raises InputError when the corpus has no usable caption, or when another spec, corpus or shard size was begun at
    this place.
    """
    if shard_size < 1:
        raise InputError(f"shard size {shard_size}: must be at least 1")
    if spec.images_per_caption > 100:
        raise InputError(f"images per caption {spec.images_per_caption}: at most 100")
    refuse_credentials(corpus)  # it goes into the plan and the manifest
    here = spec
    planned = begun_plan(store)
    records = iter(records)
    fingerprint = hashlib.sha256()
    if planned is not None:
        refuse_other_spec(store, planned, spec, shard_size)
        spec = planned.spec
        if source is not None and source == planned.source:
            return planned.at_places_of(here)
        _refuse_other_corpus(store, planned, records, corpus, fingerprint)
    first_record, first_shard = (planned.records, planned.num_shards) if planned else (0, 0)
    parts = _parts_folder(spec, shard_size, planned, source)
    head = list(itertools.islice(records, MANY_SAMPLES // spec.images_per_caption + 1 if run_on == AUTO else 0))
    chunks = _Chunks(itertools.chain(head, records), spec, shard_size, first_record, first_shard)
    writer = _PartWriter(store, parts, spec, shard_size, is_truncated)
    num_parts = new_samples = new_usable = 0
    timer = LineTimer()
    samples = len(head) * spec.images_per_caption
    with ExitStack() as planning:
        landmarks = [] if run_on == PROCESS else [planning.enter_context(marker(store))]
        work = shard_work(run_on, samples=samples, landmarks=landmarks, threads=_CHUNKS_AT_ONCE)
        for written in work.in_order(writer, chunks.after_usable() if planned is None else chunks):
            fingerprint.update(written.lines)
            num_parts += written.parts
            new_samples += written.samples
            new_usable += written.usable
            if timer.due():
                log.info("%d samples planned, %.0f samples/s", new_samples, new_samples / timer.elapsed)
    if planned is not None and not num_parts:
        return planned.at_places_of(here)
    usable = new_usable + (planned.usable if planned else 0)
    counted = chunks.next_record
    if not usable:
        raise InputError(
            f"corpus {corpus}: no usable caption among {counted} records; check the file, its format and its split"
        )
    segment = Segment(first_record, counted - first_record, first_shard, num_parts, fingerprint.hexdigest(), parts)
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
    return plan.at_places_of(here)


def corpus_lines(corpus_ids: Iterable[str], captions: Iterable[str], reasons: Iterable[str]) -> bytes:
    """What the corpus fingerprint is the sha256 of: a line of JSON for each record."""
    return "".join(
        f"[{json_string(corpus_id)}, {json_string(caption)}, {json_string(reason)}]\n"
        for corpus_id, caption, reason in zip(corpus_ids, captions, reasons, strict=True)
    ).encode()


@dataclass(frozen=True)
class _Captions:
    """Captions that follow one another, the first of them number `first_record`, in columns: light to send."""

    first_record: int
    first_shard: int
    corpus_ids: list[str]
    captions: list[str]
    reasons: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def lines(self) -> bytes:
        return corpus_lines(self.corpus_ids, self.captions, self.reasons)


class _Chunks:
    """Records in chunks of whole shards, but for the last. `next_record`: after those that were read."""

    def __init__(
        self, records: Iterator[CorpusRecord], spec: DatasetSpec, shard_size: int, first_record: int, first_shard: int
    ) -> None:
        self._records = records
        samples = math.lcm(shard_size, spec.images_per_caption)
        samples *= max(1, _SAMPLES_A_CHUNK // samples)
        self._captions, self._shards = samples // spec.images_per_caption, samples // shard_size
        self.next_record, self._next_shard = first_record, first_shard

    def __iter__(self) -> Iterator[_Captions]:
        while chunk := list(itertools.islice(self._records, self._captions)):
            if self.next_record + len(chunk) > MAX_RECORDS:
                raise InputError(
                    f"corpus: more than {MAX_RECORDS} records; sample ids have nine digits, so split the corpus"
                )
            shards = -(-len(chunk) * self._shards // self._captions)
            if self._next_shard + shards > MAX_SHARDS:
                raise InputError(f"more than {MAX_SHARDS} shards: give a larger --shard-size, so that there are fewer")
            made = _Captions(
                self.next_record,
                self._next_shard,
                [record.corpus_id for record in chunk],
                [record.caption for record in chunk],
                [record.reason for record in chunk],
            )
            self.next_record += len(chunk)
            self._next_shard += shards
            yield made

    def after_usable(self) -> Iterator[_Captions]:
        """The same, held back until one has a usable caption: a corpus without any leaves nothing behind."""
        held: list[_Captions] = []
        chunks = iter(self)
        for chunk in chunks:
            held.append(chunk)
            if any(reason in USABLE for reason in chunk.reasons):
                yield from held
                yield from chunks


def plan_parts(
    records: Iterator[CorpusRecord],
    spec: DatasetSpec,
    shard_size: int,
    is_truncated: Callable[[str], bool],
    first_record: int,
    fingerprint: "hashlib._Hash",
) -> Iterator[pa.Table]:
    """The plan parts of a segment, in order, of `shard_size` samples but for the last. `fingerprint` is updated."""
    for captions in _Chunks(records, spec, shard_size, first_record, 0):
        fingerprint.update(captions.lines())
        yield from _parts(captions, spec, shard_size, is_truncated)


def _parts(
    captions: _Captions, spec: DatasetSpec, shard_size: int, is_truncated: Callable[[str], bool]
) -> Iterator[pa.Table]:
    table = _samples(captions, spec, is_truncated)
    for start in range(0, len(table), shard_size):
        yield table.slice(start, shard_size).combine_chunks()


def _samples(captions: _Captions, spec: DatasetSpec, is_truncated: Callable[[str], bool]) -> pa.Table:
    images = range(spec.images_per_caption)
    indices = range(captions.first_record, captions.first_record + len(captions))
    reasons = [
        PROMPT_TRUNCATED if not reason and is_truncated(spec.generator.prompt(caption)) else reason
        for caption, reason in zip(captions.captions, captions.reasons, strict=True)
    ]
    columns = {
        "sample_id": [sample_id(index, image) for index in indices for image in images],
        "record_index": [index for index in indices for _ in images],
        "image_index": [*images] * len(captions),
        "corpus_id": [corpus_id for corpus_id in captions.corpus_ids for _ in images],
        "caption": [caption for caption in captions.captions for _ in images],
        "seed": sample_seeds(spec, captions.corpus_ids),
        "reason": [reason for reason in reasons for _ in images],
    }
    return pa.table(columns, schema=PLAN_SCHEMA)


@dataclass(frozen=True)
class _Written:
    """lines: of the corpus fingerprint. usable: of the samples."""

    lines: bytes
    parts: int
    samples: int
    usable: int


@dataclass(frozen=True)
class _PartWriter:
    """Writes the plan parts of some captions, several at a time."""

    store: Store
    folder: str
    spec: DatasetSpec
    shard_size: int
    is_truncated: Callable[[str], bool]

    def __call__(self, captions: _Captions) -> _Written:
        tables = list(_parts(captions, self.spec, self.shard_size, self.is_truncated))
        keys = [plan_part_key(self.folder, captions.first_shard + number) for number in range(len(tables))]
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(lambda key, table: write_plan_part(self.store, key, table), keys, tables))
        usable = sum(reason in USABLE for table in tables for reason in table["reason"].to_pylist())
        return _Written(captions.lines(), len(tables), sum(map(len, tables)), usable)


def write_plan_part(store: Store, key: str, table: pa.Table) -> None:
    store.write_bytes(key, parquet_bytes(table))


def _parts_folder(spec: DatasetSpec, shard_size: int, planned: Plan | None, source: CorpusSource | None) -> str:
    """Named by all that decides the parts of a segment, so that the same command, run again, writes the same objects.

    Where the source of the captions is not known, by chance.
    """
    if source is None:
        return f"{PARTS}{uuid.uuid4().hex[:16]}"
    before = (planned.records, planned.corpus_fingerprint) if planned else None
    decides = [pcm.__version__, spec.digest(), shard_size, before, asdict(source)]
    return f"{PARTS}{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}"


def _lines(records: list[CorpusRecord]) -> bytes:
    return corpus_lines(
        (record.corpus_id for record in records),
        (record.caption for record in records),
        (record.reason for record in records),
    )


def refuse_other_spec(store: Store, planned: Plan, spec: DatasetSpec, shard_size: int) -> None:
    """Raises InputError, with the differences, unless the dataset was begun with this spec and shard size."""
    differences = planned.spec.differences(spec)
    if planned.shard_size != shard_size:
        differences.append(f"shard_size: {planned.shard_size} -> {shard_size}")
    before, now = planned.spec.clip.device, spec.clip.device
    if before != now and all(line.partition(":")[0] in _OF_DEVICE for line in differences):
        where = " where there is a GPU" if before == "cuda" else ""
        raise InputError(
            f"{store.root}: was begun on {before}, and this is {now}; give --device {before}{where}, or another --out"
        )
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
