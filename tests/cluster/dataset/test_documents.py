"""Names of a dataset's objects: part of the contract, because other tools read them."""

from functools import partial

import pytest

from cluster.dataset.keys import plan_part_key, quarantine_key, shard_key, shard_number, stats_key

#: Of datasets that were planned by one run at a time; a segment has its own folder now.
plan_part = partial(plan_part_key, "plan")


def test_a_shards_objects_are_named_by_its_number() -> None:
    assert [key(7) for key in (plan_part, shard_key, quarantine_key, stats_key)] == [
        "plan/part-000007.parquet", "shards/part-000007.parquet", "quarantine/part-000007.parquet",
        "stats/part-000007.json",
    ]  # fmt: skip


@pytest.mark.parametrize("key", [plan_part, shard_key, quarantine_key, stats_key])
def test_the_number_is_read_back_from_a_name(key) -> None:
    numbers = [0, 7, 123, 999_999]
    assert [shard_number(key(number)) for number in numbers] == numbers
    assert sorted(map(key, numbers)) == list(map(key, numbers)), "names sort as numbers do"
