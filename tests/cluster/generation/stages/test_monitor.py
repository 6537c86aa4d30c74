"""What the monitor remembers of dead generators, and when it tells a run to stop."""

from functools import partial

import pytest

from cluster.generation.limits import FaultPolicy
from cluster.generation.stages.claims import COMMIT_SECONDS, LATE_FACTOR, UNKNOWN_SECONDS
from cluster.generation.stages.monitor import (
    MAX_FRUITLESS_STARTS,
    MAX_IN_HAND,
    MAX_SHARD_STARTS,
    OTHERS_MAY_START_SECONDS,
    RECENT_SAMPLES,
    RunMonitor,
    ShardOutcome,
    Turn,
)
from pcm.errors import InputError


class Clock:
    """Seconds, as a test says."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def begin_shard(monitor: RunMonitor, shard: int = 0) -> tuple[dict[int, int], dict[int, str]]:
    """(deaths, reasons) that a generator is told as it begins a shard."""
    stop, faults = monitor.begin_shard(shard)
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
    _, faults = monitor.begin_shard(0)
    assert faults.refused == {5: ("generator_hung", "took longer than 60 s, at unet.py, line 7, 2 times")}


def test_who_has_started_is_counted_by_what_it_is() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(5), 3, 1)

    def counted() -> tuple[int, int]:
        said = monitor.snapshot()
        return said["generators"], said["scorers"]

    assert counted() == (0, 0)
    monitor.start("loads", "a node")
    monitor.turn("null", 0, node="n1")
    assert counted() == (2, 0), "a null generator loads nothing, and asks for turns"
    monitor.turn("loads", 1, node="n2")
    monitor.start("clip", "a node", scores=True)
    monitor.received(0, "clip", "n2")
    assert counted() == (2, 1)
    monitor.nodes(["n1"])
    assert counted() == (1, 0)


def test_what_was_given_out_a_second_time_is_counted() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(5), 2)
    assert [monitor.turn(name, number).shard for number, name in enumerate(("a", "b"))] == [0, 1]
    assert monitor.begun_again() == 0
    monitor.start("a", "a node")
    monitor.start("a", "a node")  # its process died
    assert monitor.turn("b", 2).shard == 0
    assert monitor.begun_again() == 1
    monitor.committed(0)
    monitor.committed(1)
    assert [monitor.turn("a", number).shard for number in (3, 4)] == [2, 3]
    assert monitor.turn("c", 3).shard == 2, "the same turn again, by another actor"
    assert monitor.begun_again() == 2


def test_a_turn_of_which_something_may_have_come_out_is_for_no_other_shard() -> None:
    """Of what it gives the second time Ray keeps nothing."""
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(4), 1)
    assert monitor.turn("g", 0, process=1) == Turn(0)
    assert monitor.turn("g", 1, process=1) == Turn(1)
    assert monitor.may_store(0, 0)
    monitor.committed(0)
    assert monitor.turn("g", 0, process=2) == Turn(), "its row is there, and its process died after that"
    assert monitor.turn("g", 1, process=2) == Turn(1), "nothing has come out of this one"
    assert monitor.turn("g", 2, process=2) == Turn(2)
    monitor.handed_on(2)
    monitor.committed(2)
    assert monitor.turn("g", 2, process=3) == Turn(), "it went to an actor of CLIP"


def test_who_draws_a_shard_that_another_stores_loses_it_and_it_is_given_out_when_that_one_dies() -> None:
    clock = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=clock)
    monitor.begin_pass(range(4), 2)
    for number in range(3):
        assert monitor.turn("a", number) == Turn(number)
        clock.now += 10
        monitor.committed(number)
    assert monitor.turn("a", 3) == Turn(3)
    clock.now += 10 * LATE_FACTOR
    assert monitor.turn("b", 4) == Turn(3), "it is late"
    assert monitor.may_store(3, 3) and not monitor.may_store(3, 4)
    monitor.start("a", "a node")
    monitor.start("a", "a node")  # its process died while it stored the shard
    assert not monitor.may_store(3, 4), "that turn has ended with nothing"
    assert monitor.turn("b", 4) == Turn()
    assert monitor.turn("b", 5) == Turn(3)
    assert monitor.may_store(3, 5)


def test_what_a_broken_process_says_is_kept() -> None:
    monitor = RunMonitor(FaultPolicy(max_deaths=2))
    monitor.start("g", "a node")
    for _ in range(2):
        monitor.begin("g", 0, [1])
        monitor.end("g", 1)
        monitor.broken("g", 0, [5], "CUDA error: device-side assert triggered")
        monitor.start("g", "a node")
    _, faults = monitor.begin_shard(0)
    assert faults.refused == {5: ("generator_crashed", "CUDA error: device-side assert triggered")}


def test_a_shard_that_moves_to_another_generator_is_a_death_too() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(4), 2)
    monitor.start("g", "a node")
    assert monitor.turn("g", 0) == Turn(0)
    monitor.begin("g", 0, [4])
    monitor.start("h", "another node")
    assert monitor.turn("h", 0) == Turn(0), "Ray Data gives the turn again"
    assert begin_shard(monitor) == ({4: 1}, {})
    assert begin_shard(monitor, 1) == ({}, {}), "and counted once"


def test_a_batch_on_a_node_that_is_lost_is_a_death_before_another_generator_draws_it() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(4), 2)
    monitor.start("g", "a node")
    assert monitor.turn("g", 0, node="one") == Turn(0)
    monitor.begin("g", 0, [4])
    monitor.nodes([])
    assert monitor.turn("h", 1, node="two") == Turn(0)
    assert begin_shard(monitor) == ({4: 1}, {}), "a caption may have taken the node along: it is drawn alone"


def test_a_committed_shard_is_forgotten() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.start("g", "a node")
    die(monitor, [5])
    monitor.committed(0)
    assert begin_shard(monitor) == ({}, {})


def test_a_generator_that_never_draws_is_left_out_and_the_last_one_of_them_stops_the_run() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(8), 2)
    assert (monitor.start("g", "gpu-7"), monitor.start("h", "gpu-8")) == ("", "")
    for _ in range(MAX_FRUITLESS_STARTS - 1):
        assert monitor.start("g", "gpu-7") == ""
    said = monitor.start("g", "gpu-7")
    assert f"{MAX_FRUITLESS_STARTS} starts of a generator in a row without a picture" in said and "\n" not in said
    assert monitor.turn("g", 0, loaded=False) == Turn(wait=True), "its turn goes on, but it draws nothing"
    assert monitor.turn("h", 1) == Turn(0) and monitor.begin("h", 0, [8]) == "", "the other one draws"
    assert monitor.left_out() == [f"gpu-7: {said}"]
    monitor.not_loaded("h", "--t2i x: no such folder", again=False)
    stop = monitor.turn("h", 2, loaded=False).stop
    assert stop == f"{said} (on gpu-7, and 1 more)" and monitor.turn("g", 0, loaded=False).stop == stop


def test_a_generator_that_moves_to_another_node_is_no_longer_left_out() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(8), 1)
    monitor.start("g", "gpu-7")
    monitor.not_loaded("g", "OSError: the disk is full", again=False)
    assert "disk is full" in monitor.start("g", "gpu-7")
    assert monitor.start("g", "gpu-8") == "" and monitor.left_out() == []


def test_a_model_that_is_not_loaded_is_tried_again_as_often_as_a_process_that_dies() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(8), 1)
    for number in range(MAX_FRUITLESS_STARTS):
        assert monitor.start("g", "gpu-7") == ""
        assert monitor.turn("g", 0, loaded=False) == Turn(wait=True)
        monitor.not_loaded("g", f"OSError: {number}", again=True)
    assert "OSError: 3" in monitor.turn("g", 0, loaded=False).stop


def with_a_bad_node(time: Clock, *, wanted: int = 64) -> RunMonitor:
    """The first of some generators could not load its model; nobody else has started."""
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(8), wanted)
    monitor.nodes(["one"])
    monitor.start("g", "gpu-7")
    monitor.not_loaded("g", "/models/x: no such folder", again=False)
    return monitor


def test_the_run_waits_for_generators_that_have_not_started_before_it_says_that_none_can_draw() -> None:
    time = Clock()
    monitor = with_a_bad_node(time)
    assert monitor.turn("g", 0, loaded=False) == Turn(wait=True)
    time.now += OTHERS_MAY_START_SECONDS
    assert monitor.turn("g", 0, loaded=False).stop == "/models/x: no such folder (on gpu-7)"


def test_the_run_waits_as_long_as_nodes_are_coming_and_says_for_what() -> None:
    time = Clock()
    monitor = with_a_bad_node(time)
    said = "/models/x: no such folder (on gpu-7); 63 more that were asked for have not started"
    assert monitor.wants() == (False, said)
    for _ in range(9):
        time.now += OTHERS_MAY_START_SECONDS - 1
        monitor.nodes_are_coming()
        assert monitor.turn("g", 0, loaded=False) == Turn(wait=True)
    monitor.nodes(["one", "two"])
    time.now += OTHERS_MAY_START_SECONDS - 1
    assert monitor.turn("g", 0, loaded=False) == Turn(wait=True), "a node has come, on which one may start"
    monitor.start("h", "gpu-8")
    assert monitor.wants() == (False, "") and monitor.turn("h", 1) == Turn(0)


@pytest.mark.parametrize("scores", [False, True])
def test_a_monitor_that_starts_again_hears_who_is_left_out_and_stops_where_all_are(scores: bool) -> None:
    monitor = RunMonitor(FaultPolicy())
    left_out = partial(monitor.not_loaded, "g", "/models/x: no such folder", again=False, where="gpu-7", scores=scores)
    ask = partial(monitor.given_back, 0, "g") if scores else partial(monitor.turn, "g", 0, loaded=False)
    left_out()
    assert ask() == Turn(wait=True), "it does not know yet who was asked for"
    monitor.begin_pass(range(8), 1, 1, in_hand=2)
    assert ask() == Turn(wait=True)
    left_out()
    assert ask().stop == "/models/x: no such folder (on gpu-7)"


def test_a_monitor_that_starts_again_takes_nobody_for_lost_who_may_be_at_work() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(8), 2, in_hand=2)
    monitor.not_loaded("g", "/models/x: no such folder", again=False, where="gpu-7")
    time.now += UNKNOWN_SECONDS - 1
    assert monitor.wants() == (False, ""), "another one may draw what is in hand"
    assert monitor.turn("g", 0, loaded=False) == Turn(wait=True)
    time.now += 1
    assert "1 more that were asked for have not started" in monitor.wants()[1]
    assert monitor.turn("g", 0, loaded=False) == Turn(wait=True)
    time.now += OTHERS_MAY_START_SECONDS
    assert monitor.turn("g", 0, loaded=False).stop == "/models/x: no such folder (on gpu-7)"


def test_an_actor_of_clip_that_works_is_known_to_a_monitor_that_starts_again() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(8), 1, 2)
    monitor.received(7, "d", "one")  # of a turn that the process before gave out
    monitor.not_loaded("c", "OSError: the disk is full", again=False, where="gpu-1", scores=True)
    time.now += OTHERS_MAY_START_SECONDS
    assert monitor.given_back(3, "c") == Turn(wait=True), "d scores"


def test_where_all_that_were_asked_for_are_left_out_no_node_is_waited_for() -> None:
    monitor = with_a_bad_node(Clock(), wanted=1)
    assert monitor.wants() == (False, "")
    assert "no such folder" in monitor.turn("g", 0, loaded=False).stop


def test_what_two_machines_say_is_the_runs_error_and_no_third_one_is_waited_for() -> None:
    monitor = with_a_bad_node(Clock())
    monitor.start("h", "gpu-8")
    monitor.not_loaded("h", "no GPU memory is free", again=False)
    assert monitor.wants() != (False, ""), "each has a fault of its own"
    monitor.start("i", "gpu-9")
    monitor.not_loaded("i", "/models/x: no such folder", again=False)
    assert monitor.wants() == (False, "")


def test_an_actor_of_clip_that_cannot_load_it_gives_its_shards_back_and_only_the_last_one_stops_the_run() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(8), 2, 2)
    assert monitor.start("d", "gpu-2", scores=True) == ""
    assert monitor.snapshot()["generators"] == 0
    assert monitor.turn("g", 0) == Turn(0)
    monitor.handed_on(0)
    monitor.received(0, "c", "one")
    for _ in range(MAX_FRUITLESS_STARTS):
        assert monitor.start("c", "gpu-1", scores=True) == ""
        monitor.not_loaded("c", "OSError: the disk is full", again=True)
    assert "starts of an actor of CLIP in a row without a shard" in monitor.start("c", "gpu-1", scores=True)
    assert monitor.given_back(0, "c") == Turn(wait=True)
    assert monitor.turn("g", 1) == Turn(0), "it is drawn again"
    assert monitor.given_back(0, "c") == Turn(wait=True)
    assert monitor.turn("h", 2) == Turn(1), "once"
    monitor.not_loaded("d", "OSError: the disk is full", again=False)
    assert "the disk is full" in monitor.given_back(0, "c").stop
    assert "the disk is full" in monitor.turn("g", 3).stop


def test_actors_of_clip_that_take_turns_are_left_out_and_stop_the_run_as_generators_do() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(8), 2, 2)
    assert (monitor.start("c", "gpu-1", scores=True), monitor.start("d", "gpu-2", scores=True)) == ("", "")
    monitor.not_loaded("c", "OSError: the disk is full", again=False, where="gpu-1", scores=True)
    assert monitor.turn("c", 0, loaded=False, scores=True) == Turn(wait=True)
    assert monitor.turn("d", 1, scores=True) == Turn(0)
    monitor.not_loaded("d", "OSError: the disk is full", again=False, where="gpu-2", scores=True)
    assert monitor.turn("c", 0, loaded=False, scores=True).stop == "OSError: the disk is full (on gpu-1, and 1 more)"


def test_an_actor_of_clip_that_takes_turns_is_known_to_a_monitor_that_starts_again() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(8), 2, 2)
    assert monitor.turn("d", 1, scores=True) == Turn(0)
    monitor.not_loaded("c", "OSError: the disk is full", again=False, where="gpu-1", scores=True)
    time.now += OTHERS_MAY_START_SECONDS
    assert monitor.turn("c", 0, loaded=False, scores=True) == Turn(wait=True), "d works"


def test_an_actor_of_clip_that_takes_turns_and_ends_after_each_shard_is_not_left_out() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(99), 1, 1)
    for turn in range(3 * MAX_FRUITLESS_STARTS):
        assert monitor.start("c", "gpu-1", scores=True) == ""
        assert monitor.turn("c", turn, scores=True) == Turn(turn) and monitor.may_store(turn, turn)
        monitor.committed(turn)


def test_an_actor_of_clip_whose_process_ends_after_each_shard_is_not_left_out() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(99), 1, 1)
    for turn in range(3 * MAX_FRUITLESS_STARTS):
        assert monitor.start("c", "gpu-1", scores=True) == ""
        monitor.turn("g", turn)
        monitor.handed_on(turn)
        monitor.received(turn, "c", "one")
        assert monitor.busy() == 2, "it loads, and g draws"
        assert monitor.may_store(turn, turn) and monitor.busy() == 0
        monitor.committed(turn)


def test_one_that_was_lost_with_its_node_and_does_not_come_back_is_not_waited_for_where_nobody_else_can_draw() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(8), 2)
    monitor.nodes(["one", "two"])
    for name, node in (("g", "one"), ("h", "two")):
        monitor.start(name, node)
        monitor.turn(name, 0, node=node)
    monitor.nodes(["two"])
    monitor.start("h", "two")
    monitor.not_loaded("h", "OSError: the disk is full", again=False)
    assert "1 more that were asked for" in monitor.wants()[1]
    assert monitor.turn("h", 1, node="two", loaded=False) == Turn(wait=True)
    time.now += OTHERS_MAY_START_SECONDS
    assert "the disk is full" in monitor.turn("h", 1, node="two", loaded=False).stop


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
    assert f"shard 0 was begun {MAX_SHARD_STARTS + 1} times" in monitor.begin_shard(0)[0]


def test_a_shard_over_which_clip_dies_again_and_again_stops_the_run() -> None:
    monitor = RunMonitor(FaultPolicy())
    for start in range(MAX_SHARD_STARTS):
        assert monitor.begin_scoring(0) == ("", start > 0), "with whether it was begun before"
        assert monitor.begin_scoring(1) == ("", False)
        monitor.committed(1)
    monitor.scorer_broken("CUDA error: uncorrectable ECC error encountered")
    assert "uncorrectable ECC" in monitor.begin_scoring(0)[0]


@pytest.mark.parametrize(
    ("good", "failed", "stops"), [(31, 32, False), (32, 32, False), (32, 33, True), (0, 63, False)]
)
def test_too_large_a_share_of_failures_stops_the_run(good: int, failed: int, stops: bool) -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin("g", 0, range(good))
    monitor.end("g", good)
    for _ in range(failed):
        monitor.failed(1, "RuntimeError: useless")
    assert bool(monitor.end_shard(0)) is stops
    if stops:
        assert monitor.end_shard(1).startswith("33 of 65 samples failed in the generator")


def draw_shards(monitor: RunMonitor, samples: int, *, failed: int = 0) -> str:
    """So many samples in shards of 100, of which so many fail in each: why to stop."""
    for _ in range(samples // 100):
        monitor.begin_shard(0)
        monitor.begin("g", 0, range(100))
        monitor.end("g", 100 - failed)
        if failed:
            monitor.failed(failed, "RuntimeError: useless")
        if stop := monitor.end_shard(0, ShardOutcome(samples=100, failed=failed)):
            return stop
        monitor.committed(0)
    return ""


def test_what_fails_after_days_stops_the_run() -> None:
    monitor = RunMonitor(FaultPolicy())
    assert draw_shards(monitor, 100_000) == ""
    stop = draw_shards(monitor, RECENT_SAMPLES, failed=100)
    assert stop.startswith("5100 of the last 10000 samples failed in the generator, more than the share of 0.5 allowed")
    assert "(last: RuntimeError: useless)" in stop
    allowing = RunMonitor(FaultPolicy(max_error_share=1.0))
    assert draw_shards(allowing, 3 * RECENT_SAMPLES, failed=100) == ""


def test_a_stretch_of_captions_that_fail_stops_no_long_run() -> None:
    monitor = RunMonitor(FaultPolicy())
    for _ in range(5):
        assert draw_shards(monitor, 10_000) == "" and draw_shards(monitor, 4_000, failed=100) == ""
        assert draw_shards(monitor, 10_000, failed=10) == ""


def test_blank_pictures_stop_the_run() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_shard(0)
    monitor.begin("g", 0, range(100))
    monitor.end("g", 2 * 100)  # pictures, two of each sample
    all_blank = ShardOutcome(samples=100, failed=100, blank=100, blank_pictures=200, blank_reason="nan_image")
    assert monitor.end_shard(0, all_blank).startswith("100 of 100 samples failed in the generator")
    assert "(last: nan_image)" in monitor.end_shard(1)


@pytest.mark.parametrize("blank", [40, 100])
def test_blank_pictures_of_a_shard_begun_before_the_monitors_process_died_stop_no_healthy_run(blank: int) -> None:
    """The pictures that were good were counted by the process before."""
    monitor = RunMonitor(FaultPolicy())
    monitor.begin("g", 0, range(8))
    monitor.end("g", 8)
    outcome = ShardOutcome(samples=1000, failed=blank, blank=blank, blank_pictures=4 * blank, blank_reason="nan_image")
    assert monitor.end_shard(0, outcome) == ""
    monitor.begin_shard(1)
    for _ in range(60):
        monitor.begin("g", 1, range(8))
        monitor.end("g", 8)
        assert monitor.end_shard(2) == ""


def test_a_shards_end_that_is_told_twice_is_counted_once_for_each_time_that_it_was_begun() -> None:
    """A question whose link was cut may be asked twice."""
    monitor = RunMonitor(FaultPolicy())
    outcome = ShardOutcome(samples=100, failed=40, blank=40, blank_pictures=40, blank_reason="nan_image")
    for _ in range(2):
        monitor.begin_shard(0)
        monitor.begin("g", 0, range(100))
        monitor.end("g", 100)
        assert [monitor.end_shard(0, outcome) for _ in range(3)] == ["", "", ""]
    monitor.failed(41, "RuntimeError: useless")
    assert monitor.end_shard(1).startswith("121 of 241 samples failed")


def test_a_snapshot_counts_what_is_not_yet_stored() -> None:
    monitor = RunMonitor(FaultPolicy())
    for generator, shard in (("g", 0), ("h", 1)):
        monitor.start(generator, "a node")
        monitor.begin_shard(shard)
        monitor.begin(generator, shard, range(4))
    monitor.end("g", 4)
    assert monitor.snapshot() == {"drawn": 4, "in_flight": 1, "generators": 2, "scorers": 0}
    monitor.begin_shard(0)
    assert monitor.snapshot()["drawn"] == 0, "a shard begun again is drawn again"
    monitor.end("h", 4)
    monitor.committed(1)
    assert monitor.snapshot() == {"drawn": 0, "in_flight": 0, "generators": 2, "scorers": 0}


@pytest.mark.parametrize(
    "values", [{"batch_timeout": 0}, {"max_error_share": 0}, {"max_error_share": 1.5}, {"max_deaths": 1}]
)
def test_a_policy_that_makes_no_sense_is_refused(values: dict) -> None:
    with pytest.raises(InputError):
        FaultPolicy(**values)


def test_a_generator_does_not_run_ahead_of_the_store() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(10), 2)
    assert (monitor.turn("g", 0), monitor.turn("g", 1), monitor.turn("h", 2)) == (Turn(0), Turn(1), Turn(2))
    assert monitor.turn("g", 3) == Turn(wait=True), "two of its shards are not stored"
    assert (monitor.turn("g", 1), monitor.turn("h", 7)) == (Turn(1), Turn(3)), "the same again; another has room"
    monitor.committed(0)
    assert monitor.turn("g", 4) == Turn(4) and monitor.turn("g", 5) == Turn(wait=True)
    assert monitor.turn("g", 5, anyway=True) == Turn(5)
    for shard in range(6):
        monitor.committed(shard)
    assert (monitor.turn("g", 6), monitor.turn("g", 7)) == (Turn(6), Turn(7)), "a stored shard counts no more"


def test_a_turn_is_for_the_next_shard_whatever_its_number() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass([3, 5, 7], 3)
    assert (monitor.turn("g", 4), monitor.turn("h", 0), monitor.turn("i", 1)) == (Turn(3), Turn(5), Turn(7))
    assert monitor.turn("i", 2) == Turn(wait=True), "one of them may prove to be lost or late"
    assert monitor.turn("h", 0) == Turn(5), "Ray Data gives the turn again: the same shard"
    for shard in (3, 5, 7):
        monitor.committed(shard)
    assert monitor.turn("i", 2) == Turn() and monitor.turn("h", 0) == Turn(), "nothing is left"


def test_a_late_shard_is_given_out_again_at_the_end() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(6), 2)
    for shard in range(4):
        monitor.turn("g", shard)
        time.now += 10
        monitor.committed(shard)
    monitor.start("g", "gpu-7")
    monitor.start("h", "gpu-8")
    assert (monitor.turn("g", 4), monitor.turn("h", 5)) == (Turn(4), Turn(5))
    monitor.committed(5)
    time.now += LATE_FACTOR * 10 - 1
    assert monitor.turn("h", 6) == Turn(wait=True)
    time.now += 1
    assert monitor.turn("h", 6) == Turn(4)
    time.now += 100 * LATE_FACTOR
    assert monitor.turn("i", 7) == Turn(wait=True), "two draw it, however late they are"
    assert monitor.turn("g", 4) == Turn(wait=True), "the first one died; its shard is in other hands"
    monitor.start("h", "gpu-8")
    assert monitor.turn("i", 7) == Turn(4), "the process that drew it has died: nobody waits for its model to load"
    time.now += 100 * LATE_FACTOR
    assert monitor.turn("j", 8) == Turn(wait=True), "the first drawer may be at work still"


def test_a_late_shard_that_is_being_stored_is_not_drawn_again() -> None:
    """A store that failed for minutes ended a run: its last shard was drawn again and again, as if drawers had died."""
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(4), 2)
    for shard in range(3):
        monitor.turn("g", shard)
        time.now += 10
        monitor.committed(shard)
    assert monitor.turn("g", 3) == Turn(3)
    assert monitor.may_store(3, 3)
    time.now += COMMIT_SECONDS - 1
    assert monitor.turn("h", 4) == Turn(wait=True)
    time.now += 1
    assert monitor.turn("h", 4) == Turn(3), "the first one has had its time"
    assert monitor.may_store(3, 4)


def test_a_caption_that_hangs_in_the_last_shard_is_given_up_and_the_run_goes_on() -> None:
    """Sixteen generators, of which each would take the shard in turn and hang for the 900 s of a batch's time."""
    time = Clock()
    policy = FaultPolicy()
    monitor = RunMonitor(policy, clock=time)
    names = [f"g{number}" for number in range(16)]
    monitor.begin_pass(range(20), len(names))
    for name in names:
        monitor.start(name, name)
    for shard in range(19):
        monitor.turn("g0", shard)
        time.now += 26
        monitor.committed(shard)
    turns, hanging, drawn_by = iter(range(100, 10**6)), {}, []
    while True:
        for name in names:
            if name in hanging and time.now - hanging[name] >= policy.batch_timeout:
                monitor.start(name, name, hung="unet.py, line 7")
                del hanging[name]
            if name in hanging or monitor.turn(name, turn := next(turns)).shard is None:
                continue
            drawn_by.append(name)
            stop, faults = monitor.begin_shard(19)
            assert not stop
            if faults.refused:
                assert monitor.may_store(19, turn) and faults.refused[7][0] == "generator_hung"
                assert len(drawn_by) <= policy.max_deaths + 2, "two at once at most"
                return
            monitor.begin(name, 19, [7])
            hanging[name] = time.now
        time.now += 5


def test_what_a_dead_process_had_is_the_next_to_be_drawn_by_whoever_asks() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(99), 2)
    monitor.start("g", "gpu-7")
    for turn in range(3):
        assert monitor.turn("g", turn, anyway=True) == Turn(turn)
    monitor.committed(1)
    assert monitor.turn("h", 4) == Turn(3)
    monitor.start("g", "gpu-7")
    assert monitor.turn("h", 5) == Turn(0), "in the middle of the run, and in the plan's order"
    assert monitor.turn("g", 0) == Turn(2), "the same turn begins again; its shard is in other hands"
    assert monitor.turn("i", 6) == Turn(4) and monitor.turn("i", 2) == Turn(5), "nothing that is lost is left"


def test_a_generator_of_which_only_turns_are_heard_is_known_to_have_died_when_its_next_process_asks() -> None:
    """The null generator says nothing as it starts."""
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(9), 1)
    assert [monitor.turn("g", turn, process=1) for turn in (0, 1)] == [Turn(0), Turn(1)]
    assert monitor.turn("g", 2, process=1) == Turn(wait=True)
    assert monitor.turn("g", 2, process=2) == Turn(0), "not behind the turn that had it, and which comes later"
    assert monitor.turn("g", 1, process=2) == Turn(1)


def test_what_was_drawn_on_a_node_that_is_lost_is_given_out_again_at_once() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(9), 2)
    assert (monitor.turn("g", 0, node="one"), monitor.turn("h", 1, node="two")) == (Turn(0), Turn(1))
    monitor.nodes(["one", "two"])
    assert monitor.turn("h", 2, node="two") == Turn(2)
    monitor.nodes(["two"])
    assert monitor.turn("h", 3, node="two", anyway=True) == Turn(0)
    monitor.nodes(["two"])
    assert monitor.turn("i", 4, node="two") == Turn(3), "it is lost once"


def test_the_end_waits_for_no_generator_that_was_lost_with_its_node() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(1), 2)
    assert (monitor.turn("g", 0, node="one"), monitor.turn("h", 1, node="two")) == (Turn(0), Turn(wait=True))
    monitor.nodes(["one"])
    assert monitor.may_store(0, 0)
    monitor.committed(0)
    assert monitor.busy() == 1, "h, to which turns are bound"


def test_a_shard_on_its_way_through_an_actor_of_clip_is_lost_with_the_node_that_holds_it() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(9), 2)
    for turn in range(3):
        assert monitor.turn("g", turn, node="one", anyway=True) == Turn(turn)
    monitor.handed_on(0)
    monitor.handed_on(1)
    monitor.received(0, "clip", "three")
    monitor.nodes(["two", "three"])
    assert [monitor.turn("h", turn, node="two") for turn in (5, 6)] == [Turn(1), Turn(2)], "0 is with clip"
    monitor.nodes(["two"])
    assert monitor.turn("h", 7, node="two", anyway=True) == Turn(0)


def test_a_shard_that_comes_to_another_actor_of_clip_all_the_same_is_not_drawn_again() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(9), 2)
    assert monitor.turn("g", 0, node="one") == Turn(0)
    monitor.handed_on(0)
    monitor.received(0, "clip", "two")
    monitor.nodes(["one"])
    monitor.received(0, "another", "one")
    assert monitor.turn("h", 1, node="one") == Turn(1)


def test_what_a_process_was_storing_is_lost_with_it_unless_clip_alone_has_it() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(4), 2)
    monitor.start("g", "gpu-7")
    assert (monitor.turn("g", 0), monitor.turn("g", 1)) == (Turn(0), Turn(1))
    assert monitor.may_store(0, 0)
    monitor.handed_on(1)
    monitor.start("g", "gpu-7")
    assert monitor.turn("h", 2) == Turn(0)
    assert monitor.turn("g", 0) == Turn(), "its row may be there"
    assert (monitor.turn("g", 3), monitor.turn("g", 6)) == (Turn(2), Turn(wait=True)), "what is lost counts no more"
    assert monitor.may_store(0, 2), "nobody stores it any more"
    assert monitor.turn("h", 4) == Turn(3)
    assert monitor.turn("i", 5) == Turn(wait=True), "of shard 1 nothing is lost"


def with_a_late_shard() -> RunMonitor:
    """g and then h have shard 3, in turns 3 and 4; nothing else is left."""
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(4), 2)
    for name in "gh":
        monitor.start(name, "a node")
    for shard in range(3):
        monitor.turn("g", shard)
        monitor.committed(shard)
    assert monitor.turn("g", 3) == Turn(3)
    time.now += 1
    assert monitor.turn("h", 4) == Turn(3), "it is late"
    return monitor


def test_what_a_dead_process_was_storing_blocks_nobody_who_took_the_shard_over_before() -> None:
    monitor = with_a_late_shard()
    assert monitor.may_store(3, 3)
    monitor.start("g", "a node")
    assert monitor.may_store(3, 4), "the first one died over it"


def test_what_one_drawer_hands_on_does_not_keep_what_another_loses() -> None:
    monitor = with_a_late_shard()
    monitor.handed_on(3)
    monitor.start("h", "a node")
    assert monitor.turn("i", 5) == Turn(3), "h has it last, and died"


def test_a_shard_that_was_begun_before_is_marked() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(2), 1)
    monitor.start("g", "gpu-7")
    assert monitor.turn("g", 0) == Turn(0)
    monitor.begin_shard(0)
    monitor.start("g", "gpu-7")
    assert monitor.turn("g", 0) == Turn(0, again=True)
    assert monitor.turn("g", 1) == Turn(1)


def test_of_two_that_drew_a_shard_the_first_to_ask_is_stored() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(2), 2)
    assert monitor.may_store(0, -1) and not monitor.may_store(0, 0)
    assert monitor.may_store(0, -1), "its process died, and Ray runs it again"
    assert monitor.may_store(1, 1)
    time.now += COMMIT_SECONDS
    assert monitor.may_store(0, 2), "the first one has had its time"
    monitor.committed(0)
    assert not monitor.may_store(0, -1) and not monitor.may_store(0, 2)


def test_at_the_end_only_those_that_load_or_draw_for_nothing_are_busy() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(2), 3)
    for name in "ghi":
        monitor.start(name, "a node")
    assert monitor.busy() == 3
    assert (monitor.turn("g", 0), monitor.turn("h", 1)) == (Turn(0), Turn(1))
    monitor.start("h", "a node")
    assert monitor.turn("g", 0) == Turn(0) and monitor.turn("i", 2) == Turn(1), "h loads its model again"
    for shard, turn in ((0, 0), (1, 2)):
        assert monitor.may_store(shard, turn)
        monitor.committed(shard)
    assert monitor.busy() == 1, "h, whose shard another one drew"
    assert monitor.turn("h", 1) == Turn() and monitor.busy() == 0


def test_a_pass_knows_nothing_of_the_generators_of_the_pass_before() -> None:
    monitor = RunMonitor(FaultPolicy())
    monitor.begin_pass(range(2), 1)
    monitor.start("g", "gpu-7")
    assert monitor.turn("g", 0) == Turn(0)
    monitor.begin_pass(range(2), 1)
    monitor.start("h", "gpu-8")
    monitor.not_loaded("h", "--t2i x: no such folder", again=False)
    assert monitor.turn("h", 0, loaded=False).stop == "--t2i x: no such folder (on gpu-8)", (
        "g is gone, and draws nothing"
    )


def test_a_shard_that_was_given_up_and_comes_all_the_same_says_nothing_of_how_long_one_takes() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(9), 2)
    for shard in range(4):
        monitor.turn("g", shard, node="one")
        monitor.nodes([])
        monitor.committed(shard)  # by one that was cut off, and taken for dead
    for shard in range(4, 7):
        monitor.turn("g", shard, node="one")
        time.now += 10
        monitor.committed(shard)
    assert (monitor.turn("g", 7), monitor.turn("h", 8)) == (Turn(7), Turn(8))
    monitor.committed(8)
    time.now += LATE_FACTOR * 10
    assert monitor.turn("h", 9) == Turn(7)


def test_a_monitor_that_starts_again_gives_nothing_out_before_it_knows_what_is_left() -> None:
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    assert monitor.wants() == (True, "")
    assert monitor.turn("g", 7) == Turn(wait=True)
    monitor.begin_pass(range(4, 20), 2, in_hand=MAX_IN_HAND * 2)
    assert monitor.wants() == (False, "")
    assert monitor.turn("g", 7) == Turn(8), "4 to 7 are in somebody's hands"
    monitor.committed(5)
    time.now += UNKNOWN_SECONDS
    assert [monitor.turn("h", turn) for turn in (8, 9)] == [Turn(4), Turn(6)], "nobody has stored them"


def test_a_monitor_that_starts_again_takes_for_lost_what_would_have_been_late() -> None:
    """At the end of a run too few shards are left to say when that is."""
    time = Clock()
    monitor = RunMonitor(FaultPolicy(), clock=time)
    monitor.begin_pass(range(4), 1)
    for shard in range(3):
        monitor.turn("g", shard)
        time.now += 10
        monitor.committed(shard)
    late_after = monitor.late_after()
    assert late_after == LATE_FACTOR * 10
    for _ in range(2):  # the process after the next one knows it too
        monitor = RunMonitor(FaultPolicy(), clock=time)
        monitor.begin_pass([3], 1, in_hand=1, late_after=late_after)
        late_after = monitor.late_after()
    assert monitor.turn("g", 3) == Turn(wait=True), "somebody may have it"
    time.now += late_after
    assert monitor.turn("g", 3) == Turn(3)
