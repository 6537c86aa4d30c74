"""What became of the trials of a sweep, and of a setting over its seeds."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.sweep.trial import trial_id
from cluster.training.checkpoints import best_epoch
from cluster.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How one trial went."""

    overrides: dict[str, Any]  # its settings and its seed
    status: str  # finished; stopped (by the scheduler); failed (it would again); crashed (--resume tries it again)
    reason: str
    history: tuple[dict[str, Any], ...]  # rows of metrics.jsonl
    seconds: float

    @staticmethod
    def of(document: dict[str, Any]) -> "TrialResult":
        names = ("overrides", "status", "reason", "seconds")
        return TrialResult(**{name: document[name] for name in names}, history=tuple(document["history"]))

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.overrides.items() if name != "seed"}

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch that jobs.train would keep; None for a trial that failed or reported nothing."""
        rows = [row for row in self.history if not row.get("reason")]
        if self.status in ("failed", "crashed") or not rows:
            return None
        return best_epoch(rows)


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """One setting over its seeds."""

    settings: dict[str, Any]
    trials: tuple[TrialResult, ...]

    @property
    def scores(self) -> list[float]:
        return [trial.best["CIDEr"] for trial in self.trials if trial.best is not None]

    @property
    def mean(self) -> float:
        """NaN where a seed failed: the others alone would flatter the setting."""
        return statistics.fmean(self.scores) if len(self.scores) == len(self.trials) else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; NaN for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan


def by_setting(results: Sequence[TrialResult], *, base: TrainConfig) -> list[SettingResult]:
    """The settings, best mean first, those without one last.

    Of settings that tie, the one that changes least of `base`, which the sweep began with, comes first; then the first
    in the order of their values, so that neither the order of the trials nor that of a listing decides.
    """
    groups: dict[str, list[TrialResult]] = defaultdict(list)
    for result in results:
        groups[trial_id(result.settings)].append(result)
    found = [SettingResult(settings=group[0].settings, trials=tuple(group)) for group in groups.values()]

    def rank(setting: SettingResult) -> tuple[float, int, str]:
        mean = -math.inf if math.isnan(setting.mean) else setting.mean
        changed = sum(_preset_value(base, name) != value for name, value in setting.settings.items())
        return -mean, changed, json.dumps(setting.settings, sort_keys=True)

    return sorted(found, key=rank)


def _preset_value(base: TrainConfig, name: str) -> Any:
    return getattr(base if hasattr(base, name) else base.model, name, None)


def tied(ranked: Sequence[SettingResult]) -> list[SettingResult]:
    """The settings whose mean is the best one's, in the order of `by_setting`; one where none ties."""
    return [setting for setting in ranked if setting.mean == ranked[0].mean]
