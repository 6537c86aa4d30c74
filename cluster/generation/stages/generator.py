"""First and second stage as an actor: it owns a GPU, takes turns, draws a shard in each, and scores it by CLIP."""

import logging
import os
import random
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cluster.dataset.layout import PLAN_KEY, Plan
from cluster.generation.reach import not_reached
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.monitor import Turn
from cluster.generation.stages.shard_row import SHARD_ROW_SCHEMA
from cluster.store.store import Store
from pcm.errors import InputError, typed_first_line

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.dataset.vocabularies import ConceptsOfShard
    from cluster.generation.limits import FaultPolicy

log = logging.getLogger(__name__)

#: Seconds that a generator waits for its shards to be stored before it draws the next all the same: a shard that was
#: lost with its node, and is waited for, may be queued behind this turn.
LONGEST_WAIT = 60.0

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 2.0  # seconds between two questions to the monitor
FIRST_LOAD_PAUSE, LONGEST_LOAD_PAUSE = 1.0, 60.0  # seconds before a model is loaded again, with jitter


class Generator:
    """Generator pool: a turn in, a shard out, or none where there is none to draw.

    It draws a shard, then scores it on the same device, by turns: the two would only share the device, and one process
    starts sooner and holds less than two. What is scored leaves this process before the next shard is drawn, so a
    caption that kills it takes no finished shard along. Without `scores`, CLIP has actors of its own.

    Models are loaded in the first turn. Where that fails, this generator tries again a few times, then leaves its
    shards to others: one machine with a fault ends no run. The monitor stops the run when nobody can draw.
    """

    def __init__(
        self,
        draw: type[DrawShard],
        store: Store,
        plan: Plan,
        watched_by: "tuple[ActorHandle, FaultPolicy]",
        retry: frozenset[str],
        *,
        scores: bool,
        concepts: "ConceptsOfShard | None" = None,
    ) -> None:
        import ray  # the stages are usable without it

        self._make_draw = partial(draw, store, plan.spec, watched_by, retry)
        self._store = store
        self._plan = plan
        self._scoring = (plan.spec.clip, watched_by, concepts) if scores else None
        self._monitor = watched_by[0]
        context = ray.get_runtime_context()
        self._name, self._node = context.get_actor_id(), context.get_node_id()
        self._draw: DrawShard | None = None
        self._score: FeaturiseShard | None = None
        self._loaded = False
        self._left_out = False
        self._load_pause = FIRST_LOAD_PAUSE

    def __call__(self, block: pa.Table) -> pa.Table:
        number = block["turn"][0].as_py()
        shard = self._shard_for(number)
        if shard is None:
            return SHARD_ROW_SCHEMA.empty_table()
        wanted = pa.table({"shard": [shard], "part": [self._plan.part_key(shard)], "turn": [number]})
        assert self._draw is not None
        if self._score is None:
            return self._draw(wanted)
        self._score.store_concepts(shard)
        return self._score(self._draw(wanted))

    def _shard_for(self, number: int) -> int | None:
        """The shard to be drawn in a turn. Raises InputError when the run is not worth going on with."""
        pause, deadline = FIRST_PAUSE, time.monotonic() + LONGEST_WAIT
        while True:
            self._load()
            anyway = time.monotonic() >= deadline
            turn: Turn = self._ask("turn", self._name, number, node=self._node, loaded=self._loaded, anyway=anyway)
            if turn.stop:
                raise InputError(turn.stop)
            if not turn.wait:
                return turn.shard
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _load(self) -> None:
        """Load the models, unless they are, or this generator is left out. Waits a while where that fails."""
        if self._loaded or self._left_out:
            return
        try:
            if self._store.is_local and not self._store.exists(PLAN_KEY):
                raise InputError(not_reached(self._store, os.uname().nodename))
            self._draw = self._draw or self._make_draw()
            if self._scoring:
                self._score = FeaturiseShard(*self._scoring)
            self._loaded = True
        except InputError as error:  # the monitor's too, of a generator that is left out
            self._left_out = True
            self._ask("not_loaded", self._name, str(error), again=False)
        except Exception as error:
            log.warning("models are not loaded", exc_info=True)
            self._ask("not_loaded", self._name, typed_first_line(error), again=True)
            time.sleep(self._load_pause * random.uniform(0.5, 1.0))
            self._load_pause = min(2 * self._load_pause, LONGEST_LOAD_PAUSE)

    def _ask(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Call the monitor and wait for its answer."""
        import ray

        return ray.get(getattr(self._monitor, method).remote(*arguments, **named))
