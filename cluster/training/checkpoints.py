"""What a training run keeps to go on from: a checkpoint's files, and the loss of every step."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from cluster.store.store import Store
from cluster.training.ema import WeightAverage
from pcm.captioners.captioner import MODEL_FILE

#: Beside MODEL_FILE, which then holds the averaged weights: those that the optimiser goes on with.
WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "state.json"


@dataclass
class TrainingState:
    """How far training is; the part of a checkpoint that is neither weights nor optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # optimiser steps made, over the whole run
    history: list[dict[str, Any]] = field(default_factory=list)  # one row of metrics.jsonl an epoch

    @property
    def best_cider(self) -> float:
        return max((row["CIDEr"] for row in self.history), default=float("-inf"))

    @property
    def checkpoint_name(self) -> str:
        """epoch-002 at the end of epoch 2, epoch-002-step-000000700 in epoch 3; in the order of training."""
        at_end = bool(self.history) and self.history[-1]["step"] == self.step
        return f"epoch-{self.epoch:03d}" + ("" if at_end else f"-step-{self.step:09d}")


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
    torch.save(optimizer.state_dict(), folder / OPTIMIZER_FILE)
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
    optimizer.load_state_dict(torch.load(folder / OPTIMIZER_FILE, weights_only=True))
    return TrainingState(**json.loads((folder / STATE_FILE).read_text()))


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
