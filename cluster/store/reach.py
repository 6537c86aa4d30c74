"""Which nodes of the cluster do not see a local folder."""

import os
from typing import Any

from cluster.store.store import Store


def blind_nodes(store: Store, key: str) -> list[str]:
    """The names of the other nodes with CPUs that do not see an object of a local store, if there is such an object.

    Asked are the nodes that are there now; Ray must be running. A node that is lost meanwhile has nothing to say.
    """
    if not store.is_local or not store.exists(key):
        return []
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [
        node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and node["Resources"].get("CPU", 0)
    ]
    task: Any = ray.remote(_sees)
    asked = [
        task.options(num_cpus=0, max_retries=1, scheduling_strategy=_on(node)).remote(store.path(key))
        for node in others
    ]
    blind = []
    for node, answer in zip(others, asked, strict=True):
        try:
            sees = ray.get(answer)
        except ray.exceptions.RayError:
            continue
        if not sees:
            blind.append(node["NodeName"])
    return blind


def _on(node: dict[str, Any]) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _sees(path: str) -> bool:
    return os.path.exists(path)
