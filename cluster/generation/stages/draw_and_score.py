"""First and second stage in one process: captions to pictures to CLIP scores and features."""

from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.generation.stages.draw import DrawShard
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.store.store import Store
from pcm.spec import DatasetSpec

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.dataset.vocabularies import ConceptsOfShard
    from cluster.generation.limits import FaultPolicy


class DrawAndScore:
    """Generator pool: draws a shard, then scores it on the same device.

    By turns: the two would only share the device, and one process starts sooner and holds less than two. What is
    scored leaves this process before the next shard is drawn, so a caption that kills it takes no finished shard along.
    """

    def __init__(
        self,
        draw: type[DrawShard],
        store: Store,
        spec: DatasetSpec,
        watched_by: "tuple[ActorHandle, FaultPolicy]",
        retry: frozenset[str],
        concepts: "ConceptsOfShard | None",
    ) -> None:
        self._draw = draw(store, spec, watched_by, retry)
        self._score = FeaturiseShard(spec.clip, watched_by, concepts)

    def __call__(self, block: pa.Table) -> pa.Table:
        self._score.store_concepts(block["shard"][0].as_py())
        return self._score(self._draw(block))
