"""What a training run says while it goes on: log lines, metrics.jsonl, the loss of every step, trackers."""

import io
import json
import logging
import time
from array import array
from collections.abc import Sequence
from typing import Any

from cluster.store.store import Store
from cluster.training.run_spec import RunSpec
from cluster.training.trackers import Tracker, open_trackers

log = logging.getLogger(__name__)

METRICS_KEY = "metrics.jsonl"
#: {"at": seconds since 1970} of the first step of a run whose first epoch is in the order of the plan.
FIRST_STEP_KEY = "first_step.json"


def write_metrics(out: Store, history: Sequence[dict[str, Any]]) -> None:
    """metrics.jsonl as a whole: one row an epoch."""
    out.write_bytes(METRICS_KEY, "".join(json.dumps(row) + "\n" for row in history).encode())


class LossLog:
    """The loss of every step of an epoch: `losses/epoch-001.jsonl`, one {"step", "loss", "lr"} a line.

    Written at every checkpoint, so that a run that goes on from one finds the lines before it. Object stores cannot
    append: from the second checkpoint within an epoch on, what is new is a file of its own below `losses/epoch-001/`,
    and the end of the epoch makes one of all. Three numbers a step are kept, 24 bytes.
    """

    def __init__(self, store: Store, *, epoch: int, until: int) -> None:
        """Of epoch `epoch` (from 1), with the lines up to step `until` that are stored."""
        self._store = store
        self._key = f"losses/epoch-{epoch:03d}.jsonl"
        self._parts = f"losses/epoch-{epoch:03d}"
        self.step, self.loss, self.lr = array("q"), array("d"), array("d")
        is_longer = False
        for key in (*([self._key] if store.exists(self._key) else []), *store.list(f"{self._parts}/")):
            for line in io.BytesIO(store.read_bytes(key)):
                row = json.loads(line)
                is_longer |= row["step"] > until
                if row["step"] <= until and (not self.step or row["step"] > self.step[-1]):
                    self.append(**row)
        #: So many lines are stored; 0: all are written anew, for of those that are there some are done again.
        self._stored = 0 if is_longer else len(self.step)

    def append(self, *, step: int, loss: float, lr: float) -> None:
        self.step.append(step)
        self.loss.append(loss)
        self.lr.append(lr)

    def write(self, *, at_end: bool) -> None:
        """`at_end`: of the epoch."""
        if at_end or not self._stored:
            self._store.write_bytes(self._key, self._lines(0))
            if self._store.list(f"{self._parts}/"):
                self._store.delete_folder(self._parts)
        else:
            self._store.write_bytes(f"{self._parts}/{self.step[-1]:09d}.jsonl", self._lines(self._stored))
        self._stored = len(self.step)

    def _lines(self, first: int) -> bytes:
        data = io.BytesIO()
        for step, loss, lr in zip(self.step[first:], self.loss[first:], self.lr[first:], strict=True):
            data.write(json.dumps({"step": step, "loss": loss, "lr": lr}).encode() + b"\n")
        return data.getvalue()


class Reporter:
    """The first rank's; that of the other ranks says and writes nothing."""

    def __init__(self, out: Store, *, is_first: bool) -> None:
        self._out, self._is_first = out, is_first
        self._trackers: list[Tracker] = []

    def open_trackers(self, run: RunSpec) -> None:
        if self._is_first:
            self._trackers.append(open_trackers(run.out, config=run.document))

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()

    def say(self, line: str) -> None:
        if self._is_first:
            log.info("%s", line)

    def track(self, step: int, metrics: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def write_losses(self, losses: LossLog, *, at_end: bool) -> None:
        if self._is_first:
            losses.write(at_end=at_end)

    def write_metrics(self, history: Sequence[dict[str, Any]]) -> None:
        if self._is_first:
            write_metrics(self._out, history)

    def write_first_step(self) -> None:
        if self._is_first:
            self._out.write_bytes(FIRST_STEP_KEY, json.dumps({"at": time.time()}).encode())
