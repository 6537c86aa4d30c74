"""Ray's own records in our store: whole or not there, patient, one line where it fails, and nobody else's deleted."""

import gc
import pickle
import socket
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs
import pytest
import s3fs

from cluster.store.store import Store, open_store
from cluster.training.ray_storage import ray_storage
from pcm.errors import StoreFailure
from tests.helpers.small_disk import small_disk

RECORD = "checkpoints/record.json"


def files_of(store: Store) -> pyarrow.fs.FileSystem:
    return ray_storage(store)["storage_filesystem"]


def put(store: Store, data: bytes) -> None:
    with files_of(store).open_output_stream(f"{store.prefix}/{RECORD}") as file:
        file.write(data)


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "run" if request.param == "local" else f"memory://bucket/{tmp_path.name}/run")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Store:
    """A prefix of a store that answers nothing, for whoever has no patience."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    s3fs.S3FileSystem.clear_instance_cache()
    return open_store("s3://bucket/team/run")


def test_a_record_is_found_read_replaced_and_deleted(store: Store) -> None:
    files, place = files_of(store), f"{store.prefix}/{RECORD}"
    assert files.get_file_info(place).type == pyarrow.fs.FileType.NotFound
    for data in (b"", b"one", b"another"):
        put(store, data)
        with files.open_input_stream(place) as file:
            assert file.read() == data == store.read_bytes(RECORD)
    assert files.get_file_info(place).is_file and not files.get_file_info(f"{store.prefix}/checkpoints").is_file
    files.delete_file(place)
    assert store.list() == []


def test_a_record_of_which_nothing_was_written_stays_as_it_was(store: Store) -> None:
    files, place = files_of(store), f"{store.prefix}/{RECORD}"
    with files.open_output_stream(place):
        pass  # Ray's marker of a place that can be written
    assert store.read_bytes(RECORD) == b""
    put(store, b"whole")
    with pytest.raises(SystemExit), files.open_output_stream(place):
        raise SystemExit
    assert store.read_bytes(RECORD) == b"whole"


def test_a_record_that_is_dropped_half_written_is_not_put(store: Store) -> None:
    put(store, b"whole")
    half = ray_storage(store)["storage_filesystem"].handler.open_output_stream(f"{store.prefix}/{RECORD}", None)
    half.write(b"wh")
    del half
    gc.collect()
    assert store.read_bytes(RECORD) == b"whole"


def test_it_travels_to_a_worker_and_is_the_same_there(store: Store) -> None:
    files = files_of(store)
    assert pickle.loads(pickle.dumps(files)) == files


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?"])
def test_checkpoints_of_no_other_run_are_deleted(name: str, store: Store) -> None:
    runs = open_store(store.root.removesuffix("/run"))
    for run in ("run1", name):
        for checkpoint in ("epoch-001", "epoch-0012"):
            runs.write_bytes(f"{run}/checkpoints/{checkpoint}/state.json", b"{}")
    mine = open_store(f"{runs.root}/{name}")
    files_of(mine).delete_dir(f"{mine.prefix}/checkpoints/epoch-001")
    assert runs.list() == sorted(
        [f"{name}/checkpoints/epoch-0012/state.json"]
        + [f"run1/checkpoints/{checkpoint}/state.json" for checkpoint in ("epoch-001", "epoch-0012")]
    )


def test_no_bucket_is_asked_for_or_made(nowhere: Store) -> None:
    files_of(nowhere).create_dir(f"{nowhere.prefix}/checkpoints")


def test_a_store_that_does_not_answer_is_one_line(nowhere: Store) -> None:
    files, place = files_of(nowhere), f"{nowhere.prefix}/{RECORD}"
    asks: tuple[Callable[[], object], ...] = (
        lambda: put(nowhere, b"x"),
        lambda: files.get_file_info(place),
        lambda: files.open_input_stream(place),
        lambda: files.delete_dir(place),
    )
    for ask in asks:
        with pytest.raises(StoreFailure, match=r"s3://bucket/team/run/checkpoints/record.json.*: the store did not"):
            ask()


def test_a_record_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as free:
        store = open_store(tmp_path / "disk" / "run")
        put(store, b"old")
        with pytest.raises(StoreFailure, match=rf"disk full at .*{RECORD}"):
            put(store, bytes(1 << 20))
        assert store.read_bytes(RECORD) == b"old"
        free()
        put(store, b"new")
        assert store.read_bytes(RECORD) == b"new"
