"""Trials of a sweep, killed and started again: what they report and what is recorded of them."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.tune

from cluster.store.store import open_store
from cluster.sweep.sweep import _Recorder
from cluster.sweep.trial import OVERRIDES, RESULT_FILE, SweepRun, run_trial, trial_folder
from cluster.training.request import TrainRequest
from cluster.training.train import planned_run
from tests.helpers.tiny_dataset import TINY, write_dataset

SETTINGS = {"lr_factor": 0.4, "seed": 1}
EPOCHS = TINY["epochs"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("trial") / "data", tiny_clip, rows=48)


@dataclass
class Tune:
    """What Ray Tune does with one trial, in this process: `driver` is the recorder of the driver that lives now."""

    sweep: SweepRun
    driver: _Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.start_driver()

    @property
    def folder(self) -> Path:
        return Path(trial_folder(self.sweep.out, SETTINGS))

    def start_driver(self) -> None:
        self.driver = _Recorder(open_store(self.sweep.out), epochs=EPOCHS, total=1)

    def run(self, *, until: int = EPOCHS + 1) -> None:
        """The trial; its thread is ended in its report of epoch `until`, as by a scheduler that stops there."""
        trial: Any = SimpleNamespace(trial_id="1", config={OVERRIDES: SETTINGS}, last_result={"time_total_s": 1.0})

        def report(row: dict[str, Any]) -> None:
            self.driver.on_trial_result(0, [], trial, row)
            if row["epoch"] >= until:
                raise SystemExit

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray.tune, "report", report)
            with contextlib.suppress(SystemExit):
                run_trial(trial.config, sweep=self.sweep)
        self.end = lambda: self.driver.on_trial_complete(0, [], trial)

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / RESULT_FILE).read_text())


@pytest.fixture
def tune(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tune]:
    monkeypatch.setattr("ray.train.v2._internal.execution.train_fn_utils._train_fn_utils", None)  # and back at the end
    run = planned_run(TrainRequest(data=str(data), out=str(tmp_path), overrides=TINY), cpus=1)
    return Tune(SweepRun(out=str(tmp_path), run=run, tables={}))


def science(rows: list[dict]) -> list[tuple]:
    return [tuple(row[name] for name in ("epoch", "step", "loss", "lr", "CIDEr")) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The history of a trial that nothing disturbs."""
    out = str(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.train.v2._internal.execution.train_fn_utils._train_fn_utils", None)
        run = planned_run(TrainRequest(data=str(data), out=out, overrides=TINY), cpus=1)
        tune = Tune(SweepRun(out=out, run=run, tables={}))
        tune.run()
        tune.end()
    return science(tune.result()["history"])


@pytest.mark.parametrize("killed_after", [1, EPOCHS])
def test_a_trial_of_a_killed_sweep_has_all_its_epochs(tune: Tune, undisturbed: list[tuple], killed_after: int) -> None:
    """After its last epoch too, when nothing is left to train but the result was not stored."""
    tune.run(until=killed_after)
    tune.start_driver()
    tune.run()
    tune.end()
    assert tune.result()["status"] == "finished" and science(tune.result()["history"]) == undisturbed


def test_a_trial_that_goes_on_beside_its_driver_has_each_epoch_once(tune: Tune, undisturbed: list[tuple]) -> None:
    tune.run(until=1)
    tune.run()
    tune.end()
    assert science(tune.result()["history"]) == undisturbed
