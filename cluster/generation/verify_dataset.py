"""jobs.verify from request to summary: proves a dataset, repairs it, upgrades it, or draws some of it again."""

from typing import TYPE_CHECKING, Any

from cluster.dataset.request import VerifyRequest
from cluster.dataset.verify import verify
from cluster.store.store import open_store

if TYPE_CHECKING:
    from cluster.generation.moved_models import ModelPlaces


def verify_dataset(request: VerifyRequest) -> dict[str, Any]:
    """The summary of `cluster.dataset.verify.verify`; with `repair` that of `repair_dataset`, with `upgrade` also what
    `upgrade` did, with `redraw` also `redraw`: what `redraw_check` found, without which nothing is `ok`.

    Raises InputError for what is no dataset, and for one that cannot be repaired, upgraded or drawn again.
    """
    # Repairs, upgrades and redraws are imported where they are asked for: a proof alone needs no model's libraries.
    if request.repair:
        from cluster.generation.repair import repair_dataset

        return repair_dataset(
            request.dataset, corpus=request.corpus, run_on=request.run_on, places=_places(request, clip=request.clip),
            other_bytes=request.other_bytes,
        )  # fmt: skip
    store = open_store(request.dataset)
    if request.redraw is not None:
        from cluster.generation.redraw_check import plans_of

        plans = plans_of(store, _places(request))  # what cannot be drawn again is told before all is read
    if request.upgrade:
        from cluster.dataset.upgrade import upgrade

        return {**upgrade(store), **verify(store, run_on=request.run_on)}
    found = verify(store, run_on=request.run_on)
    if request.redraw is None:
        return found
    from cluster.generation.redraw_check import redraw_check

    again = redraw_check(store, plans, count=request.redraw, seed=request.seed)
    return {**found, "redraw": again, "ok": found["ok"] and again["ok"]}


def _places(request: VerifyRequest, *, clip: str | None = None) -> "ModelPlaces":
    from cluster.generation.moved_models import ModelPlaces

    lora = tuple((name, None) for name in request.lora)
    return ModelPlaces(t2i=request.t2i, t2i_config=request.t2i_config, vae=request.vae, lora=lora, clip=clip)
