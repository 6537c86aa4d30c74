"""Prove a dataset from the store alone: nothing missing, doubled or corrupt. Exit status 1 where it fails."""

from typing import Any

from cluster.dataset.request import VerifyRequest
from jobs.command_line import Job


def run(request: VerifyRequest) -> dict[str, Any]:
    if request.repair:
        from cluster.generation.moved_models import ModelPlaces
        from cluster.generation.repair import repair_dataset

        lora = tuple((name, None) for name in request.lora)
        places = ModelPlaces(
            t2i=request.t2i, t2i_config=request.t2i_config, vae=request.vae, lora=lora, clip=request.clip
        )
        return repair_dataset(request.dataset, corpus=request.corpus, run_on=request.run_on, places=places)
    from cluster.dataset.verify import verify
    from cluster.store.store import open_store

    store = open_store(request.dataset)
    if request.redraw is not None:
        from cluster.generation.redraw_check import plans_of

        plans = plans_of(store)  # what cannot be drawn again is told before all is read
    if request.upgrade:
        from cluster.dataset.upgrade import upgrade

        return {**upgrade(store), **verify(store, run_on=request.run_on)}
    found = verify(store, run_on=request.run_on)
    if request.redraw is None:
        return found
    from cluster.generation.redraw_check import redraw_check

    again = redraw_check(store, plans, count=request.redraw, seed=request.seed)
    return {**found, "redraw": again, "ok": found["ok"] and again["ok"]}


JOB = Job("verify", __doc__, VerifyRequest, run)

if __name__ == "__main__":
    JOB.main()
