"""Derived datasets: views, whose rows point at pictures stored elsewhere, and views written out with their pictures.

A view is a folder with dataset.json (kind "view"), the words, concepts and CLIP head of its rows, and small Parquet
parts `rows/part-000000.parquet` (pcm.records.VIEW_SCHEMA). Every reader takes it like any dataset: cluster.dataset.rows
brings caption and score from the part, pictures and features from the shards that hold them. A view of a view points at
the pictures themselves.

Rows come in the order of the shards that hold their pictures, and a view's shard ends where one of these ends, so that
reading a view reads each of them once. What decides a view is written first (lineage.json), dataset.json last.
"""

import hashlib
import io
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.beside import way_to
from cluster.dataset.derived import begun, lineage_record
from cluster.dataset.documents import (
    DATASET,
    VIEW,
    VIEW_VERSION,
    Manifest,
    StoredShard,
    store_manifest,
)
from cluster.dataset.keys import (
    LINEAGE_KEY,
    VOCABULARY_KEYS,
    rows_key,
    shard_key,
)
from cluster.dataset.lineage import Lineage, PictureStore
from cluster.dataset.opened import OpenDataset, read_corpus_ids
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.rows import part_columns, read_shard, read_view_part
from cluster.dataset.shard_check import fingerprint_entry, picture_sha256
from cluster.dataset.view_part import PictureShard, ViewPart, part_table
from cluster.shard_work import PROCESS, ShardWork, shard_work
from cluster.store.store import Store
from pcm.documents import document_bytes
from pcm.generation.names import SEVERAL
from pcm.line_timer import LineTimer
from pcm.records import MAX_SHARD_BYTES, SCHEMA_VERSION, STORED, VIEW_SCHEMA, FeatureShape, shard_schema
from pcm.spec import GeneratorSpec

log = logging.getLogger(__name__)

_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class ViewRows:
    """The rows of a view to be, n of them in any order: what each says, and which picture it shows.

    sample_id: n different ones, in the form 000000123-00. source, shard, row: (n,) whole numbers: the picture's dataset
    among the sources, its shard among that dataset's, its row there. clip_score: (n,) float32, raw cosine of this
    caption and that picture. weight: (n,) whole numbers from 1: how often training takes the row in an epoch.
    """

    sample_id: Sequence[str]
    caption: Sequence[str]
    clip_score: np.ndarray
    source: np.ndarray
    shard: np.ndarray
    row: np.ndarray
    weight: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sample_id)


def write_view(
    out: Store,
    sources: Sequence[OpenDataset],
    rows: ViewRows,
    lineage: Lineage,
    *,
    materialise: bool = False,
    shard_rows: int | None = None,
    same_words: bool = False,
    run_on: str = PROCESS,
    made_by: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write rows that point at the pictures of `sources` as a view; with `materialise` with their pictures, as a
    dataset that needs no other. Run it again to finish what was interrupted: shards that are there stay if they are of
    the same rows. `same_words`: the captions are all the first source's, whose words and concepts stay. run_on: one of
    cluster.shard_work.RUN_ON; the bytes are the same. made_by: the manifest's `versions` and `environments`
    (cluster.dataset.environment).

    The fingerprint is that of any dataset: sha256 over the sorted (sample_id, caption, seed of the picture, status,
    sha256 of the picture's bytes); shards do not matter to it. The pictures of a shard are read once, to name their
    bytes, and no features; of views among the sources neither. So it is not proved here that a shard is as it was
    stored, but by jobs.verify, and where features are read. Memory: the rows without features, some 300 bytes each.

    Raises InputError where `out` holds anything else, where a picture's shard cannot be read, and where the sources'
    features are of different CLIPs (cluster.dataset.together.check_same_clip). Raises ValueError for rows that cannot
    be: a sample id twice, a place that is not there, a weight below 1.
    """
    _check(rows, sources)
    document = lineage_record(lineage, materialise=materialise, shard_rows=shard_rows)
    if (found := begun(out, document)) is not None:
        return found
    if len(sources) > 1:
        from cluster.dataset.together import check_same_clip  # brings torch and Ray, which take seconds

        check_same_clip(sources)
    out.write_bytes(LINEAGE_KEY, document_bytes(document))
    landmarks = [(out, LINEAGE_KEY), *(landmark for each in sources for landmark in each.landmarks)]
    work = shard_work(run_on, samples=len(rows), landmarks=landmarks, threads=_THREADS)
    placed = _Placed.of(sources, rows, work)
    features = sources[0].manifest.features if materialise else None
    view = ViewParts(placed.table, placed.shards, shard_rows, features)
    pictures = [store.path for store in placed.stores]
    shards = _write_parts(view, _PartWriter(out, tuple(pictures), features), work)
    _write_vocabularies(out, sources[:1] if same_words else sources, rows)
    manifest = replace(_manifest(out, sources, placed, shards, lineage), **(made_by or {}))
    if materialise:
        manifest = replace(manifest, kind=DATASET, pictures=(), schema_version=SCHEMA_VERSION)
    store_manifest(out, manifest)
    return manifest


def with_pictures(view: Store, part: ViewPart, pictures: Sequence[str], features: FeatureShape) -> pa.Table:
    """A view's shard as one that holds its pictures: of the newest version, with the columns corpus_id and, where a row
    comes more than once, weight. Raises InputError as read_shard does."""
    schema = shard_schema(features)
    found = part_columns(view, part, pictures, schema.names)
    table = pa.table({name: found[name].cast(schema.field(name).type) for name in schema.names}, schema=schema)
    table = table.append_column("corpus_id", part.rows["corpus_id"])
    if (part.rows["weight"].to_numpy() != 1).any():
        table = table.append_column("weight", part.rows["weight"])
    return table


def _check(rows: ViewRows, sources: Sequence[OpenDataset]) -> None:
    if len(set(rows.sample_id)) < len(rows):
        raise ValueError("a sample id occurs twice")
    sizes = [np.array([shard["rows"] for shard in source.manifest.shards]) for source in sources]
    for number, size in enumerate(sizes):
        mine = rows.source == number
        shards, places = rows.shard[mine], rows.row[mine]
        if len(shards) and not ((shards >= 0) & (shards < len(size))).all():
            raise ValueError(f"a shard beyond those of {sources[number].store.root}")
        if len(shards) and not ((places >= 0) & (places < size[shards])).all():
            raise ValueError(f"a row beyond its shard of {sources[number].store.root}")
    if len(rows) and not ((rows.source >= 0) & (rows.source < len(sources))).all():
        raise ValueError("a source that is not given")
    if rows.weight is not None and (rows.weight < 1).any():
        raise ValueError("a weight below 1")


@dataclass(frozen=True)
class _Placed:
    """table: rows of VIEW_SCHEMA, their `shard` a number of `shards`, in the order of shard, row and sample id."""

    table: pa.Table
    shards: tuple[PictureShard, ...]
    stores: tuple[PictureStore, ...]

    @staticmethod
    def of(sources: Sequence[OpenDataset], rows: ViewRows, work: ShardWork) -> "_Placed":
        stores = tuple(dict.fromkeys(store for each in sources for store in _picture_stores(each)))
        order = np.lexsort((rows.row, rows.shard, rows.source))
        cuts = np.flatnonzero(np.diff(rows.source[order]) | np.diff(rows.shard[order])) + 1
        groups = [group for group in np.split(order, cuts) if len(group)]
        timer = LineTimer()

        calls = ((int(rows.source[group[0]]), int(rows.shard[group[0]]), rows.row[group]) for group in groups)
        shards: dict[PictureShard, int] = {}
        found: list[_Resolved] = []
        for done, each in enumerate(work.in_order(_Resolver(tuple(sources), stores), calls), start=1):
            for shard in each.shards:
                shards.setdefault(shard, len(shards))
            found.append(each)
            if timer.due():
                log.info("%d of %d shards looked at", done, len(groups))
        ordered = sorted(shards, key=lambda shard: (shard.pictures, shard.stored.key, shard.stored.sha256))
        number = {shard: place for place, shard in enumerate(ordered)}
        chosen = np.concatenate([*groups, np.zeros(0, np.int64)]).astype(np.int64)
        weight = np.ones(len(rows), np.int32) if rows.weight is None else rows.weight.astype(np.int32)
        columns = {
            "sample_id": pa.array(rows.sample_id, pa.string()).take(chosen),
            "caption": pa.array(rows.caption, pa.string()).take(chosen),
            "clip_score": pa.array(np.asarray(rows.clip_score, np.float32)[chosen]),
            "weight": pa.array(weight[chosen]),
            "shard": pa.array([number[shard] for each in found for shard in each.of_row], pa.int32()),
            "row": pa.array([row for each in found for row in each.rows], pa.int32()),
        }
        for name in ("seed", "corpus_id", "image_sha256", "picture_id"):
            values = [value for each in found for value in each.columns[name]]
            columns[name] = pa.array(values, VIEW_SCHEMA.field(name).type)
        table = pa.table({name: columns[name] for name in VIEW_SCHEMA.names}, schema=VIEW_SCHEMA)
        table = table.sort_by([("shard", "ascending"), ("row", "ascending"), ("sample_id", "ascending")])
        return _Placed(table.combine_chunks(), tuple(ordered), stores)


def _picture_stores(source: OpenDataset) -> tuple[PictureStore, ...]:
    """The datasets that hold a source's pictures, where they are now."""
    if source.manifest.is_view:
        return tuple(replace(store, beside=None) for store in source.manifest.pictures)
    return (PictureStore(path=source.store.address, sha256=source.sha256),)


@dataclass(frozen=True)
class _Resolved:
    """Where the pictures of some rows of one shard of a source are, and what is known of them."""

    of_row: list[PictureShard]
    rows: list[int]
    columns: dict[str, list]

    @property
    def shards(self) -> list[PictureShard]:
        return list(dict.fromkeys(self.of_row))


@dataclass(frozen=True)
class _Resolver:
    """Called with (source, shard, rows of it)."""

    sources: tuple[OpenDataset, ...]
    stores: tuple[PictureStore, ...]

    def __call__(self, call: tuple[int, int, np.ndarray]) -> _Resolved:
        source, shard, numbers = call
        return _resolve(self.sources[source], shard, numbers, self.stores)


def _resolve(source: OpenDataset, shard: int, numbers: np.ndarray, stores: Sequence[PictureStore]) -> _Resolved:
    stored = source.shards[shard]
    if source.manifest.is_view:
        part = read_view_part(source.store, stored)
        place = {number: stores.index(store) for number, store in enumerate(_picture_stores(source))}
        moved = [replace(each, pictures=place[each.pictures]) for each in part.shards]
        rows = part.rows.take(numbers)
        names = ("seed", "corpus_id", "image_sha256", "picture_id")
        return _Resolved(
            [moved[number] for number in rows["shard"].to_pylist()],
            rows["row"].to_pylist(),
            {name: rows[name].to_pylist() for name in names},
        )
    mine = PictureShard(
        stores.index(_picture_stores(source)[0]),
        replace(stored, weighted_rows=None),
    )
    # No checksum: it would read the features too, nearly all of a dataset's bytes. Whoever reads these compares it.
    table = read_shard(source.store, stored, ["sample_id", "seed", "image"], checksum=False).combine_chunks()
    wanted = sorted(set(numbers.tolist()))
    pictures = table["image"].combine_chunks().field("bytes").take(wanted).to_pylist()
    digests = {
        row: hashlib.sha256(picture).digest() if picture else b"" for row, picture in zip(wanted, pictures, strict=True)
    }
    corpus_ids = read_corpus_ids(source, shard)
    light = table.select(["sample_id", "seed"]).take(numbers)
    return _Resolved(
        [mine] * len(numbers),
        numbers.tolist(),
        {
            "seed": light["seed"].to_pylist(),
            "corpus_id": [corpus_ids[row] for row in numbers.tolist()],
            "image_sha256": [digests[row] for row in numbers.tolist()],
            "picture_id": light["sample_id"].to_pylist(),
        },
    )


class ViewParts:
    """Rows cut into a view's shards: whole shards of pictures, up to `shard_rows` rows (None: as many as the largest of
    them has, so that reading one takes as much memory). Only where half as many again show pictures of one shard, its
    rows are cut, evenly. features: of a view that gets its pictures, no more of them than a shard can hold."""

    def __init__(
        self,
        table: pa.Table,
        shards: Sequence[PictureShard],
        shard_rows: int | None,
        features: FeatureShape | None = None,
    ) -> None:
        if shard_rows is None:
            shard_rows = max((shard.stored.rows for shard in shards), default=1)
        self._table, self._shards = table, shards
        where = table["shard"].to_numpy()
        ends = [*np.flatnonzero(np.diff(where)) + 1, len(where)] if len(where) else []
        self._cuts: list[int] = [0]
        num_bytes = 0  # of the pictures since the last cut
        for start, end in itertools.pairwise([0, *map(int, ends)]):
            limit = max(shard_rows, shards[where[start]].stored.rows)
            more = (end - start) * _picture_bytes(shards[where[start]].stored, features)
            num_bytes += more
            if start > self._cuts[-1] and (end - self._cuts[-1] > limit or num_bytes > MAX_SHARD_BYTES):
                self._cuts.append(start)
                num_bytes = more
            if end - start > 1.5 * limit:
                pieces = -(-(end - start) // limit)
                self._cuts += [start + (end - start) * piece // pieces for piece in range(1, pieces)]
                num_bytes = more // pieces
        if len(where):
            self._cuts.append(len(where))

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def part(self, number: int) -> ViewPart:
        start, end = self._cuts[number], self._cuts[number + 1]
        rows = self._table.slice(start, end - start)
        used, numbers = np.unique(rows["shard"].to_numpy(), return_inverse=True)
        shards = tuple(self._shards[place] for place in used)
        columns = {name: rows[name] for name in rows.column_names} | {"shard": pa.array(numbers, pa.int32())}
        return ViewPart(part_table(columns, shards), shards)


def _picture_bytes(shard: StoredShard, features: FeatureShape | None) -> int:
    """Of a picture of a shard, about; 0 for a view without pictures."""
    return max(0, shard.bytes // max(shard.rows, 1) - features.bytes_per_row) if features else 0


@dataclass(frozen=True)
class _PartWriter:
    """Called with (number, part, whether an earlier run wrote it): an entry of Manifest.shards, and whether what that
    run wrote were other rows, as another device or release finds them.

    pictures: the places of the datasets that hold the pictures. features: of a view that gets its pictures.
    """

    out: Store
    pictures: tuple[str, ...]
    features: FeatureShape | None

    def key(self, number: int) -> str:
        return rows_key(number) if self.features is None else shard_key(number)

    def __call__(self, call: tuple[int, ViewPart, bool]) -> tuple[dict, bool]:
        number, part, there = call
        data = self.out.read_bytes(self.key(number)) if there else b""
        is_other = there and not self._holds(data, part)
        if is_other or not there:
            data = parquet_bytes(
                part.rows if self.features is None else with_pictures(self.out, part, self.pictures, self.features)
            )
            self.out.write_bytes(self.key(number), data)
        entry = {"key": self.key(number), "rows": len(part), "quarantined": 0}
        weight = int(part.rows["weight"].to_numpy().sum())
        if weight != len(part):
            entry["weighted_rows"] = weight
        return {**entry, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}, is_other

    def _holds(self, data: bytes, part: ViewPart) -> bool:
        """Whether a shard is of these very rows. Its pictures tell, so that they are not read from their datasets."""
        if self.features is None:
            return data == parquet_bytes(part.rows)
        try:
            found = pq.ParquetFile(io.BytesIO(data)).read([*_WRITTEN_OUT, "weight", "image"])  # weight: if it has one
            pictures = found["image"].combine_chunks().field("bytes").to_pylist()
            own = {name: found[name].to_pylist() for name in found.column_names if name != "image"}
        except (pa.ArrowException, OSError, LookupError):
            return False  # damaged
        own.setdefault("weight", [1] * len(found))
        if any(own.get(name) != part.rows[name].to_pylist() for name in (*_WRITTEN_OUT, "weight")):
            return False
        return list(map(picture_sha256, pictures)) == [digest.hex() for digest in part.rows["image_sha256"].to_pylist()]


#: What a shard with pictures has of a view's rows as they are.
_WRITTEN_OUT = ("sample_id", "caption", "clip_score", "seed", "corpus_id")


def _write_parts(view: ViewParts, writer: _PartWriter, work: ShardWork) -> tuple[dict, ...]:
    """Entries of Manifest.shards; what an earlier run wrote stays where it is the same."""
    present = set(writer.out.list(writer.key(0).partition("/")[0] + "/"))
    timer = LineTimer()
    entries: list[dict] = []
    others = 0
    calls = ((number, view.part(number), writer.key(number) in present) for number in range(len(view)))
    for entry, is_other in work.in_order(writer, calls):
        entries.append(entry)
        others += is_other
        if timer.due():
            log.info("%d of %d shards written", len(entries), len(view))
    for key in (beyond := present - {entry["key"] for entry in entries}):
        writer.out.delete(key)
    if replaced := others + len(beyond):
        log.warning(
            "%s: %d shards of an earlier run hold other rows, of another device or release, or are damaged: replaced",
            writer.out.root, replaced,
        )  # fmt: skip
    return tuple(entries)


def _write_vocabularies(out: Store, sources: Sequence[OpenDataset], rows: ViewRows) -> None:
    """Those of one source as they are, so that a view is trained with the same words; of several by their rule."""
    keys = [key for key in VOCABULARY_KEYS if all(source.store.exists(key) for source in sources)]
    if len(sources) == 1:
        for key in keys:
            out.write_bytes(key, sources[0].store.read_bytes(key))
    elif len(keys) == len(VOCABULARY_KEYS):
        from cluster.dataset.together import vocabularies_of

        found = vocabularies_of(sources, rows.caption, rows=len(rows))
        for key, data in zip(VOCABULARY_KEYS, (found.words, found.concepts, found.clip_head), strict=True):
            out.write_bytes(key, data)


def _manifest(
    out: Store, sources: Sequence[OpenDataset], placed: _Placed, shards: tuple[dict, ...], lineage: Lineage
) -> Manifest:
    first = sources[0].manifest
    spec = first.spec
    named = spec.generator.without_places()
    if any(source.manifest.spec.generator.without_places() != named for source in sources):
        several = GeneratorSpec(
            model=SEVERAL, revision="", num_inference_steps=1, guidance_scale=0.0, batch_size=1, max_attempts=1
        )
        spec = replace(spec, generator=several)
    corpora = list(dict.fromkeys(source.manifest.corpus for source in sources))
    stored = len(placed.table)
    score_sum = math.fsum(placed.table["clip_score"].to_pylist())  # exact, so that the order of rows does not matter
    return Manifest(
        spec=spec,
        corpus=" + ".join(corpora),
        corpus_fingerprint=first.corpus_fingerprint if len(sources) == 1 else "",
        features=first.features,
        expected=stored,
        stored=stored,
        quarantined=0,
        quarantined_by_reason={},
        clip_score_mean=score_sum / stored if stored and spec.clip.model != "null" else None,
        shard_bytes=sum(shard["bytes"] for shard in shards),
        shards=shards,
        schema_version=VIEW_VERSION,
        kind=VIEW,
        pictures=tuple(replace(store, beside=way_to(out.address, store.path)) for store in placed.stores),
        fingerprint=view_fingerprint(placed.table),
        lineage=lineage,
    )


def view_fingerprint(table: pa.Table) -> str:
    """Of rows of VIEW_SCHEMA in any order: the dataset's rule, as all of them are stored."""
    digest = hashlib.sha256()
    for line in sorted(_entries(table)):
        digest.update(line.encode())
    return digest.hexdigest()


def _entries(table: pa.Table) -> Iterator[str]:
    names = ("sample_id", "caption", "seed", "image_sha256")
    for sample, caption, seed, image in zip(*(table[name].to_pylist() for name in names), strict=True):
        yield fingerprint_entry(sample, caption, seed, STORED, image.hex())
