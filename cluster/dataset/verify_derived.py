"""Proof of a derived dataset from the stores alone.

Of a view: every row, and the very picture that it points at, in the shard as it was when the view was made. Of one that
holds its pictures: every row and picture. Both have a fingerprint in dataset.json, which must come out again.
"""

import hashlib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cluster.dataset.documents import Manifest, StoredShard
from cluster.dataset.keys import MANIFEST_KEY
from cluster.dataset.parquet import UNREADABLE
from cluster.dataset.rows import read_shard, read_view_part
from cluster.dataset.shard_check import (
    PROBLEMS_SHOWN,
    fingerprint_entry,
    finite_rows_of,
    picture_problem,
    picture_sha256,
)
from cluster.dataset.view_part import PictureShard
from cluster.dataset.vocabulary_files import unreadable_vocabularies
from cluster.numbers import duration
from cluster.shard_work import ShardWork
from cluster.store.store import Store, open_store
from pcm.errors import InputError, first_line
from pcm.line_timer import LineTimer
from pcm.records import STORED

log = logging.getLogger(__name__)

_COLUMNS = ["sample_id", "image", "width", "height", "clip_score", "global_feature", "patch_features"]


@dataclass
class _Report:
    """What one shard's rows show."""

    stored: int = 0
    missing: int = 0
    corrupt: int = 0
    sample_ids: list[str] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def tell(self, problem: str) -> None:
        if len(self.problems) < PROBLEMS_SHOWN:
            self.problems.append(problem)


@dataclass(frozen=True)
class _ShardChecks:
    store: Store
    is_view: bool

    def __call__(self, shard: StoredShard) -> _Report:
        return (_check_view_shard if self.is_view else _check_shard)(self.store, shard)


def verify_derived(store: Store, manifest: Manifest, workers: ShardWork) -> dict[str, Any]:
    """As cluster.dataset.verify.verify. missing: rows that are not there, or whose picture is not; a line of `problems`
    names the dataset that has changed or is gone. Memory: the fingerprint's lines, some 250 bytes a row."""
    shards = manifest.stored_shards
    check = _ShardChecks(store, is_view=manifest.is_view)
    seen: set[str] = set()
    entries: list[str] = []
    counts = {"stored": 0, "missing": 0, "duplicated": 0, "corrupt": 0}
    problems = [*_foreign_objects(store, manifest), *unreadable_vocabularies(store)]
    timer = LineTimer()
    for done, report in enumerate(workers.in_order(check, shards), start=1):
        for name in ("stored", "missing", "corrupt"):
            counts[name] += getattr(report, name)
        for sample in report.sample_ids:
            if sample in seen:
                counts["duplicated"] += 1
                report.tell(f"{shards[done - 1].key}: {sample}: stored more than once")
            seen.add(sample)
        entries += report.entries
        problems += report.problems
        if timer.due():
            left = (len(shards) - done) * timer.elapsed / done
            log.info("%d of %d shards checked, ETA %s", done, len(shards), duration(left))
    fingerprint = hashlib.sha256("".join(sorted(entries)).encode()).hexdigest()
    faulty = counts["missing"] + counts["duplicated"] + counts["corrupt"]
    if fingerprint != manifest.fingerprint and not faulty:
        problems.append(f"{MANIFEST_KEY}: its fingerprint is not that of the rows")
    if manifest.stored != sum(shard.rows for shard in shards):
        problems.append(f"{MANIFEST_KEY}: says {manifest.stored} stored, its shards {sum(s.rows for s in shards)}")
    for problem in problems[:PROBLEMS_SHOWN]:
        log.warning("%s", problem)
    return {
        "expected": manifest.expected,
        "stored": counts["stored"],
        "quarantined": 0,
        **{name: counts[name] for name in ("missing", "duplicated", "corrupt")},
        "fingerprint": fingerprint,
        "complete": True,
        "problems": problems[:PROBLEMS_SHOWN],
        "ok": not (faulty or problems),
    }


def _check_view_shard(store: Store, shard: StoredShard) -> _Report:
    report = _Report()
    try:
        part = read_view_part(store, shard)
    except InputError as error:
        return _unreadable(report, shard, error)
    report.stored = len(part)
    report.sample_ids = part.rows["sample_id"].to_pylist()
    names = ("sample_id", "caption", "seed", "image_sha256", "picture_id")
    own = [part.rows[name].to_pylist() for name in names]
    finite = np.isfinite(part.rows["clip_score"].to_numpy())
    digests = [""] * len(part)  # of the pictures that are there
    for pictures, rows, places in part.groups():
        dataset = shard.pictures[pictures.pictures]
        try:
            found = _pictures(dataset, pictures, rows)
        except InputError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                report.missing += len(places)
                report.tell(f"{shard.key}: {len(places)} pictures are gone: {dataset}: {first_line(error)}")
            else:
                report.corrupt += len(places)
                report.tell(f"{shard.key}: {len(places)} pictures have changed: {dataset}: {first_line(error)}")
            continue
        for place, row in zip(places.tolist(), rows.tolist(), strict=True):
            sample_id, digest, problem = found[row]
            digests[place] = digest
            if digest != own[3][place].hex():
                problem = problem or "another picture than when the view was made"
            elif sample_id != own[4][place]:
                problem = problem or f"the picture of {sample_id}, not of {own[4][place]}"
            if problem or not finite[place]:
                report.corrupt += 1
                report.tell(f"{shard.key}: {own[0][place]}: {problem or 'score not finite'} ({dataset})")
    report.entries = [
        fingerprint_entry(sample, caption, seed, STORED, digest)
        for sample, caption, seed, digest in zip(*own[:3], digests, strict=True)
    ]
    return report


def _pictures(dataset: str, shard: PictureShard, rows: np.ndarray) -> dict[int, tuple[str, str, str]]:
    """Row -> (sample id, sha256 of the picture, what is wrong with it or ""). Raises InputError."""
    table = read_shard(open_store(dataset), shard.stored, _COLUMNS).combine_chunks()
    wanted = np.unique(rows)
    return dict(zip(wanted.tolist(), _checked(table.take(wanted)), strict=True))


def _checked(table: Any) -> Iterator[tuple[str, str, str]]:
    finite = finite_rows_of(table)
    pictures = table["image"].combine_chunks().field("bytes").to_pylist()
    light = (table[name].to_pylist() for name in ("sample_id", "width", "height"))
    for sample, width, height, picture, is_finite in zip(*light, pictures, finite.tolist(), strict=True):
        problem = "" if is_finite else "features or score not finite"
        if picture is not None and not problem:  # a dataset of text alone has none
            problem = picture_problem(picture, width, height)
        yield sample, picture_sha256(picture), problem


def _check_shard(store: Store, shard: StoredShard) -> _Report:
    report = _Report()
    try:
        data = store.read_bytes(shard.key)
        if (found := hashlib.sha256(data).hexdigest()) != shard.sha256:
            raise ValueError(f"its sha256 is {found[:16]}... instead of {shard.sha256[:16]}...")
        table = pq.read_table(io.BytesIO(data))
        table.validate(full=True)
        checked = list(_checked(table))
        captions, seeds = table["caption"].to_pylist(), table["seed"].to_pylist()
    except (InputError, *UNREADABLE) as error:
        return _unreadable(report, shard, error)
    report.stored = len(table)
    for (sample, digest, problem), caption, seed in zip(checked, captions, seeds, strict=True):
        report.sample_ids.append(sample)
        report.entries.append(fingerprint_entry(sample, caption, seed, STORED, digest))
        if problem:
            report.corrupt += 1
            report.tell(f"{shard.key}: {sample}: {problem}")
    return report


def _unreadable(report: _Report, shard: StoredShard, error: BaseException) -> _Report:
    gone = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError)
    setattr(report, "missing" if gone else "corrupt", shard.rows)
    report.tell(f"{shard.key}: {'missing' if gone else f'unreadable ({first_line(error)})'} ({shard.rows} rows)")
    return report


def _foreign_objects(store: Store, manifest: Manifest) -> list[str]:
    wanted = {shard["key"] for shard in manifest.shards}
    there = [key for folder in ("shards/", "rows/") for key in store.list(folder)]
    return [f"{key}: not part of the dataset" for key in there if key not in wanted]
