"""What the monitor remembers of dead generators, and when it tells a run to stop."""

import pytest

from cluster.generation.limits import FaultPolicy
from cluster.generation.stages.monitor import MAX_FRUITLESS_STARTS, MAX_SHARD_STARTS, RunMonitor
from pcm.errors import InputError


def begin_shard(monitor: RunMonitor, generator: str = "g", shard: int = 0) -> tuple[dict[int, int], dict[int, str]]:
    """(deaths, reasons) that a generator is told as it begins a shard."""
    stop, faults = monitor.begin_shard(generator, shard)
    assert stop == ""
    return faults.deaths, {position: reason for position, (reason, _) in faults.refused.items()}


def die(monitor: RunMonitor, positions: list[int], generator: str = "g", hung: str = "") -> None:
    """A process of the generator draws one picture, then dies with these samples in its batch; the next one starts."""
    monitor.begin(generator, 0, [99])
    monitor.end(generator, 1)
    monitor.begin(generator, 0, positions)
    assert monitor.start(generator, "a node", hung) == ""


def test_who_was_in_a_batch_at_a_death_is_drawn_alone_and_given_up_after_the_third() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.start("g", "a node")
    assert begin_shard(monitor) == ({}, {})
    die(monitor, [4, 5])
    assert begin_shard(monitor) == ({4: 1, 5: 1}, {})
    die(monitor, [5])
    assert begin_shard(monitor) == ({4: 1, 5: 2}, {})
    die(monitor, [5])
    assert begin_shard(monitor) == ({4: 1, 5: 3}, {5: "generator_crashed"})
    assert begin_shard(monitor, shard=1) == ({}, {}), "another shard's samples are no suspects"


def test_a_batch_over_its_time_hung() -> None:
    monitor = RunMonitor(FaultPolicy(batch_timeout=60, max_deaths=2))
    monitor.start("g", "a node")
    die(monitor, [5])
    die(monitor, [5], hung="unet.py, line 7")
    _, faults = monitor.begin_shard("g", 0)
    assert faults.refused == {5: ("generator_hung", "took longer than 60 s, at unet.py, line 7, 2 times")}


def test_what_a_broken_process_says_is_kept() -> None:
    monitor = RunMonitor(FaultPolicy(max_deaths=2))
    monitor.start("g", "a node")
    for _ in range(2):
        monitor.begin("g", 0, [1])
        monitor.end("g", 1)
        monitor.broken("g", 0, [5], "CUDA error: device-side assert triggered")
        monitor.start("g", "a node")
    _, faults = monitor.begin_shard("g", 0)
    assert faults.refused == {5: ("generator_crashed", "CUDA error: device-side assert triggered")}


def test_a_shard_that_moves_to_another_generator_is_a_death_too() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.start("g", "a node")
    monitor.begin("g", 0, [4])
    monitor.start("h", "another node")
    assert begin_shard(monitor, "h") == ({4: 1}, {})
    assert begin_shard(monitor, "g", 1) == ({}, {}), "and counted once"


def test_a_committed_shard_is_forgotten() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.start("g", "a node")
    die(monitor, [5])
    monitor.committed(0)
    assert begin_shard(monitor) == ({}, {})


def test_a_generator_without_a_picture_in_all_its_processes_stops_the_run() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.start("g", "gpu-7")
    for _ in range(MAX_FRUITLESS_STARTS - 1):
        assert monitor.start("g", "gpu-7") == ""
    said = monitor.start("g", "gpu-7")
    assert "gpu-7" in said and f"{MAX_FRUITLESS_STARTS} times in a row" in said and "\n" not in said
    assert monitor.begin("h", 0, [1]) == said, "the other generators stop too"


def test_a_picture_in_between_makes_them_start_to_count_again() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.start("g", "a node")
    for _ in range(3 * MAX_FRUITLESS_STARTS):
        monitor.begin("g", 0, [1])
        monitor.end("g", 1)
        for _ in range(MAX_FRUITLESS_STARTS - 1):
            assert monitor.start("g", "a node") == ""


def test_a_shard_that_no_process_finishes_stops_the_run() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.start("g", "a node")
    for number in range(MAX_SHARD_STARTS):
        begin_shard(monitor)
        die(monitor, [number])
    assert f"shard 0 was begun {MAX_SHARD_STARTS + 1} times" in monitor.begin_shard("g", 0)[0]


def test_a_shard_over_which_clip_dies_again_and_again_stops_the_run() -> None:
    monitor = RunMonitor(FaultPolicy())
    for _ in range(MAX_SHARD_STARTS):
        assert monitor.begin_scoring(0) == "" and monitor.begin_scoring(1) == ""
        monitor.committed(1)
    monitor.scorer_broken("CUDA error: uncorrectable ECC error encountered")
    assert "uncorrectable ECC" in monitor.begin_scoring(0)


@pytest.mark.parametrize(
    ("good", "failed", "stops"), [(31, 32, False), (32, 32, False), (32, 33, True), (0, 63, False)]
)
def test_too_large_a_share_of_failures_stops_the_run(good: int, failed: int, stops: bool) -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin("g", 0, range(good))
    monitor.end("g", good)
    for _ in range(failed):
        monitor.failed(1, "RuntimeError: useless")
    assert bool(monitor.end_shard()) is stops
    if stops:
        assert monitor.end_shard().startswith("33 of 65 samples failed in the generator")


def test_a_snapshot_counts_what_is_not_yet_stored() -> None:
    monitor = RunMonitor(FaultPolicy())
    for generator, shard in (("g", 0), ("h", 1)):
        monitor.start(generator, "a node")
        monitor.begin_shard(generator, shard)
        monitor.begin(generator, shard, range(4))
    monitor.end("g", 4)
    assert monitor.snapshot() == {"drawn": 4, "in_flight": 1, "generators": 2}
    monitor.begin_shard("g", 0)
    assert monitor.snapshot()["drawn"] == 0, "a shard begun again is drawn again"
    monitor.end("h", 4)
    monitor.committed(1)
    assert monitor.snapshot() == {"drawn": 0, "in_flight": 0, "generators": 2}


@pytest.mark.parametrize(
    "values", [{"batch_timeout": 0}, {"max_error_share": 0}, {"max_error_share": 1.5}, {"max_deaths": 1}]
)
def test_a_policy_that_makes_no_sense_is_refused(values: dict) -> None:
    with pytest.raises(InputError):
        FaultPolicy(**values)


def test_a_generator_does_not_run_ahead_of_the_store() -> None:
    monitor = RunMonitor(FaultPolicy())
    assert monitor.admit("g", 0) and monitor.admit("g", 1) and monitor.admit("h", 2)
    assert not monitor.admit("g", 3), "two of its shards are not stored"
    assert monitor.admit("g", 1) and monitor.admit("h", 3), "its own again; another generator has room"
    monitor.committed(0)
    assert monitor.admit("g", 4) and not monitor.admit("g", 5) and monitor.admit("g", 5, anyway=True)
    assert monitor.admit("h", 1), "a shard may go to another generator, and leaves the first one room"
    for shard in range(6):
        monitor.committed(shard)
    assert monitor.admit("g", 0) and monitor.admit("g", 6) and monitor.admit("g", 7), "a stored shard counts no more"
