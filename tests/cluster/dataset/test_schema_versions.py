"""A dataset of schema version 2 is read, finished, mended and rewritten; one of a later version is refused."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.dataset import read_dataset
from cluster.dataset.committed import committed
from cluster.dataset.documents import load_manifest, load_plan
from cluster.dataset.environment import store_environment
from cluster.dataset.keys import MANIFEST_KEY, PLAN_KEY, VOCABULARY_KEY, shard_key
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.plan import make_plan
from cluster.dataset.upgrade import upgrade
from cluster.dataset.verify import Inspection, verify
from cluster.export.export import export_dataset
from cluster.export.request import FORMATS, ExportRequest
from cluster.generation.pipeline import write_manifest
from cluster.generation.regenerate import regenerate
from cluster.generation.repair import repair
from cluster.ingest.text_only import text_only_dataset
from cluster.report.dataset_facts import gather_dataset
from cluster.sources.corpus import read_corpus
from cluster.store.store import Store, open_store
from cluster.training.data.arriving import ArrivingShards
from cluster.training.data.batches import Batch, BatchShape
from cluster.training.data.mixture import DataSource, open_training_sets
from cluster.training.data.selection import RowFilter, all_rows
from cluster.training.data.shard_cache import ShardCache
from cluster.training.data.shuffled import Part, ShardLoader
from pcm.clip.encoder import ClipEncoder
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.text.vocabulary import Vocabulary
from tests.helpers.faulty_generators import RAISES
from tests.helpers.paths import ROOT
from tests.helpers.shards import describe_anew
from tests.helpers.stored import proven
from tests.helpers.tiny_generation import CAPTIONS, draw_in_process, make_dataset_in_process, null_spec, write_corpus

VERSION_2 = ROOT / "tests" / "data" / "dataset_v2"
FINGERPRINT = "945d28007c4a913ba25e25fa7213cc2ded112f52b92323387fe6b2838f1d22be"
CORPUS = [*CAPTIONS[:3], RAISES, *CAPTIONS[3:6], "a\x07b"]


@pytest.fixture
def folder(tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the CLIP of the dataset is, under the name by which its spec knows it."""
    (tmp_path / "tiny-clip").symlink_to(tiny_clip)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def old(folder: Path) -> Store:
    """A copy of the dataset of version 2."""
    return open_store(shutil.copytree(VERSION_2, folder / "old"))


@pytest.fixture
def new(folder: Path) -> Store:
    """Another, upgraded."""
    store = open_store(shutil.copytree(VERSION_2, folder / "new"))
    upgrade(store)
    return store


def patch_types(store: Store) -> set[str]:
    plan = load_plan(store)
    assert plan is not None
    return {
        "bytes" if pa.types.is_fixed_size_binary(pq.read_schema(path).field("patch_features").type) else "lists"
        for path in Path(store.prefix).glob("shards/*.parquet")
    }


def draw(store: Store) -> Callable[[Inspection], None]:
    """What jobs.verify gives to repair, without Ray."""

    def make_again(found: Inspection) -> None:
        committed(store, found.plan).forget(found.damaged_shards)
        write_manifest(store, found.plan, draw_in_process(store, found.plan, found.damaged_shards))

    return make_again


def test_version_2_is_proven_as_it_was(old: Store) -> None:
    assert patch_types(old) == {"lists"} and load_manifest(old).schema_version == 2
    assert proven(old)["fingerprint"] == FINGERPRINT


@pytest.mark.parametrize("lacking", [(), ("made_with",), ("made_with", "environments", "versions")])
def test_a_complete_dataset_stays_as_it_is_when_its_command_runs_again(
    lacking: tuple[str, ...], old: Store, tmp_path: Path
) -> None:
    """One of an earlier release says less of how it was made, and a retry that was killed may have left a machine."""
    new, _, _ = make_dataset_in_process(tmp_path / "null", write_corpus(tmp_path, CORPUS[:2]), null_spec())
    document = json.loads(new.read_bytes(MANIFEST_KEY))
    new.write_bytes(MANIFEST_KEY, document_bytes({key: value for key, value in document.items() if key not in lacking}))
    store_environment(new, {"versions": {"torch": "0"}})
    for store in (old, new):
        before, plan = store.read_bytes(MANIFEST_KEY), load_plan(store)
        assert plan is not None
        assert write_manifest(store, plan, load_manifest(store).features) == load_manifest(store)
        assert store.read_bytes(MANIFEST_KEY) == before
    changed(new, MANIFEST_KEY, quarantined=1)
    assert write_manifest(new, plan, load_manifest(new).features).quarantined == load_manifest(new).quarantined == 0


def test_an_upgrade_keeps_every_row_bit_for_bit_and_the_fingerprint(old: Store) -> None:
    before = list(read_dataset(old.prefix))
    assert upgrade(old) == {"schema_version": 3, "upgraded": 2}
    assert patch_types(old) == {"bytes"}
    plan, manifest = load_plan(old), load_manifest(old)
    assert plan is not None and plan.schema_version == manifest.schema_version == 3
    assert manifest.shard_bytes == sum(old.size(shard["key"]) for shard in manifest.shards)
    assert proven(old)["fingerprint"] == FINGERPRINT
    for one, two in zip(before, read_dataset(old.prefix), strict=True):
        assert (one.sample_id, one.caption, one.image_bytes, one.clip_score) == (
            two.sample_id, two.caption, two.image_bytes, two.clip_score,
        )  # fmt: skip
        for name in ("global_feature", "patch_features"):
            assert getattr(one, name).tobytes() == getattr(two, name).tobytes()
    assert upgrade(old) == {"schema_version": 3, "upgraded": 0}
    assert proven(old)["fingerprint"] == FINGERPRINT


@pytest.mark.parametrize("generated", [False, True])
def test_an_upgrade_may_be_killed_at_any_write_and_run_again(
    generated: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows can be read all the while, verification says what is the matter, and the second run ends it: also where
    a run of jobs.generate came between, which writes what belongs to the old shards."""
    write_bytes = Store.write_bytes
    captions = [row.caption for row in read_dataset(VERSION_2)]
    deaths = 0
    for allowed in range(20):
        store = open_store(shutil.copytree(VERSION_2, folder / f"killed-{allowed}"))
        writes = 0

        def dies(self: Store, key: str, data: bytes, allowed: int = allowed) -> None:
            nonlocal writes
            writes += 1
            if writes > allowed:
                raise KeyboardInterrupt
            write_bytes(self, key, data)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "write_bytes", dies)
            patch.setattr("cluster.dataset.upgrade._SHARDS_AT_ONCE", 1)
            try:
                upgrade(store)
            except KeyboardInterrupt:
                deaths += 1
            else:
                break
        assert [row.caption for row in read_dataset(store.prefix)] == captions
        report = verify(store)
        assert report["fingerprint"] == FINGERPRINT and report["corrupt"] == report["missing"] == 0
        if allowed:
            assert not report["ok"] and any("jobs.verify DATASET --upgrade" in said for said in report["problems"])
        if generated:  # which finds all shards
            plan = load_plan(store)
            assert plan is not None
            write_manifest(store, plan, load_manifest(store).features)
        upgrade(store)
        assert proven(store)["fingerprint"] == FINGERPRINT and patch_types(store) == {"bytes"}
        before, groups = store.read_bytes(MANIFEST_KEY), store.list("progress/")
        assert upgrade(store)["upgraded"] == 0 and store.read_bytes(MANIFEST_KEY) == before
        assert store.list("progress/") == groups, "they are read in place of every shard's statistics"
    assert deaths == 6  # plan.json, twice stats and shard, dataset.json


def test_a_damaged_shard_is_not_upgraded_and_can_be_repaired(old: Store) -> None:
    data = bytearray(old.read_bytes(shard_key(1)))
    data[200] ^= 1
    old.write_bytes(shard_key(1), bytes(data))
    with pytest.raises(InputError, match=r"1 shards are damaged \(such as shards/part-000001.parquet\)"):
        upgrade(old)
    assert old.read_bytes(shard_key(1)) == bytes(data)
    report = repair(old, draw=draw(old), read_records=lambda plan: iter([]), truncation_check=lambda model: len)
    assert report["ok"] and report["fingerprint"] == FINGERPRINT and report["repaired"] == 1
    assert patch_types(old) == {"bytes"}
    assert upgrade(old) == {"schema_version": 3, "upgraded": 0}


def test_an_unfinished_dataset_is_upgraded_and_goes_on(old: Store) -> None:
    old.delete(MANIFEST_KEY)
    old.delete(shard_key(1))
    assert upgrade(old) == {"schema_version": 3, "upgraded": 1}
    plan = load_plan(old)
    assert plan is not None
    write_manifest(old, plan, draw_in_process(old, plan, [1]))
    assert proven(old)["fingerprint"] == FINGERPRINT and patch_types(old) == {"bytes"}


def test_a_resume_finishes_a_dataset_in_its_own_version(old: Store) -> None:
    old.delete(MANIFEST_KEY)
    old.delete(shard_key(1))
    corpus = write_corpus(Path(old.prefix).parent, CORPUS)
    plan = load_plan(old)
    assert plan is not None
    resumed = make_plan(
        old, read_corpus(str(corpus)), plan.spec, corpus="captions.txt", shard_size=4, is_truncated=lambda prompt: False
    )
    assert resumed == plan
    made = committed(old, resumed)
    missing = [shard for shard in range(resumed.num_shards) if shard not in made]
    assert missing == [1]
    made.forget(missing)  # its features may differ in their last bits: another processor made the ones that were there
    write_manifest(old, resumed, draw_in_process(old, resumed, missing))
    assert patch_types(old) == {"lists"} and load_manifest(old).schema_version == 2
    assert proven(old)["fingerprint"] == FINGERPRINT
    assert len(list(read_dataset(old.prefix))) == 6


def test_a_corpus_that_grows_stays_in_its_version(old: Store) -> None:
    corpus = write_corpus(Path(old.prefix).parent, [*CORPUS, CAPTIONS[6]])
    plan = load_plan(old)
    assert plan is not None
    grown = make_plan(
        old, read_corpus(str(corpus)), plan.spec, corpus="captions.txt", shard_size=4, is_truncated=lambda prompt: False
    )
    assert (grown.schema_version, grown.num_shards) == (2, 3)
    write_manifest(old, grown, draw_in_process(old, grown, [2]))
    assert patch_types(old) == {"lists"} and proven(old)["stored"] == 7


@pytest.mark.parametrize("version", [2, 3])
def test_a_quarantined_sample_joins_a_shard_of_either_version(version: int, old: Store, new: Store) -> None:
    store = old if version == 2 else new
    before = {row.sample_id: row for row in read_dataset(store.prefix)}
    plan = load_plan(store)
    assert plan is not None
    committed(store, plan).forget([0])
    features = draw_in_process(store, plan, [0], retry=frozenset({"generator_error"}))
    write_manifest(store, plan, features)
    assert proven(store)["stored"] == 7 and patch_types(store) == {"lists" if version == 2 else "bytes"}
    after = {row.sample_id: row for row in read_dataset(store.prefix)}
    assert after.keys() - before.keys() == {"000000003-00"}
    for name, row in before.items():
        assert row.patch_features is not None
        assert row.patch_features.tobytes() == after[name].patch_features.tobytes()  # type: ignore[union-attr]


def test_a_retry_keeps_columns_of_later_work(new: Store) -> None:
    table = pq.read_table(Path(new.prefix) / shard_key(0))
    table = table.append_column("aesthetic_score", pa.array([1.0, 2.0, 3.0], pa.float32()))
    new.write_bytes(shard_key(0), parquet_bytes(table))
    plan = load_plan(new)
    assert plan is not None
    draw_in_process(new, plan, [0], retry=frozenset({"generator_error"}))
    assert pq.read_table(Path(new.prefix) / shard_key(0))["aesthetic_score"].to_pylist() == [1.0, 2.0, 3.0, None]


def test_repair_makes_a_shard_again_in_the_version_of_the_dataset(old: Store) -> None:
    old.write_bytes(shard_key(0), b"no Parquet")
    report = repair(old, draw=draw(old), read_records=lambda plan: iter([]), truncation_check=lambda model: len)
    # What the generator could not draw then is drawn now.
    assert report["ok"] and (report["stored"], report["quarantined"]) == (7, 1)
    assert patch_types(old) == {"lists"}


def test_one_sample_of_version_2_is_drawn_again(old: Store) -> None:
    assert regenerate(old, "000000000-00")["matches"] is True


def batches(store: Store, epochs: int = 2, **settings: object) -> list[Batch]:
    manifest = load_manifest(store)
    loader = ShardLoader(
        [Part(store, all_rows(manifest), cache=settings.get("cache"))],  # type: ignore[arg-type]
        BatchShape(features=manifest.features, batch_size=4, max_length=8, int8=bool(settings.get("int8"))),
        Vocabulary.from_text(store.read_bytes(VOCABULARY_KEY).decode()),
        seed=3,
        cache_bytes=0,
    )
    return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


def assert_same_batches(ours: list[Batch], theirs: list[Batch]) -> None:
    assert ours and len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        for name in set(Batch.__dataclass_fields__) - {"shards"}:  # which say where each of the two lies
            mine, others = np.asarray(getattr(one, name)), np.asarray(getattr(two, name))
            assert mine.dtype == others.dtype and mine.tobytes() == others.tobytes(), name


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_training_batches_of_both_versions_are_bit_equal(
    int8: bool, cached: bool, old: Store, new: Store, tmp_path: Path
) -> None:
    """So are its losses: nothing else comes from the data."""
    caches = [ShardCache(tmp_path / f"cache-{number}", int8=int8) if cached else None for number in (0, 1)]
    two, three = (batches(store, cache=cache, int8=int8) for store, cache in zip((old, new), caches, strict=True))
    assert {row for batch in two for row in batch.sample_ids} > {"000000000-00", "000000006-00"}
    assert_same_batches(two, three)


def test_the_stream_of_both_versions_is_bit_equal(old: Store, new: Store) -> None:
    def stream(store: Store) -> list[Batch]:
        plan, features = load_plan(store), load_manifest(store).features
        assert plan is not None
        vocabulary = Vocabulary.from_text(store.read_bytes(VOCABULARY_KEY).decode())
        shape = BatchShape(features=features, batch_size=4, max_length=8)
        return list(ArrivingShards(store, plan, RowFilter(seed=0), shape, vocabulary, seed=1).batches())

    assert_same_batches(stream(old), stream(new))


def test_both_versions_train_together(old: Store, new: Store) -> None:
    sets = open_training_sets([DataSource(old.prefix), DataSource(new.prefix, 0.5)])
    assert [each.manifest.schema_version for each in sets] == [2, 3]


def test_exports_of_both_versions_are_the_same(old: Store, new: Store, folder: Path) -> None:
    for to in FORMATS:
        found = []
        for store in (old, new):
            out = open_store(folder / f"{to}-{Path(store.prefix).name}")
            own = {"name": "sd", "max_length": 12} if to == "official" else {}
            export_dataset(store, out, ExportRequest(data=store.root, out=out.root, to=to, workers=2, **own))
            keys = [key for key in out.list() if key not in ("export.json", MANIFEST_KEY)]
            found.append({key: out.read_bytes(key) for key in keys})
        assert found[0].keys() == found[1].keys()
        different = [key for key in found[0] if found[0][key] != found[1][key]]
        assert different == [], to


def test_reports_and_derived_datasets_read_version_2(old: Store, folder: Path) -> None:
    assert gather_dataset(old, seed=0).manifest.stored == 6
    made = text_only_dataset(old, open_store(folder / "text"), ClipEncoder("tiny-clip"))
    assert made.schema_version == 3 and patch_types_of(folder / "text") == {pa.binary(2048)}


def patch_types_of(folder: Path) -> set[pa.DataType]:
    return {pq.read_schema(path).field("patch_features").type for path in folder.glob("shards/*.parquet")}


def changed(store: Store, key: str, **fields: object) -> None:
    store.write_bytes(key, json.dumps(json.loads(store.read_bytes(key)) | fields).encode())


@pytest.mark.parametrize("key", [PLAN_KEY, MANIFEST_KEY])
@pytest.mark.parametrize("version", [1, 4])
def test_another_version_is_refused_in_one_line_and_nothing_is_touched(key: str, version: object, new: Store) -> None:
    changed(new, key, schema_version=version)
    before = {name: new.read_bytes(name) for name in new.list()}
    attempts: list[Callable[[], object]] = [
        lambda: verify(new),
        lambda: upgrade(new),
        lambda: repair(new, draw=draw(new), read_records=lambda plan: iter([]), truncation_check=lambda model: len),
    ]
    if key == MANIFEST_KEY:
        attempts += [lambda: read_dataset(new.prefix), lambda: open_training_sets([DataSource(new.prefix)])]
    for attempt in attempts:
        with pytest.raises(InputError) as caught:
            attempt()
        said = str(caught.value)
        assert f"{key}: dataset schema version {version}, but this package reads versions 2 and 3; use" in said
        assert "\n" not in said
    assert {name: new.read_bytes(name) for name in new.list()} == before


@pytest.mark.parametrize("key", [PLAN_KEY, MANIFEST_KEY])
@pytest.mark.parametrize("later", [{"generator_version": 3}, {"refiner": "a"}])
def test_a_spec_of_a_later_release_is_refused_and_not_written_anew(key: str, later: dict, new: Store) -> None:
    plan, features = load_plan(new), load_manifest(new).features
    assert plan is not None
    changed(new, key, spec=json.loads(new.read_bytes(key))["spec"] | later)
    before = new.read_bytes(key)
    attempts: list[Callable[[], object]] = [
        lambda: verify(new),
        lambda: upgrade(new),
        lambda: repair(new, draw=draw(new), read_records=lambda plan: iter([]), truncation_check=lambda model: len),
    ]
    if key == MANIFEST_KEY:
        attempts.append(lambda: write_manifest(new, plan, features))
    for attempt in attempts:
        with pytest.raises(InputError, match=rf"{key}: .* not known to this release.*; use the release that wrote it"):
            attempt()
    assert new.read_bytes(key) == before


@pytest.mark.parametrize("version", ["3", None, True, 3.0])
def test_a_version_that_is_no_number_is_damage(version: object, new: Store) -> None:
    changed(new, MANIFEST_KEY, schema_version=version)
    with pytest.raises(InputError, match=r"dataset.json: damaged \(schema_version is"):
        load_manifest(new)


def test_fields_and_columns_of_later_work_are_ignored(new: Store) -> None:
    plan, manifest = load_plan(new), load_manifest(new)
    for key in (PLAN_KEY, MANIFEST_KEY):
        changed(new, key, licence="CC0", lineage=[{"from": "elsewhere"}])
    document = json.loads(new.read_bytes(MANIFEST_KEY))
    changed(new, MANIFEST_KEY, features=document["features"] | {"text_dim": 7})
    segments = json.loads(new.read_bytes(PLAN_KEY))["segments"]
    changed(new, PLAN_KEY, segments=[segment | {"note": "first"} for segment in segments])
    assert load_plan(new) == plan and load_manifest(new) == manifest
    table = pq.read_table(io.BytesIO(new.read_bytes(shard_key(0))))
    data = parquet_bytes(table.append_column("aesthetic_score", pa.array(np.ones(len(table), np.float32))))
    new.write_bytes(shard_key(0), data)
    report = verify(new)
    assert report["corrupt"] == report["missing"] == 0 and report["fingerprint"] == FINGERPRINT
    assert all("sha256" in said or "other bytes" in said for said in report["problems"])  # it is another object
    describe_anew(new)
    assert len(list(read_dataset(new.prefix))) == 6


def test_jobs_verify_upgrades(old: Store, call_job) -> None:
    result = call_job("verify", old.prefix, "--upgrade")
    assert result.returncode == 0 and result.summary["ok"] and result.summary["fingerprint"] == FINGERPRINT
    assert (result.summary["schema_version"], result.summary["upgraded"]) == (3, 2)
    both = call_job("verify", old.prefix, "--upgrade", "--repair")
    assert both.returncode == 2 and "give one of the two" in both.stderr
