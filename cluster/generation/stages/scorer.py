"""CLIP as an actor of its own, for runs in which no generator scores: it scores a shard, and stores it."""

import time
from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.dataset.documents import Plan
from cluster.generation.stages.asking import ask
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.loading import Models
from cluster.generation.stages.monitor import Turn
from cluster.generation.stages.overlap import Overlap
from cluster.generation.stages.write import STORED_SCHEMA, WriteShard
from cluster.store.store import Store
from pcm.errors import InputError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.dataset.vocabularies import ConceptsOfShard
    from cluster.generation.limits import FaultPolicy

#: Seconds between two questions of an actor that could not load CLIP, whether anything is left to do.
PAUSE = 2.0


class Scorer:
    """Scorer pool: a drawn shard in, the stats of the stored shard out. One shard is scored while another is stored.

    CLIP is loaded while the first shard is drawn. Where that fails, this actor tries again a few times, then gives its
    shards back, to be drawn again for others, and holds what Ray Data gave it: a call that ended at once would get the
    next shard. The monitor stops the run when no such actor can score.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        watched_by: "tuple[ActorHandle, FaultPolicy]",
        concepts: "ConceptsOfShard",
        again: Collection[int] = (),
        pyarrow: str | None = None,
    ) -> None:
        """`again`, `pyarrow`: as of WriteShard."""
        import ray  # the stages are usable without it

        self._monitor = watched_by[0]
        context = ray.get_runtime_context()
        self._name, self._node = context.get_actor_id() or "driver", context.get_node_id()
        self._write = WriteShard(store, plan.schema_version, self._monitor, again, pyarrow)
        self._overlap = Overlap(self._write)
        clip = plan.spec_to_load.clip
        self._make_score = partial(FeaturiseShard, clip, watched_by, concepts, before_again=self._overlap.wait)
        self._score: FeaturiseShard | None = None
        self._models = Models(self._monitor, self._name, self._load, scores=True)
        self._overlap.begin(self._models.load)

    def __call__(self, block: pa.Table) -> pa.Table:
        turn = block["turn"][0].as_py()
        ask(self._monitor, "received", turn, self._name, self._node)
        stored = self._overlap.run(partial(self._score_shard, block))
        if stored is not None:
            return stored
        self._give_back(turn)
        return STORED_SCHEMA.empty_table()

    def _score_shard(self, block: pa.Table) -> pa.Table | None:
        """None: this actor could not load CLIP. The call behind this one has its turn then."""
        self._models.load_or_leave()
        if self._models.left_out:
            return None
        assert self._score is not None
        return self._score(block)

    def _give_back(self, turn: int) -> None:
        """Return when nothing is left to do. Raises InputError when the run is not worth going on with."""
        while True:
            self._models.say_left_out()
            answer: Turn = ask(self._monitor, "given_back", turn, self._name)
            if answer.stop:
                raise InputError(answer.stop)
            if not answer.wait:
                return
            time.sleep(PAUSE)

    def _load(self) -> None:
        self._write.check_pyarrow()
        self._score = self._make_score()
