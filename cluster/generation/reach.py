"""Whether every node of the cluster sees a local folder that is to hold a dataset, or that one is read from."""

from collections.abc import Sequence

from cluster.store.reach import SHARE_IT, Place, blind_nodes, marker, of_one_machine
from cluster.store.store import Store
from pcm.errors import InputError


def check_reach(store: Store) -> None:
    """Raises InputError for a local folder that a node does not see: what it drew would be lost with its disk.

    Asked are the nodes that are there now; what works on one that comes later looks itself.
    """
    with marker(store) as place:
        blind = blind_nodes(*place)
    if blind:
        raise InputError(f"--out {of_one_machine(store, blind)}; {SHARE_IT}")


def check_places(out: Place, sources: Sequence[Place] = ()) -> None:
    """The same for the folders that tasks write to, and read from: stores with an object of each."""
    for option, (store, key) in (("--out", out), *(("--data", each) for each in sources)):
        if blind := blind_nodes(store, key):
            raise InputError(f"{option} {of_one_machine(store, blind)}; {SHARE_IT}")
