"""What computed a derived or imported dataset, as its dataset.json says it."""

from typing import Any

from cluster.generation.environment import environment, joined_versions, store_environment, stored_environments
from cluster.store.store import Store
from pcm.spec import ClipSpec


def tell_encoder(out: Store, clip: ClipSpec) -> None:
    """Put beside the rows where this process computes their features or scores. clip: with the device that it uses."""
    store_environment(out, environment(device=clip.device, loads_models=True))


def made_by(out: Store) -> dict[str, Any]:
    """A manifest's `versions` and `environments`: of the processes that encoded; else of this one, without a model.

    Where pictures were drawn stands in the dataset that they were taken from. Raises InputError for a damaged object.
    """
    found = stored_environments(out) or (environment(device="cpu", loads_models=False),)
    return {"versions": joined_versions(found), "environments": found}
