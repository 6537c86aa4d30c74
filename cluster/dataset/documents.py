"""The two documents of a dataset: plan.json, its first object, and dataset.json, its last.

Of more than MOST_LISTED shards dataset.json does not hold the list: it names parts of it, `manifest/DIGEST.parquet`, by
their content. They are written before it, and are never changed.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from typing import overload

import pyarrow as pa

from cluster.dataset.beside import check_way, located
from cluster.dataset.keys import LINEAGE_KEY, MANIFEST_KEY, PLAN_KEY, manifest_part_key, plan_part_key
from cluster.dataset.lineage import Lineage, PictureStore
from cluster.dataset.parquet import UNREADABLE, read_table
from cluster.dataset.shard_entries import ShardEntries
from cluster.store.store import Store
from pcm.documents import document_bytes
from pcm.errors import InputError, NotKnown, one_line
from pcm.records import READABLE_VERSIONS, SCHEMA_VERSION, FeatureShape
from pcm.spec import DatasetSpec

#: What dataset.json says of itself: rows with their pictures, or rows that point at pictures of other datasets.
DATASET, VIEW = "dataset", "view"
#: The schema version in dataset.json of a view, whose rows are of version 3: releases that know no views refuse it.
VIEW_VERSION = 4

#: The schema version in a dataset.json that names parts: releases that know none refuse it. The dataset's own version
#: stands beside the parts.
PARTS_VERSION = 5
#: Shards that dataset.json lists itself: 5 MB, a tenth of a second to read. Of more it names parts, of so many each.
MOST_LISTED, SHARDS_A_PART = 20_000, 10_000

#: In the stats of a shard that cluster.dataset.upgrade rewrote: the sha256 of the shard before.
UPGRADED_FROM = "upgraded_from"


@dataclass(frozen=True, slots=True)  # there may be hundreds of thousands
class StoredShard:
    """A shard as the manifest, or its stats, describe it: readers compare what they find with that.

    pictures: of a view's shard, where the datasets are that hold its pictures.
    """

    key: str
    rows: int
    bytes: int
    sha256: str
    pictures: tuple[str, ...] = ()
    #: Rows of an epoch, where a row may come several times; None: each comes once.
    weighted_rows: int | None = None

    @staticmethod
    def of(entry: dict) -> "StoredShard":
        """Of an entry of Manifest.shards of a dataset that holds its pictures. Raises KeyError or TypeError when it is
        not one."""
        kinds: dict[str, type] = {"key": str, "rows": int, "bytes": int, "sha256": str}
        for name, kind in kinds.items():
            if type(entry[name]) is not kind:
                raise TypeError(f"a shard's {name} is {entry[name]!r}")
        weighted = entry.get("weighted_rows")
        if weighted is not None and type(weighted) is not int:
            raise TypeError(f"a shard's weighted_rows is {weighted!r}")
        return StoredShard(**{name: entry[name] for name in kinds}, weighted_rows=weighted)


class StoredShards(Sequence[StoredShard]):
    """The shards of a list that is large, each made as it is asked for."""

    def __init__(self, entries: ShardEntries, pictures: tuple[str, ...]) -> None:
        self._entries, self._pictures = entries, pictures

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> StoredShard: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredShards": ...
    def __getitem__(self, index: int | slice) -> "StoredShard | StoredShards":
        if isinstance(index, slice):
            return StoredShards(self._entries[index], self._pictures)
        return _with_pictures(self._entries[index], self._pictures)

    def __iter__(self) -> Iterator[StoredShard]:
        values = self._entries.values("key", "rows", "bytes", "sha256", "weighted_rows")
        return (
            StoredShard(
                key, rows=rows, bytes=size, sha256=sha256.hex(), pictures=self._pictures, weighted_rows=weighted
            )
            for key, rows, size, sha256, weighted in values
        )


def _with_pictures(entry: dict, pictures: tuple[str, ...]) -> StoredShard:
    return replace(StoredShard.of(entry), pictures=pictures)


@dataclass(frozen=True)
class Segment:
    """Captions that were planned together: a corpus, or what it grew by. Its last shard may be short, and stays so."""

    first_record: int
    records: int
    first_shard: int
    num_shards: int
    corpus_fingerprint: str  # of all captions up to the end of this segment
    parts: str = "plan"  # the folder of its plan parts, its own: another run that plans here writes into another


@dataclass(frozen=True)
class CorpusSource:
    """How the captions were read: the same bytes read in the same way are the same captions, unread."""

    sha256: str  # of the file as it lies there, compressed or not
    format: str
    split: str | None
    limit: int | None
    caption_column: str | None = None
    csv_quoting: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """plan.json: what the dataset will hold. Written after every plan part, before the first shard."""

    spec: DatasetSpec
    corpus: str
    corpus_fingerprint: str  # sha256 over every record's (corpus_id, caption, reason)
    records: int  # captions in the corpus, broken ones included
    expected: int  # samples: records * images_per_caption
    usable: int  # samples that are to be generated
    shard_size: int
    segments: tuple[Segment, ...]  # in order of records and of shards, without gaps
    source: CorpusSource | None = None
    schema_version: int = SCHEMA_VERSION
    #: Its samples are redraws of another dataset's: corpus id and caption give the seed (pcm.generation.seeds).
    redraws: bool = False
    #: The spec with its models where they are now, if they may have moved: neither stored nor compared.
    spec_here: DatasetSpec | None = field(default=None, compare=False)

    @property
    def spec_to_load(self) -> DatasetSpec:
        """For whoever loads its models. What is recorded is `spec`."""
        return self.spec_here or self.spec

    def at_places_of(self, spec: DatasetSpec) -> "Plan":
        """The same, its models to be loaded from where those of `spec` lie, which has no differences."""
        return replace(self, spec_here=self.spec.at_places_of(spec))

    @property
    def num_shards(self) -> int:
        return self.segments[-1].first_shard + self.segments[-1].num_shards

    def part_key(self, shard: int) -> str:
        """Of the plan part of a shard. Raises IndexError for a shard beyond the plan."""
        segment = self._segment_of("first_shard", shard, self.num_shards)
        return plan_part_key(segment.parts, shard)

    def asked(self) -> "Plan":
        """What it asks for, wherever its parts lie: of two plans for the same samples in the same shards the same."""
        return replace(self, segments=tuple(replace(segment, parts="") for segment in self.segments))

    def shard_rows(self, shard: int) -> int:
        """Samples planned for a shard. Raises IndexError for a shard beyond the plan."""
        return len(self.shard_positions(shard))

    def shard_positions(self, shard: int) -> range:
        """Positions of a shard's samples among all: record_index * images_per_caption + image_index."""
        segment = self._segment_of("first_shard", shard, self.num_shards)
        per_caption = self.spec.images_per_caption
        start = segment.first_record * per_caption + (shard - segment.first_shard) * self.shard_size
        end = (segment.first_record + segment.records) * per_caption
        return range(start, min(start + self.shard_size, end))

    def shard_of(self, position: int) -> tuple[int, int]:
        """(shard, row of its plan part) of the sample at a position. Raises IndexError for one beyond the plan."""
        per_caption = self.spec.images_per_caption
        segment = self._segment_of("first_record", position // per_caption, self.records)
        shard, row = divmod(position - segment.first_record * per_caption, self.shard_size)
        return segment.first_shard + shard, row

    def _segment_of(self, first: str, value: int, end: int) -> Segment:
        if not 0 <= value < end:
            raise IndexError(f"{value}: the plan ends at {end}")
        return next(segment for segment in reversed(self.segments) if getattr(segment, first) <= value)

    def to_json(self) -> bytes:
        values = {**asdict(self), "spec": self.spec.to_dict()}
        del values["spec_here"]
        if not self.redraws:
            del values["redraws"]
        return document_bytes(values)

    @staticmethod
    def from_json(data: bytes) -> "Plan":
        values = _document(data, PLAN_KEY)
        with _intact(PLAN_KEY):
            segments = tuple(Segment(**_known(Segment, segment)) for segment in values["segments"])
            source = CorpusSource(**_known(CorpusSource, values["source"])) if values["source"] else None
            spec = DatasetSpec.from_dict(values["spec"])
            found = Plan(
                **{**_known(Plan, values), "spec": spec, "segments": segments, "source": source, "spec_here": None}
            )
            _check_numbers(found, "records", "expected", "usable", "shard_size")
            for segment in segments:
                _check_numbers(segment, "first_record", "records", "first_shard", "num_shards")
            if not segments or found.shard_size < 1:
                raise ValueError("nothing is planned")
            return found


@dataclass(frozen=True, kw_only=True)
class MadeWith:
    """What was asked for besides the spec. nouns: what found those of the concepts, "lexicon" or a spaCy model, and the
    versions of spaCy and the model; or concepts: the sha256 of those that a user gave."""

    shard_size: int
    source: CorpusSource | None = None  # None: the captions came from no file
    nouns: str | None = None
    noun_versions: dict[str, str] = field(default_factory=dict)
    concepts: str | None = None

    @staticmethod
    def from_dict(values: dict) -> "MadeWith":
        """Raises TypeError or LookupError for anything else."""
        source = CorpusSource(**_known(CorpusSource, values["source"])) if values["source"] else None
        versions = {str(name): str(version) for name, version in values["noun_versions"].items()}
        found = MadeWith(**{**_known(MadeWith, values), "source": source, "noun_versions": versions})
        _check_numbers(found, "shard_size")
        return found


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """dataset.json: what the dataset holds. Written last: its presence says that the dataset is complete."""

    spec: DatasetSpec
    corpus: str
    corpus_fingerprint: str
    features: FeatureShape
    expected: int
    stored: int
    quarantined: int
    quarantined_by_reason: dict[str, int]
    clip_score_mean: float | None  # None: no rows, or no scores (the null CLIP's are all zero)
    shard_bytes: int  # of all shards
    shards: Sequence[dict]  # {"key", "rows", "quarantined", "sha256", "bytes"} in shard order
    schema_version: int = SCHEMA_VERSION
    kind: str = DATASET
    pictures: tuple[PictureStore, ...] = ()  # of a view: where its pictures are
    fingerprint: str | None = None  # of a derived dataset, which has no plan to be proved by
    lineage: Lineage | None = None  # of a derived dataset
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that made it
    #: Where it was drawn, or of a derived or imported dataset where its rows were made: each kind of machine once
    #: (cluster.dataset.environment).
    environments: tuple[dict, ...] = ()
    made_with: MadeWith | None = None  # None: it was not drawn here, or by an earlier release

    @property
    def is_view(self) -> bool:
        return self.kind == VIEW

    @property
    def stored_shards(self) -> Sequence[StoredShard]:
        places = tuple(store.path for store in self.pictures)
        if isinstance(self.shards, ShardEntries):
            return StoredShards(self.shards, places)
        return tuple(_with_pictures(shard, places) for shard in self.shards)

    def to_json(self) -> bytes:
        """With the whole list of shards."""
        return document_bytes({**self._without_shards(), "shards": list(self.shards)})

    def to_json_with_parts(self, parts: Sequence[dict]) -> bytes:
        """The document that names parts of the list: {"key", "sha256", "shards"} of each, in order."""
        shards = {"schema_version": self.schema_version, "parts": list(parts)}
        return document_bytes({**self._without_shards(), "schema_version": PARTS_VERSION, "shards": shards})

    def _without_shards(self) -> dict:
        spec, features = self.spec.to_dict(), asdict(self.features)
        values = {**asdict(replace(self, shards=())), "spec": spec, "features": features}
        if self.lineage is None:
            for name in _OF_DERIVED:
                del values[name]
        for name in _OF_ENVIRONMENT:
            if not values[name]:
                del values[name]
        return values

    @staticmethod
    def from_json(data: bytes, read: Callable[[str], bytes] | None = None) -> "Manifest":
        """`read`: the object at a key, for a document that names parts. Raises InputError for one that is damaged, or
        whose parts are damaged or missing."""
        values = _document(data, MANIFEST_KEY)
        if values["schema_version"] == PARTS_VERSION:
            assert read is not None, "a document that is kept without a store names no parts"
            values = _with_parts(values, read)
        with _intact(MANIFEST_KEY):
            if not isinstance(values["shards"], ShardEntries):
                values["shards"] = tuple(values["shards"])
            features = FeatureShape(**_known(FeatureShape, values["features"]))
            if "kind" not in values:  # no derived dataset: what else later work may mean by these names is passed over
                values = {name: value for name, value in values.items() if name not in _OF_DERIVED}
            found = Manifest(
                **{
                    **_known(Manifest, values),
                    "spec": DatasetSpec.from_dict(values["spec"]),
                    "features": features,
                    "versions": dict(values.get("versions", {})),
                    "environments": tuple(map(dict, values.get("environments", ()))),
                    "made_with": MadeWith.from_dict(values["made_with"]) if values.get("made_with") else None,
                    "pictures": tuple(
                        PictureStore(**_known(PictureStore, each)) for each in values.get("pictures", ())
                    ),
                    "lineage": Lineage.from_dict(values["lineage"]) if values.get("lineage") else None,
                }
            )
            if found.kind not in (DATASET, VIEW) or found.is_view != (found.schema_version == VIEW_VERSION):
                raise ValueError(f"kind is {found.kind!r} in schema version {found.schema_version}")
            if found.is_view and not (found.pictures and found.lineage and found.fingerprint):
                raise ValueError("a view without the datasets of its pictures, its lineage or its fingerprint")
            for each in found.pictures:
                check_way(each.beside)
            _check_numbers(found, "expected", "stored", "quarantined", "shard_bytes")
            _check_numbers(features, *asdict(features))
            for shard in found.shards if isinstance(found.shards, tuple) else ():
                StoredShard.of(shard)
                if type(shard["quarantined"]) is not int:
                    raise TypeError(f"quarantined of {shard['key']} is {shard['quarantined']!r}")
            # An earlier release wrote 0.0.
            return replace(found, clip_score_mean=None) if found.spec.clip.model == "null" else found


def _with_parts(values: dict, read: Callable[[str], bytes]) -> dict:
    """The document with the list of shards in place of the parts that it names, and with the dataset's own version.

    Raises InputError, which names a part that is missing or damaged.
    """

    def found(part: dict) -> bytes | None:
        try:
            return read(part["key"])
        except FileNotFoundError:
            return None

    with _intact(MANIFEST_KEY):
        parts, version = list(values["shards"]["parts"]), values["shards"]["schema_version"]
        if version not in (*READABLE_VERSIONS, VIEW_VERSION):
            raise ValueError(f"schema_version of its shards is {version!r}")
        for part in parts:
            if part["key"] != manifest_part_key(part["sha256"]):
                raise ValueError(f"{part['key']!r} is no part")
    with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
        objects = list(pool.map(found, parts))
    with _intact(MANIFEST_KEY):
        for part, data in zip(parts, objects, strict=True):
            if data is None:
                raise ValueError(f"{part['key']}: missing")
            if hashlib.sha256(data).hexdigest() != part["sha256"]:
                raise ValueError(f"{part['key']}: damaged: its sha256 is another")
        entries = ShardEntries.of_parts(data for data in objects if data is not None)
        if len(entries) != sum(part["shards"] for part in parts):
            raise ValueError(f"its parts list {len(entries)} shards")
    return {**values, "schema_version": version, "shards": entries}


_PARTS_AT_ONCE = 8

#: Fields of dataset.json that datasets of earlier releases lack.
_OF_ENVIRONMENT = ("versions", "environments", "made_with")
#: Fields of dataset.json that only derived datasets have, all four of them.
_OF_DERIVED = ("kind", "pictures", "fingerprint", "lineage")


def load_plan(store: Store) -> Plan | None:
    try:
        with _in(store):
            return Plan.from_json(store.read_bytes(PLAN_KEY))
    except FileNotFoundError:
        return None


def find_manifest(store: Store) -> Manifest | None:
    """The manifest of a finished dataset, or None where there is none (yet).

    A view's names the datasets of its pictures where they are now (cluster.dataset.beside).
    """
    try:
        with _in(store):
            found = Manifest.from_json(store.read_bytes(MANIFEST_KEY), store.read_bytes)
    except FileNotFoundError:
        return None
    pictures = tuple(located(store, each, documents=(MANIFEST_KEY, PLAN_KEY)) for each in found.pictures)
    if pictures == found.pictures:
        return found
    with _intact(MANIFEST_KEY):
        places = {old.path: new.path for old, new in zip(found.pictures, pictures, strict=True)}
        return replace(found, pictures=pictures, lineage=found.lineage.moved(places) if found.lineage else None)


def find_whole_manifest(store: Store) -> Manifest | None:
    """The same; None for a damaged one too, which is written again. Raises OtherSchema."""
    try:
        return find_manifest(store)
    except OtherSchema:
        raise
    except InputError:
        return None


def store_manifest(store: Store, manifest: Manifest) -> None:
    """Put dataset.json there, which makes the dataset complete; first the parts of its list where that is long.

    Parts that an older dataset.json of this place named stay: a reader may be at work with it.
    """
    if len(manifest.shards) <= MOST_LISTED:
        store.write_bytes(MANIFEST_KEY, manifest.to_json())
        return
    entries = ShardEntries.of(manifest.shards)
    parts = []
    for start in range(0, len(entries), SHARDS_A_PART):
        data = entries.part(start, SHARDS_A_PART)
        digest = hashlib.sha256(data).hexdigest()
        key = manifest_part_key(digest)
        store.write_bytes(key, data)
        parts.append({"key": key, "sha256": digest, "shards": len(entries[start : start + SHARDS_A_PART])})
    store.write_bytes(MANIFEST_KEY, manifest.to_json_with_parts(parts))


def load_manifest(store: Store) -> Manifest:
    """The manifest of a finished dataset. Raises InputError when there is none."""
    if (manifest := find_manifest(store)) is not None:
        return manifest
    refuse_interrupted(store)
    unfinished = store.exists(PLAN_KEY)
    raise InputError(
        f"{store.root}: {'an unfinished dataset' if unfinished else 'not a dataset'} (no {MANIFEST_KEY}); "
        f"{'rerun the same jobs.generate command to finish it' if unfinished else 'make one with jobs.generate'}"
    )


def refuse_dataset(store: Store, *, shown: str) -> None:
    """Raises InputError where a dataset, finished or not, lies at a place for something else."""
    if found := next((key for key in (MANIFEST_KEY, PLAN_KEY, LINEAGE_KEY) if store.exists(key)), None):
        raise InputError(f"{shown} {store.root}: holds a dataset ({found}); give another place")


def refuse_interrupted(store: Store) -> None:
    """Raises InputError where a derived dataset was begun and not finished."""
    if store.exists(LINEAGE_KEY) and not store.exists(MANIFEST_KEY):
        raise InputError(
            f"{store.root}: a derived dataset that was interrupted (no {MANIFEST_KEY}); rerun the command that made it"
        )


def read_plan_part(store: Store, key: str, columns: list[str] | None = None) -> pa.Table:
    """The part of a plan that lies at a key. Raises InputError where it is missing or damaged."""
    try:
        return read_table(store, key, columns)
    except UNREADABLE as error:
        what = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({one_line(error, longest=200)})"
        raise InputError(f"{store.root}/{key}: a part of the plan is {what}; run jobs.verify {store.root}") from None


class OtherSchema(InputError):
    """A dataset of a schema or a spec that this package does not know: nothing in it may be judged or touched."""


def _document(data: bytes, key: str) -> dict:
    """Raises OtherSchema, and InputError for what is no JSON object or has no version."""
    with _intact(key):
        values = dict(json.loads(data))
        version = values["schema_version"]
        if type(version) is not int:
            raise ValueError(f"schema_version is {version!r}")
    is_view = (key, version, values.get("kind")) == (MANIFEST_KEY, VIEW_VERSION, VIEW)
    has_parts = (key, version) == (MANIFEST_KEY, PARTS_VERSION)
    if version not in READABLE_VERSIONS and not is_view and not has_parts:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise OtherSchema(
            f"{key}: dataset schema version {version}, but this package reads versions {readable}; "
            "use the release that wrote it, or generate into another --out"
        )
    return values


def _check_numbers(found: object, *names: str) -> None:
    for name in names:
        if type(value := getattr(found, name)) is not int or value < 0:
            raise TypeError(f"{name} is {value!r}")


def _known(kind: type, values: dict) -> dict:
    """The values without fields that later work has added to a document."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


#: What helps against a damaged document.
_MENDED = {
    PLAN_KEY: "restore it (without it jobs.verify cannot tell what is missing)",
    MANIFEST_KEY: (
        "run jobs.verify DATASET --repair, which writes it anew (of a derived dataset: rerun the command that made it)"
    ),
}


@contextlib.contextmanager
def _in(store: Store) -> Iterator[None]:
    """An InputError that begins with a document's key says whose it is."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{store.root}/{error}") from None


@contextlib.contextmanager
def _intact(key: str) -> Iterator[None]:
    """What goes wrong in reading a document is that it is damaged. Raises InputError; OtherSchema for what a later
    release has written.
    """
    try:
        yield
    except NotKnown as error:
        raise OtherSchema(f"{key}: {error}; use the release that wrote it, or generate into another --out") from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, pa.ArrowException) as error:
        said = one_line(error, longest=200)
        raise InputError(f"{key}: damaged ({said}); {_MENDED[key]}, or generate into another --out") from None
