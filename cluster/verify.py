"""Proof of a dataset from the store alone: every planned sample stored or quarantined, once, and intact."""

import hashlib
import io
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.dataset import (
    MANIFEST_KEY,
    Manifest,
    Plan,
    load_plan,
    plan_part_key,
    quarantine_key,
    shard_key,
)
from cluster.storage import Store
from pcm.errors import InputError
from pcm.images import open_image
from pcm.records import QUARANTINED, STORED, FeatureShape, shard_schema

log = logging.getLogger(__name__)

#: Problems that are printed; all are counted.
PROBLEMS_SHOWN = 20

#: What reading a damaged Parquet object raises: gone, no Parquet, broken pages, text that is no UTF-8, another schema.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException)


@dataclass
class ShardReport:
    """What one shard's objects show. `entries` are the fingerprint's lines, sorted by sample id."""

    planned: int
    stored: int = 0
    quarantined: int = 0
    missing: int = 0
    duplicated: int = 0
    corrupt: int = 0
    entries: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def verify(store: Store, *, workers: int = 8) -> dict:
    """Check every object against the plan and the manifest.

    Returns expected, stored, quarantined, missing (planned, nowhere), duplicated (more than once), corrupt (there, but
    not to be trusted: unreadable, another checksum, caption, seed or size, undecodable image, non-finite features),
    complete (the manifest is there), fingerprint and ok. Raises InputError when there is no dataset.
    """
    plan = load_plan(store)
    if plan is None:
        raise InputError(f"{store.root}: not a dataset (no plan.json); give the --out of a jobs.generate run")
    manifest = _manifest(store)
    total = ShardReport(planned=plan.expected)
    fingerprint = hashlib.sha256()
    for report in _reports(store, plan, manifest, workers):
        for counter in ("stored", "quarantined", "missing", "duplicated", "corrupt"):
            setattr(total, counter, getattr(total, counter) + getattr(report, counter))
        total.problems += report.problems[: PROBLEMS_SHOWN - len(total.problems)]
        for entry in report.entries:  # plan order is sample_id order, so the lines come sorted over all shards
            fingerprint.update(entry.encode())
    total.problems += _foreign_objects(store, plan)
    if manifest is not None:
        total.problems += _manifest_disagrees(manifest, total)
    for problem in total.problems[:PROBLEMS_SHOWN]:
        log.warning("%s", problem)
    ok = manifest is not None and not (total.missing or total.duplicated or total.corrupt or total.problems)
    return {
        "expected": plan.expected,
        "stored": total.stored,
        "quarantined": total.quarantined,
        "missing": total.missing,
        "duplicated": total.duplicated,
        "corrupt": total.corrupt,
        "fingerprint": fingerprint.hexdigest(),
        "complete": manifest is not None,
        "problems": total.problems[:PROBLEMS_SHOWN],
        "ok": ok,
    }


def fingerprint_entry(sample_id: str, caption: str, seed: int, status: str, image: bytes) -> str:
    """One line of the fingerprint: sample_id, caption, seed, status sha256 of the stored image bytes or ""."""
    digest = hashlib.sha256(image).hexdigest() if image else ""
    return json.dumps([sample_id, caption, seed, status, digest], ensure_ascii=False) + "\n"


def _reports(store: Store, plan: Plan, manifest: Manifest | None, workers: int) -> Iterator[ShardReport]:
    def check(shard: int) -> ShardReport:
        return check_shard(store, plan, manifest, shard)

    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, plan.num_shards, 4 * workers):  # a window, so that reports do not pile up in memory
            yield from pool.map(check, range(start, min(start + 4 * workers, plan.num_shards)))


def check_shard(store: Store, plan: Plan, manifest: Manifest | None, shard: int) -> ShardReport:
    """Check the plan part, shard and quarantine part of one shard."""
    try:
        planned = {row["sample_id"]: row for row in _read(store, plan_part_key(shard)).to_pylist()}
    except _UNREADABLE as error:
        count = plan.shard_rows(shard)
        return ShardReport(
            count, corrupt=count, problems=[f"{plan_part_key(shard)}: unreadable ({_first_line(error)})"]
        )
    report = ShardReport(planned=len(planned))
    seen: dict[str, int] = {}
    try:
        data = store.read_bytes(shard_key(shard))
    except FileNotFoundError:
        report.missing = len(planned)
        report.problems.append(f"{shard_key(shard)}: missing ({len(planned)} samples)")
        return report
    if manifest is not None and hashlib.sha256(data).hexdigest() != manifest.shards[shard]["sha256"]:
        report.problems.append(f"{shard_key(shard)}: its sha256 is not the manifest's")
    try:
        table = pq.read_table(io.BytesIO(data))
        _check_schema(table, manifest)
        rows, finite_rows = _light_rows(table), _finite_rows(table)
    except _UNREADABLE as error:
        report.corrupt = len(planned)
        report.problems.append(f"{shard_key(shard)}: unreadable ({_first_line(error)})")
        return report
    del data, table
    entries = []
    for row, finite in zip(rows, finite_rows, strict=True):
        problem = _stored_problem(row, planned.get(row["sample_id"]), finite)
        _count(report, seen, row["sample_id"], problem, shard_key(shard))
        report.stored += 1
        image = row["image"]["bytes"] or b""
        entries.append(fingerprint_entry(row["sample_id"], row["caption"], row["seed"], row["status"], image))
    for row in _quarantine_rows(store, shard, report):
        problem = _quarantine_problem(row, planned.get(row["sample_id"]))
        _count(report, seen, row["sample_id"], problem, quarantine_key(shard))
        report.quarantined += 1
        entries.append(fingerprint_entry(row["sample_id"], row["caption"], row["seed"], row["status"], b""))
    report.missing = sum(1 for sample in planned if sample not in seen)
    if report.missing:
        report.problems.append(f"{shard_key(shard)}: {report.missing} planned samples neither stored nor quarantined")
    report.entries = sorted(entries)
    return report


def _count(report: ShardReport, seen: dict[str, int], sample_id: str, problem: str, key: str) -> None:
    seen[sample_id] = seen.get(sample_id, 0) + 1
    if seen[sample_id] > 1:
        report.duplicated += 1
        problem = problem or "stored more than once"
    elif problem:
        report.corrupt += 1
    if problem and len(report.problems) < PROBLEMS_SHOWN:
        report.problems.append(f"{key}: {sample_id}: {problem}")


def _stored_problem(row: dict, planned: dict | None, finite: bool) -> str:
    """Why a stored row is not to be trusted, or ""."""
    if planned is None:
        return "not planned for this shard"
    if row["status"] != STORED:
        return f"status {row['status']!r} in a shard"
    if row["caption"] != planned["caption"]:
        return "another caption than planned"
    if row["attempts"] < 1 or row["seed"] != planned["seed"] + row["attempts"] - 1:
        return "another seed than planned"
    if not finite:
        return "features or score not finite"
    try:
        image = open_image(row["image"]["bytes"] or b"")
    except InputError as error:
        return f"image: {error}"
    if image.size != (row["width"], row["height"]):
        return f"image is {image.size[0]}x{image.size[1]}, its row says {row['width']}x{row['height']}"
    return ""


def _quarantine_problem(row: dict, planned: dict | None) -> str:
    if planned is None:
        return "not planned for this shard"
    if row["status"] != QUARANTINED or not row["reason"]:
        return "quarantined without status or reason"
    return "" if row["caption"] == planned["caption"] else "another caption than planned"


def _quarantine_rows(store: Store, shard: int, report: ShardReport) -> list[dict]:
    try:
        return _read(store, quarantine_key(shard)).to_pylist()
    except FileNotFoundError:
        return []
    except _UNREADABLE as error:
        report.problems.append(f"{quarantine_key(shard)}: unreadable ({_first_line(error)})")
        return []


def _check_schema(table: pa.Table, manifest: Manifest | None) -> None:
    """Raises ValueError unless names and types are a shard's, with the manifest's features where there is one."""
    if manifest is not None:
        features = manifest.features
    else:
        sizes = [table.schema.field(name).type.list_size for name in ("global_feature", "patch_features")]
        features = FeatureShape(embed_dim=sizes[0], patch_dim=sizes[1], num_patches=1)
    wanted = {field.name: field.type for field in shard_schema(features)}
    found = {field.name: field.type for field in table.schema}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise ValueError(f"column {name}: {found.get(name, 'missing')}, must be {wanted.get(name, 'absent')}")
    table.validate(full=True)  # text is UTF-8, offsets lie within


def _light_rows(table: pa.Table) -> list[dict]:
    rows = table.select(["sample_id", "caption", "image", "width", "height", "seed", "attempts", "status"]).to_pylist()
    if any(value is None for row in rows for value in row.values()):
        raise ValueError("a value is null")
    return rows


def _finite_rows(table: pa.Table) -> np.ndarray:
    finite = np.isfinite(table["clip_score"].to_numpy())
    for name in ("global_feature", "patch_features"):
        column = table[name].combine_chunks()
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
        finite &= np.isfinite(values).all(axis=1)
    return finite


def _foreign_objects(store: Store, plan: Plan) -> list[str]:
    """Shards or quarantine parts beyond the plan: a dataset must hold nothing that nobody asked for."""
    wanted = {key(shard) for shard in range(plan.num_shards) for key in (shard_key, quarantine_key)}
    found = [key for folder in ("shards", "quarantine") for key in store.list(folder)]
    return [f"{key}: not part of the plan" for key in found if key not in wanted]


def _manifest_disagrees(manifest: Manifest, total: ShardReport) -> list[str]:
    said, found = (manifest.stored, manifest.quarantined), (total.stored, total.quarantined)
    if said == found:
        return []
    return [f"{MANIFEST_KEY}: says {said[0]} stored and {said[1]} quarantined, found {found[0]} and {found[1]}"]


def _manifest(store: Store) -> Manifest | None:
    try:
        return Manifest.from_json(store.read_bytes(MANIFEST_KEY))
    except FileNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read(store: Store, key: str) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read_bytes(key)))
