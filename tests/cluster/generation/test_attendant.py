"""What the driver tells the monitor while a pass goes on."""

import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.actor import ActorHandle
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

from cluster.generation.attendant import TICK_SECONDS, attended
from cluster.generation.limits import FaultPolicy
from cluster.generation.stages.generator import Generator
from cluster.generation.stages.monitor import MAX_IN_HAND, Turn, start_monitor
from cluster.numbers import duration
from pcm.errors import InputError
from tests.helpers.faulty_generators import DrawNotLoaded
from tests.helpers.tiny_generation import null_spec, plan_dataset, write_corpus
from tests.helpers.waiting import wait_until


def asked(monitor: ActorHandle, name: str, number: int, **named: bool | str) -> Turn:
    turn: Turn = ray.get(monitor.turn.remote(name, number, **named))
    return turn


def nobody_can_draw(wanted: int) -> ActorHandle:
    """A monitor of so many generators, of which one has started and is left out."""
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote(range(9), wanted))
    ray.get(monitor.start.remote("g", "gpu-7"))
    ray.get(monitor.not_loaded.remote("g", "/models/x: no such folder", again=False))
    return monitor


def first_line(caplog: pytest.LogCaptureFixture, monitor: ActorHandle, wanted: int) -> str:
    with caplog.at_level(logging.WARNING), attended(monitor, set(range(9)), wanted, 0):
        wait_until(lambda: caplog.messages)
    return caplog.messages[0]


def test_a_monitor_whose_process_died_gives_out_what_is_left_and_in_nobodys_hand(ray_session: None) -> None:
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote(range(9), 1))
    assert [asked(monitor, "g", turn) for turn in range(4)] == [Turn(0), Turn(1), Turn(wait=True), Turn(wait=True)]
    left = set(range(9)) - {0}
    with attended(monitor, left, 1, 0):
        ray.kill(monitor, no_restart=False)
        while (turn := asked(monitor, "g", 2)).wait:
            time.sleep(0.1)
    assert turn == Turn(1 + MAX_IN_HAND)


def test_a_monitor_whose_process_died_is_told_how_long_a_shard_takes_and_the_log_says_what_is_waited_for(
    ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote(range(9), 1))
    left = set(range(9))
    with caplog.at_level(logging.WARNING), attended(monitor, left, 1, 0):
        for shard in range(3):
            assert asked(monitor, "g", shard) == Turn(shard)
            ray.get(monitor.committed.remote(shard))
            left.remove(shard)
        late_after = ray.get(monitor.late_after.remote())
        time.sleep(2 * TICK_SECONDS)
        ray.kill(monitor, no_restart=False)
        wait_until(lambda: caplog.messages)
        assert ray.get(monitor.late_after.remote()) == late_after
    assert caplog.messages == [
        "the monitor's process died; it knows again what is left: 6 shards; 2 may be in work, and are given out again "
        f"where they are not stored within {duration(late_after)}"
    ]


def test_the_log_says_who_is_left_out_and_what_is_waited_for(
    ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    said = first_line(caplog, nobody_can_draw(16), 16)
    assert said.startswith(
        "nobody can work: /models/x: no such folder (on gpu-7); 15 more that were asked for have not started, and no "
        "node is coming (waited "
    )


def test_the_log_names_each_actor_that_is_left_out_once(ray_session: None, caplog: pytest.LogCaptureFixture) -> None:
    monitor = nobody_can_draw(2)
    ray.get(monitor.start.remote("another", "gpu-8"))
    with caplog.at_level(logging.WARNING), attended(monitor, set(range(9)), 2, 0):
        wait_until(lambda: caplog.messages)
        time.sleep(2 * TICK_SECONDS)
    assert caplog.messages == ["an actor is left out, and others do its share: gpu-7: /models/x: no such folder"]


def test_what_was_in_hand_on_a_node_that_is_gone_is_given_out_again(ray_session: None) -> None:
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote([0], 2))
    assert asked(monitor, "g", 0, node="gone") == Turn(0)
    with attended(monitor, {0}, 2, 0):
        wait_until(lambda: asked(monitor, "h", 1) == Turn(0))


def test_a_run_in_which_nobody_can_draw_is_told_that_nodes_are_coming(
    ray_session: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = b"status of a test"
    monkeypatch.setattr("cluster.ray_autoscaler_internals.DEBUG_AUTOSCALING_STATUS", key)
    _internal_kv_put(key, json.dumps({"autoscaler_report": {"pending_launches": {"gpu": 1}}}))
    monitor = nobody_can_draw(2)
    said = first_line(caplog, monitor, 2)
    assert "have not started; nodes are coming" in said
    assert asked(monitor, "g", 0, loaded=False) == Turn(wait=True)
    _internal_kv_del(key)


def test_where_ray_does_not_say_whether_nodes_are_coming_the_log_says_so_and_who_is_left_out(
    ray_session: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = b"status of a test, in a form that this Ray does not have"
    monkeypatch.setattr("cluster.ray_autoscaler_internals.DEBUG_AUTOSCALING_STATUS", key)
    _internal_kv_put(key, "pending: 1")
    said = first_line(caplog, nobody_can_draw(2), 2)
    assert said.startswith("nobody can work: /models/x: no such folder (on gpu-7); 1 more ")
    assert "have not started, and Ray does not say whether nodes are coming (JSONDecodeError: " in said
    _internal_kv_del(key)


def test_a_generator_that_was_left_out_before_the_monitors_process_died_still_ends_the_run(
    tmp_path: Path, ray_session: None
) -> None:
    """It never starts again."""
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin_pass.remote(range(9), 2))
    ray.get(monitor.start.remote("another", "gpu-8"))
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path), null_spec())
    generator = Generator(DrawNotLoaded, store, plan, (monitor, FaultPolicy()), frozenset(), scores=False)
    with ThreadPoolExecutor(1) as calls, attended(monitor, set(range(9)), 1, 0):
        call = calls.submit(generator, pa.table({"turn": [0]}))
        while not ray.get(monitor.left_out.remote()):
            assert not call.done()
            time.sleep(0.1)
        ray.kill(monitor, no_restart=False)  # and the other one with it
        try:
            with pytest.raises(InputError, match=r"mend the model \(on .*node"):
                call.result(30)
        finally:
            ray.get(monitor.begin_pass.remote([], 1))  # it waits no longer
