"""Where a view finds the datasets that hold its pictures, also after the view and they were moved or copied together.

A view names each dataset by its absolute place. One that lies below the view's parent folder, or in the view itself, is
named by the way to it as well ("../dataset", "redraws/round-000").
"""

from dataclasses import replace

from cluster.dataset.lineage import PictureStore
from cluster.dataset.state import state_digest
from cluster.store.store import Store, join, open_store
from pcm.errors import OneLineError


def way_to(view: str, dataset: str) -> str | None:
    """From a view's address to a dataset's; None where the dataset lies neither in the view nor below its parent."""
    if dataset.startswith(f"{view}/"):
        return dataset.removeprefix(f"{view}/")
    parent = _parent(view)
    return "../" + dataset.removeprefix(f"{parent}/") if parent and dataset.startswith(f"{parent}/") else None


def check_way(way: str | None) -> None:
    """Raises ValueError for a way that leads anywhere but into the view or below its parent."""
    if way is not None and (not isinstance(way, str) or {"", ".", ".."} & set(way.removeprefix("../").split("/"))):
        raise ValueError(f"beside is {way!r}")


def located(view: Store, pictures: PictureStore, *, documents: tuple[str, str]) -> PictureStore:
    """With the place where the dataset is now as its path. `documents`: keys of dataset.json and plan.json.

    A dataset that is beside the view as it was when the view was made comes first, then the absolute place, if there is
    a dataset, then any dataset beside the view: what has changed is told by whoever reads it.
    """
    parent = _parent(view.address)
    if pictures.beside is None or (pictures.beside.startswith("../") and not parent):
        return pictures
    way = pictures.beside
    place = join(parent, way.removeprefix("../")) if way.startswith("../") else join(view.address, way)
    if place == pictures.path:
        return pictures
    moved = replace(pictures, path=place)
    if _digest(place, documents[0]) == pictures.sha256:
        return moved
    return moved if is_there(place, documents) and not is_there(pictures.path, documents) else pictures


def _parent(address: str) -> str:
    """Of a path or URI; "" where it has none: the root of a disk, a bucket."""
    parent = address.rpartition("/")[0]
    return "" if parent.endswith(":/") or parent.endswith("//") else parent


def _digest(place: str, key: str) -> str:
    try:
        return state_digest(open_store(place).read_bytes(key))
    except (FileNotFoundError, NotADirectoryError, OneLineError):
        return ""


def is_there(place: str, documents: tuple[str, str]) -> bool:
    """Whether there is a dataset, finished or not."""
    try:
        store = open_store(place)
        return any(store.exists(key) for key in documents)
    except OneLineError:  # a store that cannot be asked from here
        return False
