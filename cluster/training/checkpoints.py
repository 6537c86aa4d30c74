"""The checkpoints of a training run: what is in one, and where and when it is written."""

import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import safetensors.torch
import torch
from torch import nn

from cluster.ray_internals import CHECKPOINT_RECORD, reads_checkpoint_record, renewed_checkpoint_record
from cluster.store.reach import check_here
from cluster.store.retries import with_retries
from cluster.store.store import Store, join, local_copy
from cluster.store.temporary import named_temporary_folder, temporary_folder
from cluster.training.ema import WeightAverage
from cluster.training.ray_trainer import CHECKPOINTS
from cluster.training.run_spec import RunSpec
from pcm.captioners.captioner import MODEL_FILE, captioner_files
from pcm.captioners.interface import VOCABULARY_FILE
from pcm.captioners.pcmnet.model import PCMNet
from pcm.errors import InputError, NotKnown, OneLineError, known_fields, one_line
from pcm.model_faults import is_out_of_memory

log = logging.getLogger(__name__)

#: The folder of the run, beside Ray Train's own (ray_trainer.CHECKPOINTS), with the captioner of its best epoch.
BEST = "best"
#: By which Ray Train keeps checkpoints: the CIDEr of an epoch; those inside an epoch have none and count for nothing.
SCORE = "score"
NO_SCORE = -1.0

#: Beside MODEL_FILE, which then holds the averaged weights: those that the optimiser goes on with.
WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"
#: Behind the name of a checkpoint that was made once more, because the first one is damaged.
AGAIN = "-again"
_CHECKPOINT_NAME = re.compile(rf"epoch-\d+(?:-step-\d+)?(?:{AGAIN})*")


@dataclass
class TrainingState:
    """How far training is; the part of a checkpoint that is neither weights nor optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps made, over the whole run
    history: list[dict[str, Any]] = field(default_factory=list)  # one row of metrics.jsonl an epoch
    seconds: float = 0.0  # of training in the epoch that has begun, those of earlier attempts too
    #: {"from_step", "workers"} of each size that the group of workers has had; steps count from 1, as in losses/.
    group_sizes: list[dict[str, int]] = field(default_factory=list)
    #: Of a run that began before its dataset was finished: TrainingData.rows_digest of what it then was.
    rows: str = ""

    def begin_group(self, workers: int) -> None:
        """Note that so many workers make the steps from here on."""
        kept = [size for size in self.group_sizes if size["from_step"] <= self.step]
        if not kept or kept[-1]["workers"] != workers:
            kept.append({"from_step": self.step + 1, "workers": workers})
        self.group_sizes = kept

    def keep_to(self, rows: str, *, dataset: str) -> None:
        """Note which rows the run is trained on. Raises InputError where it began on others."""
        if self.rows not in ("", rows):
            raise InputError(
                f"{dataset}: its rows are others than those that this run began on (shards were made again, with "
                "--retry-quarantined or jobs.verify --repair); train into another --out"
            )
        self.rows = rows

    @property
    def checkpoint_name(self) -> str:
        """epoch-002 at the end of epoch 2, epoch-002-step-000000700 in epoch 3; see `training_order`."""
        at_end = bool(self.history) and self.history[-1]["step"] == self.step
        return f"epoch-{self.epoch:03d}" + ("" if at_end else f"-step-{self.step:09d}")


def training_order(name: str) -> tuple[list[int], str]:
    """To sort names of checkpoints by: the numbers in them, as numbers. As text, epoch 1000 comes before epoch 999."""
    return [int(number) for number in re.findall("[0-9]+", name)], name


def best_epoch(history: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of metrics.jsonl of the best epoch: of the highest CIDEr, and of equal ones the last, which has learnt
    most, as where the CIDEr of the first epochs on little data is 0. None of no epochs.
    """
    return max(reversed(history), key=lambda row: row["CIDEr"], default=None)


def check_checkpoints(out: Store, *, done: int) -> None:
    """Raises InputError where Ray Train would find no checkpoint of a run with `done` epochs, and begin it again, or
    would end in a traceback: its record of the checkpoints is damaged or gone, or of a release of Ray whose record
    cannot be written anew, or names one that is gone.
    """
    place = join(out.root, CHECKPOINTS)
    elsewise = f"restore it, or train into another --out (with --init-from {out.root} from its best captioner on)"
    names = {key.split("/")[1] for key in out.list(f"{CHECKPOINTS}/") if key.count("/") > 1}
    record: Any = None
    try:
        record = _record(out)
        gone = [name for name in _recorded(record) if name not in names]
        if not reads_checkpoint_record(record):
            renewed_checkpoint_record(record, training_order)
    except FileNotFoundError:
        # Ray Train writes it right after the first checkpoint; a run that was killed before does that epoch again.
        if done > 1 or (done and not names):
            what = f"{CHECKPOINT_RECORD}, which says what is in it, is gone" if names else "holds no checkpoint"
            raise InputError(f"{place}: {what}, though epochs are done ({done}); {elsewise}") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        of_ray = record.get("ray_version") if isinstance(record, dict) else None
        if of_ray not in (None, ray.__version__):
            raise InputError(
                f"{place}/{CHECKPOINT_RECORD}: of Ray {of_ray}, which Ray {ray.__version__} does not read; go on with "
                f"Ray {of_ray}, or train into another --out (with --init-from {out.root} from its best captioner on)"
            ) from None
        raise InputError(f"{place}/{CHECKPOINT_RECORD}: damaged ({one_line(error, longest=200)}); {elsewise}") from None
    else:
        if gone:
            raise InputError(f"{place}: {', '.join(gone)} gone; {elsewise}")


def renew_record(out: Store) -> None:
    """Write Ray Train's record anew in this release's form where another release wrote it, after `check_checkpoints`:
    each reads the fields of its own record alone."""
    try:
        record = _record(out)
    except FileNotFoundError:
        return
    if not reads_checkpoint_record(record):
        renewed = renewed_checkpoint_record(record, training_order)
        out.write_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}", json.dumps(renewed).encode())
        log.info(
            "the run was begun under Ray %s, and goes on under %s: its record of the checkpoints is written anew",
            record.get("ray_version"), ray.__version__,
        )  # fmt: skip


def delete_unrecorded(out: Store) -> None:
    """Delete the checkpoints that are not in Ray Train's record, after `check_checkpoints`: it strikes one from there
    before it deletes it, and adds one after it was put, and may be killed in between. Nothing without a record: then
    the first one is made again.
    """
    if not out.exists(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}"):
        return
    recorded = set(_recorded(_record(out)))
    for key in out.list(f"{CHECKPOINTS}/"):
        name, is_in_folder, _ = key.removeprefix(f"{CHECKPOINTS}/").partition("/")
        if is_in_folder and _CHECKPOINT_NAME.fullmatch(name) and name not in recorded:
            out.delete(key)


def _record(out: Store) -> dict[str, Any]:
    """Ray Train's record of the checkpoints. Raises FileNotFoundError without one, and what damage raises."""
    record: dict[str, Any] = json.loads(out.read_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}"))
    return record


def _recorded(record: dict[str, Any]) -> list[str]:
    """Names of the checkpoints in it."""
    return [result["checkpoint_dir_name"] for result in record["checkpoint_results"]]


def kept_words(out: Store, *, sha256: str | None) -> bytes | None:
    """vocabulary.txt of a captioner that a run has kept, None without any; with `sha256` only one that has it."""
    for key in (f"{BEST}/{VOCABULARY_FILE}", *out.list(f"{CHECKPOINTS}/")):
        if key.endswith(f"/{VOCABULARY_FILE}"):
            try:
                words = out.read_bytes(key)
            except FileNotFoundError:
                continue
            if sha256 in (None, hashlib.sha256(words).hexdigest()):
                return words
    return None


class Checkpoints:
    """One worker's side of a run's checkpoints: the first rank writes them, the others report that they are there."""

    def __init__(
        self,
        run: RunSpec,
        out: Store,
        *,
        module: PCMNet,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        is_first: bool,
    ) -> None:
        self._run, self._out, self._is_first = run, out, is_first
        self._module, self._optimizer, self._average = module, optimizer, average
        self._damaged: dict[str, str] = {}  # checkpoints that restore() passed over, and why

    def save(self, metrics: dict[str, Any], at: TrainingState, *, is_best: bool) -> None:
        """Write a checkpoint and report `metrics`, whose SCORE decides how long Ray Train keeps it.

        Best first, checkpoint next, and the caller writes metrics.jsonl last: a run killed in between does the steps
        since the checkpoint before again and writes the same.
        """
        if not self._is_first:
            ray.train.report(metrics)
            return
        row = {name: value for name, value in metrics.items() if name != SCORE}
        with self._average.applied() if self._average else nullcontext():
            files = captioner_files(
                self._module,
                document={**self._run.document, "metrics": row},
                vocabulary=self._run.vocabularies.words,
                concepts=self._run.vocabularies.concepts,
            )
        if is_best:
            for name, data in files.items():
                self._out.write_bytes(f"{BEST}/{name}", data)
        with temporary_folder("checkpoint") as folder:
            with named_temporary_folder():
                for name, data in files.items():
                    (folder / name).write_bytes(data)
                save_training_state(
                    folder, module=self._module, optimizer=self._optimizer, average=self._average, at=at
                )
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=self._free_name(at.checkpoint_name),
                checkpoint_upload_fn=self._put,
            )

    def _put(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Put the files of a local checkpoint, STATE_FILE last, without which it is none; for Ray Train, where it is.

        Raises InputError where this machine does not see OUT, and StoreFailure where the store does not take them.
        """
        check_here([(self._out, CHECKPOINTS)])
        for file in sorted(Path(checkpoint.path).iterdir(), key=lambda file: (file.name == STATE_FILE, file.name)):
            self._out.put_file(f"{CHECKPOINTS}/{name}/{file.name}", file)
        storage = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            storage.build_checkpoint_path_from_name(name), filesystem=storage.storage_filesystem
        )

    def restore(self) -> TrainingState:
        """Load the last checkpoint that this run reported, or, where that is damaged, the newest before it that is not;
        at step 0, and nothing loaded, where none was reported. Every worker comes to the same one.

        Raises InputError where all that are there are damaged, and StoreFailure for a store that does not give one.
        """
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return TrainingState()
        name = Path(checkpoint.path).name
        # Ray's copy of an object store's is one for all workers of a machine; a trial's is a folder here already.
        copy: Callable[[], AbstractContextManager[str | Path]] = checkpoint.as_directory
        if self._out.is_local and not isinstance(checkpoint.filesystem, pyarrow.fs.LocalFileSystem):
            copy = lambda: nullcontext(self._out.path(f"{CHECKPOINTS}/{name}"))  # noqa: E731  # mypy knows its type
        if (state := self._loaded(name, copy)) is not None:
            return state
        for earlier in self._earlier_than(name):
            copy = partial(local_copy, join(self._out.root, CHECKPOINTS, earlier))
            if (state := self._loaded(earlier, copy)) is not None:
                if self._is_first:
                    log.warning("damaged checkpoints are passed over (%s); %s is used", self._why_damaged(), earlier)
                return state
        raise InputError(
            f"{self._out.root}/{CHECKPOINTS}: no checkpoint can be read ({self._why_damaged()}); restore one, or train "
            "into another --out"
        )

    def _why_damaged(self) -> str:
        return "; ".join(f"{name}: {why}" for name, why in self._damaged.items())[:500]

    def _loaded(self, name: str, copy: Callable[[], AbstractContextManager[str | Path]]) -> TrainingState | None:
        """What a checkpoint says, in whose local `copy` its files are; None, and noted, where it is damaged.

        No memory, or a store that refuses or does not answer, is no damage: that is raised.
        """
        place = join(self._out.root, CHECKPOINTS, name)
        with ExitStack() as stack:
            try:
                folder = Path(with_retries(lambda: stack.enter_context(copy()), place=place))
                return with_retries(lambda: self._load(folder), place=place)
            except NotKnown as error:
                raise InputError(
                    f"{place}: {error}; finish the run with the release that wrote it, or train into another --out"
                ) from None
            except OneLineError:
                raise
            except Exception as error:  # what a cut file raises depends on where it is cut
                if is_out_of_memory(error):
                    raise
                self._damaged[name] = one_line(error, longest=120)
        return None

    def _load(self, folder: Path) -> TrainingState:
        return load_training_state(folder, module=self._module, optimizer=self._optimizer, average=self._average)

    def _earlier_than(self, name: str) -> list[str]:
        """The checkpoints on the store before this one, the newest first."""
        keys = self._out.list(f"{CHECKPOINTS}/")
        names = {key.split("/")[1] for key in keys if key.endswith(f"/{STATE_FILE}") and key.count("/") == 2}
        before = (found for found in names if training_order(found) < training_order(name))
        return sorted(before, key=training_order, reverse=True)

    def _free_name(self, name: str) -> str:
        """The name, or another where a damaged checkpoint has it: Ray Train, which knows of that, deletes by name."""
        while name in self._damaged:
            name += AGAIN
        return name


def save_training_state(
    folder: Path,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    at: TrainingState,
) -> None:
    """Complete a checkpoint that has the captioner's files already."""
    if average is not None:
        safetensors.torch.save_file(
            {name: weight.detach().contiguous() for name, weight in module.named_parameters()}, folder / WEIGHTS_FILE
        )
    with (folder / OPTIMIZER_FILE).open("wb") as file:  # by name, torch would not say that the disk is full
        torch.save(optimizer.state_dict(), file)
    (folder / STATE_FILE).write_text(json.dumps(vars(at)))


def load_training_state(
    folder: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None
) -> TrainingState:
    """The inverse of `save_training_state`, into what is given; how far the run was."""
    state = safetensors.torch.load_file(folder / MODEL_FILE)
    module.load_state_dict(state)
    if average is not None:
        average.load(state)
        module.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE), strict=False)
    optimizer.load_state_dict(_read_optimizer(folder / OPTIMIZER_FILE))
    values = json.loads((folder / STATE_FILE).read_text())
    return TrainingState(**known_fields(TrainingState, values, STATE_FILE))


def _read_optimizer(file: Path) -> dict[str, Any]:
    """Raises ValueError for some files that are cut, where torch raises what a disk that fails would raise."""
    try:
        # By way of the CPU: all ranks of a machine would put a state of cuda:0 there, and without a GPU it is not read.
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise ValueError(f"{file.name}: is cut") from None
        raise
    return state
