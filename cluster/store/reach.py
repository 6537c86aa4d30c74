"""Which nodes of the cluster do not see a local folder."""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cluster.store.store import Store
from pcm.errors import InputError

#: A store and the key of an object in it: a node that sees the object sees the store.
Landmark = tuple[Store, str]

#: What to do about such a folder.
SHARE_IT = "give a URI such as s3://BUCKET/NAME, or a folder that all nodes share"


def of_one_machine(store: Store, blind: Sequence[str]) -> str:
    """The beginning of a line about a local store that these nodes do not see."""
    more = f" and {len(blind) - 1} more" if len(blind) > 1 else ""
    return f"{store.root}: a folder of one machine, which node {blind[0]}{more} does not see"


@contextmanager
def marker(store: Store) -> Iterator[Landmark]:
    """A landmark in a store that holds nothing yet. Of a local one it is an empty file, deleted at the end.

    Its name is that of a temporary file: one that a killed process leaves behind is no object of the store.
    """
    key = f"seen-by-all-{uuid.uuid4().hex}.tmp"
    if store.is_local:
        store.write_bytes(key, b"")
    try:
        yield store, key
    finally:
        if store.is_local:
            store.delete(key)


def local_landmarks(landmarks: Sequence[Landmark]) -> list[Landmark]:
    """Those of local stores that are there: what a node may not see."""
    return [(store, key) for store, key in landmarks if store.is_local and store.exists(key)]


def check_here(landmarks: Sequence[Landmark]) -> None:
    """Called on the node that is to work there. Raises InputError for a landmark of a local store that it does not see:
    it would read nothing, and write to its own disk."""
    for store, key in landmarks:
        if store.is_local and not os.path.exists(store.path(key)):
            raise InputError(f"{of_one_machine(store, [os.uname().nodename])}; {SHARE_IT}")


def blind_nodes(store: Store, key: str) -> list[str]:
    """The names of the other nodes with CPUs that do not see an object of a local store, if there is such an object.

    Asked are the nodes that are there now; Ray must be running. A node that is lost meanwhile has nothing to say.
    """
    if not local_landmarks([(store, key)]):
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


def check_reach(store: Store) -> None:
    """Raises InputError for a local folder that a node does not see: what it drew would be lost with its disk.

    Asked are the nodes that are there now; what works on one that comes later looks itself.
    """
    with marker(store) as landmark:
        blind = blind_nodes(*landmark)
    if blind:
        raise InputError(f"--out {of_one_machine(store, blind)}; {SHARE_IT}")


def check_landmarks(out: Landmark, sources: Sequence[Landmark] = ()) -> None:
    """The same for the folders that tasks write to, and read from."""
    for option, (store, key) in (("--out", out), *(("--data", each) for each in sources)):
        if blind := blind_nodes(store, key):
            raise InputError(f"{option} {of_one_machine(store, blind)}; {SHARE_IT}")
