"""What a store does to its clients, done on purpose to a real one: nothing is lost; what cannot pass is one line."""

import contextlib
import errno
import json
import os
import subprocess
import time
import types
from collections.abc import Callable
from pathlib import Path

import botocore.exceptions
import pytest
import s3fs

from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY, shard_key
from cluster.dataset.verify import verify
from cluster.generation.pipeline import write_manifest
from cluster.store.retries import classify, with_retries
from cluster.store.store import Store, open_store
from pcm.errors import StoreFailure
from pcm.line_timer import LineTimer
from pcm.records import NULL_FEATURES
from tests.helpers.faulty_proxy import FaultyProxy
from tests.helpers.seaweedfs import S3Server
from tests.helpers.small_disk import small_disk
from tests.helpers.stored import proven
from tests.helpers.tiny_generation import CAPTIONS, make_dataset, make_dataset_in_process, null_spec, write_corpus

DATA = bytes(range(256)) * 1024  # 256 KiB: several segments, so that half of it can be cut off
OPERATIONS: dict[str, tuple[str, Callable[[Store], object]]] = {
    "put": ("PUT", lambda store: store.write_bytes("part", DATA)),
    "get": ("GET", lambda store: store.read_bytes("part") == DATA),
    "list": ("GET", lambda store: store.list("pa") == ["part"]),
    "head": ("HEAD", lambda store: store.exists("part") and store.size("part") == len(DATA)),
}
FAULTS = [
    ("status", "put get list head"), ("hang", "put get list head"), ("reset", "put get list head"),
    ("cut", "get list"), ("reset_upload", "put"), ("lose_answer", "put get list head"), ("corrupt_upload", "put"),
]  # fmt: skip


@pytest.fixture
def store(s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    """A prefix of its own behind the proxy, with one object; a second of silence is a timeout."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("PCM_STORE_TIMEOUT_SECONDS", "0.5")
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "30")
    proxy.heal()
    store = open_store(f"{s3.uri}/faults/{abs(hash(request.node.name))}")
    store.write_bytes("part", DATA)
    proxy.requests.clear()
    return store


@pytest.mark.parametrize(
    ("kind", "operation"), [(kind, operation) for kind, operations in FAULTS for operation in operations.split()]
)
def test_a_fault_that_passes_is_tried_again(
    kind: str, operation: str, store: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, run = OPERATIONS[operation]
    with monkeypatch.context() as patch, pytest.raises(StoreFailure, match="did not answer properly") as silent:
        patch.setenv("PCM_STORE_RETRY_SECONDS", "0")  # without patience, the fault is an error
        proxy.fail(kind, method=method)
        run(store)
    assert silent.value.passes
    proxy.heal()
    fault = proxy.fail(kind, method=method, count=3)  # aiohttp itself repeats a request once when it is reset
    assert run(store) in (None, True)
    assert fault.struck == 3
    assert store.read_bytes("part") == DATA and store.list() == ["part"]


@pytest.mark.parametrize(
    ("status", "code"),
    [(500, "InternalError"), (503, "ServiceUnavailable"), (400, "RequestTimeout"), (429, "TooManyRequests")],
)
def test_answers_that_ask_for_patience(status: int, code: str, store: Store, proxy: FaultyProxy) -> None:
    fault = proxy.fail("status", status=status, code=code, count=2)
    store.write_bytes("part", DATA)
    assert fault.struck == 2


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (403, "AccessDenied", "access refused (AccessDenied 403); check the credentials"),
        (400, "ExpiredToken", "access refused (ExpiredToken 400); check the credentials"),
        (404, "NoSuchBucket", "no such bucket; create it"),
        (507, "XMinioStorageFull", "(XMinioStorageFull 507): free space and run"),
        (403, "QuotaExceeded", "(QuotaExceeded 403): free space and run"),
    ],
)
def test_what_only_the_user_can_mend_is_one_line_at_once(
    status: int, code: str, line: str, store: Store, proxy: FaultyProxy
) -> None:
    proxy.fail("status", status=status, code=code)
    for operation in ("put", "get", "list"):
        proxy.requests.clear()
        with pytest.raises(StoreFailure) as caught:
            OPERATIONS[operation][1](store)
        assert line in str(caught.value) and store.root in str(caught.value) and "\n" not in str(caught.value)
        assert len(proxy.requests) == 1, "not tried again"


def test_what_was_created_though_its_answer_was_lost_is_ours(store: Store, proxy: FaultyProxy) -> None:
    fault = proxy.fail("lose_answer", method="PUT", count=3)
    assert store.create_bytes("new", DATA)
    assert fault.struck == 3 and store.read_bytes("new") == DATA


def test_a_store_without_conditional_puts_is_asked_before(store: Store, proxy: FaultyProxy) -> None:
    proxy.fail("status", method="PUT", status=501, code="NotImplemented", count=1)
    assert store.create_bytes("new", DATA) and store.read_bytes("new") == DATA
    proxy.requests.clear()
    assert not store.create_bytes("new", b"other") and store.read_bytes("new") == DATA
    assert [method for method, _ in proxy.requests if method == "PUT"] == []


def test_a_missing_key_is_not_waited_for(store: Store, proxy: FaultyProxy) -> None:
    with pytest.raises(FileNotFoundError):
        store.read_bytes("nothing")
    assert len(proxy.requests) == 1


def test_a_bucket_that_does_not_exist_is_named(store: Store) -> None:
    for operation in ("get", "list", "head"):
        with pytest.raises(StoreFailure, match=r"s3://pcm-no-such-bucket/x.*no such bucket"):
            OPERATIONS[operation][1](open_store("s3://pcm-no-such-bucket/x"))


def test_wrong_credentials_are_one_line_without_them(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_SECRET_ACCESS_KEY": "wrong-secret", "AWS_ACCESS_KEY_ID": "WRONGKEY"}.items():
        monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(StoreFailure, match="access refused") as caught:
            open_store(store.root).write_bytes("part", DATA)
        assert value not in str(caught.value) and "\n" not in str(caught.value)


def test_no_credentials_at_all_are_one_line(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreFailure, match=r"access refused \(NoCredentialsError\)"):
        open_store(store.root).read_bytes("part")


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"AWS_ENDPOINT_URL": "minio:9000"}, "the endpoint is no URL; give AWS_ENDPOINT_URL as https://HOST or http"),
        ({"AWS_CONFIG_FILE": "config"}, r"access refused \(ConfigParseError\); check the credentials"),
        ({"AWS_PROFILE": "nobody"}, r"access refused \(ProfileNotFound\); check the credentials"),
        ({"AWS_ACCESS_KEY_ID": None}, r"access refused \(NoCredentialsError\).*public bucket set FSSPEC_S3_ANON=true"),
    ],
)
def test_what_is_wrong_in_the_environment_is_one_line(
    environment: dict[str, str | None], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[profile me\nfoo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    for name, value in environment.items():
        if value is None:
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        else:
            monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreFailure, match=line) as caught:
        open_store("s3://bucket/x").exists("key")
    assert "\n" not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    "name", ["TokenRetrievalError", "LoginRefreshRequired", "SSOTokenLoadError", "NoAuthTokenError"]
)
def test_a_sign_in_that_is_over_is_refused_at_once(name: str) -> None:
    error = getattr(botocore.exceptions, name)(provider="sso", error_msg="over", msg="over")
    assert classify(error).kind == "refused"


def test_an_object_in_an_archive_is_to_be_restored() -> None:
    error = botocore.exceptions.ClientError(
        {"Error": {"Code": "InvalidObjectState"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "GetObject"
    )

    def operation() -> None:
        raise error

    with pytest.raises(StoreFailure, match=r"s3://b/k: is in an archive of the store .*; restore it there"):
        with_retries(operation, place="s3://b/k")


def test_a_store_that_restarts_is_waited_for(
    store: Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    started = time.monotonic()
    with proxy.refusing():
        read: list[bytes] = []
        import threading

        reader = threading.Thread(target=lambda: read.append(store.read_bytes("part")))
        reader.start()
        time.sleep(1)
        assert not read
    reader.join(timeout=30)
    assert read == [DATA] and time.monotonic() - started > 1


def test_patience_says_what_it_waits_for_once(
    store: Store, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.store.retries._lines", LineTimer(30.0, at_once=True))
    proxy.fail("status", count=3)
    store.write_bytes("part", DATA)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "cluster.store.retries"]
    assert line == f"{store.root}/part: SlowDown 503; trying again for up to 30 s"


def test_a_large_object_is_one_put_and_leaves_no_part_when_it_fails(
    store: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCM_STORE_TIMEOUT_SECONDS", "60")
    s3fs.S3FileSystem.clear_instance_cache()
    store = open_store(store.root)
    data = os.urandom(1 << 20) * 105  # over the size at which s3fs would send parts
    fault = proxy.fail("reset_upload", method="PUT", count=1)
    store.write_bytes("large", data)
    assert fault.struck == 1 and [method for method, _ in proxy.requests] == ["PUT", "PUT"]
    assert store.read_bytes("large") == data
    fault = proxy.fail("reset_upload", method="PUT")
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    with pytest.raises(StoreFailure):
        store.write_bytes("other", data)
    assert store.list() == ["large", "part"]
    bucket = store.prefix.partition("/")[0]
    assert not store.fs.list_multipart_uploads(bucket)
    store.delete("large")


def test_a_read_is_one_request_and_a_list_one_a_thousand_keys(store: Store, proxy: FaultyProxy) -> None:
    for prefix, requests in (("pa", 1), ("part-000", 1)):
        proxy.requests.clear()
        store.list(prefix)
        assert len(proxy.requests) == requests, proxy.requests
    proxy.requests.clear()
    store.read_bytes("part")
    assert [method for method, _ in proxy.requests] == ["GET"]


@pytest.mark.parametrize(
    "number",
    [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EMFILE, errno.ENOTCONN, errno.EREMOTEIO],
)
def test_a_network_disk_that_stutters_is_tried_again(number: int) -> None:
    failures = [OSError(number, os.strerror(number))] * 2

    def operation() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert with_retries(operation, place="/mnt/nfs/x") == "done"


def test_a_store_may_be_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "inf")
    monkeypatch.setattr("cluster.store.retries._lines", LineTimer(30.0, at_once=True))
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def operation() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert with_retries(operation, place="/mnt/nfs/x") == "done"
    assert caplog.messages == ["/mnt/nfs/x: EIO; trying again for up to an unlimited time"]


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EKEYEXPIRED, errno.EINVAL, errno.ENODEV, None])
def test_any_other_error_of_a_disk_is_one_line_and_no_missing_object(number: int | None) -> None:
    error = OSError("Failure") if number is None else OSError(number, os.strerror(number))

    def operation() -> None:
        raise error

    what = "OSError" if number is None else errno.errorcode[number]
    with pytest.raises(StoreFailure, match=rf"/mnt/nfs/x: the store or disk failed \({what}\)"):
        with_retries(operation, place="/mnt/nfs/x")


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG])
def test_what_is_said_of_a_name_passes_unchanged(number: int) -> None:
    error = OSError(number, os.strerror(number))

    def operation() -> None:
        raise error

    with pytest.raises(OSError) as caught:
        with_retries(operation, place="/mnt/nfs/x")
    assert caught.value is error


def test_errors_of_google_storage_are_told_apart_by_status() -> None:
    class HttpError(Exception):  # as gcsfs.retry has it
        def __init__(self, code: int) -> None:
            self.code = code

    kinds = {code: classify(HttpError(code)).kind for code in (400, 403, 404, 408, 429, 500, 503)}
    assert kinds == {
        400: "refused", 403: "refused", 404: "other", 408: "transient", 429: "transient", 500: "transient",
        503: "transient",
    }  # fmt: skip


def test_errors_of_azure_are_told_apart_by_status_and_code() -> None:
    class HttpResponseError(Exception):  # as azure.core has it
        def __init__(self, status: int, error_code: str) -> None:
            self.response, self.error_code = types.SimpleNamespace(status_code=status), error_code

    cases = {
        (404, "ContainerNotFound"): "no bucket",
        (404, "BlobNotFound"): "other",
        (403, "AuthenticationFailed"): "refused",
        (503, "ServerBusy"): "transient",
        (500, "InternalError"): "transient",
    }
    assert {case: classify(HttpResponseError(*case)).kind for case in cases} == cases


def test_a_full_disk_is_one_line_and_nothing_is_half_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as free:
        store = open_store(tmp_path / "disk" / "data")
        store.write_bytes("small", b"1")
        with pytest.raises(StoreFailure, match=r"disk full at .*data/large .*free space and run") as caught:
            store.write_bytes("large", bytes(1 << 20))
        assert "\n" not in str(caught.value)
        assert [path.name for path in Path(store.prefix).iterdir()] == ["small"]
        free()
        store.write_bytes("large", bytes(1 << 20))
        assert store.size("large") == 1 << 20


def test_a_disk_that_is_full_or_read_only_at_the_manifest_costs_no_shard(tmp_path: Path) -> None:
    """The last object of a run: what was drawn stays, and the same command puts the manifest beside it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a disk")
    try:
        corpus = write_corpus(tmp_path)
        store, plan, _ = make_dataset_in_process(disk / "data", corpus, null_spec(), finish=False)
        shards = {key: store.read_bytes(key) for key in store.list("shards")}

        def refused(message: str) -> None:
            with pytest.raises(StoreFailure, match=message) as caught:
                write_manifest(store, plan, NULL_FEATURES)
            assert "\n" not in str(caught.value)
            assert not store.exists(MANIFEST_KEY) and not list(disk.rglob("*.tmp"))

        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
        refused(r"disk full at .*/disk/data/.* \(ENOSPC\): free space and run .* \(training and sweeps with --resume\)")
        (disk / "ballast").unlink()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(r"/disk/data/.*: access refused \(EROFS\); check its owner .* not mounted read-only")
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)

        make_dataset_in_process(disk / "data", corpus, null_spec())
        assert {key: store.read_bytes(key) for key in store.list("shards")} == shards
        proven(store)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the corpus below, made without faults."""
    folder = tmp_path_factory.mktemp("undisturbed")
    store, *_ = make_dataset_in_process(folder / "data", write_corpus(folder, RUN), null_spec(), shard_size=16)
    return proven(store)["fingerprint"]


RUN = [f"{caption} {number}" for number in range(5) for caption in CAPTIONS]  # 120


def test_a_run_on_a_full_disk_stops_with_the_line_and_resumes(
    tmp_path: Path, undisturbed: str, ray_session: None
) -> None:
    corpus = write_corpus(tmp_path, RUN)
    with small_disk(tmp_path / "disk") as free:
        with pytest.raises(StoreFailure, match="disk full at"):
            make_dataset(tmp_path / "disk" / "data", corpus, null_spec(), shard_size=4)
        free()
        made = make_dataset(tmp_path / "disk" / "data", corpus, null_spec(), shard_size=4)
        assert proven(made.store)["fingerprint"] == undisturbed
        assert not list((tmp_path / "disk").rglob("*.tmp"))


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_dataset_resumes_grows_and_is_proven_alike_everywhere(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where = str(tmp_path / "data") if place == "local" else f"{request.getfixturevalue('s3').uri}/alike"
    half, whole = write_corpus(tmp_path, RUN[:50]), tmp_path / "whole"
    make_dataset_in_process(where, half, null_spec(), shard_size=16, finish=False)
    store = open_store(where)
    for shard in (1, 3):
        store.delete(shard_key(shard))
    make_dataset_in_process(where, half, null_spec(), shard_size=16)
    proven(store)
    whole.mkdir()
    make_dataset_in_process(where, write_corpus(whole, RUN[:70]), null_spec(), shard_size=16)
    other, *_ = make_dataset_in_process(tmp_path / "other", whole / "captions.txt", null_spec(), shard_size=9)
    assert proven(store)["fingerprint"] == proven(other)["fingerprint"] and load_manifest(store).stored == 70


@pytest.mark.slow
def test_a_run_through_a_failing_network_ends_as_if_nothing_had_been(
    s3_server: S3Server, proxy: FaultyProxy, tmp_path: Path, undisturbed: str, run_job
) -> None:
    proxy.heal()
    proxy.requests.clear()
    faults = [
        proxy.fail("status", method="PUT", path="/shards/", count=4),
        proxy.fail("status", status=500, code="InternalError", path="/stats/", count=2),
        proxy.fail("hang", path="/plan/", count=2),
        proxy.fail("cut", method="GET", path="/plan/", count=2),
        proxy.fail("lose_answer", method="PUT", path="/shards/part-00002", count=4),
        proxy.fail("reset", path="/shards/part-00000", count=4),
        proxy.fail("slow", delay=0.2, path="/stats/", count=5),
    ]
    started = time.time()
    environment = s3_server.environment | {"AWS_ENDPOINT_URL": proxy.url, "PCM_STORE_TIMEOUT_SECONDS": "1"}
    out = f"{s3_server.uri}/failing"
    run = run_job(
        "generate", "--corpus", write_corpus(tmp_path, RUN), "--out", out, "--t2i", "null", "--shard-size", 4,
        env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.summary["stored"] == len(RUN)
    assert [fault.kind for fault in faults if fault.struck == 0] == []
    assert "trying again for up to 5 min 00 s" in run.stderr
    proxy.heal()
    checked = run_job("verify", out, env=environment)
    assert checked.returncode == 0, checked.stderr
    assert checked.summary["fingerprint"] == undisturbed

    # What was printed, what Ray's processes wrote to their logs, and what lies on the store.
    logs = [path for path in Path("/tmp/ray").glob("session_*/logs/**/*") if path.is_file()]
    fresh = [path.read_bytes() for path in logs if path.stat().st_mtime >= started]
    assert len(fresh) > 5
    objects = [path.read_bytes() for path in s3_server.data.rglob("*") if path.is_file()]
    secret = s3_server.environment["AWS_SECRET_ACCESS_KEY"]
    for text in (run.stderr.encode(), json.dumps(run.summary).encode(), *fresh, *objects):
        assert secret.encode() not in text


def test_an_object_cut_short_on_the_store_is_found(s3: S3Server, tmp_path: Path) -> None:
    store, *_ = make_dataset_in_process(f"{s3.uri}/short", write_corpus(tmp_path, RUN[:40]), null_spec(), shard_size=16)
    store.write_bytes(shard_key(1), store.read_bytes(shard_key(1))[:-100])
    report = verify(store)
    assert not report["ok"] and report["corrupt"] > 0 and any(shard_key(1) in problem for problem in report["problems"])
