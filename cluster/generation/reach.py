"""Whether every node of the cluster sees a local folder that is to hold a dataset."""

import os
import uuid
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.store.store import Store
from pcm.errors import InputError


def check_reach(store: Store) -> None:
    """Raises InputError for a local folder that a node does not see: what it drew would be lost with its disk.

    Asked are the nodes that are there now; a generator that comes later looks for the plan itself.
    """
    if not store.is_local:
        return
    here = ray.get_runtime_context().get_node_id()
    others = [
        node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU", 0)
    ]
    if not others:
        return
    marker = f"seen-by-all-{uuid.uuid4().hex}"
    store.write_bytes(marker, b"")
    try:
        asked = [_sees.options(scheduling_strategy=_on(node)).remote(store.path(marker)) for node in others]
        blind = [node["NodeName"] for node, sees in zip(others, _answers(asked), strict=True) if not sees]
    finally:
        store.delete(marker)
    if blind:
        raise InputError(not_reached(store, blind[0], others=len(blind) - 1))


def not_reached(store: Store, node: str, *, others: int = 0) -> str:
    """The line about a folder that a node does not see."""
    more = f" and {others} more" if others else ""
    return (
        f"--out {store.root}: a folder of one machine, which node {node}{more} does not see; give a URI such as "
        "s3://BUCKET/NAME, or a folder that all nodes share"
    )


def _on(node: dict[str, Any]) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _answers(asked: list[ray.ObjectRef]) -> list[bool]:
    """A node that is lost meanwhile has nothing to say."""
    found = []
    for one in asked:
        try:
            found.append(ray.get(one))
        except ray.exceptions.RayError:
            found.append(True)
    return found


@ray.remote(num_cpus=0, max_retries=1)
def _sees(path: str) -> bool:
    return os.path.exists(path)
