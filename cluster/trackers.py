"""Where the numbers of a training run go while it runs, besides the run's own files."""

from collections.abc import Mapping
from typing import Protocol


class Tracker(Protocol):
    """One experiment tracker, on rank 0 only. It never raises: one that is out of reach warns and goes quiet."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers after optimiser step `step` (from 1, over the whole run); a resumed run may log a step again."""

    def close(self) -> None:
        """Write what is pending; called once, also when training fails."""
