"""The index of a thousand shards' rows saves requests, and is believed only where it is of these very shards."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest

from cluster.dataset.committed import committed
from cluster.dataset.documents import StoredShard, load_manifest, load_plan
from cluster.dataset.keys import row_index_key, shard_key
from cluster.dataset.row_index import caption_digests, row_index, store_row_index
from cluster.dataset.rows import read_shard
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.write import WriteShard
from cluster.store.store import Store, open_store
from pcm.errors import StoreFailure
from tests.helpers.published import make_complete_dataset
from tests.helpers.tiny_dataset import write_dataset

ROWS = 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    return write_dataset(tmp_path_factory.mktemp("index") / "data", tiny_clip, rows=ROWS, shard_size=6)


@pytest.fixture
def store(source: Path, tmp_path: Path) -> Store:
    """A copy to change."""
    shutil.copytree(source, tmp_path / "data")
    return open_store(tmp_path / "data")


def shards_of(store: Store) -> tuple[StoredShard, ...]:
    return load_manifest(store).stored_shards


def index_of(store: Store, shards: tuple[StoredShard, ...] | None = None, **options: bool) -> pa.Table:
    with ThreadPoolExecutor(2) as pool:
        return row_index(store, 0, shards or shards_of(store), pool, **options)


def asked_of(work: Callable[[], object]) -> list[str]:
    """The keys of objects that are read whole or opened."""
    asked: list[str] = []

    def recorded(name: str) -> Callable:
        original = getattr(Store, name)
        return lambda self, key="", *args, **named: (asked.append(key), original(self, key, *args, **named))[1]

    names = ("read_bytes", "open")
    with patch.multiple(Store, **{name: recorded(name) for name in names}):
        work()
    return asked


def test_the_index_says_of_every_row_what_its_shard_says(store: Store) -> None:
    tables = [read_shard(store, shard, ["caption", "clip_score"]) for shard in shards_of(store)]
    captions = [caption for table in tables for caption in table["caption"].to_pylist()]
    for _ in range(2):  # made, then read
        index = index_of(store)
        np.testing.assert_array_equal(index["caption"].to_numpy(), caption_digests(captions))
        np.testing.assert_array_equal(index["clip_score"].to_numpy(), pa.concat_tables(tables)["clip_score"].to_numpy())
        assert index["weight"].to_pylist() == [1] * ROWS


def test_digests_are_of_the_words_alone() -> None:
    same = caption_digests(["A dog  on\tgrass", "a dog on grass ", "a dog on grass."])
    assert same[0] == same[1] != same[2] and same.dtype == np.uint64


def test_it_is_made_once_and_costs_one_request_then(store: Store) -> None:
    shards = shards_of(store)
    index_of(store)
    assert asked_of(lambda: index_of(store, shards)) == [row_index_key(0)]


def flipped(data: bytes) -> bytes:
    place = len(data) // 3  # among the digests
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[: len(data) // 2],
    "a bit flipped": flipped,
    "empty": lambda data: b"",
    "no Parquet": lambda data: bytes(range(256)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_again(damage: str, store: Store) -> None:
    index, intact = index_of(store), store.read_bytes(row_index_key(0))
    store.write_bytes(row_index_key(0), DAMAGES[damage](intact))
    assert index_of(store).equals(index)
    assert store.read_bytes(row_index_key(0)) == intact


def test_an_index_of_other_shards_is_not_believed(store: Store) -> None:
    """As many rows in as many shards, other checksums: a shard was drawn again, or this is another dataset's."""
    shards, index = shards_of(store), index_of(store)
    others = (dataclasses.replace(shards[0], sha256="0" * 64), *shards[1:])
    lies = index.set_column(0, "caption", pa.array(np.zeros(ROWS, np.uint64)))
    store_row_index(store, 0, others, lies)
    assert index_of(store).equals(index)


def test_an_index_with_other_columns_is_made_again(store: Store) -> None:
    index = index_of(store)
    for wrong in (
        index.drop_columns("weight"),
        index.slice(1),
        index.set_column(2, "weight", pa.nulls(ROWS, pa.int32())),
    ):
        store_row_index(store, 0, shards_of(store), wrong)
        assert index_of(store).equals(index)


def test_a_dataset_that_cannot_be_written_to_is_read_all_the_same(store: Store) -> None:
    def refused(self: Store, key: str, data: bytes) -> None:
        raise StoreFailure(f"{key}: access denied")

    with patch.object(Store, "write_bytes", refused):
        assert len(index_of(store)) == ROWS
    assert len(index_of(store, keep=False)) == ROWS and not store.exists(row_index_key(0))


def test_the_driver_writes_the_index_of_a_group_that_it_has_made(
    tmp_path: Path, tiny_clip: Path, tiny_t2i: Path
) -> None:
    store, plan, manifest = make_complete_dataset(tmp_path / "data", t2i=tiny_t2i, clip=tiny_clip)
    made_of_shards = index_of(store)
    bytes_of_shards = store.read_bytes(row_index_key(0))
    assert manifest.stored == len(made_of_shards) > 0
    store.delete(row_index_key(0))
    for shard in range(plan.num_shards):
        store.delete(shard_key(shard))
    on_store = committed(store, plan)
    drawing, featurise = DrawShard(store, plan.spec), FeaturiseShard(plan.spec.clip)
    write = WriteShard(store, plan.schema_version)
    for shard in reversed(range(plan.num_shards)):
        assert not store.exists(row_index_key(0))
        block = write(featurise(drawing(pa.table({"shard": [shard], "part": [plan.part_key(shard)]}))))
        on_store.add(json.loads(block["stats"][0].as_py()))
    assert load_plan(store) == plan and store.read_bytes(row_index_key(0)) == bytes_of_shards
