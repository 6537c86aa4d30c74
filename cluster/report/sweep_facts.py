"""What a report knows of a sweep: its trials, gathered by setting."""

import json
import math
from dataclasses import dataclass

from cluster.report.dataset_facts import in_parallel
from cluster.store.store import Store
from cluster.sweep.results import SettingResult, TrialResult, by_setting
from cluster.sweep.sweep import SWEEP_KEY
from cluster.sweep.trial import RESULT_FILE, TRIALS
from cluster.training.config import TrainConfig
from pcm.errors import InputError, one_line


@dataclass(frozen=True, kw_only=True)
class SweepFacts:
    """A sweep of jobs.sweep, finished or not."""

    root: str
    params: tuple[str, ...]
    search: str
    ranked: tuple[SettingResult, ...]  # best mean first, those without one last
    unfinished: int  # trials without a result

    @property
    def scored(self) -> list[SettingResult]:
        return [setting for setting in self.ranked if not math.isnan(setting.mean)]


def gather_sweep(store: Store) -> SweepFacts:
    """Raises InputError where there is no sweep, or its documents are damaged."""
    try:
        document = json.loads(store.read_bytes(SWEEP_KEY))
        params, search = tuple(document["params"]), str(document["search"])
        base = TrainConfig.from_dict(document["run"]["train"])
    except FileNotFoundError:
        raise InputError(f"{store.root}: not a sweep (no {SWEEP_KEY}); give the --out of jobs.sweep") from None
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        said = one_line(error)
        raise InputError(f"{store.root}/{SWEEP_KEY}: damaged ({said}); give the --out of jobs.sweep") from None
    keys = store.list(f"{TRIALS}/")
    folders = {key.split("/")[1] for key in keys}
    results = [key for key in keys if key.count("/") == 2 and key.endswith(f"/{RESULT_FILE}")]

    def read(key: str) -> TrialResult:
        try:
            return TrialResult.of(json.loads(store.read_bytes(key)))
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InputError(
                f"{store.root}/{key}: damaged ({one_line(error)}); delete it, then jobs.sweep --resume trains it again"
            ) from None

    trials = in_parallel(read, results)
    return SweepFacts(
        root=store.root,
        params=params,
        search=search,
        ranked=tuple(by_setting(trials, base=base)),
        unfinished=len(folders) - len(results),
    )
