"""Each thing of Ray that is not public, named and called as we call it: what an upgrade of Ray breaks is seen here."""

import gc
import inspect
import json
import os
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest
import ray.data
import ray.train
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray.data import ActorPoolStrategy
from ray.data._internal.stats import _StatsManager
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put
from ray.train import FailureConfig, WorkerGroupError
from ray.train._internal.session import get_session
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution import train_fn_utils
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.util import construct_user_exception_with_traceback
from ray.util.placement_group import placement_group, remove_placement_group

from cluster import ray_internals
from cluster.ray_autoscaler_internals import nodes_are_coming
from cluster.ray_data_internals import RowsOf, row_by_row
from cluster.ray_internals import LOOP_ERRORS, LocalReports, PolicyTrainer, train_in_this_process
from cluster.ray_state import actors_are_placed, free_resources, has_group
from cluster.session import is_no_user_error
from pcm.errors import InputError
from tests.helpers.waiting import Holds, wait_until


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (get_session, []),
        (_TorchBackend.on_start, ["self", "worker_group", "backend_config"]),
        (DefaultFailurePolicy.__init__, ["self", "failure_config"]),
        (DefaultFailurePolicy.make_decision, ["self", "training_failed_error"]),
        (PlacementGroupCleanerCallback.__init__, ["self"]),
        (ElasticScalingPolicy.__init__, ["self", "scaling_config"]),
        (ElasticScalingPolicy._count_possible_workers, ["self", "reserved_resources"]),
        (
            ElasticScalingPolicy.make_decision_for_running_worker_group,
            ["self", "worker_group_state", "worker_group_status"],
        ),
        (ElasticScalingPolicy._maybe_send_resource_request, ["self"]),
        (ResizeDecision.__init__, ["self", "num_workers", "resources_per_worker"]),
        (TorchTrainer._initialize_and_run_controller, ["self", "controller_init_kwargs"]),
        (TorchTrainer._create_default_callbacks, ["self"]),
        (train_fn_utils.set_train_fn_utils, ["train_fn_utils"]),
        (packaging._dir_travel, ["path", "excludes", "handler", "include_gitignore", "logger"]),
        (packaging._get_excludes, ["path", "excludes"]),
        (get_runtime_env_default_excludes, []),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_ray_still_has_it_with_the_signature_we_call(function: object, expected: list[str]) -> None:
    names = [name for name in parameters(function) if name not in ("args", "kwargs")]
    assert names[: len(expected)] == expected
    assert all(
        each.default is not inspect.Parameter.empty or each.kind is inspect.Parameter.VAR_KEYWORD
        for each in list(inspect.signature(function).parameters.values())[len(expected) :]  # type: ignore[arg-type]
    )


def test_the_workers_backend_is_chosen_by_a_property_of_the_config() -> None:
    assert TorchConfig().backend_cls is ray_internals.TorchBackend is _TorchBackend


def test_a_report_takes_what_the_loop_gives_and_a_subclass_may_ignore_the_rest() -> None:
    assert parameters(train_fn_utils.LocalTrainFnUtils.report)[:4] == [
        "self", "metrics", "checkpoint", "checkpoint_dir_name",
    ]  # fmt: skip
    assert parameters(train_fn_utils.LocalTrainFnUtils.__init__)[1] == "experiment_name"


def test_a_failure_policy_is_asked_about_the_errors_of_workers() -> None:
    policy = DefaultFailurePolicy(FailureConfig(max_failures=1))
    failed = WorkerGroupError("failed", {0: OSError("gone")})
    assert policy.make_decision(failed) == FailureDecision.RETRY
    assert isinstance(failed, ray_internals.TrainingFailedError)
    assert ray_internals.TrainingFailedError is ray.train.TrainingFailedError
    assert list(failed.worker_failures) == [0] and FailureDecision.RAISE != FailureDecision.RETRY


def test_of_a_loops_errors_the_users_are_shown_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(LOOP_ERRORS, "filters", [is_no_user_error])
    monkeypatch.setattr(LOOP_ERRORS, "propagate", True)
    shown = []
    for raised in (InputError("no rows"), RuntimeError("a defect")):
        try:
            raise raised
        except Exception as error:
            construct_user_exception_with_traceback(error)
        shown.append("\n".join(record.getMessage() for record in caplog.records))
    assert shown[0] == "" and shown[1].endswith("RuntimeError: a defect\n")


def test_ray_reads_its_record_of_the_checkpoints_by_a_model_that_we_can_fill() -> None:
    """Each of its fields is known here: a new one needs its value in `renewed_checkpoint_record`."""
    result = {"version": 0, "checkpoint_dir_name": "epoch-001", "metrics": {"score": 0.5}}
    renewed = ray_internals.renewed_checkpoint_record(
        {"checkpoint_results": [result], "latest_checkpoint_result": result}, str
    )
    assert ray_internals.reads_checkpoint_record(renewed) and renewed["latest_checkpoint_result"] == result
    assert renewed.keys() == vars(_CheckpointManagerState)["__annotations__"].keys()
    assert renewed["ray_version"] == ray.__version__


def test_a_trainer_gives_its_controller_our_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Policy(DefaultFailurePolicy):
        pass

    class Trainer(PolicyTrainer):
        failure_policy = Policy

    given: dict = {}
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda self, **settings: given.update(settings))
    run_config = ray.train.RunConfig(failure_config=FailureConfig(max_failures=2))
    trainer = Trainer(lambda: None, scaling_config=ray.train.ScalingConfig(num_workers=1), run_config=run_config)
    trainer._initialize_and_run_controller(failure_policy=None, callbacks=[])
    assert isinstance(given["failure_policy"], Policy) and given["callbacks"] == []
    for name in ("failure_policy=", "scaling_policy="):
        assert name in inspect.getsource(TorchTrainer.fit), "fit() passes the policy by this name"
    trainer.scaling_policy = lambda scaling_config: scaling_config
    trainer._initialize_and_run_controller(failure_policy=None, scaling_policy=None, callbacks=[])
    assert given["scaling_policy"] is trainer.scaling_config


def test_the_clean_up_after_a_lost_controller_can_be_left_out() -> None:
    class Quiet(PolicyTrainer):
        cleans_up = False

    def callbacks(kind: type[PolicyTrainer]) -> list[type]:
        trainer = kind(lambda: None, scaling_config=ray.train.ScalingConfig(num_workers=1))
        return [type(each) for each in trainer._create_default_callbacks()]

    kept, left = callbacks(PolicyTrainer), callbacks(Quiet)
    assert PlacementGroupCleanerCallback in kept and PlacementGroupCleanerCallback not in left
    assert set(kept) - set(left) == {PlacementGroupCleanerCallback}


def test_a_loop_runs_as_a_plain_function_from_the_checkpoint_it_is_given(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train_fn_utils, "_train_fn_utils", None)
    reported = []

    class Reports(LocalReports):
        def report(self, metrics, checkpoint=None, checkpoint_dir_name=None, **settings) -> None:
            reported.append((metrics, checkpoint_dir_name))

    begin = ray.train.Checkpoint.from_directory(str(tmp_path))
    train_in_this_process(Reports(name="trial", checkpoint=begin))
    assert ray.train.get_checkpoint() is begin
    assert (ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()) == (0, 1)
    ray.train.report({"loss": 1.0}, checkpoint_dir_name="epoch-001")
    assert reported == [({"loss": 1.0}, "epoch-001")]


class RowsAtOnce:
    """How many rows an actor is handed at once, and which."""

    def __call__(self, block: pa.Table) -> pa.Table:
        return pa.table({"number": block["number"], "rows": [block.num_rows] * block.num_rows})


def in_two_actors(rows: ray.data.Dataset) -> ray.data.Dataset:
    pool = ActorPoolStrategy(size=2)
    return rows.map_batches(RowsAtOnce, compute=pool, num_cpus=0.5, batch_size=None, batch_format="pyarrow")


def test_every_row_is_handed_to_an_actor_alone_and_once(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.ray_data_internals.ROWS_AN_OBJECT", 20)
    numbers = list(range(43))
    rows = row_by_row(pa.table({"number": numbers}))
    given = list(RowsOf(in_two_actors(rows)))
    assert sorted(row["number"] for row in given) == numbers
    assert {row["rows"] for row in given} == {1}


@pytest.mark.slow
def test_rows_come_without_the_statistics_of_all_blocks_before(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []
    monkeypatch.setattr(_StatsManager, "update_iteration_metrics", lambda *given: sent.append(given))
    pipeline = in_two_actors(row_by_row(pa.table({"number": list(range(5))})))
    assert len(list(RowsOf(pipeline))) == 5 and not sent
    assert len(list(pipeline.iter_batches(batch_size=1))) == 5 and sent, "the same call, where there are some"


class SleepsOverTheSecond:
    """A row alone; the second one to come, whichever it is (an actor's calls keep no order), takes ten minutes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, block: pa.Table) -> pa.Table:
        self.calls += 1
        if self.calls == 2:
            time.sleep(600)
        return pa.table({"process": [os.getpid()]})


def test_a_pipeline_ends_where_its_rows_are_no_longer_wanted(ray_session: None) -> None:
    pool = ActorPoolStrategy(size=1)
    pipeline = row_by_row(pa.table({"number": list(range(20))}))
    rows = RowsOf(pipeline.map_batches(SleepsOverTheSecond, compute=pool, batch_size=1, batch_format="pyarrow"))
    process = next(rows)["process"]
    assert Path(f"/proc/{process}").exists()
    rows.close()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{process}").exists()


def test_a_pipeline_may_be_closed_while_another_thread_waits_for_its_rows(ray_session: None) -> None:
    pool = ActorPoolStrategy(size=1)
    pipeline = row_by_row(pa.table({"number": list(range(20))}))
    rows = RowsOf(pipeline.map_batches(SleepsOverTheSecond, compute=pool, batch_size=1, batch_format="pyarrow"))
    next(rows)
    left: list[dict] = []
    waiting = threading.Thread(target=lambda: left.extend(rows), daemon=True)
    waiting.start()
    rows.close()
    waiting.join(60)
    assert not waiting.is_alive() and not left


@pytest.mark.parametrize("fails_at", [0, 7, None])
def test_a_pipeline_that_has_ended_or_failed_holds_no_cpus_whoever_keeps_the_error(
    ray_session: None, fails_at: int | None
) -> None:
    class Fails:
        def __call__(self, block: pa.Table) -> pa.Table:
            if block["number"][0].as_py() == fails_at:
                raise ValueError("no such colour")
            return block

    pool = ActorPoolStrategy(size=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True)
    numbers = row_by_row(pa.table({"number": list(range(20))}))
    pipeline = numbers.map_batches(Fails, compute=pool, num_cpus=0.9, batch_size=1, batch_format="pyarrow")
    there, kept = ray.cluster_resources()["CPU"], None
    gc.disable()
    try:
        assert len(list(RowsOf(pipeline))) == 20
    except ray.exceptions.RayError as error:
        kept = error
    try:
        deadline = time.monotonic() + 60
        while ray.available_resources().get("CPU") != there and time.monotonic() < deadline:
            time.sleep(0.1)
        assert ray.available_resources().get("CPU") == there
    finally:
        gc.enable()
    assert (kept is None) == (fails_at is None)


def test_no_node_is_coming_to_a_cluster_of_this_machine_alone(ray_session: None) -> None:
    assert not nodes_are_coming()


@pytest.mark.parametrize(
    ("pending", "coming"),
    [({"pending_launches": {"gpu": 1}, "pending_nodes": []}, True), ({"pending_launches": {"gpu": 0}}, False),
     ({"pending_nodes": [["10.0.0.7", "gpu", "setting-up"]]}, True)],
)  # fmt: skip
def test_nodes_that_the_older_autoscaler_launches_are_seen(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, pending: dict, coming: bool
) -> None:
    """As it says so itself, in the cluster's own key-value store."""
    key = b"status of a test"
    monkeypatch.setattr("cluster.ray_autoscaler_internals.DEBUG_AUTOSCALING_STATUS", key)
    _internal_kv_put(key, json.dumps({"autoscaler_report": pending}))
    assert nodes_are_coming() is coming
    _internal_kv_del(key)


def test_an_actor_that_waits_for_a_node_is_known_as_one(ray_session: None) -> None:
    wait_until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    (node,) = free_resources()
    holder = ray.remote(Holds).options(num_cpus=ray.cluster_resources()["CPU"]).remote()
    ray.get(holder.ready.remote())
    wait_until(lambda: not free_resources()[node].get("CPU"))
    assert actors_are_placed()
    waits = ray.remote(Holds).options(num_cpus=1).remote()
    wait_until(lambda: not actors_are_placed())
    ray.kill(holder)
    ray.get(waits.ready.remote())
    wait_until(actors_are_placed)
    ray.kill(waits)


def test_a_group_that_waits_for_its_nodes_is_known_as_one(ray_session: None) -> None:
    wait_until(lambda: not has_group())
    large = placement_group([{"CPU": ray.cluster_resources()["CPU"] + 1}])
    time.sleep(1)
    assert not has_group()
    remove_placement_group(large)
    small = placement_group([{"CPU": 1}])
    wait_until(has_group)
    remove_placement_group(small)
    wait_until(lambda: not has_group())
