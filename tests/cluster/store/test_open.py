"""Any URI is opened by the store: as a stream, with its patience, and never with a credential."""

import ast
import gzip
import http.server
import os
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import pytest

from cluster.generation.picture_spec import pin_t2i
from cluster.generation.pinning import pin_clip
from cluster.ingest.published import ImportRequest
from cluster.ingest.request import FeaturiseRequest
from cluster.sources.corpus import read_corpus, source_digest
from cluster.sources.pictures import PictureSource
from cluster.store.object_file import ObjectFile
from cluster.store.store import Store, local_copy, open_store, read_uri
from cluster.training.data.mixture import DataSource
from cluster.training.train import TrainRequest
from pcm.clip.names import resolve_clip_name
from pcm.errors import InputError, StoreFailure
from tests.helpers.faulty_proxy import FaultyProxy
from tests.helpers.paths import ROOT
from tests.helpers.seaweedfs import S3Server

DATA = bytes(range(256)) * 1024  # 256 KiB


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A prefix on a local disk and on an object store, with one object."""
    uri = str(tmp_path / "data") if request.param == "local" else f"{request.getfixturevalue('s3').uri}/open"
    open_store(uri).write_bytes("part", DATA)
    return uri


@pytest.mark.parametrize("buffered", [True, False])
def test_an_object_is_read_from_any_place(place: str, buffered: bool) -> None:
    with open_store(place).open("part", buffered=buffered) as file:
        assert file.read(3) == DATA[:3] and file.tell() == 3
        assert file.seek(-5, os.SEEK_END) == len(DATA) - 5 and file.read(9) == DATA[-5:] and file.read(9) == b""
        assert file.seek(1000) == 1000 and file.seek(24, os.SEEK_CUR) == 1024
        assert file.read(100_000) == DATA[1024:101_024]
        assert file.read() == DATA[101_024:]


def test_a_web_address_is_read_by_way_of_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "3")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"one")

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        fsspec.filesystem("http").clear_instance_cache()
        assert read_uri("http://data.example.invalid/captions.json") == b"one"
        server.shutdown()
    assert set(asked) == {"http://data.example.invalid/captions.json"}


def test_a_uri_is_the_object_itself(place: str) -> None:
    with open_store(f"{place}/part").open() as file:
        assert file.read() == DATA


def test_what_is_no_object_says_so(place: str) -> None:
    store = open_store(place)
    with pytest.raises(FileNotFoundError):
        store.open("nothing")
    with pytest.raises(IsADirectoryError):
        store.open("")
    assert [store.is_file(key) for key in ("part", "nothing", "", "part/x")] == [True, False, False, False]


def test_a_path_is_what_has_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a::b.txt", "12:30.txt", "x@y.txt", "q?token=1.txt", "#1.txt", "%41.txt", " .txt"):
        (tmp_path / name).write_bytes(DATA)
        store = open_store(name)
        assert store.is_local and store.address == str(tmp_path / name) and store.name == name
        with store.open() as file:
            assert file.read() == DATA


def test_an_address_means_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("data/x/").address == str(tmp_path / "data/x") == open_store(f"file://{tmp_path}/data/x").address
    assert open_store("s3://bucket/x/").address == "s3://bucket/x" and open_store("s3://bucket/x/").name == "x"


# --- what gives no ranges is copied first ---


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """An HTTP server that knows no ranges, over a folder `web`."""
    (tmp_path / "web").mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_http_and_chains_are_read_as_the_plain_file(web: str, tmp_path: Path) -> None:
    (tmp_path / "web/c.txt").write_bytes(DATA)
    with zipfile.ZipFile(tmp_path / "web/c.zip", "w") as archive:
        archive.writestr("c.txt", DATA)
    for uri in (f"{web}/c.txt", f"simplecache::{web}/c.txt", f"zip://c.txt::{tmp_path}/web/c.zip"):
        with open_store(uri).open() as file:
            assert file.seek(-4, os.SEEK_END) and file.read() == DATA[-4:]
            assert file.seek(0) == 0 and file.read() == DATA
    with pytest.raises(FileNotFoundError):
        open_store(f"{web}/nothing.txt").open()


# --- patience ---


@pytest.fixture
def faulty(s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A prefix behind the proxy; half a second of silence is a timeout."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("PCM_STORE_TIMEOUT_SECONDS", "0.5")
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "30")
    proxy.heal()
    return open_store(f"{s3.uri}/faulty")


@pytest.mark.parametrize("kind", ["status", "hang", "cut", "reset"])
def test_a_corpus_is_read_through_faults_that_pass(kind: str, faulty: Store, proxy: FaultyProxy) -> None:
    captions = [f"dog number {number}" for number in range(5000)]
    faulty.write_bytes("c.txt.gz", gzip.compress("\n".join(captions).encode()))
    fault = proxy.fail(kind, method="GET", path="c.txt.gz", count=3)  # aiohttp itself repeats a request that is reset
    assert [record.caption for record in read_corpus(f"{faulty.root}/c.txt.gz")] == captions
    assert fault.struck == 3


def test_a_corpus_whose_store_does_not_come_back_is_one_line(
    faulty: Store, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.write_bytes("c.txt", b"a dog\n")
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    proxy.fail("status", method="GET", path="c.txt")
    with pytest.raises(StoreFailure, match=r"c\.txt: the store did not answer properly") as caught:
        list(read_corpus(f"{faulty.root}/c.txt"))
    assert "\n" not in str(caught.value)


# --- objects that change ---


def changing(*, size: int, version: list[int]) -> ObjectFile:
    """A file over zeros, whose version is what `version` says at the time, and was 1 when it was opened."""
    return ObjectFile(
        lambda start, end: bytes(min(end, size) - start), size=8, opened=1, version=lambda: version[0], name="s3://b/x"
    )


def test_an_object_that_is_replaced_while_it_is_read_is_noticed_at_its_end() -> None:
    version = [1]
    assert changing(size=8, version=version).read() == bytes(8)
    file = changing(size=8, version=version)
    assert file.read(8) == bytes(8)
    version[0] = 2
    with pytest.raises(InputError, match="s3://b/x: it was changed while it was read"):
        file.read(1)


def test_an_object_that_has_become_shorter_is_noticed_at_once() -> None:
    with pytest.raises(InputError, match="5 bytes where 8 were asked for"):
        changing(size=5, version=[1]).read(8)


# --- credentials: the rule itself is tested in tests/pcm/test_credentials.py ---


WAYS = {
    "store": open_store,
    "copy": lambda uri: local_copy(uri).__enter__(),
    "file": read_uri,
    "corpus": lambda uri: list(read_corpus(uri)),
    "digest of a corpus": source_digest,
    "pictures": lambda uri: PictureSource(images=uri),
    "references": lambda uri: PictureSource(images="photos", references=uri),
    "dataset": DataSource.parse,
    "dataset with a bad weight": lambda uri: DataSource.parse(f"{uri}=0"),
    "text-to-image model": lambda uri: pin_t2i(uri, None),
    "CLIP": lambda uri: pin_clip(uri, None),
    "CLIP's name": resolve_clip_name,
    "training": lambda uri: TrainRequest(data="data", out="run", clip=uri),
    "cache": lambda uri: TrainRequest(data="data", out="run", cache_dir=uri),
    "photos": lambda uri: FeaturiseRequest(images="photos", captions=uri, out="data", clip="embedded"),
    "import": lambda uri: ImportRequest(annotations="a", images="b", vocabulary="c", out="d", clip="e", clip_head=uri),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("uri", ["s3://AKIAKEY:very-secret@bucket/x", "simplecache::https://very-secret@host/c.txt"])
def test_no_way_in_takes_a_credential(way: str, uri: str) -> None:
    with pytest.raises(InputError, match="carries a credential") as caught:
        WAYS[way](uri)
    assert "very-secret" not in str(caught.value) and "AKIAKEY" not in str(caught.value)


# --- nobody else opens what a user names ---


def imports(path: Path) -> set[str]:
    """Top-level names of what a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def test_nothing_but_the_store_imports_a_file_system() -> None:
    clients = {"fsspec", "s3fs", "gcsfs", "adlfs", "boto3", "botocore", "aiohttp", "requests"}
    files = [
        path.relative_to(ROOT) for package in ("pcm", "cluster", "jobs") for path in (ROOT / package).rglob("*.py")
    ]
    assert {str(path.parent) for path in files if imports(ROOT / path) & clients} == {"cluster/store"}
