"""Where the models of a dataset are now, for work that takes all else from its plan: repairs, retries, redraws."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.dataset.documents import Plan
from cluster.dataset.plan import refuse_other_spec
from cluster.generation.picture_spec import other_models
from cluster.generation.pinning import pin_clip
from cluster.store.store import Store, is_uri
from pcm.clip.names import is_commit
from pcm.errors import InputError
from pcm.generation.names import model_source, split_revision
from pcm.spec import GeneratorSpec


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
        generator = spec.generator
        if replace(self, clip=None) != NOT_MOVED:  # a CLIP has work on pictures that no generator is here for
            generator = self.generator_at(generator, version=spec.generator_version, data=store.root)
        clip = spec.clip
        if self.clip is not None:
            revision, weights = pin_clip(self.clip, None, clip)
            clip = replace(clip, model=self.clip, revision=revision, weights=weights)
        now = replace(spec, generator=generator, clip=clip)
        refuse_other_spec(store, plan, now, plan.shard_size)
        return plan.at_places_of(now)

    def generator_at(self, spec: GeneratorSpec, *, version: int, data: str) -> GeneratorSpec:
        """The spec that drew `data`, its models at the places that are named. `version`: pcm.spec.GENERATOR_VERSION.

        Raises InputError for a place of what it was drawn without, and where another model lies at one that is named.
        """
        if spec.model in ("embedded", "null") and self.t2i not in (None, spec.model):
            raise InputError(f"--t2i {self.t2i}: {data} was drawn with {spec.model}; leave it out")
        own = {"--t2i-config": spec.config, "--vae": spec.vae, "--lora": spec.loras}
        named = {"--t2i-config": self.t2i_config, "--vae": self.vae, "--lora": self.lora}
        if without := [option for option, place in named.items() if place and not own[option]]:
            raise InputError(f"{', '.join(without)}: {data} was drawn without; leave it out")
        lora = self.lora or [(name, weight) for name, _, weight in spec.loras]
        if len(lora) != len(spec.loras):
            raise InputError(
                f"--lora: {data} was drawn with {len(spec.loras)}; give each of these, in this order: "
                + ", ".join(name for name, _, _ in spec.loras)
            )
        config = _without_commit(self.t2i_config, spec.config_revision)
        vae = _without_commit(self.vae, spec.vae_revision)
        loras = [_without_commit(place, pin) for (place, _), (_, pin, _) in zip(lora, spec.loras, strict=True)]
        pins = [
            ("--t2i", self.t2i, spec.model, spec.revision),
            ("--t2i-config", config, spec.config, spec.config_revision),
            ("--vae", vae, spec.vae, spec.vae_revision),
            *(("--lora", place, name, pin) for place, (name, pin, _) in zip(loras, spec.loras, strict=True)),
        ]
        for option, place, name, pin in pins:
            if place not in (None, name) and is_commit(pin or "") and _is_repo(place):  # it has no such commit
                raise InputError(
                    f"{option} {place}: {data} was drawn with {name} at {pin}; give that one, each in the order of "
                    f"{data}"
                )
        for (place, weight), (_, _, before) in zip(lora, spec.loras, strict=True):
            if weight not in (None, before):
                raise InputError(
                    f"--lora {place}={weight:g}: {data} was drawn with weight {before:g}; give {place}={before:g}"
                )
        found = replace(
            spec,
            model=self.t2i or spec.model,
            config=config or spec.config,
            vae=vae or spec.vae,
            loras=tuple((str(place), pin, weight) for place, (_, pin, weight) in zip(loras, spec.loras, strict=True)),
        )
        for other in other_models(found, version=version):
            is_old = other.name == "embedded" == spec.model
            raise InputError(
                f"--{other.option} {other.name}: is {other.now}, but {data} was drawn with {other.pinned}; "
                + ("only the release that drew it has that one" if is_old else "give that one")
            )
        return found


NOT_MOVED = ModelPlaces()


def _without_commit(place: str | None, pin: str | None) -> str | None:
    """ORG/REPO of ORG/REPO@COMMIT where the dataset was drawn with that commit."""
    if place is None:
        return None
    name, revision = split_revision(place)
    return name if revision == pin else place


def _is_repo(place: str) -> bool:
    return not Path(model_source(place)).exists() and not is_uri(place)
