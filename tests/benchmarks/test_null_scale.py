"""What a shard leaves in memory is read off the last three quarters of a run; its operations are those of a new one."""

from pathlib import Path

from benchmarks.null_scale import Sample, kilobytes_a_shard, shard_operations
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus


def run(shards: int) -> list[Sample]:
    """A driver that takes 300 MB to start, 4 kB a shard from then on, and frees all at the end; a raylet that stays."""
    rising = [Sample(done, 10**8 + 3 * 10**8 * (done > shards // 8) + 4000 * done, 50_000) for done in range(shards)]
    return [*rising, Sample(shards, 10**8, 50_000)]


def test_the_slope_is_of_the_shards_alone() -> None:
    assert kilobytes_a_shard(run(2000)) == {"driver_kb_a_shard": 4.0, "raylet_kb_a_shard": 0.0}


def test_few_shards_tell_nothing() -> None:
    assert kilobytes_a_shard(run(200)) == {"driver_kb_a_shard": None, "raylet_kb_a_shard": None}


def test_the_operations_are_of_a_shard_that_is_not_there_yet(tmp_path: Path) -> None:
    make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec())
    counts = {"read_bytes": 1, "create_bytes": 1, "exists": 1, "write_bytes": 1}  # plan, stats, quarantine, shard
    assert shard_operations(tmp_path / "data", null_spec()) == counts
