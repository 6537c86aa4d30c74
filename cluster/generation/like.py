"""jobs.generate --spec: every setting of another dataset, from its dataset.json.

What is given on the command line wins; an option at its default counts as not given. Everything else must come out as
the dataset has it: where a model is another now, that is an error and not a silent difference. How captions are read
(OF_CORPUS) is taken where the corpus is the same file; of another file it is not, which is said. Never taken is what
changes no byte of a dataset: how many machines draw, what they cost, when a run stops.
"""

import hashlib
import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cluster.dataset.documents import CorpusSource, MadeWith, Manifest
from cluster.dataset.keys import CONCEPTS_KEY, MANIFEST_KEY
from cluster.generation.drawing_fields import DRAWING_FIELDS
from cluster.generation.request import CorpusOptions, GenerationOptions
from cluster.options import flag, given, options_of
from cluster.sources.corpus import source_digest
from cluster.store.store import read_uri
from pcm import embedded
from pcm.clip.names import is_commit
from pcm.documents import read_document
from pcm.errors import InputError
from pcm.generation.names import TEXT_ONLY, UNDRAWN, at_revision, model_source
from pcm.spec import DatasetSpec
from pcm.text.concepts import noun_versions

log = logging.getLogger(__name__)

AnyOptions = TypeVar("AnyOptions", bound=GenerationOptions)

#: Fields of a request that say how the captions of a corpus are read.
OF_CORPUS = tuple(name for name in options_of(CorpusOptions) if name != "corpus")

#: Fields of a request that decide each field of the spec, where they are not called alike.
_DECIDED_BY = {
    "generator.model": ("t2i",),
    "generator.revision": ("t2i", "t2i_revision"),
    "generator.variant": ("t2i", "t2i_variant"),
    "generator.without": ("t2i", "t2i_without"),
    "generator.config": ("t2i", "t2i_config"),
    "generator.config_revision": ("t2i", "t2i_config"),
    "generator.loras": ("lora",),
    "generator.vae_revision": ("vae",),
    "generator.num_inference_steps": ("steps",),
    "generator.guidance_scale": ("t2i", "guidance_scale"),
    "generator.offload": ("device", "offload"),
    "clip.model": ("clip",),
    "clip.revision": ("clip", "clip_revision"),
    "clip.weights": ("clip", "clip_revision"),
    "clip.activation": ("clip",),
    "clip.batch_size": ("clip_batch_size",),
}


def read_spec_manifest(uri: str) -> Manifest:
    """A dataset.json. Raises InputError for anything else, and for a dataset that no one generator drew here."""
    if Path(uri).is_dir():
        raise InputError(f"--spec {uri}: is a folder; give its {MANIFEST_KEY}")
    try:
        data = read_uri(uri)
        if _is_another_document(data):
            raise InputError(f"is no {MANIFEST_KEY}; give that of a dataset")
        found = Manifest.from_json(data, lambda key: read_uri(_beside(uri, key)))
    except InputError as error:
        raise InputError(f"--spec {uri}: {error}") from None
    if (model := found.spec.generator.model) in (*UNDRAWN, TEXT_ONLY):
        raise InputError(f"--spec {uri}: its pictures were not drawn by one generator here ({model})")
    return found


def _is_another_document(data: bytes) -> bool:
    """Whether it is whole JSON without what every dataset.json has."""
    try:
        document = read_document(data)
    except ValueError:
        return False
    return not isinstance(document, dict) or not {"schema_version", "spec", "shards"} <= document.keys()


def _beside(uri: str, key: str) -> str:
    return f"{uri.rpartition('/')[0] or '.'}/{key}"


def with_settings(request: AnyOptions, wanted: Manifest, *, uri: str) -> AnyOptions:
    """The request, what was not given as the dataset has it; says in one line what is not taken.

    Raises InputError where its concepts cannot be had, or what found its nouns is another release now.
    """
    own, made_with = set(given(request)), wanted.made_with
    asked = with_spec(request, wanted.spec)
    if made_with is None:
        log.warning(
            "--spec %s: %s; it does not say and this does not take: --shard-size, --nouns, --concepts, %s",
            uri, _why_silent(wanted), _flags(request, OF_CORPUS),
        )  # fmt: skip
        return asked
    values = {"shard_size": made_with.shard_size, **_concepts(made_with, own, asked.clip, uri=uri)}
    reading = _reading(made_with.source) if made_with.source else {}
    if made_with.source and request.corpus and _digest(request.corpus) == made_with.source.sha256:
        values |= reading
        if fewer := [name for name in ("split", "limit") if name not in own and reading[name] is not None]:
            taken = " ".join(f"{flag(type(request), name)} {reading[name]}" for name in fewer)
            log.info("--spec %s: of the same corpus, so %s is taken; give another to read more of it", uri, taken)
    elif other := [name for name, value in reading.items() if name not in own and getattr(request, name) != value]:
        log.info("--spec %s: of another corpus; its %s: not taken", uri, _flags(request, other))
    return replace(asked, **{name: value for name, value in values.items() if name not in own})


def _why_silent(wanted: Manifest) -> str:
    """Why a dataset does not say what it was made with."""
    if wanted.lineage is None:
        return "an earlier release made it"
    sources = ", ".join(source.path for source in wanted.lineage.sources)
    return f"jobs.{wanted.lineage.method} derived it from {sources}, whose {MANIFEST_KEY} may say more"


def _reading(source: CorpusSource) -> dict[str, Any]:
    return {name: source.format if name == "corpus_format" else getattr(source, name) for name in OF_CORPUS}


def _digest(corpus: str) -> str:
    return source_digest(embedded.caption_file(corpus))


def _flags(request: GenerationOptions, names: Collection[str]) -> str:
    return ", ".join(flag(type(request), name) for name in names)


def _concepts(made_with: MadeWith, own: Collection[str], clip: str | None, *, uri: str) -> dict[str, Any]:
    """The options that mean where its concepts come from."""
    if not {"concepts", "nouns"}.isdisjoint(own) or clip == "null":  # which has none
        return {}
    if made_with.nouns is not None:
        before, now = made_with.noun_versions, noun_versions(made_with.nouns)
        if before and before != now:  # none: no concepts were made
            raise InputError(
                f"--spec {uri}: cannot be taken as it is (its nouns were found by {_named(before)}, here is "
                f"{_named(now)}); install the same, or give --nouns {made_with.nouns}"
            )
        return {"nouns": made_with.nouns}
    if "clip" in own:
        raise InputError(f"--spec {uri}: its concepts were given, for its own CLIP; give --concepts beside --clip")
    path = _beside(uri, CONCEPTS_KEY)
    try:
        found = hashlib.sha256(read_uri(path)).hexdigest()
    except InputError:
        found = ""
    if found != made_with.concepts:
        raise InputError(f"--spec {uri}: its concepts were given, and are not at {path}; give the same --concepts")
    return {"concepts": path}


def _named(versions: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def with_spec(request: AnyOptions, spec: DatasetSpec) -> AnyOptions:
    """The request, what was not given as the spec has it, but for what has no place beside what was given."""
    own = set(given(request))
    values = settings_of(spec)
    if "t2i" in own:  # of another model
        useless = ("t2i_variant", "t2i_without") if Path(str(request.t2i)).is_file() else ("t2i_config",)
        for name in ("t2i_revision", *useless):
            values.pop(name, None)
        if request.t2i == "null":
            values = {name: value for name, value in values.items() if name not in DRAWING_FIELDS}
    if "clip" in own:
        values.pop("clip_revision")
        if request.clip == "null":
            values.pop("clip_batch_size")
    if request.device == "cpu" and (offload := values.pop("offload", "none")) != "none" and "offload" not in own:
        log.info("--spec: its --offload %s is for GPUs, and not taken beside --device cpu", offload)
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
        "t2i_config": _at_commit(generator.config, generator.config_revision),
        "lora": tuple((_at_commit(name, revision), weight) for name, revision, weight in generator.loras),
        "vae": _at_commit(generator.vae, generator.vae_revision),
        "pipeline_options": dict(generator.pipeline_options),
        "scheduler_options": dict(generator.scheduler_options),
        "steps": generator.num_inference_steps,
        "images_per_caption": spec.images_per_caption,
        "seed": spec.seed,
        "clip": clip.model,
        "clip_revision": clip.revision if is_commit(clip.revision) else None,
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


def _at_commit(name: str | None, revision: str | None) -> str | None:
    """The name with its commit, of a repo; the name alone of a folder or a file."""
    is_repo = name is not None and is_commit(revision or "") and not Path(name).exists()
    return at_revision(str(name), str(revision)) if is_repo else name


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
