"""Work on a local folder in a process that kills itself by SIGKILL, again and again, until it is done.

A process dies right before it gives the n-th object its name, or deletes the n-th one: what it wrote of that object
lies there as a temporary file, and nothing of it is done. Objects that were there before do not count, so with n = 2
each process gets one object further: together they die at every moment that can be told apart on the store.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

from cluster.store.store import Store

#: Imported once, before processes are forked: some of them take many seconds.
_MODULES = [
    "tests.helpers.refined",
    "tests.helpers.featurised",
    "tests.helpers.tiny_models",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers.models.clip.modeling_clip",
]


def kills_until_done(folder: Path, work: Callable[..., object], *args: object, every: int) -> int:
    """How often the work was killed before it was done. Raises AssertionError where it fails otherwise, or a kill was
    one object too late to go on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_MODULES)
    kills, seen = 0, set[tuple[str, ...]]()
    while True:
        process = context.Process(target=_dying, args=(str(folder), every, work, args))
        process.start()
        process.join(300)
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        kills += 1
        lies_there = tuple(_objects(folder))
        assert every == 1 or lies_there not in seen, "no process gets further"
        seen.add(lies_there)


def _objects(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".tmp")


def _dying(folder: str, every: int, work: Callable[..., object], args: tuple) -> None:
    done = 0
    replace, link, delete = os.replace, os.link, Store.delete

    def count() -> None:
        nonlocal done
        done += 1
        if done == every:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_replace(source: str, target: str) -> None:
        if str(target).startswith(f"{folder}/") and not os.path.exists(target):
            count()
        replace(source, target)

    def dying_link(source: str, target: str) -> None:
        if str(target).startswith(f"{folder}/") and not os.path.exists(target):
            count()
        link(source, target)

    def dying_delete(store: Store, key: str) -> None:
        count()
        delete(store, key)

    os.replace = dying_replace  # type: ignore[assignment]
    os.link = dying_link  # type: ignore[assignment]
    Store.delete = dying_delete  # type: ignore[method-assign]
    work(*args)
