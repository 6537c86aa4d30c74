"""jobs.generate --spec: every setting of another dataset, from its dataset.json.

What is given on the command line wins; an option at its default counts as not given. Everything else must come out as
the dataset has it: where a model is another now, that is an error and not a silent difference. Not among the settings:
the corpus, --limit, --shard-size, --concepts, and how many machines draw.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cluster.dataset.layout import Manifest
from cluster.generation.drawing_fields import DRAWING_FIELDS
from cluster.generation.request import GenerationOptions
from cluster.options import given
from cluster.store.store import read_uri
from pcm.clip.names import HUB_PREFIX, is_commit
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY, UNDRAWN, model_source
from pcm.spec import DatasetSpec

AnyOptions = TypeVar("AnyOptions", bound=GenerationOptions)

#: Fields of a request that decide each field of the spec, where they are not called alike.
_DECIDED_BY = {
    "generator.model": ("t2i",),
    "generator.revision": ("t2i", "t2i_revision"),
    "generator.variant": ("t2i_variant",),
    "generator.without": ("t2i_without",),
    "generator.config": ("t2i", "t2i_config"),
    "generator.config_revision": ("t2i", "t2i_config"),
    "generator.loras": ("lora",),
    "generator.vae_revision": ("vae",),
    "generator.num_inference_steps": ("steps",),
    "clip.model": ("clip",),
    "clip.revision": ("clip", "clip_revision"),
    "clip.weights": ("clip", "clip_revision"),
    "clip.activation": ("clip",),
    "clip.batch_size": ("clip_batch_size",),
}


def read_spec(uri: str) -> DatasetSpec:
    """Of a dataset.json. Raises InputError for anything else, and for a dataset that no one generator drew here."""
    try:
        spec = Manifest.from_json(read_uri(uri), lambda key: read_uri(f"{uri.rpartition('/')[0] or '.'}/{key}")).spec
    except InputError as error:
        raise InputError(f"--spec {uri}: {error}") from None
    if spec.generator.model in (*UNDRAWN, TEXT_ONLY):
        raise InputError(f"--spec {uri}: its pictures were not drawn by one generator here ({spec.generator.model})")
    return spec


def with_spec(request: AnyOptions, spec: DatasetSpec) -> AnyOptions:
    """The request, what was not given as the spec has it."""
    own = set(given(request))
    values = settings_of(spec)
    if "t2i" in own:  # of another model
        values.pop("t2i_revision")
        if request.t2i == "null":
            values = {name: value for name, value in values.items() if name not in DRAWING_FIELDS}
    if "clip" in own:
        values.pop("clip_revision")
    return replace(request, **{name: value for name, value in values.items() if name not in own})


def settings_of(spec: DatasetSpec) -> dict[str, Any]:
    """The options that mean this spec."""
    generator, clip = spec.generator, spec.clip
    is_repo = is_commit(generator.revision) and not Path(model_source(generator.model)).exists()
    values: dict[str, Any] = {
        "t2i": generator.model,
        "t2i_revision": generator.revision if is_repo else None,
        "t2i_variant": generator.variant,
        "t2i_without": generator.without,
        "t2i_config": generator.config,
        "lora": tuple((name, weight) for name, _, weight in generator.loras),
        "vae": generator.vae,
        "pipeline_options": dict(generator.pipeline_options),
        "scheduler_options": dict(generator.scheduler_options),
        "steps": generator.num_inference_steps,
        "images_per_caption": spec.images_per_caption,
        "seed": spec.seed,
        "clip": clip.model,
        "clip_revision": clip.revision if clip.model.startswith(HUB_PREFIX) and is_commit(clip.revision) else None,
        "clip_batch_size": clip.batch_size,
    }
    alike = (
        "guidance_scale", "width", "height", "scheduler", "negative_prompt", "prompt_template", "max_attempts",
        "image_format", "image_quality", "device", "dtype", "batch_size", "attention", "channels_last", "compile",
        "vae_slicing", "vae_tiling", "prompt_cache", "offload",
    )  # fmt: skip
    values |= {name: getattr(generator, name) for name in alike}
    if generator.model == "null":
        values = {name: value for name, value in values.items() if name not in DRAWING_FIELDS}
    return values


def check_alike(found: DatasetSpec, wanted: DatasetSpec, own: set[str], *, uri: str) -> None:
    """Raises InputError where a spec is not the wanted one in something that the options `own` do not decide."""
    off = []
    for line in wanted.differences(found):
        name = line.partition(":")[0]
        if not own & set(_DECIDED_BY.get(name, (name.rpartition(".")[2],))):
            off.append(line)
    if off:
        raise InputError(
            f"--spec {uri}: cannot be taken as it is ({'; '.join(off)}); put the same models there, or give the option "
            "for what is to differ"
        )
