"""Rates, ETA, stalls, cost and lines of a run, on a clock that the test turns."""

import contextlib
import io
import os
import pty
import termios
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import ray

from cluster.dataset.clip_scores import ClipScores, check_gate
from cluster.generation.cost import Billing
from cluster.generation.display import (
    Display,
    Room,
    _bar_format,
    absent,
    absent_clip,
    log_line,
    next_line,
    trouble,
)
from cluster.generation.limits import FaultPolicy, RunLimits
from cluster.generation.pipeline import GenerationResult
from cluster.generation.pools import Pools
from cluster.generation.progress import MonitorSnapshot, RunProgress
from cluster.generation.stages.monitor import start_monitor
from cluster.generation.telemetry import Telemetry
from cluster.numbers import duration, size
from pcm.errors import InputError
from tests.helpers.tiny_generation import make_dataset_in_process, null_spec, write_corpus
from tests.helpers.waiting import wait_until

FREE = Billing(price_per_hour=None, unit="machine")


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def shard_stats(
    clock: Clock, *, images: int = 256, seconds: float = 100.0, quarantined: int = 0, score: float = 0.3
) -> dict:
    """Stats of a shard that was committed just now, after `seconds` of drawing."""
    histogram = [0] * 40
    histogram[int((score + 1) / 2 * 40)] = images
    return {
        "shard": 0, "count": images + quarantined, "successes": images, "bytes": 1000 * images, "retried": 0,
        "quarantined_by_reason": {"black_image": quarantined} if quarantined else {},
        "start_time": clock.now - seconds, "draw_seconds": seconds, "featurise_seconds": seconds / 10,
        "encode_seconds": seconds / 50, "store_seconds": seconds / 100,
        "clip_score_sum": score * images, "clip_score_sum_of_squares": score**2 * images,
        "clip_score_histogram": histogram,
    }  # fmt: skip


def a_run(
    clock: Clock,
    *,
    total: int = 10_000,
    skipped: int = 0,
    generators: int = 4,
    billing: Billing = FREE,
    scorers: int = 0,
) -> RunProgress:
    last = scorers or generators
    actors = {"draw": generators, "featurise": last, "encode": last, "store": last}
    return RunProgress(total=total, skipped=skipped, actors=actors, billing=billing, scorers=scorers, clock=clock)


def draw(
    clock: Clock, run: RunProgress, *, seconds: int, images_per_second: float, already: int = 0, generators: int = 4
) -> None:
    """The monitor sees so many pictures a second, and is asked every second."""
    for second in range(1, seconds + 1):
        clock.now += 1
        drawn = already + int(second * images_per_second)
        run.observe(MonitorSnapshot(drawn=drawn, in_flight=generators, generators=generators))


def test_the_rate_is_known_before_the_first_shard_is_committed() -> None:
    clock = Clock()
    run = a_run(clock)
    clock.now += 40  # models load
    run.observe(MonitorSnapshot(drawn=0, in_flight=4, generators=4))
    draw(clock, run, seconds=50, images_per_second=2.0)
    status = run.status()
    assert (status.samples, status.drawn) == (0, 100)
    assert status.images_per_second == pytest.approx(2.0, rel=0.02), "loading models is not drawing"
    assert status.eta_seconds == pytest.approx(9_900 / 2, rel=0.02)
    assert status.recent_images_per_second is None, "a minute that is partly start-up says nothing"


def test_the_first_pictures_make_no_rate_yet() -> None:
    clock = Clock()
    run = a_run(clock)
    clock.now += 40
    run.observe(MonitorSnapshot(drawn=8, in_flight=1, generators=1))
    clock.now += 0.001
    assert run.status().images_per_second is None and run.status().eta_seconds is None


def test_the_recent_rate_follows_a_change_and_the_eta_with_it() -> None:
    clock = Clock()
    run = a_run(clock)
    run.observe(MonitorSnapshot(drawn=0, in_flight=4, generators=4))
    draw(clock, run, seconds=700, images_per_second=4.0)
    draw(clock, run, seconds=600, images_per_second=1.0, already=2800)
    status = run.status()
    assert status.recent_images_per_second == pytest.approx(1.0, rel=0.02)
    assert status.images_per_second == pytest.approx(3400 / 1300, rel=0.02)
    assert status.eta_seconds == pytest.approx((10_000 - 3400) / 1.0, rel=0.02)


def test_a_committed_picture_is_not_counted_twice() -> None:
    clock = Clock()
    run = a_run(clock)
    run.observe(MonitorSnapshot(drawn=0, in_flight=4, generators=4))
    draw(clock, run, seconds=128, images_per_second=2.0)
    assert run.status().missing == 10_000 - 256
    run.add(shard_stats(clock, images=250, quarantined=6, seconds=128))
    assert run.status().missing == 10_000 - 256
    run.observe(MonitorSnapshot(drawn=0, in_flight=4, generators=4))
    assert run.status().missing == 10_000 - 256


def test_no_more_is_drawn_than_there_is_to_draw() -> None:
    """Pictures that show nothing are drawn several times; an answer of the monitor may be older than a commit."""
    clock = Clock()
    run = a_run(clock, total=600, skipped=88)
    run.observe(MonitorSnapshot(drawn=0, in_flight=4, generators=4))
    draw(clock, run, seconds=100, images_per_second=7.68)
    assert (run.status().drawn, run.status().missing) == (512, 0)
    assert log_line(run.status(), "").startswith("600/600 samples (100.0%)")
    for _ in range(2):
        run.add(shard_stats(clock))
    run.observe(MonitorSnapshot(drawn=256, in_flight=0, generators=4))
    status = run.status()
    assert (status.samples, status.drawn) == (512, 0) and status.images_per_second == pytest.approx(5.12)


def test_skipped_shards_neither_raise_the_rate_nor_lengthen_the_eta() -> None:
    clock = Clock()
    run = a_run(clock, total=10_000, skipped=9_000, generators=1)
    clock.now += 100
    run.add(shard_stats(clock, images=200, seconds=100))
    status = run.status()
    assert status.images_per_second == pytest.approx(2.0)
    assert status.eta_seconds == pytest.approx(400.0)


def test_a_run_without_a_monitor_goes_by_its_commits() -> None:
    clock = Clock()
    run = a_run(clock)
    run.observe(None)
    clock.now += 100
    for _ in range(4):
        run.add(shard_stats(clock, images=250, seconds=100))
    clock.now += 30
    run.observe(None)
    status = run.status()
    assert (status.images_per_second, status.generators) == (pytest.approx(10.0), None)
    assert status.eta_seconds == pytest.approx(900.0)


def test_a_monitor_that_falls_silent_makes_no_false_rate() -> None:
    clock = Clock()
    run = a_run(clock)
    run.observe(MonitorSnapshot(drawn=0, in_flight=4, generators=4))
    draw(clock, run, seconds=90, images_per_second=2.0)
    run.observe(None)
    clock.now += 1
    run.add(shard_stats(clock, images=180, seconds=91))
    status = run.status()
    assert status.recent_images_per_second is None
    assert status.images_per_second == pytest.approx(180 / 91, rel=0.02)


def test_clocks_of_workers_that_differ_do_not_break_the_rate() -> None:
    for skew in (-500.0, 500.0):
        clock = Clock()
        run = a_run(clock)
        clock.now += 100
        run.add(shard_stats(clock, seconds=100) | {"start_time": clock.now - 100 + skew})
        clock.now += 100
        run.add(shard_stats(clock, seconds=100))
        rate = run.status().images_per_second
        assert rate is not None and 2.5 < rate < 5.2


def test_utilisation_is_the_busy_share_of_each_pool() -> None:
    clock = Clock()
    run = a_run(clock, total=512, generators=2)
    clock.now += 100
    run.add(shard_stats(clock, seconds=80) | {"start_time": clock.now - 100})
    run.add(shard_stats(clock, seconds=100))
    busy = run.status().utilisation
    assert busy == {
        "draw": pytest.approx(0.9), "featurise": pytest.approx(0.09), "encode": pytest.approx(0.018),
        "store": pytest.approx(0.009),
    }  # fmt: skip


@pytest.mark.parametrize("scorers", [0, 1])
def test_generators_that_never_come_are_not_idle(scorers: int) -> None:
    clock = Clock()
    run = a_run(clock, total=512, generators=10, scorers=scorers)
    clock.now += 100
    run.observe(MonitorSnapshot(drawn=0, in_flight=0, generators=2, scorers=scorers))
    clock.now += 100
    run.add(shard_stats(clock, seconds=90) | {"start_time": clock.now - 100})
    run.observe(MonitorSnapshot(drawn=256, in_flight=0, generators=2, scorers=scorers))
    working = run.status().utilisation
    run.add(shard_stats(clock, seconds=90))
    clock.now += 50
    run.observe(MonitorSnapshot(drawn=0, in_flight=0, generators=2, scorers=scorers))
    ended = run.status().utilisation
    assert (working["draw"], ended["draw"]) == (pytest.approx(0.9), pytest.approx(0.9))
    assert ended["featurise"] == pytest.approx(18 / 100 if scorers else 18 / 200)


def test_failures_are_counted_by_reason() -> None:
    clock = Clock()
    run = a_run(clock)
    for quarantined in (1, 0, 2):
        clock.now += 10
        run.add(shard_stats(clock, images=10, quarantined=quarantined, seconds=10))
    status = run.status()
    assert (status.samples, status.images, status.reasons) == (33, 30, {"black_image": 3})


def test_gpus_are_paid_for_from_when_they_are_there() -> None:
    pools = Pools.for_cluster(device="cuda", cpus=64, gpus=0, generators=4)
    billing = Billing.of(pools, device="cuda", price_per_hour=3.0)
    clock = Clock()
    run = a_run(clock, total=2_000, billing=billing)
    run.observe(MonitorSnapshot(drawn=0, in_flight=0, generators=0))
    clock.now += 1800
    run.observe(MonitorSnapshot(drawn=0, in_flight=2, generators=2))  # half an hour of waiting costs nothing
    clock.now += 3600
    run.observe(MonitorSnapshot(drawn=1_000, in_flight=4, generators=4))
    status = run.status()
    assert status.generator_hours == pytest.approx(2.0)
    assert status.unit_hours == pytest.approx(2.0), "a generator and its scorer share one GPU"
    assert status.cost == pytest.approx(6.0)
    assert status.cost_forecast == pytest.approx(6.0 + 1.0 * 4 * 3.0), "an hour more, now with four"


def test_machines_are_paid_for_when_drawing_on_cpus() -> None:
    pools = Pools.for_cluster(device="cpu", cpus=16, gpus=0)
    billing = Billing.of(pools, device="cpu", price_per_hour=0.5)
    clock = Clock()
    run = a_run(clock, generators=16, billing=billing)
    run.observe(MonitorSnapshot(drawn=0, in_flight=16, generators=16), machines=2)
    clock.now += 3600
    assert run.status().cost == pytest.approx(1.0)
    assert billing.basis(spot=True) == "0.5 per machine-hour (spot)"


def test_without_a_price_nothing_is_said_of_cost() -> None:
    clock = Clock()
    run = a_run(clock)
    clock.now += 100
    run.add(shard_stats(clock))
    assert run.status().cost is None and "cost" not in log_line(run.status(), "")


def test_a_stall_is_said_once_it_is_longer_than_what_is_usual() -> None:
    clock = Clock()
    run = a_run(clock)
    for second in range(20):
        clock.now += 40  # a batch takes 40 s
        run.observe(MonitorSnapshot(drawn=32 * second, in_flight=4, generators=4))
    clock.now += 100
    run.observe(MonitorSnapshot(drawn=32 * 19, in_flight=4, generators=4))
    assert trouble(run.status(), few_gpus="", no_room="") == ""
    clock.now += 112
    run.observe(MonitorSnapshot(drawn=32 * 19, in_flight=3, generators=4))
    said = trouble(run.status(), few_gpus="", no_room="")
    assert run.longest_pause_seconds == 40, "of what is over; the present one is in the line"
    assert said == "nothing finished for 3 min 32 s; 3 of 4 generators are drawing"


def test_a_run_that_stands_still_has_a_rate_of_0_and_no_eta() -> None:
    clock = Clock()
    run = a_run(clock)
    run.observe(MonitorSnapshot(drawn=0, in_flight=4, generators=4))
    draw(clock, run, seconds=600, images_per_second=4.0)
    draw(clock, run, seconds=120, images_per_second=0.0, already=2400)
    assert run.status().recent_images_per_second == 0.0 and run.status().eta_seconds is not None
    draw(clock, run, seconds=600, images_per_second=0.0, already=2400)
    assert run.status().eta_seconds is None and run.status().images_per_second == pytest.approx(2400 / 1320, rel=0.01)
    assert "0 images/s (1.818 overall), ETA unknown" in log_line(run.status(), "")


def test_what_is_drawn_and_not_stored_is_a_stall_too() -> None:
    """CLIP hangs, say, or has no place; shards that are stored meanwhile are an advance."""
    clock = Clock()
    run = a_run(clock, total=512)
    clock.now += 100
    run.observe(MonitorSnapshot(drawn=512, in_flight=0, generators=4))
    clock.now += 50
    run.add(shard_stats(clock))
    clock.now += 50
    assert not run.status().stalled and run.status().missing == 0
    clock.now += 150
    said = trouble(run.status(), few_gpus="", no_room="")
    assert said == "nothing finished for 3 min 20 s; 0 of 4 generators are drawing"
    run.add(shard_stats(clock))
    clock.now += 1000
    assert not run.status().stalled, "all is stored"


def test_actors_of_clip_without_a_place_are_named() -> None:
    clock, room = Clock(), Room({"GPU": 1, "CPU": 0.0002})
    run = a_run(clock, scorers=2)
    full = room.full({"GPU": 4, "CPU": 16}, {"CPU": 12.4})
    run.observe(MonitorSnapshot(drawn=0, in_flight=4, generators=4))
    clock.now += 5
    assert absent_clip(run.status(), full=full) == "", "one that has its place starts within seconds"
    clock.now += 95
    assert absent_clip(run.status(), full="") == ""
    said = absent_clip(run.status(), full=full)
    assert said == ("2 actors of CLIP wait, for 1 min 40 s: 0 of the cluster's 4 GPUs are free, and one takes 1")
    run.observe(MonitorSnapshot(drawn=9, in_flight=4, generators=4, scorers=1))
    assert absent_clip(run.status(), full=full).startswith("1 actor of CLIP waits, for 1 min 40 s: 0 of the clu")
    run.observe(MonitorSnapshot(drawn=9, in_flight=4, generators=4, scorers=2))
    assert absent_clip(run.status(), full=full) == ""
    run.observe(MonitorSnapshot(drawn=9, in_flight=4, generators=4, scorers=1))
    clock.now += 20
    assert absent_clip(run.status(), full=full).startswith("1 actor of CLIP waits, for 20 s"), "a machine was lost"


def test_the_log_of_a_run_says_that_clip_has_no_place(ray_session: None, caplog: pytest.LogCaptureFixture) -> None:
    clock, monitor = Clock(), start_monitor(FaultPolicy())
    run = a_run(clock, generators=1, scorers=1)
    assert ray.get(monitor.start.remote("one", "a node")) == ""
    ray.get(monitor.begin_shard.remote(0))
    ray.get(monitor.begin.remote("one", 0, [0, 1]))
    clock.now += 100
    rooms = {"room": Room({"CPU": 1}), "clip_room": Room({"GPU": 1})}
    caplog.set_level("INFO", logger="cluster.generation.display")
    with Display(run, Telemetry("test", has_clip_scores=True), monitor, **rooms, stream=io.StringIO()):
        wait_until(lambda: caplog.messages)
    ray.kill(monitor)
    wait = "1 actor of CLIP waits, for 1 min 40 s: 0 of the cluster's 0 GPUs are free, and one takes 1"
    assert caplog.messages[0].endswith(f"; 1 of 1 generators are drawing; {wait}")


def test_waiting_for_an_autoscaling_cluster_is_said() -> None:
    clock = Clock()
    run = a_run(clock, generators=16)
    run.observe(MonitorSnapshot(drawn=0, in_flight=0, generators=0))
    clock.now += 100
    assert trouble(run.status(), few_gpus=Room({"GPU": 1}).few_gpus(0, 16), no_room="") == (
        "waiting for 16 generators, for 1 min 40 s; the cluster has 0 GPUs now"
    )
    run.observe(MonitorSnapshot(drawn=0, in_flight=0, generators=16))
    said = trouble(run.status(), few_gpus="", no_room="0 of the cluster's 16 GPUs are free")
    assert "loading their models, for 1 min 40 s" in said, "all have started, so nothing is waited for"


def test_waiting_for_what_another_job_uses_is_said() -> None:
    clock = Clock()
    run = a_run(clock, generators=2)
    run.observe(MonitorSnapshot(drawn=0, in_flight=0, generators=0))
    clock.now += 100
    no_room = "0.4 of the cluster's 2 CPUs are free, and one takes 0.75"
    said = trouble(run.status(), few_gpus="", no_room=no_room)
    assert said == f"waiting for 2 generators to start, for 1 min 40 s; {no_room}"
    assert "are starting" in trouble(run.status(), few_gpus="", no_room="")


def test_generators_that_wait_while_others_draw_are_named() -> None:
    clock = Clock()
    run = a_run(clock, generators=16)

    def said(gpus: float, full: str = "") -> str:
        few = Room({"GPU": 1}).few_gpus(gpus, 16)
        assert trouble(run.status(), few_gpus=few, no_room="") == ""
        return absent(run.status(), few_gpus=few, full=full)

    draw(clock, run, seconds=60, images_per_second=10, generators=8)
    assert said(8) == "8 of 16 generators; 8 wait, for 1 min 00 s: the cluster has 8 GPUs now"
    assert log_line(run.status(), said(8)).startswith("600/10,000 samples (6.0%); 8 of 16 generators; 8 wait, for ")
    draw(clock, run, seconds=60, images_per_second=10, already=600, generators=15)
    full = "0 of the cluster's 16 GPUs are free, and one takes 1"
    assert said(16, full) == f"15 of 16 generators; 1 waits, for 2 min 00 s: {full}", "another job has the last one"
    assert said(16) == "15 of 16 generators; 1 is starting, for 2 min 00 s"
    draw(clock, run, seconds=10, images_per_second=10, already=1200, generators=16)
    assert said(16) == ""
    draw(clock, run, seconds=30, images_per_second=10, already=1300, generators=12)
    assert said(12) == "12 of 16 generators; 4 wait, for 29 s: the cluster has 12 GPUs now", "since a machine was lost"


def test_what_is_too_little_for_one_more_is_told_whoever_has_it() -> None:
    room = Room({"GPU": 1, "CPU": 0.9})
    assert room.full({"GPU": 4, "CPU": 8}, {"CPU": 4.4}) == "0 of the cluster's 4 GPUs are free, and one takes 1"
    assert room.full({"GPU": 4, "CPU": 4}, {"GPU": 1, "CPU": 0.4}).startswith("0.4 of the cluster's 4 CPUs are free")
    assert room.full({"GPU": 4, "CPU": 8}, {"GPU": 1, "CPU": 4}) == ""


def test_a_run_that_fills_the_cluster_itself_waits_for_nobody() -> None:
    """Its generators are starting, and have the CPUs that are lacking since."""

    def said(has: list[float], free: list[float]) -> list[str]:
        room = Room({"GPU": 0, "CPU": 0.75})
        return [room.lacking({"CPU": whole}, {"CPU": left}) for whole, left in zip(has, free, strict=True)]

    assert said([3, 3, 3], [3, 0.65, 0.65]) == ["", "", ""]
    nothing, full = (f"0 of the cluster's {has} CPUs are free, and one takes 0.75" for has in (0, 2))
    assert said([0, 0, 1, 4], [0, 0, 0.1, 0.2]) == [nothing, nothing, "", ""], "its machines have come"
    assert said([2, 2, 2, 2], [0, 0, 2, 0]) == [full, full, "", ""], "the other job has ended"
    assert said([8, 8], [4, 0]) == ["", ""], "the others leave it half"


def test_a_run_of_three_days_leaves_a_log_that_can_be_read() -> None:
    seconds, lines = 0.0, []
    while seconds < 3 * 24 * 3600:
        lines.append(seconds)
        seconds = next_line(seconds)
    assert len(lines) < 4_500
    assert sum(when < 60 for when in lines) == 6, "dense while someone waits to see whether it works"


def test_a_line_says_all_there_is_to_know() -> None:
    clock = Clock()
    run = a_run(clock, generators=1, billing=Billing(price_per_hour=3.6, unit="machine"))
    clock.now += 100
    run.add(shard_stats(clock, images=200, quarantined=4, score=0.27))
    assert log_line(run.status(), "") == (
        "204/10,000 samples (2.0%); 2 images/s, ETA 1 h 20 min; busy: draw 100%, featurise 10%, encode 2%, store 1%, "
        "clip score 0.270, 200 kB, quarantined: black_image 4, cost 0.1 of about 4.902"
    )


def test_a_run_that_is_not_over_is_not_said_to_be_at_100_percent() -> None:
    clock = Clock()
    run = a_run(clock, total=100_000, generators=1)
    clock.now += 100
    run.add(shard_stats(clock, images=99_999))
    assert log_line(run.status(), "").startswith("99,999/100,000 samples (99.9%); ")
    assert _bar_format(run.status()).startswith(" 99%|")


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (425, "7 min 05 s"), (56_280, "15 h 38 min"),
     (86_399, "1 d 0 h"), (273_600, "3 d 4 h"), (float("inf"), "an unlimited time")],
)  # fmt: skip
def test_durations_read_like_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_sizes_are_decimal() -> None:
    assert [size(count) for count in (0, 999, 1_000, 12_340_000, 5.2e12)] == [
        "0 B",
        "999 B",
        "1 kB",
        "12.34 MB",
        "5.2 TB",
    ]


def read_to_the_end(descriptor: int) -> Iterator[bytes]:
    with open(descriptor, "rb", buffering=0) as file, contextlib.suppress(OSError):  # a closed terminal gives EIO
        while chunk := file.read(4096):
            yield chunk


@pytest.mark.parametrize("columns", [0, 140])
def test_a_terminal_gets_a_bar_that_ends_full(columns: int) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, columns))
    clock = Clock()
    run = a_run(clock, total=256, generators=1)
    chunks: list[bytes] = []
    reader = threading.Thread(target=lambda: chunks.extend(read_to_the_end(ours)))
    reader.start()
    with (
        os.fdopen(theirs, "w") as terminal,
        Display(
            run,
            Telemetry("test", has_clip_scores=False),
            None,
            room=Room({}),
            clip_room=Room({}),
            stream=terminal,
        ) as display,
    ):
        clock.now += 100
        display.add(shard_stats(clock))
    reader.join()
    shown = b"".join(chunks).decode()
    assert "100%|" in shown and "256/256 samples [1 min 40 s, 2.56 images/s]" in shown
    assert "busy: draw 100%" in shown and "clip score 0.300" in shown


def test_a_log_gets_lines_without_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    run = a_run(clock, total=256, generators=1)
    no_terminal = io.StringIO()
    with (
        caplog.at_level("INFO", logger="cluster.generation.display"),
        Display(
            run,
            Telemetry("test", has_clip_scores=False),
            None,
            room=Room({}),
            clip_room=Room({}),
            stream=no_terminal,
        ) as display,
    ):
        clock.now += 100
        display.add(shard_stats(clock))
    assert no_terminal.getvalue() == ""
    assert caplog.messages[-1].startswith("256/256 samples (100.0%); 2.56 images/s; busy: draw 100%")
    assert all(message.isprintable() for message in caplog.messages)


def test_scores_of_shards_add_up_to_those_of_the_whole() -> None:
    values = np.random.default_rng(0).normal(0.26, 0.05, 3_000)
    shards = []
    for part in np.array_split(values, 7):
        histogram, _ = np.histogram(part, bins=np.linspace(-1, 1, 41))
        shards.append(
            ClipScores.of_shard({
                "successes": len(part), "clip_score_histogram": histogram.tolist(),
                "clip_score_sum": part.sum(), "clip_score_sum_of_squares": np.square(part).sum(),
            })
        )  # fmt: skip
    whole = sum(shards, ClipScores())
    assert whole.mean == pytest.approx(values.mean())
    assert whole.standard_error == pytest.approx(values.std(ddof=1) / np.sqrt(len(values)))
    for percent in (0, 5, 50, 95, 100):
        assert whole.percentile(percent) == pytest.approx(np.percentile(values, percent), abs=0.05)
    assert whole.percentile(50) == pytest.approx(np.percentile(values, 50), abs=0.01), "interpolated inside a bin"
    assert ClipScores().mean is None and ClipScores().percentile(50) is None


def summary_of(run: RunProgress) -> dict:
    return GenerationResult(
        manifest=None, shard_size=256, status=run.status(), startup_seconds=None, stage_seconds={},
        longest_pause_seconds=0.0, begun_again=None, billing=FREE, watch=RunLimits(),
    ).summary()  # fmt: skip


def test_percentiles_have_no_more_places_than_the_histogram_gives() -> None:
    clock = Clock()
    run = a_run(clock)
    clock.now += 100
    run.add(shard_stats(clock, images=255, score=0.262))
    found = summary_of(run)["clip_score_percentiles"]
    assert found == {"p5": 0.25, "p25": 0.26, "p50": 0.27, "p75": 0.29, "p95": 0.3}


def test_the_null_clips_zeros_are_no_scores() -> None:
    clock = Clock()
    actors = {"draw": 1, "featurise": 1, "encode": 1, "store": 1}
    run = RunProgress(total=512, skipped=0, actors=actors, billing=FREE, scored=False, clock=clock)
    clock.now += 100
    run.add(shard_stats(clock, score=0.0))
    assert run.scores.mean is None
    summary = summary_of(run)
    assert not any(summary["clip_score_histogram"])
    assert set(summary["clip_score_percentiles"].values()) == {None}


def test_the_gate_closes_only_beyond_doubt_and_shows_an_example(tmp_path) -> None:
    store, _, _ = make_dataset_in_process(tmp_path / "data", write_corpus(tmp_path), null_spec(), finish=False)

    def scores(count: int, mean: float, deviation: float) -> ClipScores:
        squares = count * mean**2 + (count - 1) * deviation**2
        return ClipScores(count=count, sum=count * mean, sum_of_squares=squares)

    check_gate(scores(1_000, 0.1, 0.01), None, store=store, shard=1)
    check_gate(scores(63, 0.1, 0.01), 0.2, store=store, shard=1)
    check_gate(scores(100, 0.19, 0.06), 0.2, store=store, shard=1)  # two standard errors: 0.012
    check_gate(scores(100, 0.21, 0.01), 0.2, store=store, shard=1)
    with pytest.raises(InputError) as stop:
        check_gate(scores(400, 0.19, 0.06), 0.2, store=store, shard=1)
    line = str(stop.value)
    assert "0.190 +- 0.006 of 400 pictures is below --stop-below-clip-score 0.2" in line and "\n" not in line
    assert "--only 000000005-00" in line and "'A bird near the beach.'" in line


@pytest.mark.parametrize(
    "watch", [{"price_per_hour": -1.0}, {"price_per_hour": float("nan")}, {"stop_below_clip_score": 25.0}]
)
def test_a_watch_that_makes_no_sense_is_refused(watch: dict[str, float]) -> None:
    with pytest.raises(InputError):
        RunLimits(**watch)


@pytest.mark.parametrize("by", [-86400.0, 86400.0])
def test_a_clock_that_is_set_during_a_run_changes_no_rate(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    before = time.time()
    run = RunProgress(
        total=10, skipped=0, actors=dict.fromkeys(("draw", "featurise", "encode", "store"), 1), billing=FREE
    )
    monkeypatch.setattr(time, "time", lambda: before + by)
    assert 0 <= run.status().seconds < 3600


@pytest.mark.parametrize("ahead", [-86400.0, 86400.0])
def test_workers_whose_clocks_are_a_day_off_change_no_sign(ahead: float) -> None:
    """Nor do times that a clock took which was set back meanwhile."""
    clock = Clock()
    run = a_run(clock, total=512)
    for _ in range(2):
        clock.now += 60
        stats = shard_stats(clock)
        run.add(stats | {"start_time": stats["start_time"] + ahead, "featurise_seconds": -ahead, "draw_seconds": -1.0})
    status = run.status()
    assert status.images_per_second is None or 0 < status.images_per_second < 512
    assert status.eta_seconds == 0 and not status.stalled and status.seconds == 120
    assert all(0 <= share <= 1 for share in status.utilisation.values())
    assert "-" not in log_line(status, None).replace("- ", "")
