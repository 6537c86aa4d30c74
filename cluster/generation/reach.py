"""Whether every node of the cluster sees a local folder that is to hold a dataset, or that one is read from."""

import uuid
from collections.abc import Sequence

from cluster.store.reach import blind_nodes
from cluster.store.store import Store
from pcm.errors import InputError


def check_reach(store: Store) -> None:
    """Raises InputError for a local folder that a node does not see: what it drew would be lost with its disk.

    Asked are the nodes that are there now; a generator that comes later looks for the plan itself.
    """
    if not store.is_local:
        return
    marker = f"seen-by-all-{uuid.uuid4().hex}"
    store.write_bytes(marker, b"")
    try:
        blind = blind_nodes(store, marker)
    finally:
        store.delete(marker)
    if blind:
        raise InputError(not_reached(store, blind[0], others=len(blind) - 1))


def check_places(out: tuple[Store, str], sources: Sequence[tuple[Store, str]] = ()) -> None:
    """The same for the folders that tasks write to, and read from: stores with an object of each."""
    for option, (store, key) in (("--out", out), *(("--data", each) for each in sources)):
        if blind := blind_nodes(store, key):
            raise InputError(not_reached(store, blind[0], others=len(blind) - 1, option=option))


def not_reached(store: Store, node: str, *, others: int = 0, option: str = "--out") -> str:
    """The line about a folder that a node does not see."""
    more = f" and {others} more" if others else ""
    return (
        f"{option} {store.root}: a folder of one machine, which node {node}{more} does not see; give a URI such as "
        "s3://BUCKET/NAME, or a folder that all nodes share"
    )
