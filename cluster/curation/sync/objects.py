"""What stages leave on the store: an object for each piece of work, which is not done again while it lies there."""

from collections.abc import Callable, Mapping

import numpy as np
import safetensors
import safetensors.numpy

from cluster.curation.tasks import Tasks
from cluster.store.store import Store
from pcm.errors import InputError


def run_missing(
    tasks: Tasks,
    out: Store,
    work: str,
    function: Callable[..., None],
    calls: Mapping[str, tuple] | Mapping[tuple[str, ...], tuple],
    *,
    what: str,
    on_device: bool = False,
) -> None:
    """The calls of which an object is not there yet. `calls`: by the key, or the keys, of what a call writes.
    on_device: as for Tasks.run."""
    done = set(out.list(f"{work}/"))
    missing = [call for keys, call in calls.items() if not done.issuperset([keys] if isinstance(keys, str) else keys)]
    tasks.run(function, missing, what=what, on_device=on_device)


def write_arrays(out: Store, key: str, **arrays: np.ndarray) -> None:
    out.write_bytes(key, safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def read_arrays(out: Store, key: str) -> dict[str, np.ndarray]:
    """Raises InputError for a damaged object."""
    try:
        return safetensors.numpy.load(out.read_bytes(key))
    except (safetensors.SafetensorError, ValueError):
        raise InputError(f"{out.root}/{key}: damaged; delete it and run the same command again") from None
