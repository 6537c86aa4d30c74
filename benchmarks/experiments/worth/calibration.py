"""Learning rate and steps, fixed on validation pictures before any test picture is looked at.

Rule: the learning rate with the highest mean CIDEr at the last look; then the fewest steps at which its mean is within
NEAR of its highest. Kept, with the curves, in OUT/worth/calibration.json, which is written after every training. Once
it is reported it is in worth.json, and is not done again elsewhere.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.results import write_whole
from benchmarks.experiments.worth.archive import read_archive
from benchmarks.experiments.worth.pictures import Pictures, worth_folder
from benchmarks.experiments.worth.runs import Training, planned
from benchmarks.experiments.worth.settings import FIRST_SEED, Setting
from pcm.errors import InputError

log = logging.getLogger(__name__)

SETTING = Setting("coarse")
SEEDS = range(FIRST_SEED, FIRST_SEED + 3)
LR_FACTORS = (0.8, 1.6)  # 0.4 was tried with one seed, and was far below
#: Steps after which the validation pictures are captioned.
LOOKS = (400, 800, 1200, 1600)
#: CIDEr times 100.
NEAR = 2.0


@dataclass(frozen=True)
class Chosen:
    """Of all runs alike."""

    lr_factor: float
    steps: int


def calibrate(out: Path, validation: Pictures, *, may_begin: Callable[[], bool] = lambda: True) -> bool:
    """Do the trainings that are missing, seed by seed; whether all are done. Asks `may_begin` before each. None is
    missing where the archive has the choice."""
    if read_archive().calibration is not None:
        return True
    found = curves(out)
    for seed in SEEDS:
        for factor in LR_FACTORS:
            run = planned(SETTING, seed, out, steps=LOOKS[-1], lr_factor=factor)
            if run.key in found:
                continue
            if not may_begin():
                return False
            training, curve = Training(run), {}
            for steps in LOOKS:
                training.to_step(steps)
                cider = training.tested_on(validation)["cider"]
                curve[str(steps)] = round(100 * float(np.mean(cider)), 2)
            found[run.key] = {"lr_factor": factor, "seed": seed, "cider": curve, "loss": training.losses()}
            log.info("validation: lr_factor %g, seed %d: CIDEr by steps %s", factor, seed, curve)
            write_whole(_path(out), json.dumps(found) + "\n")
    return True


def is_calibrated(out: Path) -> bool:
    if read_archive().calibration is not None:
        return True
    found = {(each["lr_factor"], each["seed"]) for each in curves(out).values()}
    return all((factor, seed) in found for factor in LR_FACTORS for seed in SEEDS)


def chosen(out: Path) -> Chosen:
    """By the rule above: that of the archive, else of OUT. Raises InputError where trainings are missing."""
    if (kept := read_archive().calibration) is not None:
        return Chosen(**kept["chosen"])
    if not is_calibrated(out):
        raise InputError(f"--out {out}: the calibration is not done; run worth")
    return choice(list(curves(out).values()))


def choice(found: Sequence[Mapping[str, Any]]) -> Chosen:
    """Of the curves of all trainings."""
    means = {
        factor: {
            look: float(np.mean([each["cider"][str(look)] for each in found if each["lr_factor"] == factor]))
            for look in LOOKS
        }
        for factor in LR_FACTORS
    }
    factor = max(LR_FACTORS, key=lambda each: means[each][LOOKS[-1]])
    best = max(means[factor].values())
    return Chosen(factor, min(look for look in LOOKS if means[factor][look] >= best - NEAR))


def table(out: Path) -> list[dict[str, Any]]:
    """By learning rate, of the archive, else of OUT: lr_factor, seeds, and cider, its mean and standard deviation over
    seeds in words, by steps."""
    if (kept := read_archive().calibration) is not None:
        return kept["table"]
    found = list(curves(out).values())
    rows = []
    for factor in sorted({each["lr_factor"] for each in found} | set(LR_FACTORS)):
        ciders = [each["cider"] for each in found if each["lr_factor"] == factor]
        cells = {str(look): _mean_std([each[str(look)] for each in ciders]) for look in LOOKS if ciders}
        rows.append({"lr_factor": factor, "seeds": len(ciders), "cider": cells})
    return rows


def kept(out: Path) -> dict[str, Any] | None:
    """As the archive has it; None before it is done."""
    return {"chosen": asdict(chosen(out)), "table": table(out)} if is_calibrated(out) else None


def _mean_std(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def curves(out: Path) -> dict[str, dict[str, Any]]:
    """By run: lr_factor, seed, cider (by steps, times 100), loss."""
    return json.loads(_path(out).read_text()) if _path(out).exists() else {}


def _path(out: Path) -> Path:
    return worth_folder(out) / "calibration.json"
