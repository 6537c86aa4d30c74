"""Verification finds every way in which a dataset can be wrong, from the store alone."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, quarantine_key, shard_key
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.verify import verify
from cluster.shard_work import PROCESS, RAY
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.shards import part_key, with_value
from tests.helpers.tiny_generation import CAPTIONS, make_dataset_in_process, null_spec, plan_dataset, write_corpus

CORPUS = [*CAPTIONS[:3], "a\x07b", *CAPTIONS[3:12], "\x00"]  # 14 captions, two of them unusable
SHARD_SIZE = 4
SHARD, QUARANTINE = shard_key(0), quarantine_key(0)
HEALTHY = {"expected": 14, "stored": 12, "quarantined": 2, "missing": 0, "duplicated": 0, "corrupt": 0}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    make_dataset_in_process(folder / "data", write_corpus(folder, CORPUS), null_spec(), shard_size=SHARD_SIZE)
    return folder / "data"


@pytest.fixture
def dataset(healthy: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(healthy, tmp_path / "data"))


def check(folder: Path) -> dict:
    return verify(open_store(folder))


def counts(report: dict) -> dict:
    return {name: report[name] for name in HEALTHY}


def rewrite(folder: Path, key: str, change: Callable[[pa.Table], pa.Table], *, sign: bool = True) -> None:
    """Change a Parquet object; with `sign` the manifest gets its new checksum, as a careful liar would do."""
    table = change(pq.read_table(folder / key))
    data = parquet_bytes(table)
    (folder / key).write_bytes(data)
    if sign and key.startswith("shards/"):
        manifest = json.loads((folder / MANIFEST_KEY).read_text())
        for shard in manifest["shards"]:
            if shard["key"] == key:
                shard["sha256"] = hashlib.sha256(data).hexdigest()
        (folder / MANIFEST_KEY).write_text(json.dumps(manifest))


def said(report: dict) -> str:
    assert report["ok"] is False
    return " | ".join(report["problems"])


def test_a_healthy_dataset_is_proven(healthy: Path) -> None:
    report = check(healthy)
    assert counts(report) == HEALTHY
    assert report["ok"] is True and report["complete"] is True and report["problems"] == []


def test_a_shard_of_which_nothing_could_be_stored_is_healthy(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, ["\x00", "a\x07b", "A cat.", "\x01"])
    make_dataset_in_process(tmp_path / "data", corpus, null_spec(), shard_size=2)
    report = check(tmp_path / "data")
    assert report["ok"] and (report["stored"], report["quarantined"]) == (1, 3)


def test_the_fingerprint_is_what_the_contract_says(healthy: Path) -> None:
    """Recomputed here with pyarrow alone: sorted (sample_id, caption, seed, status, sha256 of the image bytes)."""
    entries = []
    for path in healthy.glob("shards/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            digest = hashlib.sha256(row["image"]["bytes"]).hexdigest()
            entries.append([row["sample_id"], row["caption"], row["seed"], row["status"], digest])
    for path in healthy.glob("quarantine/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            entries.append([row["sample_id"], row["caption"], row["seed"], row["status"], ""])
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in sorted(entries))
    assert check(healthy)["fingerprint"] == hashlib.sha256(lines.encode()).hexdigest()


def test_the_fingerprint_does_not_depend_on_the_shard_size(healthy: Path, tmp_path: Path) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path, CORPUS), null_spec(), shard_size=7)
    report = check(tmp_path / "data")
    assert report["ok"] and report["fingerprint"] == check(healthy)["fingerprint"]


def test_the_fingerprint_changes_with_any_picture_caption_or_seed(dataset: Path) -> None:
    before = check(dataset)["fingerprint"]
    other = pq.read_table(dataset / shard_key(1)).to_pylist()[0]["image"]
    for column, value in (("image", other), ("caption", "Something else."), ("seed", 1)):
        copy = Path(shutil.copytree(dataset, dataset.with_name(f"data-{column}")))
        rewrite(copy, SHARD, lambda table, c=column, v=value: with_value(table, c, 0, v))
        assert check(copy)["fingerprint"] != before


def test_a_missing_shard_is_found(dataset: Path) -> None:
    (dataset / shard_key(1)).unlink()
    report = check(dataset)
    assert counts(report) == HEALTHY | {"stored": 8, "missing": 4} and shard_key(1) in said(report)


def test_what_mends_a_dataset_is_told(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    verify(open_store(dataset))
    assert "--repair" not in caplog.text
    (dataset / shard_key(1)).unlink()
    verify(open_store(dataset))
    assert caplog.messages[-1] == f"{dataset}: jobs.verify --repair makes what is missing or damaged again"


def test_no_repair_is_advised_where_it_would_change_nothing(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copy(dataset / shard_key(0), dataset / shard_key(99))
    assert not verify(open_store(dataset))["ok"]
    assert "--repair" not in caplog.text


def test_a_missing_quarantine_part_is_found(dataset: Path) -> None:
    (dataset / QUARANTINE).unlink()
    report = check(dataset)
    assert counts(report) == HEALTHY | {"quarantined": 1, "missing": 1} and not report["ok"]


def test_a_flipped_bit_is_found_wherever_it_is(dataset: Path) -> None:
    data = (dataset / SHARD).read_bytes()
    for place in np.random.default_rng(0).integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[place] ^= 1 << int(place % 8)
        (dataset / SHARD).write_bytes(damaged)
        assert SHARD in said(check(dataset)), place


@pytest.mark.parametrize("keep", [0, 5, 400])
def test_a_truncated_shard_is_corrupt(keep: int, dataset: Path) -> None:
    (dataset / SHARD).write_bytes((dataset / SHARD).read_bytes()[:keep])
    report = check(dataset)
    assert report["corrupt"] == 4 and SHARD in said(report)


def test_a_doubled_row_is_found_even_with_a_new_checksum(dataset: Path) -> None:
    rewrite(dataset, SHARD, lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    report = check(dataset)
    assert report["duplicated"] == 1 and "stored more than once" in said(report)


def test_a_row_both_stored_and_quarantined_is_doubled(dataset: Path) -> None:
    stored = pq.read_table(dataset / SHARD).to_pylist()[0]

    def add(table: pa.Table) -> pa.Table:
        twin = table.to_pylist()[0] | {name: stored[name] for name in ("sample_id", "caption", "seed")}
        return pa.Table.from_pylist([*table.to_pylist(), twin], schema=table.schema)

    rewrite(dataset, QUARANTINE, add)
    report = check(dataset)
    assert report["duplicated"] == 1 and not report["ok"]


def test_a_lost_row_is_missing(dataset: Path) -> None:
    rewrite(dataset, SHARD, lambda table: table.slice(1))
    report = check(dataset)
    assert counts(report) == HEALTHY | {"stored": 11, "missing": 1} and "neither stored" in said(report)


def test_a_foreign_shard_is_found(dataset: Path) -> None:
    shutil.copy(dataset / SHARD, dataset / shard_key(99))
    shutil.copy(dataset / QUARANTINE, dataset / quarantine_key(77))
    problems = said(check(dataset))
    assert f"{shard_key(99)}: not part of the plan" in problems
    assert f"{quarantine_key(77)}: not part of the plan" in problems


def test_two_exchanged_shards_are_found(dataset: Path) -> None:
    first, second = (dataset / shard_key(number) for number in (1, 2))
    first_data, second_data = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_data)
    second.write_bytes(first_data)
    report = check(dataset)
    assert report["corrupt"] == 8 and report["missing"] == 8 and "not planned for this shard" in said(report)


def test_another_dataset_of_the_same_captions_is_found(dataset: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, CORPUS)
    make_dataset_in_process(tmp_path / "other", corpus, null_spec(guidance_scale=1.0), shard_size=SHARD_SIZE)
    shutil.copy(tmp_path / "other" / SHARD, dataset / SHARD)
    report = check(dataset)
    assert report["corrupt"] == 3 and "another seed" in said(report)


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("caption", "Something else.", "another caption than planned"),
        ("seed", 12345, "another seed than planned"),
        ("status", "quarantined", "status 'quarantined' in a shard"),
        ("width", 64, "its row says 64x1"),
        ("image", {"bytes": b"no picture", "path": "x.jpg"}, "not a picture"),
        ("image", {"bytes": None, "path": "x.jpg"}, "not a picture"),
        ("clip_score", float("nan"), "not finite"),
        ("global_feature", [np.float16("inf")], "not finite"),
        ("patch_features", np.float16("nan").tobytes(), "not finite"),
    ],
)
def test_a_value_that_cannot_be_right_is_corrupt(column: str, value: object, problem: str, dataset: Path) -> None:
    rewrite(dataset, SHARD, lambda table: with_value(table, column, 1, value))
    report = check(dataset)
    assert report["corrupt"] == 1 and problem in said(report)


def test_a_quarantined_row_needs_a_reason_and_its_caption(dataset: Path) -> None:
    rewrite(dataset, QUARANTINE, lambda table: with_value(table, "reason", 0, ""))
    assert "without status or reason" in said(check(dataset))
    rewrite(dataset, QUARANTINE, lambda table: with_value(with_value(table, "reason", 0, "x"), "caption", 0, "y"))
    assert "another caption" in said(check(dataset))


def test_an_unreadable_quarantine_part_is_found(dataset: Path) -> None:
    (dataset / QUARANTINE).write_bytes(b"PAR1 but no Parquet")
    report = check(dataset)
    assert QUARANTINE in said(report) and report["missing"] == 1


def test_a_shard_without_a_column_is_corrupt(dataset: Path) -> None:
    rewrite(dataset, SHARD, lambda table: table.drop_columns(["clip_score"]))
    report = check(dataset)
    assert report["corrupt"] == 4 and "clip_score" in said(report)


def test_a_manifest_that_miscounts_is_found(dataset: Path) -> None:
    manifest = json.loads((dataset / MANIFEST_KEY).read_text())
    (dataset / MANIFEST_KEY).write_text(json.dumps(manifest | {"stored": 13}))
    assert "says 13 stored and 2 quarantined, found 12 and 2" in said(check(dataset))


def test_a_manifest_of_other_shards_is_found(dataset: Path) -> None:
    manifest = json.loads((dataset / MANIFEST_KEY).read_text())
    manifest["shards"][1]["sha256"] = manifest["shards"][0]["sha256"]
    (dataset / MANIFEST_KEY).write_text(json.dumps(manifest))
    assert f"{shard_key(1)}: its sha256 is not the manifest's" in said(check(dataset))


@pytest.mark.parametrize("key", [MANIFEST_KEY, PLAN_KEY])
def test_a_damaged_document_is_one_clear_line(key: str, dataset: Path) -> None:
    (dataset / key).write_bytes(b'{"half": ')
    with pytest.raises(InputError) as caught:
        check(dataset)
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_whose_plan_is_lost_proves_nothing(dataset: Path) -> None:
    (dataset / part_key(dataset, 1)).write_bytes(b"no Parquet")
    (dataset / part_key(dataset, 2)).unlink()
    report = check(dataset)
    assert report["corrupt"] == 8 and all(part_key(dataset, shard) in said(report) for shard in (1, 2))


def test_an_unfinished_dataset_is_not_ok(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, CORPUS)
    make_dataset_in_process(tmp_path / "data", corpus, null_spec(), shard_size=SHARD_SIZE, finish=False)
    report = check(tmp_path / "data")
    assert counts(report) == HEALTHY and report["complete"] is False and report["ok"] is False
    plan_dataset(tmp_path / "planned", corpus, null_spec(), shard_size=SHARD_SIZE)
    assert counts(check(tmp_path / "planned")) == HEALTHY | {"stored": 0, "quarantined": 0, "missing": 14}


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a dataset"):
        check(tmp_path)


def test_nothing_is_written_by_verifying(healthy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in healthy.rglob("*")}
    check(healthy)
    assert {path: path.stat().st_mtime_ns for path in healthy.rglob("*")} == before


def test_shards_are_plain_parquet(healthy: Path) -> None:
    table = pq.read_table(io.BytesIO((healthy / SHARD).read_bytes()))
    assert table.schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert table.schema.field("global_feature").type == pa.list_(pa.float16(), 1)
    assert set(table["status"].to_pylist()) == {"stored"}


def test_ray_gives_the_report_of_one_process(ray_session: None, healthy: Path, tmp_path: Path) -> None:
    """Of a healthy dataset, and of one with a damaged, a missing, a doubled and an exchanged shard."""
    folder = tmp_path / "damaged"
    make_dataset_in_process(folder, write_corpus(tmp_path, [*CAPTIONS, *CORPUS]), null_spec(), shard_size=2)
    (folder / shard_key(1)).write_bytes((folder / shard_key(1)).read_bytes()[:400])
    (folder / shard_key(2)).unlink()
    rewrite(folder, shard_key(3), lambda table: pa.concat_tables([table, table.slice(0, 1)]))
    shutil.copy(folder / shard_key(5), folder / shard_key(11))
    for dataset in (healthy, folder):
        one, many = (verify(open_store(dataset), run_on=run_on) for run_on in (PROCESS, RAY))
        assert one == many and one["ok"] is (dataset == healthy)
    assert one["missing"] and one["duplicated"] and one["corrupt"] and len(one["problems"]) > 4
