"""What a training run says while it goes on: log lines, metrics.jsonl, the loss of every step, trackers."""

import json
import logging
import time
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

    Written as a whole at every checkpoint, because object stores cannot append; a run that goes on from a checkpoint
    finds the lines before it.
    """

    def __init__(self, store: Store, *, epoch: int, until: int) -> None:
        """Of epoch `epoch` (from 1), with the lines up to step `until` that are stored."""
        self._store = store
        self._key = f"losses/epoch-{epoch:03d}.jsonl"
        self.rows: list[dict[str, float]] = []
        if store.exists(self._key):
            lines = store.read_bytes(self._key).splitlines()
            self.rows = [row for line in lines if (row := json.loads(line))["step"] <= until]

    def append(self, *, step: int, loss: float, lr: float) -> None:
        self.rows.append({"step": step, "loss": loss, "lr": lr})

    def write(self) -> None:
        self._store.write_bytes(self._key, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


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

    def write_losses(self, losses: LossLog) -> None:
        if self._is_first:
            losses.write()

    def write_metrics(self, history: Sequence[dict[str, Any]]) -> None:
        if self._is_first:
            write_metrics(self._out, history)

    def write_first_step(self) -> None:
        if self._is_first:
            self._out.write_bytes(FIRST_STEP_KEY, json.dumps({"at": time.time()}).encode())
