"""The order of work: pictures, then part by part the data and the runs, seed by seed; whatever is there is kept."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.worth.datasets import data_figures, is_made, make_data
from benchmarks.experiments.worth.pictures import (
    load_pictures,
    make_judge,
    make_pictures,
    one_thread,
    worth_folder,
    write_whole,
)
from benchmarks.experiments.worth.runs import Training, do_run, planned, read_result
from benchmarks.experiments.worth.settings import BASE, FIRST_SEED, PARTS, SEEDS, Setting
from pcm.embedded.making.art import DEFAULT_ART_FOLDER, fetch_art

log = logging.getLogger(__name__)

#: Calibration: the settings and seeds whose validation CIDEr is followed, what is tried, and where it is looked at.
CALIBRATED = (Setting("coarse"),)
CALIBRATION_SEEDS = 3
LR_FACTORS = (0.2, 0.4)
LOOKS = (200, 400, 600, 800)


def prepare_worth(out: Path, *, art: Path | None) -> Path:
    """Art, classifier, test and validation pictures; the folder of the art."""
    one_thread()
    folder = fetch_art(art or DEFAULT_ART_FOLDER)
    make_judge(out, folder)
    make_pictures(out, folder)
    return folder


def worth(
    out: Path, *, art: Path | None, parts: Sequence[str] = (), seeds: int = SEEDS, minutes: float | None = None
) -> dict[str, Any]:
    """Do what is missing of the parts, in their order. After so many `minutes` nothing more is begun: a run or a
    dataset that is under way is finished. Killed at any moment, the same command goes on.
    """
    started = time.monotonic()
    folder = prepare_worth(out, art=art)
    test = load_pictures(out, "test")
    done = 0
    for name in parts or PARTS:
        settings = PARTS[name].settings
        for setting, seed in by_seed(settings, seeds):
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                return {"done_now": done, **progress(out, seeds)}
            make_data([setting], out, folder)
            run = planned(setting, seed, out)
            if read_result(out, run.key) is not None:
                continue
            result = do_run(run, out, test)
            done += 1
            log.info(
                "%s: %s, seed %d: CIDEr %.3f, %.0f CPU seconds",
                name, setting, seed, np.mean(result["cider"]), sum(result["cpu_seconds"].values()),
            )  # fmt: skip
        for setting in settings:
            data_figures(out, setting.painter, setting.data)
    return {"done_now": done, **progress(out, seeds)}


def by_seed(settings: Sequence[Setting], seeds: int) -> Iterator[tuple[Setting, int]]:
    """All settings with their first seed, then all with their second: stopped anywhere, rows have equal seeds."""
    for number in range(seeds):
        for setting in settings:
            yield setting, setting.seeds(seeds)[number]


def progress(out: Path, seeds: int) -> dict[str, Any]:
    """Runs of each part: done and wanted."""
    found: dict[str, Any] = {}
    for name, part in PARTS.items():
        done = sum(
            is_made(out, setting.painter, setting.data)
            and read_result(out, planned(setting, seed, out).key) is not None
            for setting, seed in by_seed(part.settings, seeds)
        )
        found[name] = f"{done} of {len(part.settings) * seeds}"
    return found


def calibrate(out: Path, *, art: Path | None) -> dict[str, Any]:
    """Validation CIDEr by steps, for learning rates and seeds; what settings.py's numbers were chosen by.

    Written after every training, so that a rerun goes on.
    """
    folder = prepare_worth(out, art=art)
    make_data(CALIBRATED, out, folder)
    validation = load_pictures(out, "validation")
    path = worth_folder(out) / "calibration.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(FIRST_SEED, FIRST_SEED + CALIBRATION_SEEDS):
        for factor in LR_FACTORS:
            for setting in CALIBRATED:
                run = planned(setting, seed, out, steps=LOOKS[-1], overrides={"lr_factor": factor})
                if run.key in found:
                    continue
                training, curve = Training(run), {}
                for steps in LOOKS:
                    training.to_step(steps)
                    curve[steps] = round(100 * float(np.mean(training.tested_on(validation)["cider"])), 2)
                found[run.key] = {
                    "network": setting.network, "lr_factor": factor, "seed": seed, "cider": curve,
                    "loss": training.losses(),
                }  # fmt: skip
                log.info("%s, lr_factor %g, seed %d: %s", setting.network, factor, seed, curve)
                write_whole(path, json.dumps(found) + "\n")
    return {"chosen": {"lr_factor": BASE["lr_factor"]}, "runs": list(found.values())}
