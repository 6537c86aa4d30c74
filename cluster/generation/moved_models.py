"""Where the models of a dataset are now, for work on it that takes all else from its plan: repairs and retries."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.dataset.layout import Plan
from cluster.dataset.plan import refuse_other_spec
from cluster.generation.picture_spec import at_other_places
from cluster.generation.pinning import pin_clip
from cluster.store.store import Store


@dataclass(frozen=True, kw_only=True)
class ModelPlaces:
    """What has moved, and where it is. lora: all of the dataset's in their order, with weights where they are said."""

    t2i: str | None = None
    t2i_config: str | None = None
    vae: str | None = None
    lora: Sequence[tuple[str, float | None]] = ()
    clip: str | None = None

    def plan_at(self, store: Store, plan: Plan) -> Plan:
        """The plan, its models loaded from where they are now. Raises InputError where something else lies there."""
        if self == NOT_MOVED:
            return plan
        spec = plan.spec
        generator = at_other_places(
            spec.generator,
            version=spec.generator_version,
            t2i=self.t2i,
            t2i_config=self.t2i_config,
            vae=self.vae,
            lora=self.lora,
        )
        clip = spec.clip
        if self.clip is not None:
            revision, weights = pin_clip(self.clip, None, clip)
            clip = replace(clip, model=self.clip, revision=revision, weights=weights)
        now = replace(spec, generator=generator, clip=clip)
        refuse_other_spec(store, plan, now, plan.shard_size)
        return plan.at_places_of(now)


NOT_MOVED = ModelPlaces()
