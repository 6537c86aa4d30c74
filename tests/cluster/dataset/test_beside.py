"""A view and the datasets of its pictures, moved or copied together: the view finds them."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.dataset.beside import check_way, way_to
from cluster.dataset.documents import load_manifest
from cluster.dataset.keys import MANIFEST_KEY, shard_key
from cluster.dataset.verify import verify
from cluster.report.make import make_report
from cluster.report.request import ReportRequest
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.tiny_dataset import write_dataset

if TYPE_CHECKING:
    from tests.helpers.seaweedfs import S3Server


@pytest.fixture
def world(tmp_path: Path, tiny_clip: Path) -> Path:
    """before/data, and before/views/first, which shows some of its pictures."""
    folder = tmp_path / "before"
    write_dataset(folder / "data", tiny_clip, rows=12, shard_size=5)
    write_dataset(folder / "views/data", tiny_clip, rows=12, shard_size=5, first=50)
    view(folder / "views/first", folder / "views/data")
    view(folder / "second", folder / "data")
    return folder


def view(out: Path, data: Path | str, **rules: object) -> dict:
    return curate(CurateRequest(data=(str(data),), out=str(out), **({"drop_lowest": 0.3} | rules)))  # type: ignore[arg-type]


def pictures_of(place: Path | str) -> list[str]:
    return [store.path for store in load_manifest(open_store(place)).pictures]


@pytest.mark.parametrize("original_stays", [False, True])
def test_a_view_that_moves_with_its_source_finds_it(world: Path, tmp_path: Path, original_stays: bool) -> None:
    before = verify(open_store(world / "second"))
    (shutil.copytree if original_stays else shutil.move)(world, tmp_path / "after")  # type: ignore[operator]
    for name, source in (("second", "data"), ("views/first", "views/data")):
        assert pictures_of(tmp_path / "after" / name) == [str(tmp_path / "after" / source)]
        assert verify(open_store(tmp_path / "after" / name))["ok"]
    after = verify(open_store(tmp_path / "after/second"))
    assert after["fingerprint"] == before["fingerprint"]


def test_a_view_that_is_copied_into_a_bucket_with_its_source_finds_it_there(
    world: Path, tmp_path: Path, s3: "S3Server"
) -> None:
    before = verify(open_store(world / "second"))
    place = f"{s3.uri}/beside/{tmp_path.name}"
    for name in ("second", "data"):
        copy = open_store(f"{place}/{name}")
        for key in open_store(world / name).list(""):
            copy.write_bytes(key, (world / name / key).read_bytes())
    shutil.rmtree(world)
    assert pictures_of(f"{place}/second") == [f"{place}/data"]
    after = verify(open_store(f"{place}/second"))
    assert after["ok"] and after["fingerprint"] == before["fingerprint"]
    view(tmp_path / "third", f"{place}/second", drop_lowest=0.1)
    assert pictures_of(tmp_path / "third") == [f"{place}/data"] and verify(open_store(tmp_path / "third"))["ok"]


def test_a_view_of_a_moved_view_points_at_the_pictures_where_they_are(world: Path, tmp_path: Path) -> None:
    shutil.move(world, tmp_path / "after")
    view(tmp_path / "elsewhere/deep/third", tmp_path / "after/second", drop_lowest=0.1)
    assert pictures_of(tmp_path / "elsewhere/deep/third") == [str(tmp_path / "after/data")]
    assert verify(open_store(tmp_path / "elsewhere/deep/third"))["ok"]


def test_a_view_that_moves_alone_finds_its_source_where_it_was(world: Path, tmp_path: Path, tiny_clip: Path) -> None:
    write_dataset(tmp_path / "after/data", tiny_clip, rows=7, first=30)  # another dataset of the same name
    shutil.move(world / "second", tmp_path / "after/second")
    assert pictures_of(tmp_path / "after/second") == [str(world / "data")]
    assert verify(open_store(tmp_path / "after/second"))["ok"]


def test_a_moved_source_that_has_changed_is_named_where_it_is(world: Path, tmp_path: Path) -> None:
    shutil.move(world, tmp_path / "after")
    manifest = tmp_path / "after/data" / MANIFEST_KEY
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    shutil.copy(tmp_path / "after/data" / shard_key(1), tmp_path / "after/data" / shard_key(0))
    found = verify(open_store(tmp_path / "after/second"))
    assert not found["ok"] and str(tmp_path / "after/data") in found["problems"][0]
    assert "have changed" in found["problems"][0]


def test_a_view_of_an_earlier_release_is_read_as_before(world: Path, tmp_path: Path) -> None:
    manifest = world / "second" / MANIFEST_KEY
    values = json.loads(manifest.read_bytes())
    assert values["pictures"][0].pop("beside") == "../data"
    manifest.write_text(json.dumps(values))
    assert pictures_of(world / "second") == [str(world / "data")]
    shutil.move(world / "second", tmp_path / "alone")
    assert verify(open_store(tmp_path / "alone"))["ok"]


def test_the_report_of_a_moved_view_shows_what_was_left_out(world: Path, tmp_path: Path) -> None:
    shutil.move(world, tmp_path / "after")
    make_report(ReportRequest(data=str(tmp_path / "after/second"), out=str(tmp_path / "report.html")))
    text = (tmp_path / "report.html").read_text()
    assert "What stayed" in text and "No such file" not in text and str(world / "data/shards") not in text


@pytest.mark.parametrize(
    ("view", "dataset", "way"),
    [
        ("/a/view", "/a/data", "../data"),
        ("/a/view", "/a/deep/data", "../deep/data"),
        ("/a/view", "/a/view/redraws/round-000", "redraws/round-000"),
        ("/a/view", "/a/view-2", "../view-2"),
        ("/a/view", "/b/data", None),
        ("/view", "/data", None),  # the whole disk is no folder that is moved
        ("s3://bucket/x/view", "s3://bucket/x/data", "../data"),
        ("s3://bucket/view", "s3://bucket/data", "../data"),
        ("s3://bucket", "s3://other", None),
        ("s3://bucket/x/view", "/a/data", None),
    ],
)
def test_the_way_to_a_dataset(view: str, dataset: str, way: str | None) -> None:
    assert way_to(view, dataset) == way


@pytest.mark.parametrize("way", ["../../data", "/data", "../a/../../b", "", "../", "a//b", 3])
def test_a_way_that_leads_out_is_refused(world: Path, way: object) -> None:
    with pytest.raises(ValueError, match="beside is"):
        check_way(way)  # type: ignore[arg-type]
    manifest = world / "second" / MANIFEST_KEY
    values = json.loads(manifest.read_bytes())
    values["pictures"][0]["beside"] = way
    manifest.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"dataset.json: damaged \(beside is"):
        load_manifest(open_store(world / "second"))
