"""The simulated schedule: the monitor of a real run gives out every shard once, and those of the dead to the living."""

import statistics

import pytest

from benchmarks.schedule import Settings, Simulation


def simulated(**settings: float) -> dict[str, float]:
    """Medians of seven runs of 16 generators over 160 shards."""
    runs = [Simulation(Settings(generators=16, shards=160, seed=seed, **settings)).run() for seed in range(7)]  # type: ignore[arg-type]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def test_where_nobody_dies_no_shard_is_drawn_twice_and_all_work_until_the_last_ones() -> None:
    run = simulated(joins_within_seconds=0.0)
    assert run["drawn_twice"] == 0
    seconds = 3600 * (run["hours"] - run["hours_without_idle_time"])
    assert seconds < 90 + 600, "the models' loading, and a shard that is begun when others have nothing to begin"


@pytest.mark.parametrize(("generators", "lost", "shards"), [(3, 2, 20), (3, 2, 6), (4, 3, 40), (10, 9, 100)])
def test_those_that_are_left_draw_everything_however_many_are_lost_for_good(
    generators: int, lost: int, shards: int
) -> None:
    """Ray Data binds turns to each generator, and nobody else gets these."""
    run = Simulation(Settings(generators=generators, shards=shards, lost=lost, joins_within_seconds=0.0)).run()
    assert run["hours"] < (shards + 4) / (generators - lost) * 1.2 * 600 / 3600 + 0.5


@pytest.mark.parametrize("turns", [True, False])
def test_who_reads_in_the_plans_order_hardly_notices_a_generator_that_is_lost_for_good(turns: bool) -> None:
    run = Simulation(
        Settings(generators=16, shards=320, lost=1, lost_after_seconds=5000.0, joins_within_seconds=0.0, turns=turns)
    )
    if not turns:  # its shards come with its turns, never
        with pytest.raises(IndexError):
            run.run()
        return
    figures = run.run()
    assert 0 < figures["minutes_lost_shards_stored_after"] < 20, "one who has just begun another draws it after that"
    assert figures["minutes_longest_wait_in_order"] < 20


def test_shards_of_generators_that_die_are_drawn_by_those_that_live() -> None:
    death = {"seconds_between_deaths": 3 * 3600.0, "restart_seconds": 3600.0}
    before, now = simulated(**death, turns=False), simulated(**death)
    assert now["hours"] < 0.85 * before["hours"], "a restart of an hour held up the whole run"
    assert now["drawn_twice"] < 0.1
