"""The generator that draws more of a dataset: its own, with all of its parts, at the places that the user names."""

from cluster.curation.refine_request import RefineRequest
from cluster.dataset.opened import OpenDataset
from cluster.generation.moved_models import ModelPlaces
from cluster.options import flag
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY, UNDRAWN
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
    _refuse_unnamed(spec, request, data=source.store.root)
    places = ModelPlaces(
        t2i=request.t2i, t2i_config=request.t2i_config, vae=request.vae, lora=[(name, None) for name in request.lora]
    )
    return places.generator_at(spec, version=source.manifest.spec.generator_version, data=request.data)


def _refuse_unnamed(spec: GeneratorSpec, request: RefineRequest, *, data: str) -> None:
    """Raises InputError for a place that the dataset alone names."""
    own = {
        "t2i": () if spec.model in ("embedded", "null") else (spec.model,),
        "t2i_config": () if spec.config is None else (spec.config,),
        "vae": () if spec.vae is None else (spec.vae,),
        "lora": tuple(name for name, _, _ in spec.loras),
    }
    if missing := [name for name, places in own.items() if places and not getattr(request, name)]:
        flags = {name: flag(type(request), name) for name in missing}
        options = " ".join(f"{flags[name]} {place}" for name in missing for place in own[name])
        raise InputError(
            f"{data}: was drawn with a folder, file or hub repo, which is opened only where you name it too; if you "
            f"trust it, give {options} ({', '.join(f'{name}=' for name in missing)} in Python)"
        )
