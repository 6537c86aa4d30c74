"""A dataset in other people's formats: published PCM-Net files, WebDataset, Hugging Face.

Shards are written independently, by threads of this process or by tasks on Ray; the bytes are the same. Every object is
put at once, a shard's last one says that the shard is done, and `export.json` says whose export it is from the
beginning and that it is complete in the end. Rerun the same command to resume.
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.dataset.keys import shard_number
from cluster.evaluation.captioners import local_checkpoint
from cluster.export.as_dataset import export_as_dataset
from cluster.export.huggingface import HuggingFace
from cluster.export.published import Official
from cluster.export.request import DATASET, ExportRequest
from cluster.export.source import Format, Source
from cluster.export.webdataset import WebDataset
from cluster.numbers import duration
from cluster.shard_work import ShardWork, shard_work
from cluster.store.outputs import put_captioner, refuse_other_things
from cluster.store.store import Store, open_store
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.generation.names import UNDRAWN
from pcm.line_timer import LineTimer
from pcm.official.checkpoint import export_checkpoint

log = logging.getLogger(__name__)

EXPORT_KEY = "export.json"
#: In export.json: of an unfinished dataset, the numbers of the shards that are exported.
_SHARDS = "unfinished_shards"
#: In export.json: of an unfinished dataset, the fingerprint of the captions that were planned.
_CAPTIONS = "unfinished_corpus_fingerprint"


def export(request: ExportRequest) -> dict:
    """Write a dataset or a captioner in another format, and what that was: counts, or files and bytes.

    Raises InputError as `export_dataset` does, and for a captioner that cannot be exported.
    """
    out = open_store(request.out)
    if request.data is not None:
        store = open_store(request.data)
        if out.address.startswith(f"{store.address}/"):
            raise InputError(f"--out {request.out}: is inside the dataset {request.data}; give another place")
        if request.to == DATASET:
            return {**export_as_dataset(store, out, request), "out": request.out}
        return {**export_dataset(store, out, request), "out": request.out}
    assert request.checkpoint is not None
    with local_checkpoint(request.checkpoint) as folder:
        files = export_checkpoint(folder)
    put_captioner(out, files)
    return {"files": sorted(files), "bytes": sum(map(len, files.values())), "out": request.out}


def export_dataset(data: Store, out: Store, asked: ExportRequest) -> dict:
    """Export a dataset, or go on exporting it; the counts. Memory: `workers` shards.

    Raises InputError for a dataset that is unfinished or that the format cannot hold, and where
    `out` holds anything but this very export.
    """
    source = Source.open(data, unfinished=asked.unfinished, shards=_begun_with(out) if asked.unfinished else None)
    photos = {stage: _photos(uri, f"--{stage}") for stage in ("val", "test") if (uri := getattr(asked, stage))}
    makers: dict[str, Callable[[], Format]] = {
        "official": lambda: Official(
            source, out, name=asked.name, max_length=asked.max_length, corpus=asked.corpus, photos=photos
        ),
        "webdataset": lambda: WebDataset(source, out),
        "huggingface": lambda: HuggingFace(source, out),
    }
    exporter = makers[asked.to]()
    settings: dict[str, str | int] = {}
    if asked.to == "official":
        settings = {"name": asked.name, "max_length": asked.max_length, "corpus": asked.corpus}
        settings |= {f"{stage}_sha256": other.sha256 for stage, other in photos.items()}
    document: dict[str, Any] = {"to": asked.to, "dataset_sha256": source.sha256, "complete": False, **settings}
    shards = list(range(source.num_shards))
    counts: dict[str, Any] = {
        "exported": source.manifest.stored,
        "quarantined": source.manifest.quarantined,
        "expected": source.manifest.expected,
    }
    if source.opened.is_unfinished:
        counts["unfinished"] = source.opened.extent
    if _begun(out, document, source):
        log.info("%s: is complete", out.root)
        exporter.tidy()  # what a job that was killed at its very end has left
        return counts | {"shards": len(shards), "skipped_shards": len(shards), "seconds": 0.0}
    started = time.monotonic()
    objects = exporter.prepare()
    if source.opened.is_unfinished:
        document[_SHARDS] = [shard_number(shard.key) for shard in source.opened.shards]
        document[_CAPTIONS] = source.manifest.corpus_fingerprint
    out.write_bytes(EXPORT_KEY, document_bytes(document))
    for key, content in objects.items():
        out.write_bytes(key, content)
    present = set(out.list())
    calls = [(shard, exporter.marker(shard) in present) for shard in shards]
    skipped = sum(there for _, there in calls)
    landmarks = [*source.opened.landmarks, (out, EXPORT_KEY)]
    work = shard_work(asked.run_on, samples=source.manifest.stored, landmarks=landmarks, threads=asked.workers)
    exporter.finish(_said_of_each(work, exporter, calls))
    out.write_bytes(EXPORT_KEY, document_bytes({**document, "complete": True, **counts}))
    exporter.tidy()
    seconds = round(time.monotonic() - started, 2)
    return counts | {"shards": len(shards), "skipped_shards": skipped, "seconds": seconds}


def _photos(uri: str, option: str) -> Source:
    source = Source.open(open_store(uri))
    if source.manifest.spec.generator.model not in UNDRAWN:
        raise InputError(f"{option} {uri}: holds drawn pictures; give real photos, a dataset of jobs.featurise")
    return source


def _begun_with(out: Store) -> list[int] | None:
    """The shards of an unfinished dataset with which an export was begun; None where none was, or it is complete."""
    try:
        found = json.loads(out.read_bytes(EXPORT_KEY))
        return None if found["complete"] else [int(number) for number in found[_SHARDS]]
    except (FileNotFoundError, ValueError, TypeError, LookupError):  # a damaged one is named when it is compared
        return None


def _begun(out: Store, document: dict, source: Source) -> bool:
    """Whether this export is complete already. Raises InputError where OUT holds something else."""
    try:
        found = json.loads(out.read_bytes(EXPORT_KEY))
    except FileNotFoundError:
        refuse_other_things(out, "no export")
        return False
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InputError(f"--out {out.root}: its {EXPORT_KEY} is damaged or no export's; give an empty place")
    for name, value in document.items():
        if name != "complete" and found.get(name) != value:
            captions = source.manifest.corpus_fingerprint
            if name == "dataset_sha256" and found.get(_CAPTIONS, captions) != captions and not found.get("complete"):
                raise InputError(
                    f"--out {out.root}: was begun with other captions than {source.store.root} has now (its corpus has "
                    "grown, or it is another dataset) and cannot be finished; give another --out"
                )
            raise InputError(
                f"--out {out.root}: holds another export ({name}: {found.get(name)!r} -> {value!r}); "
                "use the same arguments to resume, or another --out"
            )
    return bool(found.get("complete"))


@dataclass(frozen=True)
class _Writer:
    """Called with (shard, whether an earlier run wrote it): what the shard is said to be, and the seconds it took."""

    exporter: Format

    def __call__(self, call: tuple[int, bool]) -> tuple[Any, float]:
        shard, there = call
        started = time.monotonic()
        said = self.exporter.written(shard) if there else self.exporter.write(shard)
        return said, time.monotonic() - started


def _said_of_each(work: ShardWork, exporter: Format, calls: Sequence[tuple[int, bool]]) -> list[Any]:
    timer, said = LineTimer(), []
    to_write, written = sum(not there for _, there in calls), 0
    for (_, there), (each, seconds) in zip(calls, work.in_order(_Writer(exporter), calls), strict=True):
        said.append(each)
        if not there:  # those of an earlier run take no time, and say nothing of what is left
            written += 1
            timer.began(seconds)
        if timer.due():
            left = f", {duration((to_write - written) * timer.elapsed / written)} left" if written else ""
            log.info("%d of %d shards exported%s", len(said), len(calls), left)
    return said
