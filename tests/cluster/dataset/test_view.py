"""Views: rows that point at pictures of other datasets, read, proved and written out like any dataset."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cluster.dataset import read_dataset
from cluster.dataset.derived import claim, claimed_alone, lineage_source
from cluster.dataset.documents import Manifest, OtherSchema, load_manifest
from cluster.dataset.given_features import find_features
from cluster.dataset.keys import LINEAGE_KEY, MANIFEST_KEY, rows_key, shard_key
from cluster.dataset.lineage import Lineage
from cluster.dataset.opened import OpenDataset, open_dataset
from cluster.dataset.parquet import parquet_bytes
from cluster.dataset.rows import read_rows, read_shard
from cluster.dataset.upgrade import upgrade
from cluster.dataset.verify import inspect, verify
from cluster.dataset.view import ViewRows, write_view
from cluster.generation.regenerate import regenerate
from cluster.shard_work import PROCESS, RAY
from cluster.store.store import open_store
from cluster.training.data.batches import BatchShape
from cluster.training.data.mixture import open_training_sets
from cluster.training.data.selection import RowFilter, select_rows
from cluster.training.data.shuffled import Part, ShardLoader
from cluster.training.request import DataSource
from pcm.errors import InputError
from pcm.text.vocabulary import Vocabulary
from tests.helpers.published import make_complete_dataset
from tests.helpers.tiny_dataset import write_dataset

ROWS, SHARD = 40, 12


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("view") / "source", tiny_clip, rows=ROWS, shard_size=SHARD)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("view") / "other", tiny_clip, rows=10, shard_size=4, first=100)


def opened(*places: Path) -> list[OpenDataset]:
    return [open_dataset(open_store(place)) for place in places]


def rows_of(sources: Sequence[OpenDataset], chosen: Sequence[tuple[int, int]], **values: object) -> ViewRows:
    """`chosen`: (source, number of the row among all of it), one for each row of the view."""
    by_source = [
        [(shard, row) for shard, stored in enumerate(source.shards) for row in range(stored.rows)] for source in sources
    ]
    places = [by_source[source][number] for source, number in chosen]
    count = len(chosen)
    given = {
        "sample_id": [f"{number:09d}-00" for number in range(count)],
        "caption": [f"A caption number {number}." for number in range(count)],
        "clip_score": np.linspace(0.1, 0.9, count, dtype=np.float32),
    }
    return ViewRows(
        **(given | values),  # type: ignore[arg-type]
        source=np.array([source for source, _ in chosen]),
        shard=np.array([shard for shard, _ in places]),
        row=np.array([row for _, row in places]),
    )


def lineage(sources: Sequence[OpenDataset], **settings: object) -> Lineage:
    return Lineage(
        method="test", settings=settings, sources=tuple(map(lineage_source, sources)),
        rows_in=sum(source.manifest.stored for source in sources),
    )  # fmt: skip


def make_view(out: Path, places: Sequence[Path], chosen: Sequence[tuple[int, int]], **options: object) -> Manifest:
    sources = opened(*places)
    values = {name: options.pop(name) for name in ("sample_id", "caption", "weight") if name in options}
    return write_view(open_store(out), sources, rows_of(sources, chosen, **values), lineage(sources), **options)  # type: ignore[arg-type]


def everything(place: Path) -> dict[str, tuple]:
    """sample_id -> (caption, picture, score, features) of every row."""
    return {
        row.sample_id: (row.caption, row.image_bytes, row.clip_score, row.global_feature, row.patch_features)  # type: ignore[misc]
        for row in read_dataset(place)
    }


SHUFFLED = [(0, int(number)) for number in np.random.default_rng(3).permutation(ROWS)[:25]]


def test_a_view_gives_the_pictures_that_its_rows_point_at_with_its_own_captions(tmp_path: Path, source: Path) -> None:
    make_view(tmp_path / "view", [source], SHUFFLED)
    found, whole = everything(tmp_path / "view"), list(everything(source).values())
    assert len(found) == len(SHUFFLED)
    for number, (_, row) in enumerate(SHUFFLED):
        caption, picture, score, image, patches = found[f"{number:09d}-00"]
        assert caption == f"A caption number {number}."
        assert score == np.linspace(0.1, 0.9, len(SHUFFLED), dtype=np.float32)[number]
        assert picture == whole[row][1]
        assert np.array_equal(image, whole[row][3]) and np.array_equal(patches, whole[row][4])
    assert not list((tmp_path / "view").rglob("shards/*")), "no picture is copied"


def test_rows_for_training_are_those_of_the_columns(tmp_path: Path, source: Path) -> None:
    manifest = make_view(tmp_path / "view", [source], SHUFFLED)
    store = open_store(tmp_path / "view")
    for shard in manifest.stored_shards:
        table = read_shard(store, shard, ["sample_id", "caption", "global_feature", "patch_features"])
        for numbers in (None, np.arange(1, shard.rows, 2)):
            rows = read_rows(store, shard, numbers, manifest.features)
            kept = np.arange(shard.rows) if numbers is None else numbers
            assert rows.sample_ids.tolist() == table["sample_id"].take(kept).to_pylist()
            whole = read_rows(store, shard, None, manifest.features)
            assert np.array_equal(rows.patch_features, whole.patch_features[kept])
            in_place = read_rows(store, shard, numbers, manifest.features, in_place=True)
            assert np.array_equal(in_place.take(np.arange(len(kept))).patch_features, whole.patch_features[kept])
            assert np.array_equal(rows.global_feature, whole.global_feature[kept])


def test_each_shard_of_pictures_is_read_for_one_shard_of_the_view(tmp_path: Path, source: Path) -> None:
    manifest = make_view(tmp_path / "view", [source], SHUFFLED, shard_rows=16)
    used = []
    for shard in manifest.stored_shards:
        metadata = pq.read_schema(tmp_path / "view" / shard.key).metadata[b"shards"]
        used += [each["key"] for each in json.loads(metadata)]
    assert sorted(used) == [shard_key(number) for number in range(4)]


def test_many_rows_of_one_shard_are_cut(tmp_path: Path, source: Path) -> None:
    chosen = [(0, number % SHARD) for number in range(3 * SHARD)]
    manifest = make_view(tmp_path / "view", [source], chosen, shard_rows=8)
    assert [shard.rows for shard in manifest.stored_shards] == [SHARD, SHARD, SHARD]
    assert verify(open_store(tmp_path / "view"))["ok"]


def test_a_view_of_all_rows_has_the_fingerprint_of_its_source_whatever_the_shards(
    tmp_path: Path, source: Path, tiny_clip: Path
) -> None:
    every = [(0, number) for number in range(ROWS)]
    rows = everything(source)
    same = {"sample_id": list(rows), "caption": [row[0] for row in rows.values()]}
    first = make_view(tmp_path / "one", [source], every, **same)
    cut = write_dataset(tmp_path / "cut", tiny_clip, rows=ROWS, shard_size=7)
    second = make_view(tmp_path / "two", [cut], every, **same)
    assert first.fingerprint == second.fingerprint == verify(open_store(tmp_path / "two"))["fingerprint"]
    assert first.fingerprint != make_view(tmp_path / "other", [source], every).fingerprint


def test_a_view_of_a_view_points_at_the_pictures_themselves(tmp_path: Path, source: Path, other: Path) -> None:
    make_view(tmp_path / "a", [source, other], [(0, 5), (1, 2), (1, 9), (0, 30)])
    manifest = make_view(tmp_path / "b", [tmp_path / "a", source], [(0, 0), (0, 3), (1, 7)])
    assert {store.path for store in manifest.pictures} == {str(source), str(other)}
    shutil.rmtree(tmp_path / "a")
    assert verify(open_store(tmp_path / "b"))["ok"]
    assert manifest.lineage is not None and manifest.lineage.sources[0].lineage is not None


@pytest.mark.parametrize("materialise", [False, True])
def test_verify_proves_a_derived_dataset(tmp_path: Path, source: Path, other: Path, materialise: bool) -> None:
    manifest = make_view(tmp_path / "view", [source, other], [*SHUFFLED, (1, 3)], materialise=materialise)
    found = verify(open_store(tmp_path / "view"))
    assert found["ok"] and found["complete"], found
    assert (found["expected"], found["stored"], found["fingerprint"]) == (26, 26, manifest.fingerprint)


@pytest.mark.parametrize("materialise", [False, True])
def test_ray_gives_the_report_of_one_process(
    ray_session: None, tmp_path: Path, source: Path, other: Path, materialise: bool
) -> None:
    source = Path(shutil.copytree(source, tmp_path / "source"))  # to damage
    manifest = make_view(tmp_path / "view", [source, other], [*SHUFFLED, (1, 3)], materialise=materialise)
    store = open_store(tmp_path / "view")
    assert verify(store, run_on=RAY) == verify(store, run_on=PROCESS)
    shard = (tmp_path / "view" if materialise else source) / shard_key(0)
    shard.write_bytes(shard.read_bytes()[:-9])
    found = verify(store, run_on=RAY)
    assert found == verify(store, run_on=PROCESS) and not found["ok"] and found["fingerprint"] != manifest.fingerprint
    assert manifest.schema_version == (3 if materialise else 4)


def test_a_view_written_out_is_a_dataset_of_its_own_with_the_same_rows(
    tmp_path: Path, other: Path, source: Path
) -> None:
    chosen = [(1, 3), *SHUFFLED]
    view = make_view(tmp_path / "view", [source, other], chosen)
    written = make_view(tmp_path / "written", [source, other], chosen, materialise=True)
    assert written.fingerprint == view.fingerprint
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "written", moved)
    ours, theirs = everything(moved), everything(tmp_path / "view")
    assert ours.keys() == theirs.keys()
    for sample, row in ours.items():
        assert all(np.array_equal(one, two) for one, two in zip(row, theirs[sample], strict=True))


def test_a_view_written_out_has_no_more_pictures_a_shard_than_it_can_hold(
    tmp_path: Path, source: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rows as the largest shard has may be large pictures of another source. Views without them stay."""
    both = [(0, number) for number in range(ROWS)] + [(1, number) for number in range(10)]
    view = make_view(tmp_path / "view", [source, other], both)
    assert [shard.rows for shard in view.stored_shards] == [12, 12, 12, 12, 2]
    monkeypatch.setattr("cluster.dataset.view.MAX_SHARD_BYTES", 1)
    assert make_view(tmp_path / "again", [source, other], both).stored_shards == view.stored_shards
    written = make_view(tmp_path / "written", [source, other], both, materialise=True)
    assert [shard.rows for shard in written.stored_shards] == [12, 12, 12, 4, 4, 4, 2]
    assert written.fingerprint == view.fingerprint == verify(open_store(tmp_path / "written"))["fingerprint"]
    monkeypatch.setattr("cluster.dataset.rows.MAX_SHARD_BYTES", 100)
    with pytest.raises(
        InputError, match=r"the pictures of one of its shards have [\d,]+ bytes, at most 100 can be read"
    ):
        make_view(tmp_path / "more", [source, other], both, materialise=True)


def test_a_view_is_written_without_reading_features(tmp_path: Path, tiny_clip: Path) -> None:
    """They are nearly all of a dataset's bytes. That they are no longer what was stored is seen where they are read."""
    mine = write_dataset(tmp_path / "mine", tiny_clip, rows=10, shard_size=5)
    shard = mine / shard_key(0)
    group = pq.ParquetFile(shard).metadata.row_group(0)
    columns = map(group.column, range(group.num_columns))
    (column,) = (each for each in columns if each.path_in_schema == "patch_features")
    data = bytearray(shard.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size // 2] = bytes(column.total_compressed_size // 2)
    shard.write_bytes(data)
    manifest = make_view(tmp_path / "view", [mine], [(0, 1), (0, 8)])
    assert manifest.stored == 2
    with pytest.raises(InputError, match="not the shard that the dataset speaks of"):
        everything(tmp_path / "view")
    assert verify(open_store(tmp_path / "view"))["corrupt"] == 1
    with pytest.raises(InputError, match="not the shard that the dataset speaks of"):
        make_view(tmp_path / "written", [mine], [(0, 1)], materialise=True)


def test_verify_names_a_source_that_has_changed_or_is_gone(tmp_path: Path, tiny_clip: Path, source: Path) -> None:
    mine = write_dataset(tmp_path / "mine", tiny_clip, rows=10, shard_size=5)
    make_view(tmp_path / "view", [source, mine], [(0, 1), (1, 2), (1, 8)])
    shutil.copy(mine / shard_key(1), mine / shard_key(0))
    found = verify(open_store(tmp_path / "view"))
    assert not found["ok"] and (found["missing"], found["corrupt"]) == (0, 1)
    assert str(mine) in found["problems"][0] and "have changed" in found["problems"][0]
    shutil.rmtree(mine)
    found = verify(open_store(tmp_path / "view"))
    assert not found["ok"] and (found["missing"], found["corrupt"]) == (2, 0)
    assert str(mine) in found["problems"][0] and "are gone" in found["problems"][0]
    with pytest.raises(InputError, match=r"a view, whose pictures are there: .*mine/shards/part-000000"):
        everything(tmp_path / "view")


def test_verify_finds_rows_that_are_gone_or_others(tmp_path: Path, source: Path) -> None:
    make_view(tmp_path / "view", [source], SHUFFLED, shard_rows=4)
    store = open_store(tmp_path / "view")
    shutil.copy(tmp_path / "view" / rows_key(1), tmp_path / "view" / rows_key(0))
    assert verify(store)["corrupt"] and verify(store)["problems"]
    (tmp_path / "view" / rows_key(0)).unlink()
    found = verify(store)
    assert found["missing"] and not found["ok"]


def test_a_release_without_views_refuses_one_by_its_version(tmp_path: Path, source: Path) -> None:
    make_view(tmp_path / "view", [source], SHUFFLED)
    document = json.loads((tmp_path / "view" / MANIFEST_KEY).read_bytes())
    assert document["schema_version"] == 4 and document["kind"] == "view"
    (tmp_path / "view" / MANIFEST_KEY).write_text(json.dumps(document | {"kind": "dataset"}))
    with pytest.raises(InputError, match="dataset schema version 4, but this package reads versions 2 and 3"):
        load_manifest(open_store(tmp_path / "view"))
    (tmp_path / "view" / MANIFEST_KEY).write_text(json.dumps(document | {"schema_version": 3}))
    with pytest.raises(InputError, match=r"dataset\.json: damaged .* rerun the command that made it"):
        load_manifest(open_store(tmp_path / "view"))
    make_view(tmp_path / "view", [source], SHUFFLED)
    assert verify(open_store(tmp_path / "view"))["ok"]


def test_what_was_interrupted_is_finished_by_the_same_rows_alone(tmp_path: Path, source: Path) -> None:
    whole = make_view(tmp_path / "view", [source], SHUFFLED, shard_rows=4)
    (tmp_path / "view" / MANIFEST_KEY).unlink()
    (tmp_path / "view" / rows_key(1)).unlink()
    assert make_view(tmp_path / "view", [source], SHUFFLED, shard_rows=4) == whole
    (tmp_path / "view" / MANIFEST_KEY).unlink()
    with pytest.raises(InputError, match="was begun with another shard_rows"):
        make_view(tmp_path / "view", [source], SHUFFLED, shard_rows=5)
    (tmp_path / "view" / LINEAGE_KEY).unlink()
    with pytest.raises(InputError, match="not empty"):
        make_view(tmp_path / "view", [source], SHUFFLED)


def test_other_settings_are_named_and_a_list_that_moved_is_the_same(tmp_path: Path, source: Path) -> None:
    def go_on(*, count: int, path: str = "/a/marks.jsonl", sha256: str = "1") -> None:
        settings = {"subset": {"count": count, "seed": 7}, "keep_list": {"path": path, "sha256": sha256}}
        claim(open_store(tmp_path / "view"), lineage(opened(source), **settings))

    go_on(count=3)
    go_on(count=3, path="/b/marks.jsonl")
    with pytest.raises(InputError, match=r"begun with other settings \(subset\.count: 3 -> 4\); use the same"):
        go_on(count=4)
    with pytest.raises(InputError, match=r"\(keep_list\.sha256: '1' -> '2'\)"):
        go_on(count=3, path="/b/marks.jsonl", sha256="2")


def test_training_takes_a_row_as_often_as_its_weight_says(tmp_path: Path, source: Path) -> None:
    weight = np.array([1 + number % 3 for number in range(len(SHUFFLED))])
    make_view(tmp_path / "view", [source], SHUFFLED, weight=weight)
    (found,) = open_training_sets([DataSource(str(tmp_path / "view"))])
    selection, _ = select_rows(found.store, found.shards, RowFilter(seed=1))
    whole = everything(tmp_path / "view")
    shape = BatchShape(features=found.manifest.features, batch_size=4, max_length=8)
    vocabulary = Vocabulary.from_text((tmp_path / "view" / "vocabulary.txt").read_text())
    for dataset_weight in (1.0, 2.0):
        loader = ShardLoader([Part(found.store, selection, dataset_weight)], shape, vocabulary, seed=1)
        seen = [sample for batch in loader.epoch(0) for sample in batch.sample_ids if sample]
        assert len(seen) == loader.rows_per_epoch == round(weight.sum() * dataset_weight)
        if dataset_weight == 1:
            assert {sample: seen.count(sample) for sample in seen} == {
                f"{number:09d}-00": int(each) for number, each in enumerate(weight)
            }
            for batch in loader.epoch(0):
                for place, sample in enumerate(batch.sample_ids):
                    if sample:
                        assert np.array_equal(batch.patch_features[place], whole[sample][4])
                        assert batch.clip_score[place] == whole[sample][2]


def test_rows_that_cannot_be_are_refused(tmp_path: Path, source: Path) -> None:
    sources = opened(source)
    rows = rows_of(sources, [(0, 1), (0, 2)])
    for wrong in ({"sample_id": ["a", "a"]}, {"weight": np.array([0, 1])}, {"row": np.array([99, 0])}):
        with pytest.raises(ValueError, match=r"occurs twice|below 1|beyond its shard"):
            write_view(open_store(tmp_path), sources, ViewRows(**(vars(rows) | wrong)), lineage(sources))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("materialise", [False, True])
def test_shards_of_an_interrupted_run_that_found_other_rows_are_replaced(
    tmp_path: Path, source: Path, materialise: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As a GPU finds others than a CPU: other scores, and fewer rows."""
    make_view(tmp_path / "view", [source], SHUFFLED, materialise=materialise)
    before = open_store(tmp_path / "view").list()
    (tmp_path / "view" / MANIFEST_KEY).unlink()
    fewer = [(0, row) for _, row in SHUFFLED if row < 2 * SHARD]
    made = make_view(tmp_path / "view", [source], fewer, materialise=materialise)
    whole = make_view(tmp_path / "whole", [source], fewer, materialise=materialise)
    there, fresh = open_store(tmp_path / "view"), open_store(tmp_path / "whole")
    assert verify(there)["ok"] and made.fingerprint == whole.fingerprint
    assert len(there.list()) < len(before) and there.list() == fresh.list()
    parts = [shard["key"] for shard in made.shards]
    assert [key for key in parts if there.read_bytes(key) != fresh.read_bytes(key)] == []
    assert "shards of an earlier run hold other rows" in caplog.text


@pytest.mark.parametrize("change", ["clip_score", "image", "damaged"])
def test_a_shard_with_pictures_stays_if_it_is_of_the_same_rows_and_pictures(
    tmp_path: Path, source: Path, change: str
) -> None:
    made = make_view(tmp_path / "view", [source], SHUFFLED, materialise=True)
    first, *others = [tmp_path / "view" / shard["key"] for shard in made.shards]
    written = first.read_bytes()
    table = pq.read_table(first)
    if change == "damaged":
        first.write_bytes(written[:-9])
    else:
        number = table.schema.get_field_index(change)
        first.write_bytes(parquet_bytes(table.set_column(number, table.field(number), table[change][::-1])))
    assert first.read_bytes() != written
    (tmp_path / "view" / MANIFEST_KEY).unlink()
    times = [path.stat().st_mtime_ns for path in others]
    assert make_view(tmp_path / "view", [source], SHUFFLED, materialise=True) == made
    assert first.read_bytes() == written
    assert [path.stat().st_mtime_ns for path in others] == times


@pytest.mark.parametrize("materialise", [False, True])
def test_given_features_are_a_views(tmp_path: Path, source: Path, materialise: bool) -> None:
    make_view(tmp_path / "view", [source], SHUFFLED, materialise=materialise)
    given = find_features(str(tmp_path / "view"))
    whole = everything(tmp_path / "view")
    assert set(given.names) == set(whole)
    for name, found in zip(given.names, given.read(range(len(given.names))), strict=True):
        assert np.array_equal(found[1], whole[name][4])  # type: ignore[index]


def test_a_view_of_a_later_release_is_not_written_anew(tmp_path: Path, source: Path) -> None:
    make_view(tmp_path / "view", [source], SHUFFLED)
    manifest = tmp_path / "view" / MANIFEST_KEY
    document = json.loads(manifest.read_text())
    document["spec"]["generator"]["of_later"] = 1
    manifest.write_text(json.dumps(document))
    with pytest.raises(OtherSchema, match="'of_later': not known to this release"):
        make_view(tmp_path / "view", [source], SHUFFLED)
    assert json.loads(manifest.read_text()) == document


def test_a_view_can_be_neither_repaired_nor_upgraded_nor_drawn_again(tmp_path: Path, source: Path) -> None:
    make_view(tmp_path / "view", [source], SHUFFLED)
    again = partial(regenerate, sample_id="000000000-00")
    acts = {"repaired": inspect, "upgraded": upgrade, "drawn again": again}
    for what, act in acts.items():
        with pytest.raises(InputError, match=f"a derived dataset cannot be {what}"):
            act(open_store(tmp_path / "view"))
    (tmp_path / "view" / MANIFEST_KEY).unlink()
    for act in acts.values():
        with pytest.raises(InputError, match="a derived dataset that was interrupted"):
            act(open_store(tmp_path / "view"))


def test_the_shards_of_an_unfinished_dataset_are_pinned_for_all_workers(
    tmp_path: Path, tiny_clip: Path, tiny_t2i: Path
) -> None:
    store, *_ = make_complete_dataset(tmp_path / "data", t2i=tiny_t2i, clip=tiny_clip)
    late = store.read_bytes(shard_key(1))
    store.delete(MANIFEST_KEY)
    store.delete(shard_key(1))
    with pytest.raises(InputError, match="or add --unfinished to use the shards that are there"):
        open_training_sets([DataSource(store.root)])
    (found,) = open_training_sets([DataSource(store.root)], unfinished=True)
    assert found.description()["unfinished_shards"] == len(found.shards) == 2
    assert found.extent.startswith("2 of ")
    store.write_bytes(shard_key(1), late)
    (worker,) = open_training_sets([DataSource(store.root, manifest=found.pinned)])
    assert worker.manifest == found.manifest and worker.description() == found.description()
    (now,) = open_training_sets([DataSource(store.root)], unfinished=True)
    assert now.description()["sha256"] != found.description()["sha256"] and len(now.shards) == 3


def test_of_a_view_whose_check_fails_nothing_stays_but_what_was_begun_before(tmp_path: Path, source: Path) -> None:
    """Where no other node sees its place, say."""

    def refuse() -> None:
        assert (tmp_path / "view" / LINEAGE_KEY).exists(), "by this the nodes are asked"
        raise InputError("a folder of one machine")

    asked, out = lineage(opened(source)), open_store(tmp_path / "view")
    with pytest.raises(InputError, match="a folder of one machine"):
        claim(out, asked, check=refuse)
    assert not out.list()
    assert claim(out, asked) is None and out.list() == [LINEAGE_KEY]
    with pytest.raises(InputError, match="a folder of one machine"):
        claim(out, asked, check=refuse)
    assert out.list() == [LINEAGE_KEY]


def test_a_view_that_another_job_has_begun_meanwhile_is_left_to_it(tmp_path: Path, source: Path) -> None:
    """One of another cluster, which found lineage.json there."""
    asked, out = lineage(opened(source)), open_store(tmp_path / "view")

    def refuse() -> None:
        assert claim(out, asked) is None
        out.write_bytes("refining/work", b"")
        raise InputError("a folder of one machine")

    with pytest.raises(InputError, match="a folder of one machine"):
        claim(out, asked, check=refuse)
    assert out.list() == [LINEAGE_KEY, "refining/work"] and claim(out, asked) is None


def test_a_view_is_not_begun_where_ray_does_not_start(tmp_path: Path, source: Path) -> None:
    """So another job that has begun it keeps what it began with."""
    asked, out = lineage(opened(source)), open_store(tmp_path / "view")

    def fail() -> None:
        assert not out.list()
        assert claim(out, asked) is None  # the other job
        raise InputError("Ray did not start")

    with pytest.raises(InputError, match="Ray did not start"), claimed_alone(out, asked, join=fail, check=fail):
        pass
    assert out.list() == [LINEAGE_KEY]
