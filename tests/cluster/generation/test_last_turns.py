"""What a run does with turns that are left when all its shards are stored."""

import threading
from collections.abc import Iterator

import pytest
import ray

from cluster.generation import turns
from cluster.generation.limits import FaultPolicy
from cluster.generation.stages.monitor import start_monitor
from pcm.errors import InputError


def test_a_last_turn_that_stops_the_run_is_heard(ray_session: None) -> None:
    def rows() -> Iterator[dict]:
        yield {}
        raise InputError("40 of 64 samples failed")

    monitor = start_monitor(FaultPolicy())
    with pytest.raises(InputError, match="40 of 64 samples failed"):
        turns._let_turns_end(rows(), monitor)
    ray.kill(monitor)


def test_a_last_turn_that_never_ends_is_not_waited_for(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LAST_TURNS_SECONDS", 0.2)
    over, monitor = threading.Event(), start_monitor(FaultPolicy())

    def rows() -> Iterator[dict]:
        over.wait(60)
        yield {}

    waiting = threading.Thread(target=turns._let_turns_end, args=(rows(), monitor), daemon=True)
    waiting.start()
    waiting.join(30)  # the turn takes twice as long
    assert not waiting.is_alive()
    over.set()
    ray.kill(monitor)


def test_while_a_generator_loads_nothing_is_waited_for(ray_session: None) -> None:
    """Of what it draws then, all is there."""
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.start.remote("g", "a node"))
    taken: list[dict] = []

    def rows() -> Iterator[dict]:
        taken.append({})
        yield {}

    turns._let_turns_end(rows(), monitor)
    assert not taken
    ray.kill(monitor)
