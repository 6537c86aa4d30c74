"""Work with a generator's resources: waited for with a line, begun again where it fails, or told in one line."""

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.device import device_of_cluster
from cluster.generation import capacity
from cluster.generation.capacity import TRIES, Result, pools_of_cluster, with_generator_resources
from cluster.generation.display import Room, ask_cluster
from cluster.generation.pools import Pools
from cluster.generation.request import MachineOptions
from pcm.errors import InputError, StoreFailure

ONE = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=1)


def answer_the_second_time(marker: Path, how: str) -> Iterator[str | Result[int]]:
    yield "loading the model"
    if not marker.exists():
        marker.touch()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError("the hub said 503")
    yield Result(42)


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.slow), "raises"])
def test_one_failure_is_not_the_end(
    how: str, tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert with_generator_resources(answer_the_second_time, ONE, tmp_path / "marker", how, what="speed") == 42
    said = caplog.text
    assert said.count("speed: loading the model") == 2 and f"trying again (2 of {TRIES})" in said
    assert how == "killed" or "OSError: the hub said 503" in said


def fail(error: Exception, tries: Path) -> Iterator[str | Result[None]]:
    with tries.open("a") as file:
        file.write("x")
    raise error
    yield Result(None)


def test_what_always_fails_and_what_a_user_can_mend_are_one_line(
    tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "FIRST_PAUSE", 0.0)
    with pytest.raises(InputError, match=rf"^speed: failed {TRIES} times \(OSError: no such disk\); check") as failed:
        with_generator_resources(fail, ONE, OSError("no such disk"), tmp_path / "often", what="speed")
    assert "\n" not in str(failed.value) and len((tmp_path / "often").read_text()) == TRIES
    silent = StoreFailure("s3://weights: the store did not answer", passes=True)
    with pytest.raises(StoreFailure, match=r"^s3://weights: the store did not answer$"):
        with_generator_resources(fail, ONE, silent, tmp_path / "passes", what="speed")
    assert len((tmp_path / "passes").read_text()) == TRIES
    with pytest.raises(InputError, match=r"^no such model$"):
        with_generator_resources(fail, ONE, InputError("no such model"), tmp_path / "once", what="speed")
    assert len((tmp_path / "once").read_text()) == 1


@ray.remote(num_cpus=2)
class Other:
    def at_work(self) -> bool:
        return True


def work_until(end: Path) -> Iterator[str | Result[None]]:
    yield "drawing"
    while not end.exists():
        time.sleep(0.05)
    yield Result(None)


def test_what_is_waited_for_and_what_lasts_is_said(
    tmp_path: Path, ray_session: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(capacity, "SECONDS_BETWEEN_WAITING_LINES", 0.2)
    end, other = tmp_path / "end", Other.remote()
    assert ray.get(other.at_work.remote())

    def act_on_what_is_said(record: logging.LogRecord) -> bool:
        if "waiting for a machine" in record.getMessage():
            ray.kill(other)
        if "drawing, for" in record.getMessage():
            end.touch()
        return True

    monkeypatch.setattr(capacity.log, "filters", [act_on_what_is_said])
    with_generator_resources(work_until, ONE, end, what="speed")
    said = [record.getMessage() for record in caplog.records if record.name == capacity.log.name]
    assert re.match(r"speed: waiting for a machine, for .*; 0 of the cluster's 2 CPUs are free, and one takes", said[0])
    assert "speed: drawing" in said and said[-1].startswith("speed: drawing, for ")


def test_gpus_are_not_waited_for_on_a_machine_of_its_own(ray_session: None) -> None:
    for asked in (MachineOptions(), MachineOptions(generators=2)):
        with pytest.raises(InputError, match=r"^cuda: this machine has no GPU") as refused:
            pools_of_cluster(asked, device="cuda")
        assert "\n" not in str(refused.value)


def test_a_label_is_not_waited_for_on_a_machine_of_its_own(ray_session: None) -> None:
    asked = MachineOptions(generators=2, node_label=("role", "generation"))
    with pytest.raises(InputError, match=r"^--node-label role=generation: this machine does not have it, and no oth"):
        pools_of_cluster(asked, device="cpu")
    own = ("ray.io/node-id", ray.nodes()[0]["Labels"]["ray.io/node-id"])
    assert pools_of_cluster(MachineOptions(node_label=own), device="cpu").generators == 2


def nodes_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of two nodes: one for training, of whose four GPUs three are free, and one for generation."""
    nodes = [
        {"NodeID": role, "Alive": True, "Resources": {"CPU": 16.0, "GPU": gpus}, "Labels": {"role": role}}
        for role, gpus in (("training", 4.0), ("generation", 2.0))
    ]
    free = {"training": {"CPU": 16.0, "GPU": 3.0}, "generation": {"CPU": 14.0}}
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("cluster.session.free_resources", lambda: free)
    monkeypatch.setenv("RAY_ADDRESS", "there")


def test_nodes_with_another_label_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_with_gpus(monkeypatch)
    asked = MachineOptions(node_label=("role", "generation"))
    assert pools_of_cluster(asked, device="cuda").generators == 2
    assert pools_of_cluster(device="cuda").generators == 6
    assert device_of_cluster("auto", labels=asked.node_labels) == "cuda"
    with pytest.raises(InputError, match="--device auto: nodes with role=demo have no CPUs and GPUs for work now"):
        device_of_cluster("auto", labels={"role": "demo"})
    clip = Room({"GPU": 1})
    state = ask_cluster(None, room=Room({"GPU": 1, "CPU": 0.9}, asked.node_labels), clip_room=clip)
    assert state.gpus == 2 and state.machines == 2
    assert state.full == "0 of the 2 GPUs of nodes with role=generation are free, and one takes 1" == state.no_room
    few = Room({"GPU": 1, "CPU": 0.9}, {"role": "demo"})
    assert few.few_gpus(ask_cluster(None, room=few, clip_room=clip).gpus, 4) == "nodes with role=demo have 0 GPUs now"
    assert ask_cluster(None, room=Room({"GPU": 1, "CPU": 0.9}), clip_room=clip).no_room == ""


def test_generators_that_leave_clip_no_gpu_are_refused_where_no_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_with_gpus(monkeypatch)
    asked = MachineOptions(generators=6, clip_gpus=1)
    assert pools_of_cluster(asked, device="cuda").scorers == 1, "this cluster may grow"
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(
        InputError, match=r"^generators \(6\) and actors of CLIP alone \(1\) take 7 GPUs, and there are 6"
    ):
        pools_of_cluster(asked, device="cuda")
    assert pools_of_cluster(MachineOptions(generators=(5, 6), clip_gpus=1), device="cuda").generators == 6
    assert pools_of_cluster(MachineOptions(clip_gpus=1), device="cuda").generators == 5
    assert pools_of_cluster(MachineOptions(generators=9), device="cuda").generators == 9, "without CLIP the others wait"


def test_generators_are_as_many_as_there_are_cores_or_as_are_named(ray_session: None) -> None:
    assert pools_of_cluster(device=device_of_cluster("auto")).generators == 2
    assert pools_of_cluster(MachineOptions(generators=5), device="cpu").generators == 5
