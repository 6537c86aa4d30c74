"""Lines now and then: at their times, once each, also from many threads."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from pcm.line_timer import LineTimer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the timer sees, to be set."""
    now = [100.0]
    monkeypatch.setattr("pcm.line_timer.time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


@pytest.mark.parametrize(("at_once", "expected"), [(False, [105, 110]), (True, [100, 105, 110])])
def test_a_line_is_due_every_so_many_seconds(clock: list[float], at_once: bool, expected: list[int]) -> None:
    timer = LineTimer(5, at_once=at_once)
    due = []
    for second in range(100, 113):
        clock[0] = second
        due += [second] * timer.due()
    assert due == expected and timer.elapsed == 12


def test_after_a_long_step_one_line_is_due_and_not_all_that_were_missed(clock: list[float]) -> None:
    timer = LineTimer(5)
    clock[0] = 128.0
    assert [timer.due(), timer.due()] == [True, False]
    clock[0] = 132.9
    assert not timer.due()
    clock[0] = 133.0
    assert timer.due()


def test_many_threads_are_given_one_line(clock: list[float]) -> None:
    timer = LineTimer(5)
    clock[0] = 105.0
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda _: timer.due(), range(200))) == 1


def test_elapsed_counts_from_the_first_work_and_not_from_the_wait_for_it(clock: list[float]) -> None:
    timer = LineTimer(5)
    clock[0] = 700.0
    timer.began(4)
    assert timer.elapsed == 4 and timer.due()
    clock[0] = 701.0
    timer.began(7)  # ended later, begun earlier
    assert timer.elapsed == 7
    clock[0] = 710.0
    timer.began(2)
    assert timer.elapsed == 16
