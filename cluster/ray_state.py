"""What Ray knows of a cluster and tells outside its public interface alone (see cluster/ray_internals.py)."""

import ray
from ray._private.state import actors, available_resources_per_node
from ray.util import placement_group_table


def free_resources() -> dict[str, dict[str, float]]:
    """Node id -> resource -> what nobody uses of it now. The public call gives the sum of all nodes."""
    return available_resources_per_node()


def has_group() -> bool:
    """Whether a group of workers of this job, of Ray Train or a trial of Ray Tune, has its nodes now.

    The last four bytes of a group's id are those of its job's; no public call tells whose a group is.
    """
    job = ray.get_runtime_context().get_job_id()
    return any(name.endswith(job) and each["state"] == "CREATED" for name, each in placement_group_table().items())


def actors_are_placed() -> bool:
    """Whether no new actor of this job waits for a node: it has a process then. Of one that starts again Ray does not
    tell whether it waits or loads. Ray's public list needs a dashboard."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return all(each["Pid"] for each in actors(job_id=job, actor_state_name="PENDING_CREATION").values())
