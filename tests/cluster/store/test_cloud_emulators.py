"""A dataset on emulators of Google Cloud Storage and Azure Blob Storage, by the clients that the real ones have.

Skipped where they are not installed. With the extras `gcs` and `azure`: `pip install gcp-storage-emulator`, and
`npm install --global azurite`, whose `azurite-blob` must be on the PATH.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from cluster.dataset.verify import verify
from cluster.store.store import open_store
from pcm.errors import StoreFailure
from tests.helpers.job_runs import running
from tests.helpers.ports import free_ports
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

pytestmark = pytest.mark.slow

BUCKET = "pcm-tests"
ACCOUNT = "devstoreaccount1"
#: Azurite's own, in its documentation: it opens nothing else.
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def needed(package: str, program: str) -> str:
    """The path of an emulator. Skips the test where it, or the client's package, is not installed."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    return found


@contextlib.contextmanager
def serving(command: list[str], folder: Path) -> Iterator[subprocess.Popen]:
    """A server with its log in the folder."""
    with (folder / "log").open("wb") as log, running(command, stdout=log, stderr=log, cwd=folder) as process:
        yield process


def once_it_answers(process: subprocess.Popen, ask) -> None:  # any call that raises until then
    deadline = time.monotonic() + 120
    while True:
        try:
            ask()
            return
        except Exception:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)


def google(folder: Path, monkeypatch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> str:
    program, (port,) = needed("gcsfs", "gcp-storage-emulator"), free_ports(1)
    process = stack.enter_context(
        serving([program, "start", "--host=127.0.0.1", f"--port={port}", "--in-memory"], folder)
    )
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it would ask Google what kind of bucket this is
    bucket = urllib.request.Request(
        f"http://127.0.0.1:{port}/storage/v1/b?project=tests",
        data=json.dumps({"name": BUCKET}).encode(), headers={"Content-Type": "application/json"},
    )  # fmt: skip
    once_it_answers(process, lambda: urllib.request.urlopen(bucket).read())
    return "gs"


def azure(folder: Path, monkeypatch: pytest.MonkeyPatch, stack: contextlib.ExitStack) -> str:
    program, (port,) = needed("adlfs", "azurite-blob"), free_ports(1)
    options = [f"--blobPort={port}", "--blobHost=127.0.0.1", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = stack.enter_context(serving([program, *options, f"--location={folder}"], folder))
    connection = (
        f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={ACCOUNT_KEY};"
        f"BlobEndpoint=http://127.0.0.1:{port}/{ACCOUNT};"
    )
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection)
    from azure.storage.blob import BlobServiceClient

    once_it_answers(process, lambda: BlobServiceClient.from_connection_string(connection).create_container(BUCKET))
    return "abfs"


@pytest.fixture(params=[google, azure])
def protocol(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a store that runs, with the bucket BUCKET."""
    with contextlib.ExitStack() as stack:
        folder = tmp_path / "emulator"
        folder.mkdir()
        monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "5")
        protocol = request.param(folder, monkeypatch, stack)
        yield protocol
        fsspec.get_filesystem_class(protocol).clear_instance_cache()


def test_a_dataset_is_made_gone_on_with_and_proven(protocol: str, tmp_path: Path, run_job) -> None:
    corpus = write_corpus(tmp_path)
    make_dataset_in_process(tmp_path / "local", corpus, null_spec())
    wanted = verify(open_store(tmp_path / "local"))["fingerprint"]
    uri = f"{protocol}://{BUCKET}/a folder/data"
    store, *_ = make_dataset_in_process(uri, corpus, null_spec(), finish=False)
    store.delete(store.list("shards")[1])
    make_dataset_in_process(uri, corpus, null_spec())  # which draws one shard, and puts the manifest
    found = run_job("verify", uri, env=dict(os.environ))
    assert found.returncode == 0 and found.summary is not None, found.stderr
    assert found.summary["ok"] and found.summary["fingerprint"] == wanted


def test_objects_are_as_on_every_store(protocol: str) -> None:
    store = open_store(f"{protocol}://{BUCKET}/objects")
    large = os.urandom(12 << 20)  # more than one request of these clients
    for key, data in (("a/b", b"1"), ("a/b", b"22"), ("a/c", large)):
        store.write_bytes(key, data)
    assert store.list("a/") == ["a/b", "a/c"] and store.read_bytes("a/b") == b"22"
    assert store.create_bytes("a/d", b"first") and not store.create_bytes("a/d", b"second")
    if protocol == "abfs":  # the emulator of gs:// takes no notice of the condition
        assert not store._put_new("a/d", b"third", {})
    assert store.read_bytes("a/d") == b"first"
    store.delete("a/d")
    with store.open("a/c", buffered=False) as file:
        file.seek(5 << 20)
        assert file.read(100) == large[5 << 20 :][:100]
    store.delete("a/b")
    assert not store.exists("a/b") and store.list("none/") == []
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a/b")


def test_a_bucket_that_is_not_there_is_one_line(protocol: str) -> None:
    with pytest.raises(StoreFailure, match="no such bucket; create it") as caught:
        open_store(f"{protocol}://pcm-no-such-bucket/x").write_bytes("key", b"1")
    assert "\n" not in str(caught.value)
