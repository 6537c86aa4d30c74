"""jobs.report on derived and unfinished datasets."""

from pathlib import Path

import numpy as np
import pytest

from cluster.curation.curate import curate
from cluster.curation.curate_request import CurateRequest
from cluster.dataset.documents import load_manifest
from cluster.report import left_out
from cluster.report.make import make_report
from cluster.report.request import ReportRequest
from cluster.store.store import Store, open_store
from pcm.errors import InputError, StoreFailure
from tests.helpers.tiny_dataset import write_dataset
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

ROWS = 40


def report(place: Path, out: Path, **options: object) -> str:
    make_report(ReportRequest(data=str(place), out=str(out), **options))  # type: ignore[arg-type]
    return out.read_text()


def test_a_view_shows_how_many_rows_each_rule_left_out_and_some_of_them(tmp_path: Path, tiny_clip: Path) -> None:
    scores = np.random.default_rng(5).integers(10, 45, ROWS) / 100
    write_dataset(tmp_path / "data", tiny_clip, rows=ROWS, shard_size=9, scores=scores)
    rules = {"min_clip_score": 0.2, "duplicate_captions": 1.0}
    found = curate(CurateRequest(data=(str(tmp_path / "data"),), out=str(tmp_path / "view"), **rules))  # type: ignore[arg-type]
    text = report(tmp_path / "view", tmp_path / "report.html")
    assert f"{found['rows_out']} of {ROWS} pairs stayed" in text
    low, alike = (found["dropped"][name] for name in rules)
    assert f"0.2: {low} left out" in text and f"1.0: {alike} left out" in text and low and alike
    assert text.count("words 1.0000 with") == min(6, alike)
    assert "nothing missing, doubled or corrupt" in text and found["fingerprint"] in text
    (tmp_path / "data" / "shards" / "part-000000.parquet").unlink()
    curate(CurateRequest(data=(str(tmp_path / "view"),), dry_run=True))
    with pytest.raises(InputError, match="a view, whose pictures are there"):
        report(tmp_path / "view", tmp_path / "report.html")


def test_a_dataset_of_its_own_stands_where_its_source_is_refused(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "data", tiny_clip, rows=ROWS, shard_size=9)
    asked = CurateRequest(data=(str(tmp_path / "data"),), out=str(tmp_path / "own"), drop_lowest=0.2, materialise=True)
    curate(asked)
    real = left_out.read_shard
    refused = tmp_path / "data"

    def refuse(store: Store, *arguments: object, **options: object) -> object:
        if store.prefix == str(refused):
            raise StoreFailure(f"{refused}: access refused (AccessDenied 403)")
        return real(store, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(left_out, "read_shard", refuse)
    text = report(tmp_path / "own", tmp_path / "report.html")
    assert "access refused (AccessDenied 403)" in text and "by curate" in text
    lineage = load_manifest(open_store(tmp_path / "own")).lineage
    assert lineage is not None
    with pytest.raises(StoreFailure, match="access refused"):
        left_out.left_out_pictures(lineage, of=str(refused))


def test_a_view_is_verified_where_it_and_the_shards_of_its_pictures_are_small(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view is small itself, whatever it points at."""
    write_dataset(tmp_path / "data", tiny_clip, rows=ROWS, shard_size=9)
    curate(CurateRequest(data=(str(tmp_path / "data"),), out=str(tmp_path / "view"), drop_lowest=0.2))
    manifests = [load_manifest(open_store(tmp_path / name)) for name in ("data", "view")]
    source, view = (sum(shard.bytes for shard in manifest.stored_shards) for manifest in manifests)
    assert view < source / 2
    for limit, said in ((source, False), (source + view, True)):
        monkeypatch.setattr("cluster.report.dataset_facts.VERIFIED_BYTES", limit)
        text = report(tmp_path / "view", tmp_path / "report.html")
        assert ("nothing missing, doubled or corrupt" in text) is said
        assert ("larger with the shards that hold its pictures than" in text) is not said


def test_an_unfinished_dataset_is_reported_on_when_told_so(tmp_path: Path) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec(), shard_size=5, finish=False)
    (tmp_path / "data" / "shards" / "part-000001.parquet").unlink()
    with pytest.raises(InputError, match="add --unfinished"):
        report(tmp_path / "data", tmp_path / "report.html")
    text = report(tmp_path / "data", tmp_path / "report.html", unfinished=True)
    assert "unfinished, 4 of 5 shards" in text and "--unfinished" in text
    assert "All 19 pictures were looked at" in text
