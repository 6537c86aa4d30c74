"""One trial of a sweep: jobs.train's own loop with one worker, inside the trial's actor.

Ray Train's local mode runs a training function in the process that calls it; what it reports goes to Ray Tune instead,
and its checkpoints to the trial's folder, from where an interrupted trial goes on. That saves the controller and the
worker that a TorchTrainer would start for every trial, and changes no number: the loop is the same code.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.tune
import torch

from cluster.dataset.documents import StoredShard
from cluster.dataset.rows import COLUMNS, preload, read_shard
from cluster.ray_internals import LocalReports, train_in_this_process
from cluster.store.store import Store, join, local_copy, open_store
from cluster.training.checkpoints import SCORE, STATE_FILE, training_order
from cluster.training.config import TrainConfig
from cluster.training.loop import train_loop
from cluster.training.run_record import BEGINNING, run_versions
from cluster.training.run_spec import RunSpec
from pcm.captioners.interface import CONFIG_FILE
from pcm.documents import document_bytes, read_document
from pcm.errors import InputError, first_line
from pcm.model_faults import OutOfMemory, free_memory

TRIALS = "trials"
#: Settings and seed of a trial, from its beginning: Optuna's are known from nowhere else before there is a result.
OVERRIDES_FILE = "overrides.json"
RESULT_FILE = "result.json"
CHECKPOINT = "last"
COMPLETE_FILE = "complete"
#: Under which name a report to Ray Tune holds a row of metrics.jsonl.
ROW = "row"
#: Under which name Ray Tune gives a trial its settings.
OVERRIDES = "overrides"
#: What a trial that failed counts for the search.
FAILED_CIDER = 0.0
_READ_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """What every trial of a sweep shares."""

    out: str  # of the sweep; absolute path or URI
    run: RunSpec  # of the base config; its `out` is replaced by the trial's
    tables: Mapping[str, ray.ObjectRef]  # shards by their path: read once, shared by the trials of a node


def trial_id(overrides: Mapping[str, Any]) -> str:
    """The same for the same settings, so that a sweep that starts again finds what it has."""
    return hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:10]


def trial_folder(out: str, overrides: Mapping[str, Any]) -> str:
    return join(out, TRIALS, trial_id(overrides))


def run_trial(parameters: dict[str, Any], *, sweep: SweepRun) -> None:
    """Ray Tune's trainable; `parameters`: {"overrides": fields of TrainConfig}, whatever the search is.

    A trial that has its result already reports it again, epoch by epoch, without training.
    """
    overrides = parameters[OVERRIDES]
    out = trial_folder(sweep.out, overrides)
    store = open_store(out)
    if (result := read_result(store)) is not None:
        for row in result["history"]:
            _report(row)
        return
    try:
        config = sweep.run.config.with_overrides(overrides)
    except InputError as error:  # settings that exclude each other, which Optuna does not know
        _report_failure(sweep, str(error))
        return
    store.write_bytes(OVERRIDES_FILE, document_bytes(overrides))
    preload({key: ray.get(table) for key, table in sweep.tables.items()})
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    with _newest_checkpoint(store) as checkpoint:
        document = _document(sweep, overrides, config, checkpoint)
        run = replace(sweep.run, out=out, config=config, document=document)
        for row in _history(checkpoint):  # a driver that was started again has not heard of these epochs
            _report(row)
        train_in_this_process(_TrialReports(store, checkpoint))
        if config.compile != "none":
            torch.compiler.reset()  # a process keeps few programs, and the trials before had others
        # An InputError is raised: of a full disk or a damaged shard, it is no fault of the settings and may be mended.
        try:
            reason = train_loop({"run": run})
        except OutOfMemory as error:
            reason = f"{error}; where there is more, delete {RESULT_FILE} of this trial to train it again"
        if reason:
            free_memory()  # for the next trial of this process
            _report_failure(sweep, reason)


def _document(
    sweep: SweepRun, overrides: Mapping[str, Any], config: TrainConfig, checkpoint: ray.train.Checkpoint | None
) -> dict[str, Any]:
    """config.json of a trial, which for trackers is a run of its own; with the releases that trained its checkpoint."""
    document = {**sweep.run.document, "train": config.to_dict()}
    if checkpoint is not None:
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # damaged: the weights' readers say so
            document["versions"] = run_versions(read_document(Path(checkpoint.path, CONFIG_FILE).read_bytes()))
    if BEGINNING in document:
        document[BEGINNING] += f"-{trial_id(overrides)}"
    return document


def _report_failure(sweep: SweepRun, reason: str) -> None:
    """What a trial says whose settings cannot be trained with: it is recorded, and never tried again."""
    _report({"epoch": sweep.run.config.epochs, "CIDEr": FAILED_CIDER, "reason": reason})


def _report(row: dict[str, Any]) -> None:
    """One row of metrics.jsonl to Ray Tune, which adds many numbers of its own beside it."""
    ray.tune.report({"epoch": row["epoch"], "CIDEr": row["CIDEr"], ROW: row})


def read_result(store: Store) -> dict[str, Any] | None:
    """What is recorded of the trial in a folder: overrides, status, reason, history; None while it is not done. Raises
    InputError where that is damaged."""
    try:
        result = read_document(store.read_bytes(RESULT_FILE))
        names = ("overrides", "status", "reason", "history", "seconds", "ended")
        return {name: result[name] for name in names}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"{store.root}/{RESULT_FILE}: damaged ({first_line(error)}); delete it, and this trial is trained again"
        ) from None


def shared_tables(store: Store, shards: Sequence[StoredShard]) -> dict[str, ray.ObjectRef]:
    """What training reads of some shards, as Arrow tables in Ray's object store, by path.

    Read here, once; a node's trials share the memory of the copy that Ray brings there.
    """

    def shared(shard: StoredShard) -> ray.ObjectRef:
        return ray.put(read_shard(store, shard, COLUMNS).combine_chunks())

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return {store.path(shard.key): table for shard, table in zip(shards, pool.map(shared, shards), strict=True)}


class _TrialReports(LocalReports):
    """What ray.train.report and ray.train.get_checkpoint do in a trial."""

    def __init__(self, store: Store, checkpoint: ray.train.Checkpoint | None) -> None:
        super().__init__(name=store.prefix, checkpoint=checkpoint)
        self._store = store

    def report(  # type: ignore[override]
        self,
        metrics: dict[str, Any],
        checkpoint: ray.train.Checkpoint | None = None,
        checkpoint_dir_name: str | None = None,
        **settings: Any,
    ) -> None:
        if checkpoint is not None:
            self._keep(checkpoint, checkpoint_dir_name or f"{time.time_ns()}")
        if "CIDEr" in metrics:  # not of a checkpoint within an epoch
            _report({name: value for name, value in metrics.items() if name != SCORE})

    def _keep(self, checkpoint: ray.train.Checkpoint, name: str) -> None:
        """Store a checkpoint, its marker last, and forget the one before."""
        with checkpoint.as_directory() as folder:
            for file in sorted(Path(folder).iterdir()):
                self._store.write_bytes(f"{CHECKPOINT}/{name}/{file.name}", file.read_bytes())
        self._store.write_bytes(f"{CHECKPOINT}/{name}/{COMPLETE_FILE}", b"")
        for key in self._store.list(CHECKPOINT):
            if not key.startswith(f"{CHECKPOINT}/{name}/"):
                self._store.delete(key)


@contextlib.contextmanager
def _newest_checkpoint(store: Store) -> Iterator[ray.train.Checkpoint | None]:
    """The last checkpoint of a trial that is whole, if there is one, for as long as it is needed."""
    keys = store.list(CHECKPOINT)
    whole = [key.split("/")[1] for key in keys if key.endswith(f"/{COMPLETE_FILE}")]
    if not whole:
        yield None
        return
    newest = max(whole, key=training_order)
    with local_copy(join(store.root, CHECKPOINT, newest)) as folder:
        yield ray.train.Checkpoint.from_directory(folder)


def _history(checkpoint: ray.train.Checkpoint | None) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl of the epochs before a local checkpoint. Raises InputError where it is damaged."""
    if checkpoint is None:
        return []
    try:
        return read_document(Path(checkpoint.path, STATE_FILE).read_bytes())["history"]
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise InputError(
            f"{checkpoint.path}/{STATE_FILE}: damaged ({first_line(error)}); delete {CHECKPOINT}/ in the trial's "
            "folder, and the trial begins anew"
        ) from None
