"""--repair makes again what is damaged, and nothing else."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.dataset.documents import Plan, load_plan
from cluster.dataset.environment import versions
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, group_key, quarantine_key, shard_key, stats_key
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.verify import Inspection, verify
from cluster.dataset.vocabularies import store_vocabularies
from cluster.generation.pipeline import write_manifest
from cluster.generation.repair import repair
from cluster.sources.corpus import CorpusRecord, read_corpus
from cluster.store.store import open_store
from pcm.errors import InputError
from tests.helpers.shards import part_key, with_value
from tests.helpers.stored import file_contents
from tests.helpers.tiny_generation import draw_in_process, make_dataset_in_process, null_spec, write_corpus

CORPUS = ["A cat.", "a\x07b", *(f"caption number {index}" for index in range(9)), "\x00"]  # two of 12 unusable
SHARDS = 4


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repair")
    make_dataset_in_process(folder / "data", write_corpus(folder, CORPUS), null_spec(), shard_size=3)
    return folder


@pytest.fixture
def data(healthy: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(healthy / "data", tmp_path / "data"))


def contents(folder: Path) -> dict[str, bytes]:
    """Without the statistics, which hold times."""
    return {key: data for key, data in file_contents(folder).items() if not key.startswith("stats/")}


def repaired(
    folder: Path, corpus: Path | None = None, is_truncated: Callable[[str], bool] = lambda prompt: False
) -> tuple[dict, list[int]]:
    """(what the repair says, the shards it drew)."""
    store = open_store(folder)
    drawn: list[int] = []

    def draw(found: Inspection) -> None:
        drawn.extend(found.damaged_shards)
        for key in {group_key(0)} & set(store.list("progress/")):
            store.delete(key)
        write_manifest(store, found.plan, draw_in_process(store, found.plan, found.damaged_shards))

    def read_records(plan: Plan) -> Iterator[CorpusRecord]:
        return read_corpus(str(corpus or plan.corpus), limit=plan.records)

    return repair(store, draw=draw, read_records=read_records, truncation_check=lambda model: is_truncated), drawn


def rewritten(folder: Path, key: str, alter: Callable[[pa.Table], pa.Table]) -> None:
    (folder / key).write_bytes(parquet_bytes(alter(pq.read_table(folder / key))))


def with_first(column: str, value: object) -> Callable[[pa.Table], pa.Table]:
    return lambda table: with_value(table, column, 0, value)


def flipped(folder: Path, key: str) -> None:
    data = bytearray((folder / key).read_bytes())
    data[len(data) // 3] ^= 16
    (folder / key).write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], object], list[int]]] = {
    "nothing": (lambda folder: None, []),
    "a shard is gone": (lambda folder: (folder / shard_key(2)).unlink(), [2]),
    "two are cut short": (
        lambda folder: [(folder / shard_key(n)).write_bytes(b"PAR1" * n) for n in (1, 3)], [1, 3],
    ),
    "a bit is flipped": (lambda folder: flipped(folder, shard_key(1)), [1]),
    "a row is lost": (lambda folder: rewritten(folder, shard_key(1), lambda table: table.slice(1)), [1]),
    "a row is doubled": (
        lambda folder: rewritten(folder, shard_key(1), lambda table: pa.concat_tables([table, table])), [1],
    ),
    "a row is another shard's": (
        lambda folder: (folder / shard_key(1)).write_bytes((folder / shard_key(2)).read_bytes()), [1],
    ),
    "a feature is NaN": (
        lambda folder: rewritten(folder, shard_key(1), with_first("clip_score", float("nan"))), [1],
    ),
    "a seed is another": (lambda folder: rewritten(folder, shard_key(1), with_first("seed", 7)), [1]),
    "a quarantine part is gone": (lambda folder: (folder / quarantine_key(0)).unlink(), [0]),
    "a quarantine part is damaged": (lambda folder: (folder / quarantine_key(0)).write_bytes(b"PAR1"), [0]),
    "a quarantine part is another's": (
        lambda folder: shutil.copy(folder / quarantine_key(0), folder / quarantine_key(1)), [1],
    ),
    "statistics are gone": (lambda folder: (folder / stats_key(2)).unlink(), [2]),
    "statistics are another's": (lambda folder: shutil.copy(folder / stats_key(1), folder / stats_key(2)), [2]),
    "the manifest is gone": (lambda folder: (folder / MANIFEST_KEY).unlink(), []),
    "the manifest is damaged": (lambda folder: (folder / MANIFEST_KEY).write_bytes(b'{"stored": 12'), []),
    "the manifest lacks a field": (lambda folder: (folder / MANIFEST_KEY).write_bytes(b'{"stored": 12}'), []),
    "the group object lies": (
        lambda folder: (folder / group_key(0)).write_bytes(
            (folder / group_key(0)).read_bytes().replace(b'"sha256": "', b'"sha256": "0')
        ), [],
    ),
    "a plan part is damaged": (lambda folder: (folder / part_key(folder, 1)).write_bytes(b"PAR1"), []),
    "a plan part is gone": (lambda folder: (folder / part_key(folder, 3)).unlink(), []),
    "a plan part has another seed": (lambda folder: rewritten(folder, part_key(folder, 1), with_first("seed", 7)), []),
    "a plan part has another caption": (
        lambda folder: rewritten(folder, part_key(folder, 1), with_first("caption", "Another.")), [],
    ),
    "plan and shard are damaged": (
        lambda folder: [flipped(folder, key) for key in (part_key(folder, 1), shard_key(1))], [1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_exactly_what_is_damaged_is_made_again(damage: str, healthy: Path, data: Path) -> None:
    alter, wanted = DAMAGES[damage]
    alter(data)
    before = {path: path.stat().st_mtime_ns for path in (data / "shards").iterdir()}
    if damage == "the manifest is damaged" or damage == "the manifest lacks a field":
        with pytest.raises(InputError, match=r"dataset.json: damaged"):
            verify(open_store(data))
    else:
        assert verify(open_store(data))["ok"] is (damage == "nothing")
    report, drawn = repaired(data)
    assert report["ok"] and report["problems"] == [] and drawn == wanted and report["repaired"] == len(wanted)
    untouched = [data / shard_key(number) for number in range(SHARDS) if number not in wanted]
    assert {path: path.stat().st_mtime_ns for path in untouched} == {path: before[path] for path in untouched}
    assert contents(data) == contents(healthy / "data"), "byte for byte"
    assert verify(open_store(data))["ok"]


def test_an_unfinished_dataset_is_finished(healthy: Path, tmp_path: Path) -> None:
    make_dataset_in_process(tmp_path / "data", healthy / "captions.txt", null_spec(), shard_size=3, finish=False)
    (tmp_path / "data" / shard_key(0)).unlink()
    report, drawn = repaired(tmp_path / "data")
    assert report["ok"] and drawn == [0] and contents(tmp_path / "data") == contents(healthy / "data")


def test_what_another_run_stores_meanwhile_stays(healthy: Path, data: Path) -> None:
    """Its quarantine part was stored before repair looked, its shard after."""
    whole = healthy / "data"
    parts = [shard_key(0), group_key(0), MANIFEST_KEY]
    for key in parts:
        (data / key).unlink()

    def another_run(found: Inspection) -> None:
        assert found.damaged_shards == found.absent_shards == [0]
        for key in parts:
            shutil.copy(whole / key, data / key)
        raise InputError("no GPU to draw with")

    with pytest.raises(InputError, match="no GPU"):
        repair(
            open_store(data), draw=another_run, read_records=lambda plan: iter([]),
            truncation_check=lambda spec: lambda prompt: False,
        )  # fmt: skip
    assert verify(open_store(data))["ok"] and contents(data) == contents(whole)


def test_what_nobody_planned_is_told_of_and_stays(data: Path) -> None:
    shutil.copy(data / shard_key(0), data / shard_key(99))
    (data / shard_key(1)).unlink()
    report, drawn = repaired(data)
    assert drawn == [1] and not report["ok"] and report["problems"] == [f"{shard_key(99)}: not part of the plan"]
    assert (data / shard_key(99)).exists()


def test_a_plan_is_rebuilt_from_the_corpus_alone_that_it_was_made_from(
    healthy: Path, data: Path, tmp_path: Path
) -> None:
    (data / part_key(data, 1)).write_bytes(b"PAR1")
    before = contents(data)
    other = write_corpus(tmp_path, [*CORPUS[:-1], "Another."])
    with pytest.raises(InputError, match=r"its plan is damaged.*--corpus") as caught:
        repaired(data, other)
    assert "\n" not in str(caught.value) and contents(data) == before
    with pytest.raises(InputError, match="no such file"):
        repaired(data, tmp_path / "nowhere.txt")
    longer = write_corpus(tmp_path, [*CORPUS, "A new one."])
    assert repaired(data, longer)[0]["ok"] and contents(data) == contents(healthy / "data")


def test_a_plan_whose_remarks_are_of_an_earlier_rule_is_repaired_and_its_other_parts_stay(data: Path) -> None:
    before = contents(data)
    (data / part_key(data, 1)).write_bytes(b"PAR1")
    report, drawn = repaired(data, is_truncated=lambda prompt: True)
    assert report["ok"] and drawn == []
    changed = {key for key, content in contents(data).items() if content != before[key]}
    assert changed == {part_key(data, 1)}


def test_a_dataset_that_grew_is_repaired_in_its_own_shards(data: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, [*CORPUS, "More.", "Still more."])
    make_dataset_in_process(data, corpus, null_spec(), shard_size=3)
    before = contents(data)
    for key in (shard_key(SHARDS), part_key(data, SHARDS), part_key(data, 0)):
        (data / key).unlink()
    report, drawn = repaired(data)
    assert report["ok"] and drawn == [SHARDS] and contents(data) == before


def test_without_a_plan_there_is_nothing_to_repair(data: Path) -> None:
    (data / PLAN_KEY).unlink()
    (data / MANIFEST_KEY).write_bytes(b"{")
    with pytest.raises(InputError, match=r"can be repaired \(dataset\.json is damaged, and there is no plan\.json\)"):
        repaired(data)
    assert (data / MANIFEST_KEY).exists()


def test_a_damaged_vocabulary_without_its_sha256_is_made_again(data: Path) -> None:
    (data / "vocabulary.txt").write_bytes(b"\xff")
    assert not (data / "vocabularies.json").exists()
    _, drawn = repaired(data)
    assert drawn == []


def test_a_repair_that_is_interrupted_forgets_no_damage(data: Path) -> None:
    store = open_store(data)
    plan = load_plan(store)
    assert plan is not None
    store_vocabularies(store, plan)
    assert verify(store)["ok"]
    (data / "vocabulary.txt").write_bytes(b"cat\n")

    def fails(found: Inspection) -> None:
        raise InputError("no room")

    for problem in ("vocabulary.txt: its sha256 is not the one in vocabularies.json", "vocabulary.txt: missing"):
        assert verify(store)["problems"] == [problem]
        with pytest.raises(InputError, match="no room"):
            repair(store, draw=fails, read_records=lambda plan: iter(()), truncation_check=lambda spec: bool)


def test_the_job_repairs_with_the_real_pipeline(
    data: Path,
    healthy: Path,
    call_job,
    ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (data / shard_key(1)).unlink()
    flipped(data, shard_key(2))
    (data / part_key(data, 0)).unlink()
    assert call_job("verify", data).returncode == 1
    moved = call_job("verify", data, "--repair", "--corpus", data / "nowhere.txt")
    assert moved.returncode == 2 and "nowhere.txt" in moved.stderr
    with monkeypatch.context() as upgraded:
        upgraded.setattr("cluster.generation.other_releases.pyarrow_here", lambda: "99.0.0")
        before = {path: path.read_bytes() for path in (data / "shards").iterdir()}
        refused = call_job("verify", data, "--repair")
        assert refused.returncode == 2 and f"written by pyarrow {pa.__version__}, and this is 99.0.0" in refused.stderr
    with monkeypatch.context() as other_machines:
        other_machines.setattr("cluster.generation.pipeline.needed_pyarrow", lambda *_: "99.0.0")
        refused = call_job("verify", data, "--repair")
        assert refused.returncode == 2 and f"99.0.0, and this machine has {pa.__version__}" in refused.stderr
        assert {path: path.read_bytes() for path in (data / "shards").iterdir()} == before
    with monkeypatch.context() as upgraded:
        upgraded.setattr("cluster.generation.other_releases.pyarrow_here", lambda: "99.0.0")
        releases = {**versions(), "torch": "99.0"}
        for where in ("cluster.dataset.environment", "cluster.generation.other_releases"):
            upgraded.setattr(f"{where}.versions", lambda: releases)
        run = call_job("verify", data, "--repair", "--other-bytes")
    assert run.returncode == 0 and run.summary is not None
    assert "goes on with other releases than it was begun with (torch: " in caplog.text
    assert "was drawn with other releases than the driver has: torch 99.0 and " in caplog.text
    assert (run.summary["repaired"], run.summary["missing"], run.summary["corrupt"]) == (2, 0, 0)
    assert contents(data).keys() - {"vocabulary.txt", "vocabularies.json"} == contents(healthy / "data").keys()
    assert run.summary["fingerprint"] == verify(open_store(healthy / "data"))["fingerprint"]
    assert json.loads((data / MANIFEST_KEY).read_text()) == json.loads((healthy / "data" / MANIFEST_KEY).read_text())
    again = call_job("verify", data, "--repair")
    assert again.returncode == 0 and again.summary is not None and again.summary["repaired"] == 0
    words = (data / "vocabulary.txt").read_bytes()
    for damage in (lambda: (data / "vocabulary.txt").write_bytes(words[:-20]), (data / "vocabulary.txt").unlink):
        damage()
        found = call_job("verify", data)
        assert found.returncode == 1 and "vocabulary.txt: " in found.summary["problems"][0]
        mended = call_job("verify", data, "--repair")
        assert mended.returncode == 0 and mended.summary["repaired"] == 0
        assert (data / "vocabulary.txt").read_bytes() == words
