"""One storage layer, one behaviour: every rule holds on a local disk and on a real S3 store."""

import errno
import http.server
import importlib.util
import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster.sources.corpus import read_corpus
from cluster.store.paths import inside
from cluster.store.store import Store, join, local_copy, open_store, read_uri
from pcm.errors import InputError, StoreFailure


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A path or URI below which nothing exists yet."""
    if request.param == "local":
        return str(tmp_path / "data sets" / "one")
    return f"{request.getfixturevalue('s3').uri}/data sets/{uuid.uuid4().hex}"


@pytest.fixture
def store(place: str) -> Store:
    return open_store(place)


def write_elsewhere(place: str, key: str, data: bytes) -> None:
    """Write one object as another machine would: by a process of its own."""
    code = (
        "import sys; from cluster.store.store import open_store; "
        "open_store(sys.argv[1]).write_bytes(sys.argv[2], b'%s')"
    )
    subprocess.run([sys.executable, "-c", code % data.decode(), place, key], check=True, timeout=60)


def test_what_is_written_is_read(store: Store) -> None:
    for data in (b"", b"x", bytes(range(256)) * 40_000):  # 10 MB: several parts on S3
        store.write_bytes("shards/part-000000.parquet", data)
        assert store.read_bytes("shards/part-000000.parquet") == data
        assert store.size("shards/part-000000.parquet") == len(data)


def test_a_write_replaces_what_was_there(store: Store) -> None:
    store.write_bytes("a", b"a long first version")
    store.write_bytes("a", b"second")
    assert store.read_bytes("a") == b"second" and store.list() == ["a"]


def test_what_is_created_leaves_what_is_there(store: Store) -> None:
    assert store.create_bytes("folder/a", b"first")
    assert store.create_bytes("folder/a", b"first"), "these bytes are there"
    assert not store.create_bytes("folder/a", b"second") and not store.create_bytes("folder/a", b"")
    assert store.read_bytes("folder/a") == b"first" and store.list() == ["folder/a"]


def test_of_several_that_create_an_object_one_succeeds(store: Store) -> None:
    """None of them has seen that of another."""
    barrier = threading.Barrier(8)

    def create(number: int) -> bool:
        barrier.wait()
        return store.create_bytes("a", b"%d" % number)

    for _ in range(2):
        with ThreadPoolExecutor(8) as pool:
            created = list(pool.map(create, range(8)))
        assert created.count(True) == 1 and store.read_bytes("a") == b"%d" % created.index(True)
        store.delete("a")


def test_where_there_are_no_hard_links_an_object_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)  # as on exFAT
    store = open_store(tmp_path)
    assert store.create_bytes("a", b"first") and not store.create_bytes("a", b"second")
    assert store.read_bytes("a") == b"first" and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_not_there_raises_file_not_found(store: Store) -> None:
    for key in ("a", "deep/er/a"):
        assert not store.exists(key)
        with pytest.raises(FileNotFoundError):
            store.read_bytes(key)
        with pytest.raises(FileNotFoundError):
            store.size(key)
    assert store.list() == [] and store.list("shards") == []


def test_below_a_file_nothing_is_there(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    store = open_store(tmp_path / "dataset.json")
    for read in (store.read_bytes, store.size, store.open):
        with pytest.raises(FileNotFoundError):
            read("plan.json")
    assert not store.exists("plan.json") and not store.is_file("plan.json")
    assert store.list("shards/") == []


def test_a_list_is_sorted_and_holds_the_prefix_alone(store: Store) -> None:
    keys = sorted(["shards/part-1", "shards/part-0", "shards/deep/x", "shards-old/part-0", "top"])
    for key in keys:
        store.write_bytes(key, b"1")
    assert store.list() == keys
    for prefix in (
        "shards/",
        "shards",
        "shards/part-",
        "shards/part-1",
        "shards/deep",
        "shards/deep/",
        "to",
        "x",
        "top/",
    ):
        assert store.list(prefix) == [key for key in keys if key.startswith(prefix)], prefix
    assert open_store(join(store.root, "shards")).list() == ["deep/x", "part-0", "part-1"]


def test_objects_of_another_machine_are_seen_at_once(store: Store, place: str) -> None:
    store.write_bytes("shards/part-0", b"1")
    assert store.list("shards") == ["shards/part-0"] and not store.exists("shards/part-1")
    write_elsewhere(place, "shards/part-1", b"22")
    assert store.exists("shards/part-1") and store.size("shards/part-1") == 2
    assert store.list("shards") == ["shards/part-0", "shards/part-1"]
    write_elsewhere(place, "shards/part-0", b"333")
    assert store.size("shards/part-0") == 3 and store.read_bytes("shards/part-0") == b"333"


def test_a_deleted_object_is_gone(store: Store) -> None:
    store.write_bytes("a", b"1")
    store.delete("a")
    store.delete("a")  # another job may have been faster
    assert not store.exists("a") and store.list() == []


def test_a_failed_write_leaves_the_old_object_and_nothing_else(store: Store) -> None:
    store.write_bytes("a", b"old")
    with pytest.raises((TypeError, AttributeError)):
        store.write_bytes("a", object())  # type: ignore[arg-type]
    assert store.read_bytes("a") == b"old" and store.list() == ["a"]


def test_an_interrupted_local_write_is_no_object(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    (tmp_path / "part-0.0123.tmp").write_bytes(b"half")
    assert store.list() == []


def test_a_store_travels_to_a_worker(store: Store) -> None:
    store.write_bytes("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("a") == b"1"


@pytest.mark.parametrize("name", ["a long sentence " * 30, "loop", "loop/x", "file/x"])
def test_a_name_that_no_file_can_have_is_not_there(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    store = open_store(tmp_path / name)
    assert not store.exists("") and not store.is_file() and store.list() == []
    for read in (read_uri, lambda uri: local_copy(uri).__enter__(), lambda uri: list(read_corpus(str(uri)))):
        with pytest.raises(InputError):
            read(tmp_path / name)


def test_one_file_is_read_by_its_uri(store: Store, place: str) -> None:
    store.write_bytes("captions.txt", b"a cat")
    assert read_uri(join(place, "captions.txt")) == b"a cat"
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        read_uri(join(place, "none.txt"))


def test_a_folder_or_file_of_the_store_has_a_local_copy_for_a_while(
    store: Store, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store.write_bytes("model/config.json", b"{}")
    store.write_bytes("model/deep/weights", b"123")
    with local_copy(join(place, "model")) as folder:
        assert (folder / "config.json").read_bytes() == b"{}" and (folder / "deep/weights").read_bytes() == b"123"
    assert folder.exists() == store.is_local
    with local_copy(join(place, "model/config.json")) as file:
        assert file.read_bytes() == b"{}"
    assert file.exists() == store.is_local
    with pytest.raises(InputError, match="no such file or folder"), local_copy(join(place, "none")):
        pass
    assert not list(tmp_path.glob("pcm-*"))


@pytest.mark.parametrize("key", ["../out.txt", "a/../../out.txt", "/etc/x", "a//b", "./a", "a\nb", "x" * 300, "a/."])
def test_a_key_that_leads_out_of_a_folder_is_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no path inside it"):
        inside(tmp_path, key)


def test_a_listing_with_keys_that_lead_elsewhere_writes_nothing_elsewhere(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pipe_file("/bucket/model/good", b"1")
    fs.store["/bucket/model/../../../escaped"] = fs.store["/bucket/model/good"]
    with pytest.raises(InputError, match="is no path inside it"), local_copy("memory://bucket/model"):
        pass
    assert not list(tmp_path.parent.rglob("escaped"))
    fs.store.clear()


def test_no_operation_takes_a_key_that_leads_out_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    store = open_store(tmp_path / "data")
    for use in (store.read_bytes, store.open, store.size, store.delete, lambda key: store.write_bytes(key, b"y")):
        with pytest.raises(InputError, match="is no path inside it"):
            use("../secret")
    assert (tmp_path / "secret").read_bytes() == b"x"


def test_a_file_uri_is_a_local_path(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/x/").write_bytes("a", b"1")
    assert (tmp_path / "x/a").read_bytes() == b"1"
    assert open_store(tmp_path / "x").read_bytes("a") == b"1"


def test_an_unknown_protocol_is_refused_in_one_line() -> None:
    with pytest.raises(InputError) as caught:
        open_store("nfs4://server/x")
    assert "nfs4" in str(caught.value) and "s3://" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://", "s3:///a/b", "s3://my bucket/x", "s3://my%20bucket/x"])
def test_what_is_no_bucket_is_refused_before_it_is_asked_for(uri: str) -> None:
    with pytest.raises(InputError, match=r"is no name of a bucket .*; give s3://BUCKET/NAME"):
        open_store(uri)


@pytest.mark.parametrize("given", ["abc", "0", "-1", "nan", "inf"])
def test_a_timeout_that_is_no_number_of_seconds_is_named(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCM_STORE_TIMEOUT_SECONDS", given)
    with pytest.raises(InputError, match=r"^PCM_STORE_TIMEOUT_SECONDS (abc|0|nan|inf): must be "):
        open_store("s3://bucket/x")


def test_a_store_that_cannot_be_connected_to_at_once_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*uri: object, **options: object) -> None:
        raise OSError("Unable to load libjvm\nand more")

    monkeypatch.setattr("fsspec.core.url_to_fs", connect)
    with pytest.raises(StoreFailure, match=r"^hdfs://host/x: cannot be opened \(Unable to load libjvm\); check"):
        open_store("hdfs://host/x")


def test_a_protocol_of_azure_names_the_package_that_it_needs() -> None:
    if importlib.util.find_spec("adlfs") is not None:
        pytest.skip("adlfs is installed")
    for protocol in ("abfss", "abfs", "az"):
        with pytest.raises(InputError, match=r"needs a package that is not installed .*\[azure\]"):
            open_store(f"{protocol}://container/x")


def test_below_one_object_of_azure_nothing_is_listed() -> None:
    class OneBlob:
        """Its `find` as adlfs has it, of a blob."""

        protocol = ("abfs", "az", "abfss")

        def find(self, path: str, detail: bool = False, **options: object) -> list[str]:
            return [path]

    fs: Any = OneBlob()
    assert Store(root="abfs://c/v.parquet", fs=fs, prefix="c/v.parquet", _single=fs).list() == []


def test_refused_credentials_are_never_shown(
    s3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "not-the-secret-of-this-store"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    caplog.set_level(logging.DEBUG, "cluster")
    with pytest.raises(Exception) as caught:
        open_store(f"{s3.uri}/x").write_bytes("a", b"1")
    assert secret not in f"{caught.value!r} {caught.value} {caplog.text}"


def test_a_travelling_store_is_an_address_without_secrets(s3, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"]
    monkeypatch.setitem(fsspec.config.conf, "s3", {"secret": secret, "key": s3.environment["AWS_ACCESS_KEY_ID"]})
    store = open_store(f"{s3.uri}/x")
    store.write_bytes("a", b"1")
    assert secret in pickle.dumps(store.fs).decode(errors="replace"), "what would travel otherwise"
    packed = pickle.dumps(store)
    assert len(packed) < 300 and secret.encode() not in packed
    assert pickle.loads(packed) == store


def test_a_relative_store_is_the_same_place_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(open_store("data"))
    monkeypatch.chdir("/")
    pickle.loads(packed).write_bytes("a", b"1")
    assert (tmp_path / "data/a").read_bytes() == b"1"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAKEY:very-secret@bucket/data", "sftp://user:very-secret@host/data",
        "https://host/captions.txt?X-Amz-Signature=very-secret", "https://host/captions.txt?a=b&sig=very-secret",
    ],
)  # fmt: skip
def test_a_uri_that_carries_a_secret_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(InputError, match="the URI carries a credential") as caught:
        open_store(uri)
    assert "very-secret" not in str(caught.value)


def test_credentials_come_from_a_profile(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, credentials = tmp_path / "config", tmp_path / "credentials"
    config.write_text(f"[profile mine]\nendpoint_url = {s3.environment['AWS_ENDPOINT_URL']}\nregion = us-east-1\n")
    credentials.write_text(
        f"[mine]\naws_access_key_id = {s3.environment['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {s3.environment['AWS_SECRET_ACCESS_KEY']}\n"
    )
    for name in s3.environment:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_PROFILE": "mine", "AWS_CONFIG_FILE": str(config), "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    store = open_store(f"{s3.uri}/profile")
    store.write_bytes("a", b"1")
    assert store.read_bytes("a") == b"1"


def test_credentials_come_from_an_instances_role(s3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    role = {
        "Code": "Success", "Type": "AWS-HMAC", "Token": "", "Expiration": "2099-01-01T00:00:00Z",
        "AccessKeyId": s3.environment["AWS_ACCESS_KEY_ID"],
        "SecretAccessKey": s3.environment["AWS_SECRET_ACCESS_KEY"],
    }  # fmt: skip
    answers = {
        "/latest/api/token": "token",
        "/latest/meta-data/iam/security-credentials/": "worker",
        "/latest/meta-data/iam/security-credentials/worker": json.dumps(role),
    }

    class InstanceMetadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers.get(self.path, "").encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), InstanceMetadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    try:
        store = open_store(f"{s3.uri}/role")
        store.write_bytes("a", b"1")
        assert store.read_bytes("a") == b"1"
    finally:
        server.shutdown()
        server.server_close()
