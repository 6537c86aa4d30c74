"""Where the numbers of a training run go while it runs, besides the run's own files.

TensorBoard always: event files under RUN/tensorboard (`tensorboard --logdir RUN`). Weights & Biases where `wandb` is
installed and WANDB_API_KEY or WANDB_MODE is set; MLflow where `mlflow` (or `mlflow-skinny`) is installed and
MLFLOW_TRACKING_URI is set. Both read everything else (project, experiment, offline mode, credentials) from their own
environment variables, which are neither arguments here nor logged; on a cluster they reach the workers by the job's
runtime environment.

Every tracker works in a thread of its own. One that fails is given up with one warning, one that hangs is left behind:
training neither fails nor waits because of it.
"""

import hashlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cluster.store.store import Store, open_store
from cluster.store.temporary import temporary_folder
from cluster.training.run_record import BEGINNING

log = logging.getLogger(__name__)

TENSORBOARD_KEY = "tensorboard"
WANDB_KEY = "wandb"
#: Project of W&B and experiment of MLflow, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME names another.
PROJECT = "pcmnet"
#: Files for an object store are uploaded so often, and at the end.
UPLOAD_SECONDS = 30.0
#: From this size on an event file for an object store, which is uploaded whole each time, is left, and another begun.
EVENT_FILE_BYTES = 2**20
#: How long the end of a run waits for a tracker to write what is pending.
CLOSE_SECONDS = 60.0
_PENDING = 10_000


class Tracker(Protocol):
    """One experiment tracker, on rank 0 only. It never raises: one that is out of reach warns and goes quiet."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers after optimiser step `step` (from 1, over the whole run); a resumed run may log a step again."""

    def close(self) -> None:
        """Write what is pending; called once, also when training fails."""


def open_trackers(out: str, *, config: Mapping[str, Any]) -> Tracker:
    """All trackers that can be used for the run at `out` (path or URI). `config` is shown beside the numbers."""
    store = open_store(out)
    makers: dict[str, Callable[[], Tracker]] = {"TensorBoard": lambda: _TensorBoard(store, config)}
    if find_spec("wandb") and wandb_configured():
        makers["W&B"] = lambda: _WandB(store, config)
    if find_spec("mlflow") and os.environ.get("MLFLOW_TRACKING_URI"):
        makers["MLflow"] = lambda: _MLflow(store, config)
    return _All([_InBackground(name, make) for name, make in makers.items()])


def wandb_configured() -> bool:
    """Whether the environment asks for Weights & Biases."""
    mode = os.environ.get("WANDB_MODE", "")
    return mode != "disabled" and bool(mode or os.environ.get("WANDB_API_KEY"))


class _All:
    """Several trackers as one."""

    def __init__(self, trackers: list["_InBackground"]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class _InBackground:
    """A tracker made, fed and closed in a thread of its own, whose failures end in one warning."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self._name, self._make = name, make
        self._items: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(_PENDING)
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._given_up.is_set():
            return
        try:
            self._items.put_nowait((step, {name: float(value) for name, value in metrics.items()}))
        except queue.Full:
            self._give_up(f"does not keep up ({_PENDING} lines pending)")

    def close(self) -> None:
        if self._given_up.is_set():
            return
        try:
            self._items.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            return self._give_up("does not keep up")
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._give_up(f"did not finish within {CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        try:
            tracker = self._make()
            while (item := self._items.get()) is not None:
                tracker.log(*item)
            tracker.close()
        # SystemExit too: wandb ends the interpreter where it cannot start.
        except BaseException as error:
            self._give_up(type(error).__name__)  # only the class: a message may hold a URL with credentials

    def _give_up(self, reason: str) -> None:
        if not self._given_up.is_set():
            self._given_up.set()
            log.warning("%s: %s; training goes on without it", self._name, reason)


class _Folder:
    """A local folder whose files end up under `key` of the store: there itself on a local disk, else by upload."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._remote = not store.is_local
        self._temporary = ExitStack()
        folder = self._temporary.enter_context(temporary_folder("tracker")) if self._remote else store.path("")
        self.path = Path(folder, key)
        self.path.mkdir(parents=True, exist_ok=True)
        self._uploaded = time.monotonic()

    def is_due(self) -> bool:
        return self._remote and time.monotonic() - self._uploaded >= UPLOAD_SECONDS

    def upload(self) -> None:
        """Put every file anew: object stores cannot append."""
        self._uploaded = time.monotonic()
        if self._remote:
            for file in self._files():
                self._store.put_file(f"{self._key}/{file.relative_to(self.path)}", file)

    def is_long(self) -> bool:
        """Whether the files that each upload puts have become long."""
        return sum(file.stat().st_size for file in self._files()) >= EVENT_FILE_BYTES

    def forget(self) -> None:
        """Delete the local files, which are uploaded and are written no more."""
        for file in self._files():
            file.unlink()

    def _files(self) -> list[Path]:
        return [file for file in sorted(self.path.rglob("*")) if file.is_file() and not file.is_symlink()]

    def remove(self) -> None:
        self._temporary.close()


class _TensorBoard:
    def __init__(self, store: Store, config: Mapping[str, Any]) -> None:
        self._folder = _Folder(store, TENSORBOARD_KEY)
        self._config = json.dumps(config, indent=1, sort_keys=True, default=str)
        self._writer: Any = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._writer is None:
            # What an interrupted run logged from this step on is hidden: it is logged again.
            self._writer = self._new_writer(purge_step=step)
            self._writer.add_text("config", f"```\n{self._config}\n```", step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if self._folder.is_due():
            self._writer.flush()
            self._folder.upload()
            if self._folder.is_long():
                self._writer.close()
                self._folder.forget()
                self._writer = self._new_writer()

    def _new_writer(self, purge_step: int | None = None) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder.path), purge_step=purge_step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._folder.upload()
        self._folder.remove()


class _WandB:
    def __init__(self, store: Store, config: Mapping[str, Any]) -> None:
        import wandb

        self._folder = _Folder(store, WANDB_KEY)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_name(store)),
            id=os.environ.get("WANDB_RUN_ID", run_id(store, config)),
            resume="allow",
            dir=os.environ.get("WANDB_DIR", str(self._folder.path.parent)),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, init_timeout=30),
        )
        # Our own axis: W&B's must never go back, and a resumed run may.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({**metrics, "step": step})

    def close(self) -> None:
        self._run.finish()
        self._folder.upload()  # offline runs are kept; `wandb sync` sends them later
        self._folder.remove()


class _MLflow:
    def __init__(self, store: Store, config: Mapping[str, Any]) -> None:
        # MLflow's own defaults try for many minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        tag = run_id(store, config)
        previous = self._client.search_runs([experiment], filter_string=f"tags.pcm_run = '{tag}'", max_results=1)
        if previous:
            self._run = previous[0].info.run_id
        else:
            created = self._client.create_run(experiment, tags={"pcm_run": tag}, run_name=run_name(store))
            self._run = created.info.run_id
            for key, value in flattened(config).items():
                self._client.log_param(self._run, key, str(value)[:500])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def close(self) -> None:
        self._client.set_terminated(self._run)


def run_name(store: Store) -> str:
    """What a person calls the run: its folder."""
    return store.name


def run_id(store: Store, config: Mapping[str, Any]) -> str:
    """The same for every start of a run, wherever it lies by then; another for each run that begins: other machines
    have folders of the same name."""
    return hashlib.sha256(config.get(BEGINNING, store.prefix).encode()).hexdigest()[:16]


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train.model.tau": 0.01} of {"train": {"model": {"tau": 0.01}}}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
