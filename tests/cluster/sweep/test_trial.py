"""Trials of a sweep, killed and started again: what they report and what is recorded of them."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.tune
import torch

from cluster.store.store import open_store
from cluster.sweep.search_space import Choice, Range
from cluster.sweep.sweep import _optuna, _Recorder
from cluster.sweep.trial import (
    CHECKPOINT,
    COMPLETE_FILE,
    OVERRIDES,
    RESULT_FILE,
    SweepRun,
    _document,
    _newest_checkpoint,
    run_trial,
    trial_folder,
)
from cluster.training.checkpoints import STATE_FILE
from cluster.training.request import TrainRequest
from cluster.training.run_record import BEGINNING, run_versions
from cluster.training.trackers import run_id
from cluster.training.train import planned_run
from pcm.captioners.pcmnet.model import PCMNet
from pcm.documents import document_bytes
from pcm.errors import InputError
from tests.helpers.tiny_dataset import NO_NOISE, TINY, write_dataset
from tests.helpers.trained import history, science

SETTINGS = {"lr_factor": 0.4, "seed": 1}
EPOCHS = TINY["epochs"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("trial") / "data", tiny_clip, rows=48)


@dataclass
class Tune:
    """What Ray Tune does with one trial, in this process: `driver` is the recorder of the driver that lives now."""

    sweep: SweepRun
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    driver: _Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.start_driver()

    @property
    def folder(self) -> Path:
        return Path(trial_folder(self.sweep.out, self.settings))

    def start_driver(self) -> None:
        self.driver = _Recorder(open_store(self.sweep.out), epochs=EPOCHS, total=1)

    def run(self, *, until: int = EPOCHS + 1) -> None:
        """The trial; its thread is ended in its report of epoch `until`, as by a scheduler that stops there."""
        trial: Any = SimpleNamespace(trial_id="1", config={OVERRIDES: self.settings}, last_result={"time_total_s": 1.0})

        def report(row: dict[str, Any]) -> None:
            self.driver.on_trial_result(0, [], trial, row)
            if row["epoch"] >= until:
                raise SystemExit

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray.tune, "report", report)
            with contextlib.suppress(SystemExit):
                run_trial(trial.config, sweep=self.sweep)
        self.end = lambda: self.driver.on_trial_complete(0, [], trial)

    def history(self) -> list[dict[str, Any]]:
        return history(self.folder)

    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / RESULT_FILE).read_text())


@pytest.fixture
def tune(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tune]:
    monkeypatch.setattr("ray.train.v2._internal.execution.train_fn_utils._train_fn_utils", None)  # and back at the end
    run = planned_run(TrainRequest(data=str(data), out=str(tmp_path), overrides=TINY), cpus=1)
    return Tune(SweepRun(out=str(tmp_path), run=run, tables={}))


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


def test_a_trial_that_the_scheduler_stops_keeps_its_last_epoch_in_its_metrics(tune: Tune) -> None:
    """ASHA stops a trial in its last epoch's report, where it would have gone on to write them."""
    tune.run(until=EPOCHS)
    assert len(tune.history()) < EPOCHS
    tune.end()
    assert tune.history() == tune.result()["history"] and len(tune.history()) == EPOCHS


def test_of_epochs_of_the_same_score_the_last_is_kept(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """On little data the CIDEr of the first epochs is 0; also where the run goes on in between."""
    monkeypatch.setattr("cluster.training.loop.validation_cider", lambda *_, **__: 0.0)
    tune.run(until=1)
    tune.run()
    tune.end()
    assert [row["CIDEr"] for row in tune.history()] == [0.0] * EPOCHS
    assert json.loads((tune.folder / "best/config.json").read_text())["metrics"]["epoch"] == EPOCHS


def test_a_trial_leaves_no_checkpoint_where_its_driver_was_killed_right_after_its_result(tune: Tune) -> None:
    tune.run()
    left = tune.folder / CHECKPOINT / "epoch-001/complete"
    tune.end()
    assert tune.result()["status"] == "finished" and not left.exists()
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"")
    tune.start_driver()
    tune.run()
    tune.end()
    assert not left.exists()


def test_a_trial_of_a_thousand_epochs_goes_on_from_the_last_one(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for name in ("epoch-999", "epoch-1000", "epoch-999-step-000009995"):
        store.write_bytes(f"{CHECKPOINT}/{name}/{COMPLETE_FILE}", b"")
    store.write_bytes(f"{CHECKPOINT}/epoch-1001/{STATE_FILE}", b"")
    with _newest_checkpoint(store) as newest:
        assert newest is not None and Path(newest.path).name == "epoch-1000"


def test_for_trackers_each_trial_is_a_run_of_its_own(tune: Tune) -> None:
    def run(**overrides: Any) -> str:
        return run_id(open_store("anywhere"), _document(tune.sweep, overrides, tune.sweep.run.config, None))

    assert run(seed=1) == run(seed=1) != run(seed=2)
    tune.run(until=1)
    written = json.loads((tune.folder / "best/config.json").read_text())
    assert written[BEGINNING] != tune.sweep.run.document[BEGINNING], "as trackers are told"


def test_a_trial_says_which_releases_trained_it(tune: Tune, tmp_path: Path) -> None:
    now = run_versions({})
    (tmp_path / "config.json").write_bytes(document_bytes({"versions": {**now, "torch": "1.0"}}))
    checkpoints = [None, ray.train.Checkpoint.from_directory(tmp_path)]
    documents = [_document(tune.sweep, {}, tune.sweep.run.config, checkpoint) for checkpoint in checkpoints]
    assert [each["versions"]["torch"] for each in documents] == [now["torch"], f"1.0 and {now['torch']}"]


def test_a_trial_whose_settings_exclude_each_other_has_failed(tune: Tune) -> None:
    tune.settings = {"use_patches": False, "top_patches": 5, "seed": 1}
    tune.run()
    tune.end()
    assert (result := tune.result())["status"] == "failed" and "use_patches False with top_patches 5" in result[
        "reason"
    ]
    assert tune.history() == []


def test_a_trial_that_does_not_fit_into_memory_has_failed(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: PCMNet, *features: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(PCMNet, "forward", forward)
    tune.run()
    tune.end()
    assert (result := tune.result())["status"] == "failed"
    assert result["reason"] == (
        "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.) with 8 rows at once on each of 1 worker(s); "
        "set grad_accumulation higher (it is 1) or batch_size lower (8), or give it more or larger GPUs; where there "
        "is more, delete result.json of this trial to train it again"
    )


def test_compiled_trials_of_one_process_are_as_many_as_it_gets(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps eight programs of a network, and with fullgraph a ninth is an error; here two."""
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode, **how: compiled(self, backend="eager", **how))
    for number in range(4):
        tune.settings = NO_NOISE | {"compile": "default", "tau": 0.01 * (number + 1), "epochs": 1, "seed": 1}
        with torch._dynamo.config.patch(recompile_limit=2):
            tune.run()
        assert tune.history()


def test_what_may_be_mended_is_no_failure_of_the_settings(data: Path, tune: Tune, tmp_path: Path) -> None:
    """A damaged shard, as a full disk would: nothing is recorded, and the trial is trained when all is well again."""
    copy = shutil.copytree(data, tmp_path / "data")
    tune.sweep = replace(tune.sweep, run=planned_run(TrainRequest(data=str(copy), out="out", overrides=TINY), cpus=1))
    shard = next((copy / "shards").iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=shard.name):
        tune.run()
    assert not tune.folder.exists() or not (tune.folder / RESULT_FILE).exists()
    shard.write_bytes(whole)
    tune.run()
    tune.end()
    assert tune.result()["status"] == "finished"


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 200_000])
def test_a_damaged_record_of_a_trial_is_one_line_and_is_made_again_without_it(
    tune: Tune, undisturbed: list[tuple], content: bytes
) -> None:
    tune.run(until=1)
    (state,) = (tune.folder / CHECKPOINT).glob(f"*/{STATE_FILE}")
    state.write_bytes(content)
    with pytest.raises(InputError, match=rf"/{STATE_FILE}: damaged \(.*delete last/ in the trial's folder"):
        tune.run()
    shutil.rmtree(tune.folder / CHECKPOINT)
    tune.run()
    tune.end()
    assert science(tune.result()["history"]) == undisturbed
    (tune.folder / RESULT_FILE).write_bytes(content)
    with pytest.raises(InputError, match=rf"{tune.folder}/{RESULT_FILE}: damaged \(.*delete it"):
        tune.run()


def test_why_a_trial_crashed_is_the_users_error_in_one_line(
    tune: Tune, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = (
        "ray::ImplicitFunc.train()\n  File trial.py\npcm.errors.InputError: s3://out: access refused (AccessDenied)\n"
    )
    trial: Any = SimpleNamespace(trial_id="1", config={OVERRIDES: SETTINGS}, error_file=str(tmp_path / "error.txt"))
    (tmp_path / "error.txt").write_text(said)
    tune.driver.on_trial_recover(0, [], trial)
    assert caplog.messages == [
        "a trial is tried again: s3://out: access refused (AccessDenied) (lr_factor 0.4, seed 1)"
    ]
    tune.driver.on_trial_error(0, [], trial)
    (result,) = tune.driver.results()
    assert (result.status, result.reason) == ("crashed", "s3://out: access refused (AccessDenied)")


def test_optuna_suggests_again_what_was_finished_and_then_what_was_begun(tune: Tune) -> None:
    pytest.importorskip("optuna")
    space = {"lr_factor": Range("uniform", 0.1, 1.0)}
    for tune.settings, until in (({"lr_factor": 0.25}, 1), ({"lr_factor": 0.5}, EPOCHS + 1)):
        tune.run(until=until)
    tune.end()
    begun = Path(tune.sweep.out, "trials/of-a-damaged-record/overrides.json")
    begun.parent.mkdir()
    begun.write_bytes(b"{")
    first, second, third = _suggested(tune, space, count=3)
    assert (first, second) == ({"lr_factor": 0.5}, {"lr_factor": 0.25}) and third not in (first, second)


def _suggested(tune: Tune, space: dict[str, Any], *, count: int) -> list[dict[str, Any]]:
    search = _optuna(open_store(tune.sweep.out), space, seed=1)
    return [search.suggest(f"{number}")[OVERRIDES] for number in range(count)]


def test_a_setting_that_optuna_suggests_twice_is_not_trained_twice_at_once(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    search = _optuna(open_store(tmp_path), {"top_concepts": Choice((3,))}, seed=1)
    suggestion = search.suggest("first")
    assert suggestion == {OVERRIDES: {"top_concepts": 3}}
    assert search.suggest("second") is None and search.suggest("third") is None
    search.on_trial_complete("first", {"CIDEr": 0.5})
    assert search.suggest("fourth") == suggestion and search.suggest("fifth") is None
    search.on_trial_result("fourth", {"CIDEr": 0.5, "training_iteration": 1})
    search.on_trial_complete("fourth", {"CIDEr": 0.5})
    assert search.suggest("sixth") == suggestion
    states = [trial.state for trial in search._ot_study.trials]
    assert states == [optuna.trial.TrialState.COMPLETE] * 2 + [optuna.trial.TrialState.RUNNING]
