"""The stages as an actor: it owns a GPU, takes turns, draws a shard in each, scores it by CLIP, and stores it."""

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.dataset.documents import Plan
from cluster.dataset.keys import PLAN_KEY
from cluster.generation.stages.asking import ask
from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.shard_row import SHARD_ROW_SCHEMA
from cluster.generation.stages.takes_turns import TakesTurns
from cluster.generation.stages.write import STORED_SCHEMA, WriteShard
from cluster.store.reach import check_here
from cluster.store.store import Store

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.dataset.vocabularies import ConceptsOfShard
    from cluster.generation.limits import FaultPolicy
    from cluster.generation.retrying import Retry


class Generator(TakesTurns):
    """Generator pool: a turn in; out the stats of a stored shard, or nothing where there was none to draw.

    It draws a shard, then scores it on the same device, by turns: the two would only share the device, and one process
    starts sooner and holds less than two. A second thread stores the shard while the next one is drawn. Without
    `scores`, CLIP has actors of its own, and the drawn shard is what comes out.

    A caption that kills this process may take along the shard that is being stored, the first time: a shard that was
    begun before is drawn once nothing is left to store.
    """

    def __init__(
        self,
        draw: type[DrawShard],
        store: Store,
        plan: Plan,
        watched_by: "tuple[ActorHandle, FaultPolicy]",
        retry: "Retry | None",
        *,
        scores: bool,
        again: Collection[int] = (),
        pyarrow: str | None = None,
        concepts: "ConceptsOfShard | None" = None,
    ) -> None:
        """`again`, `pyarrow`: as of WriteShard."""
        self._make_draw = partial(draw, store, plan.spec_to_load, watched_by, retry)
        self._store = store
        self._plan = plan
        self._scoring = (plan.spec_to_load.clip, watched_by, concepts) if scores else None
        self._draw: DrawShard | None = None
        self._score: FeaturiseShard | None = None
        self._write = WriteShard(store, plan.schema_version, watched_by[0], again, pyarrow) if scores else None
        super().__init__(watched_by[0], self._write or _hand_on, gives=STORED_SCHEMA if scores else SHARD_ROW_SCHEMA)

    def __call__(self, block: pa.Table) -> pa.Table:
        number = block["turn"][0].as_py()
        stored = self._overlap.run(lambda: self._draw_in_turn(number))
        return self._nothing if stored is None else stored

    def _draw_in_turn(self, number: int) -> pa.Table | None:
        turn = self._turn(number)
        if turn.shard is None:
            return None
        if turn.again:
            self._overlap.wait()
        wanted = pa.table({"shard": [turn.shard], "part": [self._plan.part_key(turn.shard)], "turn": [number]})
        assert self._draw is not None
        if self._score is None:
            drawn = self._draw(wanted)
            ask(self._monitor, "handed_on", number)
            return drawn
        self._score.store_concepts(turn.shard)
        return self._score(self._draw(wanted))

    def _load(self) -> None:
        check_here([(self._store, PLAN_KEY)])
        if self._write is not None:
            self._write.check_pyarrow()
        self._draw = self._draw or self._make_draw()
        if self._scoring:
            self._score = FeaturiseShard(*self._scoring)


def _hand_on(drawn: pa.Table) -> pa.Table:
    return drawn
