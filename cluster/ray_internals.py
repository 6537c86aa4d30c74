"""All that is used of Ray outside its public interface, but for cluster/ray_data_internals.py, cluster/ray_state.py,
cluster/ray_autoscaler_internals.py and cluster/submit_size.py: the first files to read when Ray is upgraded.

`pyproject.toml` admits one minor version of Ray, and tests/cluster/test_ray_internals.py names each of these and calls
it as we do. The public counterpart of none of them can do what is said beside it.
"""

import json
from collections.abc import Callable
from typing import Any

import ray.train
from ray.train._internal.session import get_session
from ray.train.torch import TorchTrainer
from ray.train.torch.config import _TorchBackend as TorchBackend  # starts the workers' process group
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME as CHECKPOINT_RECORD
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.scaling_policy.elastic import ElasticScalingPolicy
from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils
from ray.train.v2._internal.util import logger as LOOP_ERRORS  # a worker says there what its training loop raises
from ray.train.v2.api.exceptions import (
    TrainingFailedError,  # ray.train's at run time, which a type checker does not know
)

__all__ = [
    "CHECKPOINT_RECORD",
    "LOOP_ERRORS",
    "DefaultFailurePolicy",
    "ElasticScalingPolicy",
    "FailureDecision",
    "LocalReports",
    "NoopDecision",
    "PolicyTrainer",
    "ResizeDecision",
    "TorchBackend",
    "TrainingFailedError",
    "reads_checkpoint_record",
    "renewed_checkpoint_record",
    "train_in_this_process",
]


class PolicyTrainer(TorchTrainer):
    """A TorchTrainer with policies of our own: Ray's retries every error, those of the input too, and its elastic group
    takes sizes that cannot share a batch, in the middle of an epoch.
    """

    failure_policy: type[DefaultFailurePolicy] = DefaultFailurePolicy
    scaling_policy: Callable[[ray.train.ScalingConfig], ElasticScalingPolicy] | None = None
    #: False leaves out Ray's clean-up after a lost controller, which asks the dashboard and, where none was started,
    #: prints a traceback.
    cleans_up = True

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        settings["failure_policy"] = self.failure_policy(self.run_config.failure_config)  # type: ignore[arg-type]
        if self.scaling_policy is not None:
            settings["scaling_policy"] = self.scaling_policy(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [each for each in callbacks if self.cleans_up or not isinstance(each, PlacementGroupCleanerCallback)]


class LocalReports(LocalTrainFnUtils):
    """What ray.train's functions do where training runs in this process; a subclass says what becomes of a report.

    Ray's local mode cannot be told where to begin, and keeps reports to itself.
    """

    def __init__(self, *, name: str, checkpoint: ray.train.Checkpoint | None = None) -> None:
        """`checkpoint`: what ray.train.get_checkpoint() gives."""
        super().__init__(experiment_name=name)
        self._last_checkpoint = checkpoint  # type: ignore[assignment]


def train_in_this_process(reports: LocalReports) -> None:
    """From now on a training loop can be called here as a plain function. In a trial of Ray Tune too, where Ray Train's
    functions would refuse to be called: they want a session with a rank.
    """
    if (session := get_session()) is not None:
        session.world_rank = 0
    set_train_fn_utils(reports)


def reads_checkpoint_record(record: dict[str, Any]) -> bool:
    """Whether this release of Ray reads what lies at CHECKPOINT_RECORD: the fields that it asks for are not those of
    the release before."""
    try:
        _CheckpointManagerState.parse_obj(record)
    except ValueError:
        return False
    return True


def renewed_checkpoint_record(record: dict[str, Any], order: Callable[[str], Any]) -> dict[str, Any]:
    """The same checkpoints, in the order of their scores as they are, in this release's form. For a run whose reports
    ask for no validation by Ray. Raises ValueError, LookupError or TypeError where the record does not say which these
    are.

    Reports are counted anew, in the `order` of their names: the numbers only tell which of two checkpoints with one
    score is the newer.
    """
    results = record["checkpoint_results"]
    if any(result["version"] != 0 for result in results):
        raise ValueError("checkpoints in another form")
    names = [result["checkpoint_dir_name"] for result in results]
    by_age = sorted(names, key=order)
    latest = record["latest_checkpoint_result"]["checkpoint_dir_name"]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=[by_age.index(name) for name in names],
        latest_checkpoint_result=results[names.index(latest)],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(names),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    return dict(json.loads(state.json()))
