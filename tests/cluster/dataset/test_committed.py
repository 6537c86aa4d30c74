"""Resuming finds what is committed; group objects save requests and are believed only where they can be."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from cluster.dataset import committed as committed_module
from cluster.dataset.committed import committed, load_group, num_groups
from cluster.dataset.documents import Plan, load_manifest
from cluster.dataset.keys import MANIFEST_KEY, group_key, shard_key, stats_key
from cluster.dataset.verify import verify
from cluster.generation.pipeline import write_manifest
from cluster.store.store import Store, open_store
from pcm.errors import InputError
from pcm.records import NULL_FEATURES
from tests.helpers.tiny_generation import (
    draw_in_process,
    make_dataset,
    make_dataset_in_process,
    null_spec,
    plan_dataset,
    write_corpus,
)

CAPTIONS = [f"caption number {index}" for index in range(18)]
SHARDS = 9


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every group beyond the first would need a thousand shards: here all are believed as in a large dataset."""
    monkeypatch.setattr(committed_module, "LISTED_GROUPS", 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_dataset_in_process(folder / "data", write_corpus(folder, CAPTIONS), null_spec(), shard_size=2)
    return folder


@pytest.fixture
def dataset(finished: Path, tmp_path: Path) -> tuple[Store, Plan]:
    """A copy to change."""
    shutil.copytree(finished / "data", tmp_path / "data")
    return plan_dataset(tmp_path / "data", finished / "captions.txt", null_spec(), shard_size=2)


def missing(store: Store, plan: Plan) -> list[int]:
    found = committed(store, plan)
    return [shard for shard in range(plan.num_shards) if shard not in found]


def requests_of(work: Callable[[], object]) -> list[str]:
    """What a piece of work asks of the store: the operation and the folder of the key."""
    asked = []

    def recorded(name: str) -> Callable:
        original = getattr(Store, name)

        def operation(self: Store, key: str, *args: object) -> object:
            asked.append(f"{name} {key.partition('/')[0]}")
            return original(self, key, *args)

        return operation

    names = ("read_bytes", "write_bytes", "exists", "size", "list", "delete")
    with patch.multiple(Store, **{name: recorded(name) for name in names}):
        work()
    return asked


def test_a_whole_group_costs_one_request(dataset: tuple[Store, Plan]) -> None:
    store, plan = dataset
    assert requests_of(lambda: missing(store, plan)) == ["read_bytes progress"]
    idle = requests_of(lambda: write_manifest(store, plan, NULL_FEATURES))
    machines = ["list environments", "read_bytes environments"]  # one kind of machine has drawn
    made_with = ["read_bytes concepts.json", "read_bytes nouns.json"]  # where somebody named them
    assert idle == [*machines, "read_bytes progress", *made_with, "read_bytes dataset.json"]
    store.delete(MANIFEST_KEY)
    manifest = requests_of(lambda: write_manifest(store, plan, NULL_FEATURES))
    assert manifest == [*idle, "read_bytes plan.json", "write_bytes dataset.json"]


def test_a_group_that_is_not_whole_is_listed(dataset: tuple[Store, Plan]) -> None:
    store, plan = dataset
    store.delete(group_key(0))
    store.delete(shard_key(3))
    assert missing(store, plan) == [3]
    assert requests_of(lambda: missing(store, plan)) == ["read_bytes progress", "list shards"]


def test_few_groups_are_listed_all_the_same_and_a_lost_shard_is_found(
    dataset: tuple[Store, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan = dataset
    store.delete(shard_key(3))
    assert missing(store, plan) == [], "a large dataset believes its group object"
    monkeypatch.setattr(committed_module, "LISTED_GROUPS", 16)
    assert missing(store, plan) == [3]


def test_a_group_is_written_with_its_last_shard(finished: Path, tmp_path: Path) -> None:
    store, plan = plan_dataset(tmp_path / "data", finished / "captions.txt", null_spec(), shard_size=2)
    draw_in_process(store, plan, range(4))  # by a driver that died
    found = committed(store, plan)
    draw_in_process(store, plan, range(4, SHARDS))
    for shard in range(SHARDS - 1, 3, -1):
        assert not found.complete and load_group(store, plan, 0) is None
        found.add(json.loads(store.read_bytes(stats_key(shard))))
    assert found.complete and num_groups(plan) == 1
    whole = open_store(finished / "data")
    assert load_group(store, plan, 0) == load_group(whole, plan, 0)
    assert write_manifest(store, plan, NULL_FEATURES) == dataclasses.replace(load_manifest(whole), corpus=plan.corpus)


def change(store: Store, alter: Callable[[dict], object]) -> None:
    document = json.loads(store.read_bytes(group_key(0)))
    alter(document)
    store.write_bytes(group_key(0), json.dumps(document).encode())


DAMAGES: dict[str, Callable[[Store], object]] = {
    "gone": lambda store: store.delete(group_key(0)),
    "cut short": lambda store: store.write_bytes(group_key(0), store.read_bytes(group_key(0))[:300]),
    "no text": lambda store: store.write_bytes(group_key(0), bytes(range(256))),
    "no object": lambda store: store.write_bytes(group_key(0), b"[1]"),
    "of another plan": lambda store: change(store, lambda group: group.update(plan="0" * 64)),
    "a shard too few": lambda store: change(store, lambda group: group["shards"].pop()),
    "a shard twice": lambda store: change(store, lambda group: group["shards"].__setitem__(0, group["shards"][1])),
    "other counts": lambda store: change(store, lambda group: group["shards"][0].update(successes=7)),
    "other types": lambda store: change(store, lambda group: group["shards"][0].update(bytes="many")),
    "a field gone": lambda store: change(store, lambda group: group["shards"][0].pop("sha256")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_group_object_that_cannot_be_believed_is_made_again(damage: str, dataset: tuple[Store, Plan]) -> None:
    store, plan = dataset
    group, manifest = store.read_bytes(group_key(0)), store.read_bytes(MANIFEST_KEY)
    DAMAGES[damage](store)
    store.delete(shard_key(5))
    assert missing(store, plan) == [5], "it says nothing of a shard"
    draw_in_process(store, plan, [5])
    write_manifest(store, plan, NULL_FEATURES)
    assert (store.read_bytes(group_key(0)), store.read_bytes(MANIFEST_KEY)) == (group, manifest)
    assert verify(store)["ok"]


def test_a_group_object_of_another_dataset_is_not_believed(dataset: tuple[Store, Plan], tmp_path: Path) -> None:
    """Same captions and shards, another guidance: its numbers look right and are not."""
    store, plan = dataset
    other = dataclasses.replace(plan, spec=null_spec(guidance_scale=1.0))
    assert load_group(store, plan, 0) is not None and load_group(store, other, 0) is None
    appended = dataclasses.replace(plan.segments[0], corpus_fingerprint="0" * 64)
    assert load_group(store, dataclasses.replace(plan, segments=(appended,)), 0) is None


def test_verification_finds_a_group_object_that_lies(dataset: tuple[Store, Plan]) -> None:
    store, _ = dataset
    store.delete(shard_key(3))
    problems = " | ".join(verify(store)["problems"])
    assert f"{shard_key(3)}: missing" in problems and f"{group_key(0)}: {shard_key(3)} is not there" in problems


def test_verification_finds_a_group_object_that_speaks_of_other_bytes(dataset: tuple[Store, Plan]) -> None:
    store, _ = dataset
    change(store, lambda group: group["shards"][4].update(sha256="0" * 64))
    report = verify(store)
    assert not report["ok"] and report["problems"] == [f"{group_key(0)}: {shard_key(4)} is another one"]


@pytest.mark.parametrize("damage", ["gone", "half", "another shard's"])
def test_a_manifest_is_not_made_from_damaged_statistics(damage: str, dataset: tuple[Store, Plan]) -> None:
    store, plan = dataset
    store.delete(group_key(0))
    data = store.read_bytes(stats_key(2))
    store.delete(stats_key(2))
    if damage != "gone":
        store.write_bytes(stats_key(2), data[:50] if damage == "half" else store.read_bytes(stats_key(1)))
    with pytest.raises(InputError, match=r"stats/part-000002.json: (missing|damaged).*--repair"):
        write_manifest(store, plan, NULL_FEATURES)


def test_shards_to_be_made_again_count_as_missing_and_their_group_is_forgotten_first(
    dataset: tuple[Store, Plan],
) -> None:
    store, plan = dataset
    found = committed(store, plan)
    found.forget([2, 7])
    assert [shard for shard in range(SHARDS) if shard not in found] == [2, 7]
    assert not store.exists(group_key(0)), "were this run to die, the next would read the statistics"


def test_a_manifest_is_left_to_the_run_that_planned_more(dataset: tuple[Store, Plan], tmp_path: Path) -> None:
    store, plan = dataset
    corpus = write_corpus(tmp_path, [*CAPTIONS, "a new one"])
    before = store.read_bytes(MANIFEST_KEY)
    _, grown = plan_dataset(store.root, corpus, null_spec(), shard_size=2)
    store.write_bytes(MANIFEST_KEY, b"of the run that grew it")
    write_manifest(store, plan, NULL_FEATURES)
    assert store.read_bytes(MANIFEST_KEY) == b"of the run that grew it" != before
    assert grown.num_shards == SHARDS + 1


@pytest.mark.slow
def test_more_shards_than_an_object_holds_turns_are_made_all_the_same(
    finished: Path, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.ray_data_internals.ROWS_AN_OBJECT", 4)
    made = make_dataset(tmp_path / "data", finished / "captions.txt", null_spec(), shard_size=2)
    assert made.result.generated == len(CAPTIONS)
    assert verify(made.store)["fingerprint"] == verify(open_store(finished / "data"))["fingerprint"]
    assert load_group(made.store, made.plan, 0) is not None, "written by the driver as the group became whole"
