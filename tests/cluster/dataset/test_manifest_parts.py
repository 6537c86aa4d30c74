"""dataset.json of many shards names parts of its list by their content; the dataset is the same."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.dataset import documents, read_dataset
from cluster.dataset.documents import PARTS_VERSION, find_manifest, load_manifest, store_manifest
from cluster.dataset.keys import MANIFEST_KEY, shard_key
from cluster.dataset.opened import open_dataset
from cluster.dataset.shard_entries import ShardEntries
from cluster.dataset.verify import Inspection, verify
from cluster.export.export import export_dataset
from cluster.export.request import ExportRequest
from cluster.generation.like import read_spec_manifest
from cluster.generation.pipeline import write_manifest
from cluster.generation.repair import repair
from cluster.shard_work import RAY
from cluster.store.store import open_store
from pcm.errors import InputError
from pcm.records import NULL_FEATURES
from tests.helpers.paths import ROOT
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus

SHARDS = 6  # of 24 captions
ENTRY = {"key": "rows/part-000001.parquet", "rows": 3, "quarantined": 0, "sha256": "0f" * 32, "bytes": 9}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset whose dataset.json lists its shards."""
    folder = tmp_path_factory.mktemp("listed")
    make_dataset_in_process(folder / "data", write_corpus(folder), null_spec(), shard_size=4)
    return folder / "data"


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_LISTED", SHARDS - 1)
    monkeypatch.setattr(documents, "SHARDS_A_PART", 4)


@pytest.fixture
def in_parts(listed: Path, few_are_many: None, tmp_path: Path) -> Path:
    """The same, whose dataset.json names two parts."""
    folder = Path(shutil.copytree(listed, tmp_path / "data"))
    store = open_store(folder)
    store_manifest(store, load_manifest(store))
    return folder


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("manifest/*"))


def test_up_to_the_stated_number_of_shards_nothing_changes(listed: Path, tmp_path: Path) -> None:
    store = open_store(shutil.copytree(listed, tmp_path / "data"))
    before = store.read_bytes(MANIFEST_KEY)
    document = json.loads(before)
    assert len(document["shards"]) == SHARDS and document["schema_version"] < PARTS_VERSION
    store_manifest(store, load_manifest(store))
    assert store.read_bytes(MANIFEST_KEY) == before and not parts(tmp_path / "data")


def test_a_manifest_with_parts_says_what_one_without_says(listed: Path, in_parts: Path) -> None:
    whole, found = load_manifest(open_store(listed)), load_manifest(open_store(in_parts))
    document = json.loads((in_parts / MANIFEST_KEY).read_bytes())
    assert document["schema_version"] == PARTS_VERSION, "releases that know no parts must refuse it"
    assert [part["shards"] for part in document["shards"]["parts"]] == [4, 2]
    assert {part["key"] for part in document["shards"]["parts"]} == {
        f"manifest/{path.name}" for path in parts(in_parts)
    }
    assert isinstance(found.shards, ShardEntries) and isinstance(whole.shards, tuple)
    assert whole == found and found.to_json() == (listed / MANIFEST_KEY).read_bytes()
    assert tuple(found.stored_shards) == whole.stored_shards
    assert found.stored_shards[SHARDS - 1] == found.stored_shards[-1] == whole.stored_shards[-1]
    assert tuple(found.stored_shards[1:5:2]) == whole.stored_shards[1:5:2]


def test_jobs_read_a_dataset_with_parts_as_any_other(listed: Path, in_parts: Path, tmp_path: Path) -> None:
    assert verify(open_store(in_parts)) == verify(open_store(listed)) and verify(open_store(in_parts))["ok"]
    made = {}
    for data in (listed, in_parts):
        out = tmp_path / f"export-{len(made)}"
        export_dataset(open_store(data), open_store(out), ExportRequest(data=str(data), out=str(out), to="webdataset"))
        made[data] = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "export.json"}
    assert made[listed] == made[in_parts] and len(made[listed]) == 2 * SHARDS
    assert len(open_dataset(open_store(in_parts)).shards) == SHARDS
    captions = [[row.caption for row in read_dataset(data, columns=["caption"])] for data in (listed, in_parts)]
    assert captions[0] == captions[1] and len(captions[0]) == 24
    assert read_spec_manifest(str(in_parts / MANIFEST_KEY)).spec == null_spec()


def test_tasks_verify_a_dataset_with_parts(ray_session: None, listed: Path, in_parts: Path) -> None:
    assert verify(open_store(in_parts), run_on=RAY) == verify(open_store(listed))


def test_an_export_of_many_shards_has_parts_too(in_parts: Path, tmp_path: Path) -> None:
    out = open_store(tmp_path / "out")
    export_dataset(open_store(in_parts), out, ExportRequest(data=str(in_parts), out=out.root, to="huggingface"))
    assert isinstance(load_manifest(out).shards, ShardEntries) and len(parts(tmp_path / "out")) == 2


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda part: part.unlink(),
    "damaged: its sha256 is another": lambda part: part.write_bytes(part.read_bytes()[:-1] + b"?"),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_a_part_that_is_damaged_or_missing_is_named_in_one_line_and_repaired(
    in_parts: Path, said: str, few_are_many: None
) -> None:
    before = {path: path.read_bytes() for path in (in_parts / MANIFEST_KEY, *parts(in_parts))}
    victim = parts(in_parts)[1]
    DAMAGES[said](victim)
    line = (
        f"^{in_parts}/dataset.json: damaged \\(manifest/{victim.name}: {said}\\); run jobs.verify DATASET --repair.*$"
    )
    for read in (verify, find_manifest, open_dataset):
        with pytest.raises(InputError, match=line) as raised:
            read(open_store(in_parts))
        assert "\n" not in str(raised.value)

    store = open_store(in_parts)

    def finish(found: Inspection) -> None:
        assert not found.damaged_shards
        write_manifest(store, found.plan, NULL_FEATURES)

    report = repair(
        store,
        draw=finish,
        read_records=lambda plan: iter([]),
        truncation_check=lambda spec: lambda prompt: False,
    )
    assert report["ok"] and report["repaired"] == 0
    assert {path: path.read_bytes() for path in before} == before


def test_other_things_in_place_of_parts_are_refused(in_parts: Path) -> None:
    """A key that leads out of the dataset, a part of another list, a list that is none."""
    document = json.loads((in_parts / MANIFEST_KEY).read_bytes())
    named = document["shards"]["parts"]
    wrong: list[object] = [
        [{**named[0], "key": "../outside.parquet"}, named[1]],
        [{**named[0], "shards": 3}, named[1]],
        [named[0]["key"]],
        None,
    ]
    for each in wrong:
        changed = {**document, "shards": {**document["shards"], "parts": each}}
        (in_parts / MANIFEST_KEY).write_text(json.dumps(changed))
        with pytest.raises(InputError, match=r"/dataset\.json: damaged"):
            load_manifest(open_store(in_parts))


#: Kills itself, as kill -9 does, when it has put so many of the objects of a manifest.
DYING = """
import os, signal, sys
from cluster.dataset import documents
from cluster.dataset.committed import manifest_of, summaries
from cluster.store.store import Store, open_store
from pcm.records import NULL_FEATURES
documents.MOST_LISTED, documents.SHARDS_A_PART = 5, 4
folder, left = sys.argv[1], int(sys.argv[2])
put = Store.write_bytes
def write_bytes(self, key, data):
    global left
    if key.startswith("manifest/") or key == documents.MANIFEST_KEY:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    put(self, key, data)
Store.write_bytes = write_bytes
store = open_store(folder)
plan = documents.load_plan(store)
documents.store_manifest(store, manifest_of(plan, NULL_FEATURES, summaries(store, plan)))
"""


@pytest.mark.parametrize("put", [0, 1, 2])
def test_a_driver_killed_while_it_writes_the_manifest_leaves_an_unfinished_dataset_that_is_finished(
    in_parts: Path, put: int
) -> None:
    wanted, names = find_manifest(open_store(in_parts)), parts(in_parts)
    (in_parts / MANIFEST_KEY).unlink()
    shutil.rmtree(in_parts / "manifest")

    def run(objects: int) -> int:
        command = [sys.executable, "-c", DYING, str(in_parts), str(objects)]
        return subprocess.run(command, cwd=ROOT, timeout=300, check=False).returncode

    assert run(put) == -signal.SIGKILL
    store = open_store(in_parts)
    assert len(parts(in_parts)) == put and find_manifest(store) is None
    assert not verify(store)["complete"]
    assert run(99) == 0
    found = find_manifest(store)
    assert wanted is not None and found is not None and verify(store)["ok"]
    # The process stores what it is given, and adds nothing of its own: neither versions nor settings.
    told = {name: getattr(wanted, name) for name in ("versions", "environments", "made_with")}
    assert replace(found, **told) == wanted
    assert parts(in_parts) == names


def test_entries_are_what_they_were_made_of() -> None:
    entries = [{**ENTRY, "key": shard_key(number), "rows": number} for number in range(9000)]
    entries[7]["weighted_rows"] = 21
    made = ShardEntries.of(entries)
    assert len(made) == 9000 and made == entries and list(made) == entries and made[7] == entries[7]
    assert made[-1] == entries[-1] and made[4090:4100] == entries[4090:4100] and made[::1000] == entries[::1000]
    assert made != entries[1:] and made[1:] != entries[:-1] and not made[:0]
    assert pickle.loads(pickle.dumps(made[5:9])) == entries[5:9]
    again = ShardEntries.of_parts([made.part(0, 5000), made.part(5000, 5000)])
    assert again == made and again.part(0, 5000) == made.part(0, 5000)
    with pytest.raises(IndexError):
        made[9000]
