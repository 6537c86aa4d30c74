"""Prove a dataset from the store alone: nothing missing, doubled or corrupt. Exit status 1 where it fails."""

from typing import TYPE_CHECKING, Any

from cluster.dataset.request import VerifyRequest
from jobs.command_line import Job

if TYPE_CHECKING:
    from cluster.generation.moved_models import ModelPlaces


def run(request: VerifyRequest) -> dict[str, Any]:
    if request.repair:
        from cluster.generation.repair import repair_dataset

        return repair_dataset(
            request.dataset, corpus=request.corpus, run_on=request.run_on, places=_places(request, clip=request.clip),
            other_bytes=request.other_bytes,
        )  # fmt: skip
    from cluster.dataset.verify import verify
    from cluster.store.store import open_store

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


JOB = Job("verify", __doc__, VerifyRequest, run)

if __name__ == "__main__":
    JOB.main()
