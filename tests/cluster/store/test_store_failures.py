"""A store that refuses or does not answer says nothing of what lies there: no damage, no bad picture, no absence."""

import errno
import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from cluster.dataset.documents import load_plan
from cluster.dataset.given_features import find_features
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, shard_key
from cluster.dataset.upgrade import upgrade
from cluster.dataset.verify import verify
from cluster.evaluation.caption import _local
from cluster.generation.repair import _drop_damaged_manifest
from cluster.ingest.photos import PhotoShards
from cluster.sources.pictures import PictureSource, find_pictures, load_picture_set
from cluster.store import store as store_module
from cluster.store.store import Store, open_store
from cluster.training.data.arriving import finished_manifest
from pcm.errors import StoreFailure
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
