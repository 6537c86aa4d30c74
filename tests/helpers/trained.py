"""What a training run has left in its folder."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def step_losses(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step, in order."""
    rows = [json.loads(line) for file in sorted(run.glob("losses/*.jsonl")) for line in file.read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def history(run: Path) -> list[dict[str, Any]]:
    """A row of metrics.jsonl for each epoch."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def science(rows: Iterable[Mapping[str, Any]]) -> list[tuple]:
    """Rows of metrics.jsonl without their times."""
    return [tuple(row[name] for name in ("epoch", "step", "loss", "lr", "CIDEr")) for row in rows]
