"""An actor's two threads: one works on a shard while the other stores the one before it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa


class Overlap:
    """Ray Data calls an actor from several threads (`cluster.generation.pools`); each call comes through these two.

    All work is done in one thread, because torch keeps some of its settings for each.
    """

    def __init__(self, store: Callable[[pa.Table], pa.Table]) -> None:
        self._store = store
        self._working = ThreadPoolExecutor(1, thread_name_prefix="work")
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="store")

    def run(self, work: Callable[[], pa.Table | None]) -> pa.Table | None:
        """Do the work and store its result. Returns what storing returns, or None where the work returns None. Raises
        what either raises."""
        worked = self._working.submit(self._work, work)
        del work  # what it holds is not needed while the result is stored
        stored = worked.result()
        return stored and stored.result()

    def begin(self, call: Callable[[], None]) -> Future[None]:
        """Such as to load the model, in the thread that works, before the work that comes later."""
        return self._working.submit(call)

    def wait(self) -> None:
        """Return when all that was handed over before is stored, or could not be."""
        self._storing.submit(lambda: None).result()  # it does one after the other

    def _work(self, work: Callable[[], pa.Table | None]) -> Future[pa.Table] | None:
        done = work()
        return None if done is None else self._storing.submit(self._store, done)
