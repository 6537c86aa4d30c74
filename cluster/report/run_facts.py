"""What a report knows of a training run: its settings, its epochs, its losses, and what an evaluation found."""

import io
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cluster.evaluation.evaluate import EPOCHS_KEY, EVALUATION_KEY, epoch_folder
from cluster.report.dataset_facts import in_parallel
from cluster.store.store import Store, is_uri, join, open_store
from cluster.training.checkpoints import best_epoch
from cluster.training.config import DATASET_SIZES, TRAINING_PRESETS, TrainConfig
from cluster.training.reporting import METRICS_KEY
from cluster.training.run_document import CONFIG_KEY
from pcm.documents import read_document
from pcm.errors import InputError, one_line, typed_first_line

#: Points of a curve.
CURVE_POINTS = 300
#: In what is known of an evaluation of every epoch: which one it is of.
BEST_EPOCH = "best_epoch"


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """A run of jobs.train. Curves are (k, 2) arrays of (step, value), k at most CURVE_POINTS."""

    root: str
    document: dict[str, Any]  # its config.json
    config: TrainConfig
    history: tuple[dict[str, Any], ...]  # a row an epoch
    loss: np.ndarray  # mean of the steps around each point
    learning_rate: np.ndarray

    @property
    def best(self) -> dict[str, Any] | None:
        return best_epoch(self.history)


def gather_run(store: Store) -> RunFacts:
    """Raises InputError where there is no run, or its documents are damaged."""
    try:
        document = read_document(store.read_bytes(CONFIG_KEY))
        config = TrainConfig.from_dict(document["train"])
        _ = document["clip"]["model"], [(each["path"], each["weight"]) for each in document.get("datasets", [])]
    except FileNotFoundError:
        raise InputError(f"{store.root}: not a training run (no {CONFIG_KEY}); give the --out of jobs.train") from None
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(store, CONFIG_KEY, error) from None
    try:
        history = tuple(_lines(store, METRICS_KEY, ("epoch", "step", "loss", "lr", "CIDEr")))
    except FileNotFoundError:
        history = ()
    keys = [key for key in store.list("losses/") if PurePosixPath(key).suffix == ".jsonl"]
    steps = np.concatenate([np.zeros((0, 3)), *in_parallel(lambda key: _steps(store, key), keys)])
    steps = steps[np.argsort(steps[:, 0], kind="stable")]
    return RunFacts(
        root=store.root,
        document=document,
        config=config,
        history=history,
        loss=_curve(steps[:, [0, 1]]),
        learning_rate=_curve(steps[:, [0, 2]]),
    )


def gather_evaluation(store: Store) -> dict[str, Any]:
    """metrics.json of jobs.evaluate: {"metrics", "request", ...}; of --every-epoch that of the best epoch, with
    BEST_EPOCH. Raises InputError where there is none, or it is damaged.
    """
    if not store.exists(EVALUATION_KEY) and store.exists(EPOCHS_KEY):
        try:
            epoch = int(read_document(store.read_bytes(EPOCHS_KEY))["metrics"]["best"]["epoch"])
        except (ValueError, LookupError, TypeError) as error:
            raise _damaged(store, EPOCHS_KEY, error) from None
        return {**_evaluation(open_store(join(store.root, epoch_folder(epoch)))), BEST_EPOCH: epoch}
    return _evaluation(store)


def _evaluation(store: Store) -> dict[str, Any]:
    try:
        document = read_document(store.read_bytes(EVALUATION_KEY))
        _ = document["request"]["pictures"]["images"], document["request"]["beam_size"], document["metrics"]["n"]
        _ = document["metrics"]["CIDEr"]
        return document
    except FileNotFoundError:
        raise InputError(
            f"{store.root}: not an evaluation (no {EVALUATION_KEY}); give the --out of jobs.evaluate"
        ) from None
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(store, EVALUATION_KEY, error) from None


def place_of(recorded: object) -> str:
    """A path or URI that was recorded, or is given now, to be compared with another; it may lie out of reach. A link is
    what it points at, and file:// a path."""
    text = str(recorded)
    if is_uri(text) and not text.startswith("file://"):
        return text.rstrip("/")
    return os.path.realpath(open_store(text).prefix)


def settings(config: TrainConfig) -> list[tuple[str, Any]]:
    """Every field of a config by its plain name, the network's too."""
    own = [(entry.name, getattr(config, entry.name)) for entry in fields(config) if entry.name != "model"]
    return own + [(entry.name, getattr(config.model, entry.name)) for entry in fields(config.model)]


def nearest_preset(config: TrainConfig) -> tuple[str, dict[str, str]]:
    """The preset that differs least, and what differs from it, the sizes of the data aside."""
    found = {
        name: {
            field: change.partition(" -> ")[2]
            for field, change in preset.differences(config).items()
            if field not in DATASET_SIZES
        }
        for name, preset in TRAINING_PRESETS.items()
    }
    return min(found.items(), key=lambda item: len(item[1]))


def _lines(store: Store, key: str, numbers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows that have these numbers. Raises InputError where one has not."""
    data = io.BytesIO(store.read_bytes(key))
    try:
        for line in data:
            row = read_document(line)
            for name in numbers:
                if not isinstance(row[name], int | float):
                    raise TypeError(f"{name} is {row[name]!r}")
            yield row
    except (ValueError, LookupError, TypeError) as error:
        raise _damaged(store, key, error) from None


def _steps(store: Store, key: str) -> np.ndarray:
    """(step, loss, lr) of each line: a run of weeks has millions."""
    numbers = array("d")
    for row in _lines(store, key, ("step", "loss", "lr")):
        numbers.extend((row["step"], row["loss"], row["lr"]))
    return np.array(numbers).reshape(-1, 3)


def _damaged(store: Store, key: str, error: Exception) -> InputError:
    said = typed_first_line(error) if isinstance(error, LookupError) else one_line(error, longest=200)
    return InputError(f"{store.root}/{key}: damaged ({said}); restore it, or make it again")


def _curve(points: np.ndarray) -> np.ndarray:
    """Points in their order, neighbours averaged until there are few enough."""
    if not len(points):
        return points
    return np.stack([part.mean(axis=0) for part in np.array_split(points, min(CURVE_POINTS, len(points)))])
