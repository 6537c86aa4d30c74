"""CLIP as an actor of its own, for runs in which no generator scores: it scores a shard, and stores it."""

from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.dataset.layout import Plan
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.overlap import Overlap
from cluster.generation.stages.write import WriteShard
from cluster.store.store import Store

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.dataset.vocabularies import ConceptsOfShard
    from cluster.generation.limits import FaultPolicy


class Scorer:
    """Scorer pool: a drawn shard in, the stats of the stored shard out. One shard is scored while another is stored."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        watched_by: "tuple[ActorHandle, FaultPolicy]",
        concepts: "ConceptsOfShard",
    ) -> None:
        self._overlap = Overlap(WriteShard(store, plan.schema_version, watched_by[0]))
        self._score = self._overlap.in_work_thread(
            lambda: FeaturiseShard(plan.spec.clip, watched_by, concepts, before_again=self._overlap.wait)
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        stored = self._overlap.run(partial(self._score, block))
        assert stored is not None
        return stored
