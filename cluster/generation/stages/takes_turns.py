"""An actor that takes turns (`cluster.generation.turns`): in each it asks for a shard to make."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.generation.stages.asking import ask
from cluster.generation.stages.loading import Models
from cluster.generation.stages.monitor import Turn
from cluster.generation.stages.overlap import Overlap
from cluster.generation.stages.write import STORED_SCHEMA
from pcm.errors import InputError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

#: Seconds that an actor waits for its shards to be stored before it makes the next all the same: a shard that was lost
#: with its node, and is waited for, may be queued behind this turn.
LONGEST_WAIT = 60.0

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 2.0  # seconds between two questions to the monitor


class TakesTurns(ABC):
    """A turn in; out what storing gives of its shard, or nothing where there was none to make.

    Models are loaded in the first turn. Where that fails, this actor tries again a few times, then leaves its shards to
    others: one machine with a fault ends no run. The monitor stops the run when nobody can work.
    """

    def __init__(
        self,
        monitor: "ActorHandle",
        store: Callable[[pa.Table], pa.Table],
        *,
        gives: pa.Schema = STORED_SCHEMA,
        scores: bool = False,
    ) -> None:
        """`gives`: what `store` does. `scores`: this is an actor of CLIP alone, which draws nothing."""
        import ray  # the stages are usable without it

        self._monitor = monitor
        self._overlap = Overlap(store)
        self._nothing = gives.empty_table()
        self._scores = scores
        context = ray.get_runtime_context()
        self._name, self._node = context.get_actor_id() or "driver", context.get_node_id()
        self._models = Models(monitor, self._name, self._load, scores=scores)

    @abstractmethod
    def _load(self) -> None:
        """Load the models; as of `Models`."""

    @abstractmethod
    def __call__(self, block: pa.Table) -> pa.Table: ...

    def _turn(self, number: int) -> Turn:
        """Which shard to make in a turn, if any. Raises InputError when the run is not worth going on with."""
        pause, deadline = FIRST_PAUSE, time.monotonic() + LONGEST_WAIT
        while True:
            self._models.load()
            anyway = time.monotonic() >= deadline
            here = {"node": self._node, "process": os.getpid(), "scores": self._scores}
            loaded = self._models.loaded
            turn: Turn = ask(self._monitor, "turn", self._name, number, **here, loaded=loaded, anyway=anyway)
            if turn.stop:
                raise InputError(turn.stop)
            if not turn.wait:
                return turn
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
