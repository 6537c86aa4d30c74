"""What became of the trials of a sweep, and of a setting over its seeds."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.sweep.trial import trial_id


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
        return max(rows, key=lambda row: row["CIDEr"])


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


def by_setting(results: Sequence[TrialResult]) -> list[SettingResult]:
    """The settings, best mean first, those without one last."""
    groups: dict[str, list[TrialResult]] = defaultdict(list)
    for result in results:
        groups[trial_id(result.settings)].append(result)
    found = [SettingResult(settings=group[0].settings, trials=tuple(group)) for group in groups.values()]
    return sorted(found, key=lambda setting: -math.inf if math.isnan(setting.mean) else setting.mean, reverse=True)
