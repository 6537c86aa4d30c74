"""A store that refuses or does not answer says nothing of what lies there: no damage, no bad picture, no absence."""

import errno
import http.server
import json
import os
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import s3fs

from cluster.dataset.documents import load_plan
from cluster.dataset.given_features import find_features
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, shard_key
from cluster.dataset.upgrade import upgrade
from cluster.dataset.verify import verify
from cluster.evaluation.caption import _local
from cluster.generation.repair import _drop_damaged_manifest
from cluster.ingest.photos import PhotoShards
from cluster.sources.pictures import PictureSource, find_pictures, load_picture_set
from cluster.store import retries
from cluster.store import store as store_module
from cluster.store.retries import classify
from cluster.store.store import Store, open_store
from cluster.training.data.arriving import finished_manifest
from pcm.errors import StoreFailure
from pcm.line_timer import LineTimer
from tests.helpers.faulty_proxy import FaultyProxy
from tests.helpers.paths import DATA
from tests.helpers.seaweedfs import S3Server
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

PICTURE = DATA / "cases" / "images" / "upright.jpe"
FAULTS = [("AccessDenied", 403), ("SlowDown", 503), ("", 400)]


@pytest.fixture
def place(s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A prefix behind the proxy, for a reader without patience."""
    proxy.heal()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    return f"{s3.uri}/failures/{abs(hash(request.node.name))}"


@contextmanager
def stalled_server() -> Iterator[str]:
    """The address of a server that reads the head of each request, asks for its body, and reads no further."""

    class Stalled(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (read := self.request.recv(1)):
                    return
                head += read
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            over.wait()

    over = threading.Event()
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Stalled) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            over.set()
            server.shutdown()


class Answering(http.server.BaseHTTPRequestHandler):
    """A store of one object, and the metadata service of a machine with a role, as IMDSv2: the first of its answers
    comes after 1.5 s."""

    role, asked, signed = b"role", 0, 0

    def do_HEAD(self) -> None:
        type(self).signed += "Authorization" in self.headers
        self._answer(b"", 200)

    def do_PUT(self) -> None:
        type(self).asked += 1
        if self.asked == 1:
            time.sleep(1.5)
        self._answer(b"token", 200)

    def do_GET(self) -> None:
        if "x-aws-ec2-metadata-token" not in self.headers:
            self._answer(b"", 401)
        elif self.path.endswith("/security-credentials/"):
            self._answer(self.role, 200 if self.role else 404)
        else:
            keys = {"AccessKeyId": "k", "SecretAccessKey": "s", "Token": "t", "Expiration": "2999-01-01T00:00:00Z"}
            self._answer(json.dumps(keys).encode(), 200)

    def _answer(self, body: bytes, status: int) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
            self.end_headers()
            self.wfile.write(body)
        except OSError:  # nobody waits for it any more
            pass

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answering]]:
    """This process has no credentials but those of a role that its machine has."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)

    class Machine(Answering):
        pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Machine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        for name in ("AWS_EC2_METADATA_SERVICE_ENDPOINT", "AWS_ENDPOINT_URL"):
            monkeypatch.setenv(name, url)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        yield Machine
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()


def test_credentials_that_a_metadata_service_gives_too_late_are_asked_for_again(machine: type[Answering]) -> None:
    """A client of botocore waits for 1 s, once, and one that was made without credentials never looks again."""
    store = open_store("s3://bucket/x")
    assert store.exists("key") and machine.asked > 1 and machine.signed == 1
    assert store.exists("key") and machine.signed == 2, "that client serves the process from now on"


def test_credentials_that_no_metadata_service_has_are_one_line_soon(
    machine: type[Answering], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert retries.CREDENTIALS_SECONDS < 30
    monkeypatch.setattr(retries, "CREDENTIALS_SECONDS", 1.0)
    monkeypatch.setattr(retries, "_lines", LineTimer(30.0, at_once=True))
    machine.role, machine.asked = b"", 1
    line = r"^s3://bucket/x/key: access refused \(NoCredentialsError\); check the credentials .* the role"
    with pytest.raises(StoreFailure, match=line) as caught:
        open_store("s3://bucket/x").exists("key")
    assert not caught.value.passes, "they were waited for: a model that needs them is not loaded again and again"
    assert machine.asked > 2 and "for up to 1 s; for a public bucket set FSSPEC_S3_ANON=true" in caplog.text
    machine.asked = 1
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreFailure, match=line) as caught:
        open_store("s3://bucket/x").exists("key")
    assert not caught.value.passes and machine.asked == 1


def test_a_chain_of_azure_that_found_no_credentials_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # says nothing of Azure's

    class ClientAuthenticationError(Exception):  # as azure.core has it: of no answer of the store
        response = None

    failures = [ClientAuthenticationError("DefaultAzureCredential failed to retrieve a token\nManagedIdentity...")] * 2

    def operation() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert classify(failures[0]).kind == "no credentials"
    assert retries.with_retries(operation, place="abfs://c/x") == "done"


def failure_of(put: Callable[[], None]) -> str:
    """What a call that may never end raises within a minute."""
    said: list[str] = []

    def call() -> None:
        try:
            put()
        except StoreFailure as failure:
            said.append(str(failure))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(60)
    return "".join(said)


def test_an_upload_that_a_server_stops_reading_ends(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCM_STORE_TIMEOUT_SECONDS", "0.2")
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    monkeypatch.setattr(store_module, "SLOWEST_UPLOAD", 2**40)
    file = tmp_path / "weights"
    file.write_bytes(bytes(16 << 20))  # more than the buffers of a connection hold
    with stalled_server() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        store = open_store(f"{s3.uri}/stalled")
        for put in (lambda: store.put_file("k", file), lambda: store.write_bytes("k", file.read_bytes())):
            assert "the store did not answer properly" in failure_of(put)


@pytest.mark.parametrize(("code", "status"), FAULTS)
def test_a_picture_is_not_left_out(code: str, status: int, place: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    open_store(place).write_bytes("a.jpg", PICTURE.read_bytes())
    references = tmp_path / "references.csv"
    references.write_text("image,caption\na.jpg,a house\n")
    pictures = load_picture_set(PictureSource(images=place, references=str(references)))
    shards = PhotoShards.__new__(PhotoShards)
    shards._files, shards._positions = find_pictures(place), {0: 0}
    proxy.fail("status", method="GET", path="a.jpg", status=status, code=code)
    for read in (lambda: pictures.open(0), lambda: shards._read(0)):
        with pytest.raises(StoreFailure, match=code or str(status)):
            read()


@pytest.mark.parametrize(("code", "status"), FAULTS)
def test_features_are_not_left_out(code: str, status: int, place: str, proxy: FaultyProxy) -> None:
    open_store(place).write_bytes("a.npz", b"")
    given = find_features(place)
    proxy.fail("status", method="GET", path="a.npz", status=status, code=code)
    with pytest.raises(StoreFailure, match=code or str(status)):
        given.read([0])


def test_a_head_that_is_refused_without_a_reason_is_one_line(place: str, proxy: FaultyProxy) -> None:
    """What S3 answers to a HEAD with a token that has expired: there is no body that could say so."""
    store = open_store(place)
    proxy.fail("status", method="HEAD", status=400, code="ExpiredToken")
    for ask in (store.exists, store.size, store.open):
        with pytest.raises(StoreFailure, match=r"/a.npz: access refused \(400\); .*\(a token may have expired\)"):
            ask("a.npz")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOTCONN, errno.ENOMEM, errno.EREMOTEIO, errno.EKEYEXPIRED])
def test_a_picture_that_a_disk_does_not_give_is_not_missing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    (tmp_path / "a.jpg").write_bytes(PICTURE.read_bytes())
    references = tmp_path / "references.csv"
    references.write_text("image,caption\na.jpg,a house\n")
    pictures = load_picture_set(PictureSource(images=str(tmp_path), references=str(references)))
    shards = PhotoShards.__new__(PhotoShards)
    shards._files, shards._positions = find_pictures(str(tmp_path)), {0: 0}

    def failing(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("builtins.open", failing)
    for read in (lambda: pictures.open(0), lambda: shards._read(0)):
        with pytest.raises(StoreFailure, match=errno.errorcode[number]):
            read()


def test_a_picture_to_caption_is_not_said_to_be_missing(place: str, proxy: FaultyProxy) -> None:
    open_store(place).write_bytes("a.jpg", PICTURE.read_bytes())
    proxy.fail("status", path="a.jpg", status=403, code="AccessDenied")
    with ExitStack() as copies, pytest.raises(StoreFailure, match="access refused"):
        _local(f"{place}/a.jpg", copies)


PARTS: list[tuple[str, Callable[[Store], object]]] = [
    (r"plan/\w+/part-000001", verify),
    (shard_key(1), verify),
    ("quarantine/part-000001", verify),
    ("stats/part-000001", verify),
    ("stats/part-000001", upgrade),
    (MANIFEST_KEY, _drop_damaged_manifest),
]


@pytest.mark.parametrize(("part", "read"), PARTS, ids=[f"{read.__name__} {part}" for part, read in PARTS])
def test_a_dataset_is_not_damaged(
    part: str, read: Callable[[Store], object], place: str, proxy: FaultyProxy, tmp_path: Path
) -> None:
    store, *_ = make_dataset_in_process(place, write_corpus(tmp_path), null_spec())
    proxy.fail("status", method="GET", path=part, status=403, code="AccessDenied")
    with pytest.raises(StoreFailure, match=rf"{part}.*access refused"):
        read(store)
    proxy.heal()
    assert verify(store)["ok"] and store.exists(MANIFEST_KEY)


def test_a_manifest_that_may_not_be_read_is_not_waited_for(place: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    store, *_ = make_dataset_in_process(place, write_corpus(tmp_path), null_spec())
    plan = load_plan(store)
    assert plan is not None
    proxy.fail("status", method="GET", path=MANIFEST_KEY, status=403, code="AccessDenied")

    def sleep(seconds: float) -> None:
        raise AssertionError("it is waited for")

    with pytest.raises(StoreFailure, match="access refused"):
        finished_manifest(store, plan, sleep=sleep)
    assert store.exists(PLAN_KEY)
