"""The order of work: pictures, then part by part the data and the runs, seed by seed; whatever is there, in OUT or
in the archive, is kept.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.results import read_result
from benchmarks.experiments.worth import retrievers
from benchmarks.experiments.worth.archive import Archive, read_archive
from benchmarks.experiments.worth.calibration import SETTING, calibrate, chosen, is_calibrated
from benchmarks.experiments.worth.datasets import data_figures, is_made, make_data
from benchmarks.experiments.worth.pictures import (
    load_pictures,
    make_judge,
    make_pictures,
    one_thread,
    worth_folder,
)
from benchmarks.experiments.worth.runs import do_run, planned
from benchmarks.experiments.worth.settings import PARTS, SEEDS, SYNC, Setting
from pcm.embedded.making.art import DEFAULT_ART_FOLDER, fetch_art

log = logging.getLogger(__name__)


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
    """Do what is missing: the calibration, then the parts in their order. After so many `minutes` nothing more is
    begun: a run or a dataset that is under way is finished. Killed at any moment, the same command goes on.
    """
    started = time.monotonic()

    def may_begin() -> bool:
        return minutes is None or time.monotonic() - started < 60 * minutes

    folder = prepare_worth(out, art=art)
    if not is_calibrated(out):
        make_data([SETTING], out, folder)
    if not calibrate(out, load_pictures(out, "validation"), may_begin=may_begin):
        return {"done_now": 0, "calibrated": False}
    how = asdict(chosen(out))
    test, archive = load_pictures(out, "test"), read_archive()
    done = 0
    for name in parts or PARTS:
        settings = PARTS[name].settings
        for setting, seed in by_seed(settings, seeds):
            if not may_begin():
                return {"done_now": done, **progress(out, seeds)}
            if found_result(setting, seed, out, how, archive) is not None:
                continue
            make_data([setting], out, folder)
            result = do_run(planned(setting, seed, out, **how), out, test)
            done += 1
            log.info(
                "%s: %s, seed %d: CIDEr %.3f, %.0f CPU seconds",
                name, setting, seed, np.mean(result["cider"]), sum(result["cpu_seconds"].values()),
            )  # fmt: skip
        for setting in settings:
            if is_made(out, setting.painter, setting.data):
                data_figures(out, setting.painter, setting.data)
                if setting.data == SYNC:
                    retrievers.make_figures(out, setting.painter, folder)
    return {"done_now": done, **progress(out, seeds)}


def found_result(
    setting: Setting, seed: int, out: Path, how: Mapping[str, Any], archive: Archive
) -> dict[str, Any] | None:
    """Of this machine, or else of the archive; None where nobody has done it. `how`: what the calibration chose."""
    if is_made(out, setting.painter, setting.data):
        own = read_result(worth_folder(out), planned(setting, seed, out, **how).key)
        if own is not None:
            return own
    return archive.result(setting, seed, steps=how["steps"] * setting.longer, lr_factor=how["lr_factor"])


def by_seed(settings: Sequence[Setting], seeds: int) -> Iterator[tuple[Setting, int]]:
    """All settings with their first seed, then all with their second: stopped anywhere, rows have equal seeds."""
    for number in range(seeds):
        for setting in settings:
            yield setting, setting.seeds(seeds)[number]


def progress(out: Path, seeds: int) -> dict[str, Any]:
    """Runs of each part: done and wanted."""
    found: dict[str, Any] = {}
    how, archive = asdict(chosen(out)), read_archive()
    for name, part in PARTS.items():
        done = sum(
            found_result(setting, seed, out, how, archive) is not None
            for setting, seed in by_seed(part.settings, seeds)
        )
        found[name] = f"{done} of {len(part.settings) * seeds}"
    return found
