"""A store that refuses or does not answer says nothing of what lies there: no damage, no bad picture, no absence."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.dataset.given_features import find_features
from cluster.dataset.layout import MANIFEST_KEY, PLAN_KEY, load_plan, shard_key
from cluster.dataset.upgrade import upgrade
from cluster.dataset.verify import verify
from cluster.evaluation.captioning import _local
from cluster.generation.repair import _drop_damaged_manifest
from cluster.ingest.photos import PhotoShards
from cluster.sources.pictures import PictureSource, find_pictures, load_picture_set
from cluster.store.store import Store, open_store
from cluster.training.data.arriving import finished_manifest
from pcm.errors import StoreFailure
from tests.helpers.faulty_proxy import FaultyProxy, faulty_proxy
from tests.helpers.paths import DATA
from tests.helpers.seaweedfs import S3Server
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

PICTURE = DATA / "cases" / "images" / "upright.jpe"
FAULTS = [("AccessDenied", 403), ("SlowDown", 503)]


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(s3_server.ports["s3.port"]) as running:
        yield running


@pytest.fixture
def place(s3: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A prefix behind the proxy, for a reader without patience."""
    proxy.heal()
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("PCM_STORE_RETRY_SECONDS", "0")
    return f"{s3.uri}/failures/{abs(hash(request.node.name))}"


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
        with pytest.raises(StoreFailure, match=code):
            read()


@pytest.mark.parametrize(("code", "status"), FAULTS)
def test_features_are_not_left_out(code: str, status: int, place: str, proxy: FaultyProxy) -> None:
    open_store(place).write_bytes("a.npz", b"")
    given = find_features(place)
    proxy.fail("status", method="GET", path="a.npz", status=status, code=code)
    with pytest.raises(StoreFailure, match=code):
        given.read([0])


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
