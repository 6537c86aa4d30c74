"""One shard's objects against its plan part: every planned sample stored or quarantined, once, and intact."""

import hashlib
import io
import json
from dataclasses import dataclass, field
from json.encoder import encode_basestring as json_string

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset.committed import load_stats
from cluster.dataset.documents import UPGRADED_FROM, Plan
from cluster.dataset.keys import MANIFEST_KEY, quarantine_key, shard_key, stats_key
from cluster.dataset.parquet import UNREADABLE, read_table
from cluster.dataset.plan import corpus_lines, sample_id
from cluster.store.store import Store
from pcm.errors import InputError, first_line
from pcm.generation.seeds import attempt_seed, redraw_seed, sample_seeds
from pcm.images import open_image
from pcm.reasons import USABLE
from pcm.records import (
    PLAN_SCHEMA,
    QUARANTINED,
    STORED,
    FeatureShape,
    feature_matrix,
    feature_shape,
    shard_schema,
    shard_version,
)

#: Problems that are told of one shard; all are counted.
PROBLEMS_SHOWN = 20

#: What a user is to do about shards of another version than plan.json.
FINISH_UPGRADE = "an upgrade was interrupted: run jobs.verify DATASET --upgrade"


@dataclass
class ShardReport:
    """What one shard's objects show.

    `entries` are its lines of the dataset's fingerprint, sorted by sample id; `corpus` its lines of the corpus's.
    """

    shard: int
    planned: int
    stored: int = 0
    quarantined: int = 0
    missing: int = 0
    duplicated: int = 0
    corrupt: int = 0
    sha256: str = ""  # of the shard object
    reasons: dict[str, int] = field(default_factory=dict)
    entries: bytes = b""
    corpus: bytes = b""
    plan_damaged: bool = False
    damaged: bool = False  # to be made again
    problems: list[str] = field(default_factory=list)

    def damage(self, problem: str) -> None:
        self.damaged = True
        if len(self.problems) < PROBLEMS_SHOWN:
            self.problems.append(problem)


@dataclass(frozen=True)
class ShardChecks:
    """Checks shards of a plan: call it with (shard, its sha256 by the manifest, None where that lists no such shard).

    features: by the manifest, None where there is none.
    """

    store: Store
    plan: Plan
    features: FeatureShape | None

    def __call__(self, call: tuple[int, str | None]) -> ShardReport:
        return check_shard(self.store, self.plan, self.features, *call)


def check_shard(store: Store, plan: Plan, features: FeatureShape | None, shard: int, said: str | None) -> ShardReport:
    """Check plan part, shard, quarantine part and stats of one shard, as ShardChecks says."""
    report = ShardReport(shard, planned=plan.shard_rows(shard))
    try:
        part = read_table(store, plan.part_key(shard))
        _check_plan_part(part, plan, shard)
    except UNREADABLE as error:
        report.plan_damaged = True
        report.corrupt = report.planned
        report.problems.append(f"{plan.part_key(shard)}: unreadable or not this plan's ({first_line(error)})")
        return report
    report.corpus = _corpus_lines(part)
    captions, seeds = part["caption"].to_pylist(), part["seed"].to_pylist()
    planned = dict(zip(part["sample_id"].to_pylist(), zip(captions, seeds, strict=True), strict=True))
    key = shard_key(shard)
    try:
        data = store.read_bytes(key)
    except FileNotFoundError:
        report.missing = report.planned
        report.damage(f"{key}: missing ({report.planned} samples)")
        return report
    report.sha256 = hashlib.sha256(data).hexdigest()
    if said is not None and report.sha256 != said:
        report.problems.append(f"{key}: its sha256 is not the manifest's")
    try:
        table = pq.read_table(io.BytesIO(data))
        version = check_schema(table.schema, plan.schema_version, features)
        table.validate(full=True)  # text is UTF-8, offsets lie within
        rows, finite_rows = _light_rows(table), finite_rows_of(table)
    except UNREADABLE as error:
        report.corrupt = report.planned
        report.damage(f"{key}: unreadable ({first_line(error)})")
        return report
    if version < plan.schema_version:
        report.problems.append(f"{key}: of schema version {version} still; {FINISH_UPGRADE}")
    num_bytes = len(data)
    del data, table
    seen: set[str] = set()
    entries = []
    for row, finite in zip(rows, finite_rows.tolist(), strict=True):
        sample, caption, image, _, _, seed, _, status = row
        _count(report, seen, sample, _stored_problem(row, planned.get(sample), finite), key)
        entries.append(fingerprint_entry(sample, caption, seed, status, picture_sha256(image)))
    report.stored = len(rows)
    for refused in _quarantine_rows(store, shard, report):
        sample = refused["sample_id"]
        _count(report, seen, sample, _quarantine_problem(refused, planned.get(sample)), quarantine_key(shard))
        report.quarantined += 1
        report.reasons[refused["reason"]] = report.reasons.get(refused["reason"], 0) + 1
        entries.append(fingerprint_entry(sample, refused["caption"], refused["seed"], refused["status"], ""))
    report.missing = sum(sample not in seen for sample in planned)
    if report.missing:
        report.damage(f"{key}: {report.missing} planned samples neither stored nor quarantined")
    report.entries = "".join(sorted(entries)).encode()
    _check_stats(store, report, num_bytes, outdated=version < plan.schema_version)
    return report


def fingerprint_entry(sample_id: str, caption: str, seed: int, status: str, image_sha256: str) -> str:
    """One line of the fingerprint: sample_id, caption, seed, status, sha256 of the stored image bytes or ""."""
    return f'[{json_string(sample_id)}, {json_string(caption)}, {seed}, {json_string(status)}, "{image_sha256}"]\n'


def picture_sha256(image: bytes | None) -> str:
    return hashlib.sha256(image).hexdigest() if image else ""


def _check_plan_part(part: pa.Table, plan: Plan, shard: int) -> None:
    """Raises ValueError unless a plan part has the ids and seeds that follow from its place and its captions."""
    if part.schema != PLAN_SCHEMA or any(column.null_count for column in part.columns):
        raise ValueError("other columns than a plan part has")
    images = plan.spec.images_per_caption
    places = [divmod(position, images) for position in plan.shard_positions(shard)]
    if part["sample_id"].to_pylist() != [sample_id(*place) for place in places]:
        raise ValueError("other samples than planned for this shard")
    if list(zip(part["record_index"].to_pylist(), part["image_index"].to_pylist(), strict=True)) != places:
        raise ValueError("other places than its sample ids")
    if plan.redraws:
        named = zip(part["corpus_id"].to_pylist(), part["caption"].to_pylist(), strict=True)
        if part["seed"].to_pylist() != [redraw_seed(corpus_id, caption) for corpus_id, caption in named]:
            raise ValueError("other seeds than its redraws have")
        return
    corpus_ids = dict(zip(part["record_index"].to_pylist(), part["corpus_id"].to_pylist(), strict=True))
    seeds = sample_seeds(plan.spec, list(corpus_ids.values()))
    first = places[0][0]
    if part["seed"].to_pylist() != [seeds[(record - first) * images + image] for record, image in places]:
        raise ValueError("other seeds than its captions have")


def _corpus_lines(part: pa.Table) -> bytes:
    rows = zip(*(part[name].to_pylist() for name in ("image_index", "corpus_id", "caption", "reason")), strict=True)
    first = [row[1:] for row in rows if row[0] == 0]
    return corpus_lines(
        (row[0] for row in first),
        (row[1] for row in first),
        ("" if row[2] in USABLE else row[2] for row in first),
    )


def _count(report: ShardReport, seen: set[str], sample: str, problem: str, key: str) -> None:
    if sample in seen:
        report.duplicated += 1
        problem = problem or "stored more than once"
    elif problem:
        report.corrupt += 1
    seen.add(sample)
    if problem:
        report.damage(f"{key}: {sample}: {problem}")


def _stored_problem(row: tuple, planned: tuple[str, int] | None, finite: bool) -> str:
    """Why a stored row is not to be trusted, or ""."""
    _, caption, encoded, width, height, seed, attempts, status = row
    if planned is None:
        return "not planned for this shard"
    if status != STORED:
        return f"status {status!r} in a shard"
    if caption != planned[0]:
        return "another caption than planned"
    if attempts < 1 or seed != attempt_seed(planned[1], attempts - 1):
        return "another seed than planned"
    if not finite:
        return "features or score not finite"
    return picture_problem(encoded, width, height)


def picture_problem(encoded: bytes | None, width: int, height: int) -> str:
    """Why a stored picture is not to be trusted, or ""."""
    try:
        image = open_image(encoded or b"")
    except InputError as error:
        return f"image: {error}"
    if image.size != (width, height):
        return f"image is {image.size[0]}x{image.size[1]}, its row says {width}x{height}"
    return ""


def _quarantine_problem(row: dict, planned: tuple[str, int] | None) -> str:
    if planned is None:
        return "not planned for this shard"
    if row["status"] != QUARANTINED or not row["reason"]:
        return "quarantined without status or reason"
    return "" if row["caption"] == planned[0] else "another caption than planned"


def _quarantine_rows(store: Store, shard: int, report: ShardReport) -> list[dict]:
    try:
        return read_table(store, quarantine_key(shard)).to_pylist()
    except FileNotFoundError:
        return []
    except UNREADABLE as error:
        report.damage(f"{quarantine_key(shard)}: unreadable ({first_line(error)})")
        return []


def _check_stats(store: Store, report: ShardReport, num_bytes: int, *, outdated: bool) -> None:
    try:
        said = load_stats(store, report.shard)
    except InputError as error:
        report.damage(str(error))
        return
    if outdated and json.loads(store.read_bytes(stats_key(report.shard))).get(UPGRADED_FROM) == report.sha256:
        return  # the upgrade was interrupted between the two
    if (said["sha256"], said["bytes"]) != (report.sha256, num_bytes):
        report.damage(f"{stats_key(report.shard)}: of other bytes than {shard_key(report.shard)}")
    elif (said["successes"], said["quarantined_by_reason"]) != (report.stored, report.reasons):
        report.damage(
            f"{stats_key(report.shard)}: says {said['successes']} stored and {said['quarantined_by_reason']} "
            f"quarantined, found {report.stored} and {report.reasons}"
        )


def check_schema(schema: pa.Schema, planned: int, said: FeatureShape | None) -> int:
    """The version of the shard's schema: the planned one, or the one before where an upgrade is not done.

    Raises ValueError unless names and types are a shard's, with the manifest's features where these are `said`.
    Columns of later work are passed over.
    """
    version = min(shard_version(schema), planned)
    features = feature_shape(schema) if version >= 3 else _features_of_lists(schema, said)
    if said is not None and features != said:
        raise ValueError(f"features {features}, must be {said} as in {MANIFEST_KEY}")
    wanted = shard_schema(features, version)
    found = dict(zip(schema.names, schema.types, strict=True))
    for name, kind in zip(wanted.names, wanted.types, strict=True):
        if found.get(name) != kind:
            raise ValueError(f"column {name}: {found.get(name, 'missing')}, must be {kind}")
    return version


def _features_of_lists(schema: pa.Schema, said: FeatureShape | None) -> FeatureShape:
    """Of a shard of version 2, which tells no more than the number of values."""
    if said is not None:
        return said
    sizes = [schema.field(name).type.list_size for name in ("global_feature", "patch_features")]
    return FeatureShape(embed_dim=sizes[0], patch_dim=sizes[1], num_patches=1)


def _light_rows(table: pa.Table) -> list[tuple]:
    """(sample_id, caption, image bytes, width, height, seed, attempts, status) of each row."""
    names = ("sample_id", "caption", "image", "width", "height", "seed", "attempts", "status")
    if any(table[name].null_count for name in names):
        raise ValueError("a value is null")
    columns = {name: table[name] for name in names}
    columns["image"] = pa.chunked_array([chunk.field("bytes") for chunk in table["image"].chunks], pa.binary())
    return list(zip(*(column.to_pylist() for column in columns.values()), strict=True))


def check_values(table: pa.Table) -> None:
    """Raises ValueError where a value of these columns is null or not finite; others may be missing from the table."""
    table.validate(full=True)
    if missing := [name for name in table.column_names if name != "reason" and table[name].null_count]:
        raise ValueError(f"{missing[0]}: a value is null")
    for name in {"clip_score", "global_feature", "patch_features"} & set(table.column_names):
        values = table[name].to_numpy() if name == "clip_score" else feature_matrix(table[name])
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: a value is not finite")


def finite_rows_of(table: pa.Table) -> np.ndarray:
    """(n,) bool: whether score and features of each row are finite."""
    finite = np.isfinite(table["clip_score"].to_numpy())
    for name in ("global_feature", "patch_features"):
        finite &= np.isfinite(feature_matrix(table[name])).all(axis=1)
    return finite
