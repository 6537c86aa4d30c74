"""Trackers: what they keep, and that a run never fails or waits because of one."""

import glob
import hashlib
import importlib.util
import logging
import shutil
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.store.store import open_store
from cluster.training import trackers
from cluster.training.run_record import beginning
from cluster.training.trackers import flattened, open_trackers, run_id, wandb_configured
from tests.helpers.seaweedfs import S3Server

CONFIG = {"train": {"seed": 1, "model": {"tau": 0.01}}, **beginning(None)}


@pytest.fixture(autouse=True)
def no_trackers_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(name)]


def track(out: str, *, steps: range, loss: float) -> None:
    tracker = open_trackers(out, config=CONFIG)
    for step in steps:
        tracker.log(step, {"train/loss": loss, "train/lr": 0.5})
    tracker.close()


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path: Path) -> None:
    track(str(tmp_path), steps=range(1, 6), loss=3.0)
    track(str(tmp_path), steps=range(4, 7), loss=2.0)  # step 4 and 5 were after the last checkpoint
    expected = [(1, 3.0), (2, 3.0), (3, 3.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert scalars(tmp_path / "tensorboard", "train/loss") == expected
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert b'"tau": 0.01' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_event_files_of_a_run_on_an_object_store_lie_beside_it(s3: S3Server, tmp_path: Path) -> None:
    out = f"{s3.uri}/tracked"
    track(out, steps=range(1, 4), loss=1.5)
    store = open_store(out)
    (key,) = store.list("tensorboard")
    (tmp_path / Path(key).name).write_bytes(store.read_bytes(key))
    assert scalars(tmp_path, "train/loss") == [(1, 1.5), (2, 1.5), (3, 1.5)]


def test_what_is_uploaded_of_a_long_run_does_not_grow_with_its_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store cannot append: a file is put whole each time, so it must not become long."""
    sizes: list[int] = []

    def put(key: str, file: Path) -> None:
        sizes.append(file.stat().st_size)
        shutil.copy(file, tmp_path / file.name)

    monkeypatch.setattr(trackers, "UPLOAD_SECONDS", 0.0)
    monkeypatch.setattr(trackers, "EVENT_FILE_BYTES", 10_000)
    store: Any = SimpleNamespace(is_local=False, put_file=put)
    tensorboard = trackers._TensorBoard(store, CONFIG)
    for step in range(1, 1001):
        tensorboard.log(step, {"train/loss": 1.5})
    tensorboard.close()
    assert max(sizes) < 11_000 and sum(sizes) < len(sizes) * 6_000
    assert scalars(tmp_path, "train/loss") == [(step, 1.5) for step in range(1, 1001)]
    assert not tensorboard._folder.path.exists()


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init) -> None:
    """A package under W&B's name whose service misbehaves, as none can be made to on purpose."""
    module = ModuleType("wandb")
    module.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)
    module.init, module.Settings = init, dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_API_KEY", "secret-key")


def test_a_tracker_that_fails_is_one_warning_without_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**settings: object) -> None:
        raise SystemExit("https://user:secret-key@host refused")

    fake_wandb(monkeypatch, refuse)
    with caplog.at_level(logging.INFO):
        track(str(tmp_path), steps=range(1, 4), loss=1.0)
    assert [record.getMessage() for record in caplog.records] == ["W&B: SystemExit; training goes on without it"]
    assert scalars(tmp_path / "tensorboard", "train/loss")[-1] == (3, 1.0)


def test_a_tracker_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(monkeypatch, lambda **settings: time.sleep(60))
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    track(str(tmp_path), steps=range(1, 4), loss=1.0)
    assert "W&B: did not finish" in caplog.text


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_API_KEY": "k"}, True),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, False),
    ],
)
def test_wandb_is_used_where_the_environment_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], wanted: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert wandb_configured() is wanted


def test_wandb_keeps_an_offline_run_in_the_runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(str(tmp_path), steps=range(1, 4), loss=1.0)
    (file,) = glob.glob(str(tmp_path / "wandb/offline-run-*/*.wandb"))
    data = Path(file).read_bytes()
    assert b"loss" in data and run_id(open_store(tmp_path), CONFIG).encode() in data


def test_mlflow_goes_on_in_the_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for steps in (range(1, 4), range(4, 6)):
        track(str(tmp_path / "run"), steps=steps, loss=1.0)
    client = mlflow.tracking.MlflowClient()
    experiment = client.get_experiment_by_name("pcmnet")
    (run,) = client.search_runs([experiment.experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2, 3, 4, 5]
    assert run.data.params["train.model.tau"] == "0.01" and run.info.status == "FINISHED"


def test_nested_settings_have_dotted_names() -> None:
    assert flattened({"train": CONFIG["train"]}) == {"train.seed": 1, "train.model.tau": 0.01}


def test_a_run_that_begins_is_another_one_and_one_that_goes_on_the_same() -> None:
    """At a place of the same name: on another machine, or where an earlier run was deleted."""
    store, begun = open_store("/mnt/run"), beginning(None)
    assert run_id(store, beginning(None)) != run_id(store, begun) == run_id(store, beginning(begun))
    assert run_id(open_store("s3://bucket/moved"), begun) == run_id(store, begun)
    of_earlier_release = beginning({"train": {}})
    assert run_id(store, of_earlier_release) == hashlib.sha256(b"/mnt/run").hexdigest()[:16]
