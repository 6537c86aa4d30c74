"""What a shard leaves in memory is read off the last three quarters of a run."""

from benchmarks.null_scale import Sample, kilobytes_a_shard


def run(shards: int) -> list[Sample]:
    """A driver that takes 300 MB to start, 4 kB a shard from then on, and frees all at the end; a raylet that stays."""
    rising = [Sample(done, 10**8 + 3 * 10**8 * (done > shards // 8) + 4000 * done, 50_000) for done in range(shards)]
    return [*rising, Sample(shards, 10**8, 50_000)]


def test_the_slope_is_of_the_shards_alone() -> None:
    assert kilobytes_a_shard(run(2000)) == {"driver_kb_a_shard": 4.0, "raylet_kb_a_shard": 0.0}


def test_few_shards_tell_nothing() -> None:
    assert kilobytes_a_shard(run(200)) == {"driver_kb_a_shard": None, "raylet_kb_a_shard": None}
