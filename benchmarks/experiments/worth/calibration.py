"""Learning rate and steps, fixed on validation pictures before any test picture is looked at.

Rule: the learning rate with the highest mean CIDEr at the last look; then the fewest steps at which its mean is within
NEAR of its highest. Kept, with the curves, in OUT/worth/calibration.json, which is written after every training; of an
earlier machine in worth.json.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.worth.archive import read_archive
from benchmarks.experiments.worth.pictures import Pictures, worth_folder, write_whole
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
    """Do the trainings that are missing, seed by seed; whether all are done. Asks `may_begin` before each."""
    found = curves(out)
    for seed in SEEDS:
        for factor in LR_FACTORS:
            if (factor, seed) in _done(found):
                continue
            if not may_begin():
                return False
            run = planned(SETTING, seed, out, steps=LOOKS[-1], lr_factor=factor)
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
    done = _done(curves(out))
    return all((factor, seed) in done for factor in LR_FACTORS for seed in SEEDS)


def _done(found: Mapping[str, Mapping[str, Any]]) -> set[tuple[float, int]]:
    return {(each["lr_factor"], each["seed"]) for each in found.values()}


def chosen(out: Path) -> Chosen:
    """By the rule above. Raises InputError where trainings are missing."""
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


def curves(out: Path) -> dict[str, dict[str, Any]]:
    """By run: lr_factor, seed, cider (by steps, times 100), loss. Those of the archive where OUT has none."""
    return json.loads(_path(out).read_text()) if _path(out).exists() else read_archive().calibration


def _path(out: Path) -> Path:
    return worth_folder(out) / "calibration.json"
