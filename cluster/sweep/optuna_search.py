"""Optuna's search, as a sweep uses it: imported where it is asked for, because Optuna is an extra."""

from typing import Any

from ray.tune.search.optuna import OptunaSearch

from cluster.sweep.trial import OVERRIDES, trial_id


class OneTrialASetting(OptunaSearch):
    """Holds a suggestion back while a trial with the same settings goes on: both would train in one folder.

    When that trial is over, the other reports the same result without training.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._going_on: dict[str, tuple[str, str]] = {}  # trial of Ray Tune -> (trial of Optuna, id of its settings)
        self._held: str | None = None  # the trial of Optuna whose suggestion is held back

    def suggest(self, trial: str) -> dict[str, Any] | None:  # type: ignore[override]
        """None: not now."""
        asked = self._held or trial  # Optuna suggests the same to the same name
        suggestion = super().suggest(asked)
        assert suggestion is not None
        setting = trial_id(suggestion[OVERRIDES])
        if any(setting == other for _, other in self._going_on.values()):
            self._held = asked
            return None
        self._held = None
        self._going_on[trial] = asked, setting
        return suggestion

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        super().on_trial_result(self._going_on[trial_id][0], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        asked, _ = self._going_on.pop(trial_id)
        super().on_trial_complete(asked, result, error)
