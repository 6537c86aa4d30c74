"""The generator that draws more of a dataset: its own, with all of its parts, at the places that the user names."""

import dataclasses
from pathlib import Path

from cluster.curation.refine_request import RefineRequest
from cluster.dataset.opened import OpenDataset
from cluster.generation.picture_spec import other_models
from cluster.options import flag
from cluster.store.store import is_uri
from pcm.clip.names import is_commit
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY, UNDRAWN, model_source, split_revision
from pcm.spec import GeneratorSpec


def own_generator(source: OpenDataset, request: RefineRequest) -> GeneratorSpec:
    """The dataset's spec, each of its models where it is now. Raises InputError where nothing can draw more, where a
    place is not named, and where another model lies there."""
    spec = source.manifest.spec.generator
    if spec.model in (*UNDRAWN, TEXT_ONLY):
        raise InputError(
            f"--data {request.data}: its pictures were not drawn by one generator here ({spec.model}), so none can be "
            "drawn again"
        )
    found = _at_named_places(spec, request, data=source.store.root)
    for other in other_models(found, version=source.manifest.spec.generator_version):
        is_old = other.name == "embedded" == spec.model
        raise InputError(
            f"--{other.option} {other.name}: is {other.now}, but {request.data} was drawn with {other.pinned}; "
            + ("only the release that drew it has that one" if is_old else "give that one")
        )
    return found


def _at_named_places(spec: GeneratorSpec, request: RefineRequest, *, data: str) -> GeneratorSpec:
    """Raises InputError for a place that the dataset alone names, and for an option that names nothing of it."""
    own = {
        "t2i": () if spec.model in ("embedded", "null") else (spec.model,),
        "t2i_config": () if spec.config is None else (spec.config,),
        "vae": () if spec.vae is None else (spec.vae,),
        "lora": tuple(name for name, _, _ in spec.loras),
    }
    given = {name: getattr(request, name) for name in own}
    flags = {name: flag(type(request), name) for name in own}
    if missing := [name for name in own if own[name] and not given[name]]:
        options = " ".join(f"{flags[name]} {place}" for name in missing for place in own[name])
        raise InputError(
            f"{data}: was drawn with a folder, file or hub repo, which is opened only where you name it too; if you "
            f"trust it, give {options} ({', '.join(f'{name}=' for name in missing)} in Python)"
        )
    if spec.model in ("embedded", "null") and given["t2i"] not in (None, spec.model):
        raise InputError(f"--t2i {given['t2i']}: {data} was drawn with {spec.model}; leave it out")
    if without := [flags[name] for name in own if given[name] and not own[name] and name != "t2i"]:
        raise InputError(f"{', '.join(without)}: {data} was drawn without; leave it out")
    if len(given["lora"]) != len(own["lora"]):
        raise InputError(
            f"--lora: {data} was drawn with {len(own['lora'])}; give each of these, in this order: "
            + ", ".join(own["lora"])
        )
    config = _without_commit(request.t2i_config, spec.config_revision)
    vae = _without_commit(request.vae, spec.vae_revision)
    loras = [_without_commit(place, pin) for place, (_, pin, _) in zip(request.lora, spec.loras, strict=True)]
    pins = [
        ("--t2i", request.t2i, spec.model, spec.revision),
        ("--t2i-config", config, spec.config, spec.config_revision),
        ("--vae", vae, spec.vae, spec.vae_revision),
        *(("--lora", place, name, pin) for place, (name, pin, _) in zip(loras, spec.loras, strict=True)),
    ]
    for option, place, name, pin in pins:
        if place is not None and place != name and is_commit(pin or "") and _is_repo(place):  # it has no such commit
            raise InputError(
                f"{option} {place}: {data} was drawn with {name} at {pin}; give that one, each in the order of {data}"
            )
    return dataclasses.replace(
        spec,
        model=request.t2i or spec.model,
        config=config,
        vae=vae,
        loras=tuple((str(place), *of[1:]) for place, of in zip(loras, spec.loras, strict=True)),
    )


def _without_commit(place: str | None, pin: str | None) -> str | None:
    """ORG/REPO of ORG/REPO@COMMIT where the dataset was drawn with that commit."""
    if place is None:
        return None
    name, revision = split_revision(place)
    return name if revision == pin else place


def _is_repo(place: str) -> bool:
    return not Path(model_source(place)).exists() and not is_uri(place)
