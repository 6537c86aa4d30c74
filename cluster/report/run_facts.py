"""What a report knows of a training run: its settings, its epochs, its losses, and what an evaluation found."""

from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cluster.evaluation.evaluate import METRICS_KEY as EVALUATION_KEY
from cluster.report.dataset_facts import in_parallel
from cluster.store.store import Store
from cluster.training.config import DATASET_SIZES, TRAINING_PRESETS, TrainConfig
from cluster.training.reporting import METRICS_KEY
from cluster.training.train import CONFIG_KEY
from pcm.documents import read_document
from pcm.errors import InputError, one_line

#: Points of a curve.
CURVE_POINTS = 300


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
        return max(self.history, key=lambda row: row["CIDEr"], default=None)


def gather_run(store: Store) -> RunFacts:
    """Raises InputError where there is no run, or its documents are damaged."""
    try:
        document = read_document(store.read_bytes(CONFIG_KEY))
        config = TrainConfig.from_dict(document["train"])
        history = _lines(store, METRICS_KEY)
    except FileNotFoundError:
        raise InputError(f"{store.root}: not a training run (no {CONFIG_KEY}); give the --out of jobs.train") from None
    except (ValueError, LookupError, TypeError) as error:
        said = one_line(error)
        raise InputError(f"{store.root}/{CONFIG_KEY}: damaged ({said}); give the --out of jobs.train") from None
    keys = [key for key in store.list("losses/") if PurePosixPath(key).suffix == ".jsonl"]
    steps = [row for rows in in_parallel(lambda key: _lines(store, key), keys) for row in rows]
    return RunFacts(
        root=store.root,
        document=document,
        config=config,
        history=history,
        loss=_curve([(row["step"], row["loss"]) for row in steps]),
        learning_rate=_curve([(row["step"], row["lr"]) for row in steps]),
    )


def gather_evaluation(store: Store) -> dict[str, Any]:
    """metrics.json of jobs.evaluate: {"metrics", "request", ...}. Raises InputError where there is none."""
    try:
        document = read_document(store.read_bytes(EVALUATION_KEY))
        if isinstance(document["metrics"], dict) and isinstance(document["request"], dict):
            return document
    except FileNotFoundError:
        raise InputError(
            f"{store.root}: not an evaluation (no {EVALUATION_KEY}); give the --out of jobs.evaluate"
        ) from None
    except (ValueError, LookupError, TypeError):
        pass
    raise InputError(f"{store.root}/{EVALUATION_KEY}: damaged; run jobs.evaluate again")


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


def _lines(store: Store, key: str) -> tuple[dict[str, Any], ...]:
    try:
        return tuple(read_document(line) for line in store.read_bytes(key).splitlines())
    except FileNotFoundError:
        if key == METRICS_KEY:
            return ()
        raise


def _curve(points: list[tuple[float, float]]) -> np.ndarray:
    """The points in order of their step, neighbours averaged until there are few enough."""
    if not points:
        return np.zeros((0, 2))
    array = np.array(sorted(points), dtype=np.float64)
    return np.stack([part.mean(axis=0) for part in np.array_split(array, min(CURVE_POINTS, len(array)))])
