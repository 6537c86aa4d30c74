"""How fast a dataset was made, from the times of its shards."""

import numpy as np
import pytest

from cluster.report.throughput import throughput


def shard(start: float, end: float, *, draw: float, pictures: int = 16) -> dict:
    return {"start_time": 1000.0 + start, "end_time": 1000.0 + end, "draw_seconds": draw, "successes": pictures}


@pytest.mark.parametrize("generators", [1, 4])
@pytest.mark.parametrize("behind", [0.2, 0.7, 1.6])
def test_a_steady_run_has_a_steady_rate_however_long_a_shard_is_in_hand_after_it_is_drawn(
    generators: int, behind: float
) -> None:
    """One shard a second a generator, each still featurised and stored while the next ones are drawn."""
    stats = [
        shard(number + place / generators, number + place / generators + 1 + behind, draw=1.0)
        for number in range(40)
        for place in range(generators)
    ]
    found = throughput(stats, stored=16 * len(stats))
    assert found is not None
    middle = found.rate[6:-6]
    np.testing.assert_allclose(middle, 16 * generators, rtol=0.05)
    assert found.rate[1:-1].max() < 1.1 * found.images_per_second * (1 + (1 + behind) / 40)
    assert found.stored[-1] == pytest.approx(16 * len(stats))
    np.testing.assert_allclose(np.trapezoid(found.rate, found.seconds), found.stored[-1], rtol=0.02)


def test_a_pause_between_two_runs_does_not_count() -> None:
    stats = [shard(number, number + 1, draw=1.0) for number in range(10)]
    later = [shard(number + 500, number + 501, draw=1.0) for number in range(10)]
    found = throughput([*stats, *later], stored=320)
    assert found is not None and found.runs == 2
    assert found.working_seconds == pytest.approx(20) and found.images_per_second == pytest.approx(16)
    np.testing.assert_allclose(found.rate, 16, rtol=0.05)


@pytest.mark.parametrize(
    ("generators", "seconds", "every", "runs"),
    [
        (1, 60, 2, 1),
        (1, 60, 2, 5),
        (1, 300, 25, 1),
        (2, 300, 10, 6),
        (8, 300, 10, 4),
        (64, 300, 10, 3),
        (16, 40, 25, 7),
    ],
)
def test_every_nth_shard_says_the_same_as_all_of_them(generators: int, seconds: float, every: int, runs: int) -> None:
    """Shards between those that are read leave no pauses; real ones stay."""
    rng = np.random.default_rng(0)
    stats: list[dict] = []
    begin = 0.0
    for run in range(runs):
        free = np.full(generators, begin)
        for _ in range(400 * every // runs):
            place = int(free.argmin())
            took = seconds * rng.uniform(0.9, 1.1) * (1 + run % 2)
            stats.append(shard(free[place], free[place] + took, draw=0.8 * took) | {"featurise_seconds": 0.1 * took})
            free[place] += took
        begin = free.max() + 40_000
    stored = 16 * len(stats)
    whole, sample = throughput(stats, stored=stored), throughput(stats[::every], stored=stored)
    assert whole is not None and sample is not None and whole.runs == sample.runs == runs
    assert sample.images_per_second == pytest.approx(whole.images_per_second, rel=0.03)
    assert sample.machine_hours[-1] == pytest.approx(whole.machine_hours[-1], rel=0.03)
    assert sample.generator_hours[-1] == pytest.approx(whole.generator_hours[-1], rel=0.03)
    assert sample.stage_seconds["featurise"] == pytest.approx(whole.stage_seconds["featurise"], rel=0.03)
    np.testing.assert_allclose(sample.stored, whole.stored, atol=0.03 * stored)


def test_generators_that_come_and_go_are_no_pauses() -> None:
    stats, now = [], 0.0
    for number in range(8_000):
        apart = 2.0 if 2_000 <= number < 6_000 else 120.0
        stats.append(shard(now, now + 100, draw=90.0))
        now += apart
    stored = 16 * len(stats)
    sample, first = throughput(stats[::10], stored=stored), throughput(stats[::10][:1], stored=160)
    assert sample is not None and sample.working_seconds == pytest.approx(now, rel=0.03) and sample.runs <= 3
    assert first is not None and first.working_seconds == pytest.approx(100)


def test_no_times_no_throughput() -> None:
    assert throughput([{"start_time": 0, "end_time": 0, "successes": 3}], stored=3) is None


@pytest.mark.parametrize("off", [-86400.0, 86400.0])
def test_a_machine_whose_clock_is_a_day_off_makes_no_rate_negative(off: float) -> None:
    stats = [shard(number, number + 1, draw=1.0) for number in range(10)]
    others = [shard(number + off, number + 1 + off, draw=1.0) for number in range(10)]
    set_back = shard(20, 21, draw=off) | {"featurise_seconds": off}
    found = throughput([*stats, *others, set_back], stored=16 * 21)
    assert found is not None
    for values in (
        found.rate,
        found.generator_hours,
        found.machine_hours,
        np.diff(found.stored),
        np.diff(found.seconds),
    ):
        assert np.isfinite(values).all() and (values >= 0).all()
    assert all(seconds >= 0 for seconds in found.stage_seconds.values())
    assert found.stored[-1] == pytest.approx(16 * 21)
