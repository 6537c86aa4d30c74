"""Proof of a dataset from the store alone: every planned sample stored or quarantined, once, and intact.

Shards are read once, a few at a time, so memory does not grow with their number; where they are many, by tasks on Ray,
which send back what the fingerprint is made of. What is checked of each: `cluster.dataset.shard_check`. Beyond that:
the plan parts are the captions that plan.json speaks of, the manifest is the sum of the shards, words, concepts and
CLIP head are as they were stored, no group object says what is not so, and no shard is there that nobody planned.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster.dataset.committed import GROUP, load_group
from cluster.dataset.documents import Manifest, Plan, find_manifest, load_plan, refuse_interrupted
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, group_key, quarantine_key, shard_key
from cluster.dataset.request import VerifyRequest
from cluster.dataset.shard_check import FINISH_UPGRADE, PROBLEMS_SHOWN, ShardChecks, ShardReport
from cluster.dataset.verify_derived import verify_derived
from cluster.dataset.vocabulary_files import vocabulary_problems
from cluster.numbers import duration
from cluster.shard_work import ShardWork, shard_work
from cluster.store.reach import Landmark
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY, UNDRAWN
from pcm.line_timer import LineTimer

log = logging.getLogger(__name__)

_COUNTERS = ("stored", "quarantined", "missing", "duplicated", "corrupt")


@dataclass
class Inspection:
    """What a dataset's objects show, and what has to be made again. Counts are samples."""

    plan: Plan
    manifest: Manifest | None
    stored: int = 0
    quarantined: int = 0
    missing: int = 0
    duplicated: int = 0
    corrupt: int = 0
    fingerprint: str = ""
    damaged_shards: list[int] = field(default_factory=list)
    absent_shards: list[int] = field(default_factory=list)  # of the damaged ones
    damaged_plan_parts: list[int] = field(default_factory=list)
    wrong_groups: list[int] = field(default_factory=list)
    damaged_vocabularies: list[str] = field(default_factory=list)  # keys
    captions_differ: bool = False  # plan parts against plan.json
    problems: list[str] = field(default_factory=list)

    @property
    def can_be_repaired(self) -> bool:
        """Whether anything is wrong that a repair makes again: of drawn pictures alone."""
        is_drawn = self.plan.spec.generator.model not in (*UNDRAWN, TEXT_ONLY)
        wrong = self.damaged_shards or self.damaged_plan_parts or self.wrong_groups or self.damaged_vocabularies
        return is_drawn and bool(wrong or self.captions_differ)

    @property
    def complete(self) -> bool:
        """Whether the manifest is there, and of the corpus as it is planned now."""
        return self.manifest is not None and self.manifest.corpus_fingerprint == self.plan.corpus_fingerprint

    @property
    def ok(self) -> bool:
        return self.complete and not (self.missing or self.duplicated or self.corrupt or self.problems)

    def tell(self, problems: list[str]) -> None:
        self.problems += problems[: PROBLEMS_SHOWN - len(self.problems)]

    def to_dict(self) -> dict:
        return {
            "expected": self.plan.expected,
            **{name: getattr(self, name) for name in _COUNTERS},
            "fingerprint": self.fingerprint,
            "complete": self.complete,
            "problems": self.problems,
            "ok": self.ok,
        }


def verify(store: Store, *, run_on: str = VerifyRequest.run_on) -> dict:
    """Check every object against the plan and the manifest.

    Returns expected, stored, quarantined, missing (planned, nowhere), duplicated (more than once), corrupt (there, but
    not to be trusted: unreadable, another checksum, caption, seed or size, undecodable image, non-finite features),
    complete (the manifest is there, and of all planned captions), fingerprint, problems (the first of them) and ok.
    A derived dataset has no plan: it is proved by its own manifest (cluster.dataset.verify_derived).
    run_on: one of cluster.shard_work.RUN_ON; the report is the same.
    Raises InputError when there is no dataset.
    """
    manifest = find_manifest(store)
    if manifest is not None and manifest.lineage is not None:
        landmarks = [(store, MANIFEST_KEY), *((open_store(each.path), MANIFEST_KEY) for each in manifest.pictures)]
        return verify_derived(store, manifest, _workers(landmarks, manifest.stored, run_on))
    found = inspect(store, run_on=run_on)
    if found.complete and found.can_be_repaired:
        log.warning("%s: jobs.verify --repair makes what is missing or damaged again", store.root)
    return found.to_dict()


def inspect(store: Store, *, run_on: str = VerifyRequest.run_on) -> Inspection:
    """`verify`, with the places of what was found."""
    plan = require_plan(store, "repaired")
    result = Inspection(plan, find_manifest(store))
    fingerprint, corpus = hashlib.sha256(), hashlib.sha256()
    group: list[ShardReport] = []
    progress = _ProgressLines(plan)
    for report in _reports(store, plan, result.manifest, _workers([(store, PLAN_KEY)], plan.expected, run_on)):
        for counter in _COUNTERS:
            setattr(result, counter, getattr(result, counter) + getattr(report, counter))
        fingerprint.update(report.entries)  # plan order is sample_id order, so the lines come sorted over all shards
        corpus.update(report.corpus)
        report.entries = report.corpus = b""
        result.tell(report.problems)
        if report.damaged:
            result.damaged_shards.append(report.shard)
            if not report.sha256:
                result.absent_shards.append(report.shard)
        if report.plan_damaged:
            result.damaged_plan_parts.append(report.shard)
        group.append(report)
        if len(group) == GROUP or report.shard == plan.num_shards - 1:
            _check_group(store, group, result)
            group = []
        progress.add(report)
    result.fingerprint = fingerprint.hexdigest()
    if not result.damaged_plan_parts and corpus.hexdigest() != plan.corpus_fingerprint:
        result.captions_differ = True
        result.tell([f"{PLAN_KEY}: its corpus fingerprint is not that of the captions in the plan parts"])
    wrong = vocabulary_problems(store, plan)
    result.damaged_vocabularies = list(wrong)
    result.tell(list(wrong.values()))
    result.tell(_foreign_objects(store, plan))
    result.tell(_manifest_disagrees(result))
    for problem in result.problems:
        log.warning("%s", problem)
    return result


def require_plan(store: Store, what: str) -> Plan:
    """The plan of a dataset. Raises InputError where there is none: a derived dataset has no plan by which it could be
    `what`."""
    plan = load_plan(store)
    if plan is not None:
        return plan
    refuse_interrupted(store)
    manifest = find_manifest(store)
    if manifest is not None and manifest.lineage is not None:
        raise InputError(
            f"{store.root}: a derived dataset cannot be {what}; do that with its sources, then make it again with "
            f"jobs.{manifest.lineage.method} into another --out"
        )
    raise InputError(f"{store.root}: not a dataset (no {PLAN_KEY}); give the --out of a jobs.generate run")


def _workers(landmarks: list[Landmark], samples: int, run_on: str) -> ShardWork:
    return shard_work(run_on, samples=samples, landmarks=landmarks, threads=min(32, 4 * (os.cpu_count() or 1)))


def _reports(store: Store, plan: Plan, manifest: Manifest | None, workers: ShardWork) -> Iterator[ShardReport]:
    """In shard order."""
    said = manifest.shards if manifest is not None else ()
    features = manifest.features if manifest is not None else None
    calls = ((shard, said[shard]["sha256"] if shard < len(said) else None) for shard in range(plan.num_shards))
    return workers.in_order(ShardChecks(store, plan, features), calls)


def _check_group(store: Store, reports: list[ShardReport], result: Inspection) -> None:
    """A group object that a resume would believe must say of each shard what was found."""
    number = reports[0].shard // GROUP
    for said, found in zip(load_group(store, result.plan, number) or [], reports, strict=False):
        if not found.sha256:
            wrong = "is not there"
        elif (said["sha256"], said["successes"]) != (found.sha256, found.stored) and not found.damaged:
            wrong = "is another one"
        else:
            continue
        result.wrong_groups.append(number)
        result.tell([f"{group_key(number)}: {shard_key(found.shard)} {wrong}"])
        return


def _foreign_objects(store: Store, plan: Plan) -> list[str]:
    """Shards or quarantine parts beyond the plan: a dataset must hold nothing that nobody asked for."""
    foreign = []
    for folder, key in (("shards/", shard_key), ("quarantine/", quarantine_key)):
        wanted = {key(shard) for shard in range(plan.num_shards)}
        foreign += [f"{found}: not part of the plan" for found in store.list(folder) if found not in wanted]
    return foreign


def _manifest_disagrees(result: Inspection) -> list[str]:
    manifest, plan = result.manifest, result.plan
    if manifest is None:
        return []
    if not result.complete:
        return [
            f"{MANIFEST_KEY}: of {manifest.expected} samples, but the corpus has grown: {plan.expected} are planned; "
            "rerun the same jobs.generate command"
        ]
    said, found = (manifest.stored, manifest.quarantined), (result.stored, result.quarantined)
    problems = []
    if differences := manifest.spec.differences(plan.spec):
        problems.append(f"{MANIFEST_KEY}: of another spec than the plan ({'; '.join(differences)})")
    if manifest.schema_version != plan.schema_version:
        problems.append(
            f"{MANIFEST_KEY}: of schema version {manifest.schema_version}, {PLAN_KEY} of version "
            f"{plan.schema_version}; {FINISH_UPGRADE}"
        )
    if [shard["key"] for shard in manifest.shards] != [shard_key(number) for number in range(plan.num_shards)]:
        problems.append(f"{MANIFEST_KEY}: lists other shards than the plan")
    if said != found:
        problems.append(
            f"{MANIFEST_KEY}: says {said[0]} stored and {said[1]} quarantined, found {found[0]} and {found[1]}"
        )
    return problems


class _ProgressLines:
    """A line on the log now and then: how much is checked, how fast, how long it will take."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._timer = LineTimer()
        self._samples = self._problems = 0

    def add(self, report: ShardReport) -> None:
        self._samples += report.planned
        self._problems += report.missing + report.duplicated + report.corrupt
        if not self._timer.due():
            return
        rate = self._samples / self._timer.elapsed
        log.info(
            "%d of %d shards checked, %.0f samples/s, ETA %s, missing, doubled or corrupt: %d",
            report.shard + 1, self._plan.num_shards, rate, duration((self._plan.expected - self._samples) / rate),
            self._problems,
        )  # fmt: skip
