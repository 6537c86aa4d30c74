"""Going on from a checkpoint: what is damage, and what is the store's or the memory's."""

import errno
import json
import resource
import shutil
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray.train
import safetensors.torch
import torch
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext

from cluster.ray_internals import CHECKPOINT_RECORD
from cluster.store.store import open_store
from cluster.store.temporary import named_temporary_folder
from cluster.training import checkpoints
from cluster.training.checkpoints import (
    OPTIMIZER_FILE,
    SCORE,
    STATE_FILE,
    Checkpoints,
    TrainingState,
    best_epoch,
    check_checkpoints,
    delete_unrecorded,
    load_training_state,
    renew_record,
    save_training_state,
)
from cluster.training.ray_trainer import CHECKPOINTS
from pcm.captioners.captioner import MODEL_FILE
from pcm.errors import InputError, StoreFailure
from tests.helpers.small_disk import small_disk

NAMES = ("epoch-001", "epoch-002")


def test_the_best_of_epochs_that_are_alike_is_the_last() -> None:
    history = [{"epoch": epoch, "CIDEr": cider} for epoch, cider in enumerate((0.0, 0.5, 0.5, 0.25), 1)]
    assert best_epoch(history) is history[2] and best_epoch(history[:1]) is history[0]
    assert best_epoch([]) is None


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoints:
    """A run of two checkpoints, of which the second is the one to go on from; its network is one layer."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    for epoch, name in enumerate(NAMES, 1):
        folder = tmp_path / CHECKPOINTS / name
        folder.mkdir(parents=True)
        torch.nn.init.constant_(module.weight, epoch)
        safetensors.torch.save_file(module.state_dict(), folder / MODEL_FILE)
        save_training_state(
            folder, module=module, optimizer=optimizer, average=None, at=TrainingState(epoch=epoch, step=10 * epoch)
        )
    newest = ray.train.Checkpoint.from_directory(tmp_path / CHECKPOINTS / NAMES[-1])
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: newest)
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "20")
    run: Any = None
    return Checkpoints(
        run, open_store(tmp_path), module=module, optimizer=optimizer, average=None, is_first=True  # type: ignore[arg-type]
    )  # fmt: skip


def failing(monkeypatch: pytest.MonkeyPatch, *errors: BaseException) -> list[str]:
    """Let the first reads of a checkpoint fail with these errors; which checkpoints were read."""
    waiting, read = list(errors), []

    def load(folder: Path, **parts: Any) -> TrainingState:
        read.append(folder.name)
        if waiting:
            raise waiting.pop(0)
        return load_training_state(folder, **parts)

    monkeypatch.setattr(checkpoints, "load_training_state", load)
    return read


def test_the_newest_checkpoint_is_gone_on_from(run: Checkpoints) -> None:
    assert run.restore() == TrainingState(epoch=2, step=20)
    assert run._module.weight[0, 0] == 2


@pytest.mark.parametrize("name", [MODEL_FILE, "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "other", "gone"])
def test_a_damaged_checkpoint_is_passed_over_and_named(
    damage: str, name: str, run: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / CHECKPOINTS / NAMES[1] / name
    data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "other": json.dumps([1]).encode()}.get(damage, b""))
    if damage == "gone":
        file.unlink()
    assert run.restore() == TrainingState(epoch=1, step=10)
    assert run._module.weight[0, 0] == 1
    assert "damaged checkpoints are passed over (epoch-002: " in caplog.text and "epoch-001 is used" in caplog.text


def test_a_checkpoint_of_a_later_release_is_not_called_damaged(run: Checkpoints, tmp_path: Path) -> None:
    """Nor is the one before it taken in its place."""
    file = tmp_path / CHECKPOINTS / NAMES[1] / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clock": 1}))
    with pytest.raises(InputError, match=r"epoch-002: state.json field 'clock': not known to this release; finish"):
        run.restore()


def test_the_checkpoints_before_one_are_told_by_their_numbers(run: Checkpoints, tmp_path: Path) -> None:
    steps = ["epoch-999-step-000009995", "epoch-999-step-000009995-again", "epoch-1000-step-000010005"]
    in_order = [*NAMES, "epoch-200", "epoch-999", *steps[:2], "epoch-1000", steps[2], "epoch-1001"]
    for name in in_order[2:]:
        (tmp_path / CHECKPOINTS / name).mkdir()
        (tmp_path / CHECKPOINTS / name / STATE_FILE).touch()
    for place, name in enumerate(in_order):
        assert run._earlier_than(name) == in_order[:place][::-1]


def test_an_optimizer_of_many_kilobytes_that_is_cut_is_passed_over(
    run: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a rest of 7 to 82 KB torch says EINVAL, as a disk may."""
    file = tmp_path / CHECKPOINTS / NAMES[1] / OPTIMIZER_FILE
    torch.save({"state": {number: {"step": torch.zeros(2500)} for number in range(4)}}, file)
    data = file.read_bytes()
    assert len(data) > 40_000
    file.write_bytes(data[: len(data) // 2])
    assert run.restore() == TrainingState(epoch=1, step=10)
    assert "(epoch-002: optimizer.pt: is cut); epoch-001 is used" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_no_damage(error: Exception, run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    read = failing(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        run.restore()
    assert caught.value is error and read == [NAMES[1]]


def test_a_system_without_memory_is_no_damage(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    read = failing(monkeypatch, OSError(errno.ENOMEM, "Cannot allocate memory"))
    with pytest.raises(StoreFailure, match=r"checkpoints/epoch-002: .*\(ENOMEM\)"):
        run.restore()
    assert read == [NAMES[1]]


def test_a_store_that_refuses_is_named_and_no_older_checkpoint_is_taken(
    run: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = failing(monkeypatch, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(StoreFailure, match=r"checkpoints/epoch-002: access refused \(EACCES\)"):
        run.restore()
    assert read == [NAMES[1]]


def test_a_store_that_stutters_is_tried_again(run: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    read = failing(monkeypatch, OSError(errno.EIO, "Input/output error"), TimeoutError())
    assert run.restore() == TrainingState(epoch=2, step=20)
    assert read == [NAMES[1]] * 3


def test_a_checkpoint_that_the_disk_does_not_take_is_one_line_and_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whole in the next try."""
    with small_disk(tmp_path / "disk") as free:
        out = open_store(tmp_path / "disk" / "run")
        out.write_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}", b"")
        storage = types.SimpleNamespace(
            storage_filesystem=None, build_checkpoint_path_from_name=lambda name: f"{out.prefix}/{CHECKPOINTS}/{name}"
        )
        monkeypatch.setattr(ray.train, "get_context", lambda: types.SimpleNamespace(get_storage=lambda: storage))
        (tmp_path / "made").mkdir()
        for name, size in ((STATE_FILE, 10), (OPTIMIZER_FILE, 100), ("weights.safetensors", 1 << 20)):
            (tmp_path / "made" / name).write_bytes(bytes(size))
        made = ray.train.Checkpoint.from_directory(tmp_path / "made")
        run = object.__new__(Checkpoints)
        run._out = out
        with pytest.raises(StoreFailure, match=r"disk full at .*/epoch-001/weights.safetensors .*free space"):
            run._put(made, NAMES[0])
        assert out.list(f"{CHECKPOINTS}/epoch") == [f"{CHECKPOINTS}/epoch-001/{OPTIMIZER_FILE}"]
        free()
        assert run._put(made, NAMES[0]).path == f"{out.prefix}/{CHECKPOINTS}/{NAMES[0]}"
        assert {path.name: path.stat().st_size for path in Path(out.path(f"{CHECKPOINTS}/{NAMES[0]}")).iterdir()} == {
            path.name: path.stat().st_size for path in (tmp_path / "made").iterdir()
        }


def test_a_machine_that_does_not_see_the_run_writes_no_checkpoint_there(tmp_path: Path) -> None:
    run = object.__new__(Checkpoints)
    run._out = open_store(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="elsewhere: a folder of one machine, which node"):
        run._put(ray.train.Checkpoint.from_directory(tmp_path), NAMES[0])
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("bytes_free", [0, 1000, 3000])
def test_a_temporary_disk_that_is_full_is_named(bytes_free: int, tmp_path: Path) -> None:
    module = torch.nn.Linear(20, 20)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.zeros(1, 20)).sum().backward()
    optimizer.step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_free, limits[1]))
    try:
        with (
            pytest.raises(StoreFailure, match=r"disk for temporary files is full; .* with TMPDIR"),
            named_temporary_folder(),
        ):
            save_training_state(tmp_path, module=module, optimizer=optimizer, average=None, at=TrainingState())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_an_optimiser_of_a_gpu_is_gone_on_with_where_there_is_none(run: Checkpoints, tmp_path: Path) -> None:
    """And where there are several, not on the first of them: torch would put it there for every rank."""
    file = tmp_path / CHECKPOINTS / NAMES[1] / OPTIMIZER_FILE
    run._module(torch.zeros(1, 3)).sum().backward()
    run._optimizer.step()
    torch.save(run._optimizer.state_dict(), file)
    with zipfile.ZipFile(file) as saved:
        parts = {name: saved.read(name) for name in saved.namelist()}
    with zipfile.ZipFile(file, "w") as on_gpu:
        for name, data in parts.items():  # a pickled text is its length and its letters
            on_gpu.writestr(name, data.replace(b"\3\0\0\0cpu", b"\6\0\0\0cuda:0"))
    assert run.restore() == TrainingState(epoch=2, step=20)
    assert all(state["exp_avg"].device.type == "cpu" for state in run._optimizer.state.values())


def record_of(names: Sequence[str], **changes: Any) -> dict[str, Any]:
    """Ray Train's record of checkpoints, in the order of their scores; the first one is the latest."""
    results = [{"version": 0, "checkpoint_dir_name": name, "metrics": {SCORE: 0.5}} for name in names]
    return {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(4, 4 + len(results))),
        "latest_checkpoint_result": results[0],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": 9,
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    } | changes


def of_ray_2_55(record: dict[str, Any]) -> dict[str, Any]:
    """The same as that release wrote it."""
    later = ("timed_out_validation_checkpoint_dir_names", "failed_validation_checkpoint_dir_names")
    return {name: value for name, value in record.items() if name not in later} | {"ray_version": "2.55.1"}


RECORD = json.dumps(record_of(NAMES)).encode()


def test_a_record_whose_checkpoints_are_there_may_be_gone_on_with(run: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / CHECKPOINTS / CHECKPOINT_RECORD).write_bytes(RECORD)
    check_checkpoints(open_store(tmp_path), done=2)


@pytest.mark.parametrize(
    ("gone", "record", "done", "message"),
    [
        (NAMES, None, 1, "holds no checkpoint, though epochs are done"),
        ((), None, 2, f"{CHECKPOINT_RECORD}, which says what is in it, is gone"),
        ((), b"", 0, f"{CHECKPOINT_RECORD}: damaged"),
        ((), RECORD[:20], 2, f"{CHECKPOINT_RECORD}: damaged"),
        ((), b"[1]", 2, f"{CHECKPOINT_RECORD}: damaged"),
        (NAMES[1:], RECORD, 2, "checkpoints: epoch-002 gone"),
        (NAMES, RECORD, 2, "checkpoints: epoch-001, epoch-002 gone"),
    ],
)
def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(
    run: Checkpoints, tmp_path: Path, gone: tuple[str, ...], record: bytes | None, done: int, message: str
) -> None:
    for name in gone:
        shutil.rmtree(tmp_path / CHECKPOINTS / name)
    if record is not None:
        (tmp_path / CHECKPOINTS / CHECKPOINT_RECORD).write_bytes(record)
    with pytest.raises(InputError, match=message) as caught:
        check_checkpoints(open_store(tmp_path), done=done)
    assert "restore it, or train into another --out" in str(caught.value) and "\n" not in str(caught.value)


def test_a_record_that_this_ray_reads_stays_as_it_is(run: Checkpoints, tmp_path: Path) -> None:
    out = open_store(tmp_path)
    renew_record(out)
    assert not out.exists(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}")
    out.write_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}", RECORD)
    renew_record(out)
    assert out.read_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}") == RECORD


def test_a_record_of_another_ray_is_written_anew_in_this_ones_form(
    run: Checkpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray's own reader of it finds the same checkpoints, and goes on from the same one."""
    out = open_store(tmp_path)
    names = [NAMES[1], NAMES[0]]
    old = of_ray_2_55(record_of(names, latest_checkpoint_result=record_of(names)["checkpoint_results"][1]))
    out.write_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}", json.dumps(old).encode())
    storage = StorageContext(storage_path=str(tmp_path), experiment_dir_name=CHECKPOINTS)
    with pytest.raises(CheckpointManagerInitializationError, match=r"saved with Ray version 2\.55\.1"):
        CheckpointManager(ray.train.CheckpointConfig(), storage)
    check_checkpoints(out, done=2)
    with caplog.at_level("INFO"):
        renew_record(out)
    assert f"begun under Ray 2.55.1, and goes on under {ray.__version__}" in caplog.text
    manager = CheckpointManager(ray.train.CheckpointConfig(num_to_keep=2, checkpoint_score_attribute=SCORE), storage)
    found = [Path(result.checkpoint.path).name for result in manager.best_checkpoint_results]
    latest = manager.latest_checkpoint_result
    assert latest is not None and Path(latest.checkpoint.path).name == NAMES[0]
    assert found == names and latest.metrics == {SCORE: 0.5}
    assert list(manager._checkpoint_to_report_index.values()) == [1, 0] and manager._current_report_index == 2


def test_a_record_that_is_written_anew_has_its_checkpoints_in_the_order_of_training(tmp_path: Path) -> None:
    out, names = open_store(tmp_path), ["epoch-1000", "epoch-999", "epoch-999-step-000000700"]
    out.write_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}", json.dumps(of_ray_2_55(record_of(names))).encode())
    renew_record(out)
    record = json.loads(out.read_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}"))
    assert record["checkpoint_report_indices"] == [2, 0, 1] and record["current_report_index"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"latest_checkpoint_result": None},
        {"checkpoint_results": [{"checkpoint_dir_name": name, "metrics": {}, "version": 1} for name in NAMES]},
    ],
)
def test_a_record_of_another_ray_that_says_too_little_is_one_line_that_names_both(
    change: dict[str, Any], run: Checkpoints, tmp_path: Path
) -> None:
    old = json.dumps(of_ray_2_55(record_of(NAMES)) | change)
    (tmp_path / CHECKPOINTS / CHECKPOINT_RECORD).write_text(old)
    with pytest.raises(InputError) as caught:
        check_checkpoints(open_store(tmp_path), done=2)
    place = f"{tmp_path}/{CHECKPOINTS}/{CHECKPOINT_RECORD}"
    assert str(caught.value) == (
        f"{place}: of Ray 2.55.1, which Ray {ray.__version__} does not read; go on with Ray 2.55.1, or train into "
        f"another --out (with --init-from {tmp_path} from its best captioner on)"
    )


@pytest.mark.parametrize(("gone", "done"), [(NAMES, 0), ((), 0), (NAMES[1:], 1)])
def test_a_run_killed_before_its_first_checkpoint_was_recorded_begins_again(
    run: Checkpoints, tmp_path: Path, gone: tuple[str, ...], done: int
) -> None:
    for name in gone:
        shutil.rmtree(tmp_path / CHECKPOINTS / name)
    check_checkpoints(open_store(tmp_path), done=done)


def test_what_a_killed_run_has_left_of_checkpoints_is_deleted_before_it_goes_on(
    run: Checkpoints, tmp_path: Path
) -> None:
    """Ray Train strikes one from its record before it deletes it, and adds one after it was put."""
    out = open_store(tmp_path)
    kept = set(out.list())
    for name in ("epoch-000-step-000000003", "epoch-001-again", "notes"):
        out.write_bytes(f"{CHECKPOINTS}/{name}/model.safetensors", b"of a part")
    delete_unrecorded(out)
    assert len(out.list()) == len(kept) + 3, "without a record Ray Train begins again"
    out.write_bytes(f"{CHECKPOINTS}/{CHECKPOINT_RECORD}", RECORD)
    delete_unrecorded(out)
    own = {f"{CHECKPOINTS}/{CHECKPOINT_RECORD}", f"{CHECKPOINTS}/notes/model.safetensors"}
    assert set(out.list()) == kept | own


def test_the_sizes_of_the_group_are_kept_with_the_steps_they_begin_at() -> None:
    at = TrainingState()
    for step, workers in ((0, 2), (0, 4), (70, 4), (90, 2), (90, 8), (120, 4)):
        at.step = step
        at.begin_group(workers)
    assert at.group_sizes == [
        {"from_step": 1, "workers": 4}, {"from_step": 91, "workers": 8}, {"from_step": 121, "workers": 4},
    ]  # fmt: skip
