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
