"""From what a user asks of the pictures to a GeneratorSpec: everything pinned, nothing without effect."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.generation.drawing_fields import DRAWING_FIELDS
from cluster.generation.request import AUTO, GenerationOptions
from cluster.options import flag, given
from cluster.store.store import is_uri, open_store
from cluster.weights.compared import revision_once
from cluster.weights.hub import pin_repo
from cluster.weights.manifest import read_manifest
from cluster.weights.node_copy import local_name
from pcm import embedded
from pcm.clip.names import folder_revision, is_commit, whole_folder_revision
from pcm.credentials import refuse_credentials
from pcm.errors import InputError, first_line, not_known
from pcm.generation.few_step_models import few_steps
from pcm.generation.names import at_revision, model_source, split_repo_file, split_revision
from pcm.generation.pipeline_files import named_files, pipeline_revision
from pcm.generation.pipeline_index import MODEL_INDEX, UnreachableIndex
from pcm.spec import DIGEST, GENERATOR_VERSION, DatasetSpec, GeneratorSpec

if TYPE_CHECKING:
    from pcm.generation.pipeline_signature import PipelineSignature

log = logging.getLogger(__name__)

#: Options that `_check` looks at and the embedded pipeline need not have.
_OF_PIPELINE = (
    "t2i_variant", "t2i_without", "lora", "vae", "pipeline_options", "scheduler", "scheduler_options",
    "negative_prompt", "prompt_cache",
)  # fmt: skip

#: What a repo is to a spec, of a LoRA with its number, and the repo's name -> its commit.
_Commits = Mapping[tuple[str, str | None], str]


def generator_spec(
    asked: GenerationOptions,
    *,
    device: str,
    dtype: str,
    version: int = GENERATOR_VERSION,
    begun: GeneratorSpec | None = None,
    own: Collection[str] | None = None,
) -> GeneratorSpec:
    """The spec of the pictures, by the rules of a generator version (`pcm.spec.GENERATOR_VERSION`).

    Steps and guidance: what is asked for (a preset is in it already), then the embedded pack's own, the table of
    few-step models, and what the pipeline's call does. `begun`: what a dataset that is gone on with was begun with; its
    steps and guidance come before these, and its commits before a repo's newest. `own`: the options that the user gave,
    where the others are those of another dataset, which may be of no effect; None: all. Raises InputError for an option
    that this pipeline lacks or that would have no effect, before anything is planned or started.
    """
    model = asked.t2i or "embedded"
    if model == "null":
        _refuse_for_null(asked)
    commits = {} if begun is None else _commits(begun)
    revision = pin_t2i(model, asked.t2i_revision, version=version, begun=commits.get(("t2i", model)))
    config, config_revision = _pinned_config(asked, model, commits)
    signature = _signature(asked, config or local_name(model, revision), config_revision or revision)
    steps, guidance_scale = _steps_and_guidance(asked, model, signature, version, begun, own)
    if signature is not None and version > 1:
        taken = asked.t2i_without if own is not None and "t2i_without" not in own else begun.without if begun else ()
        _check(asked, signature, guidance_scale, taken=taken)
        if begun is None and (own is None or "pipeline_options" in own):
            signature.check_further_negative_prompts(asked.negative_prompt, asked.pipeline_options)
        signature.check_steps(steps, asked.scheduler, asked.scheduler_options, asked.pipeline_options)
    return GeneratorSpec(
        model=model,
        revision=revision,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        width=asked.width,
        height=asked.height,
        scheduler=asked.scheduler,
        negative_prompt=asked.negative_prompt,
        prompt_template=asked.prompt_template,
        dtype=dtype,
        device=device,
        batch_size=GeneratorSpec.batch_size if asked.batch_size == AUTO else int(asked.batch_size),
        max_attempts=asked.max_attempts,
        image_format=asked.image_format,
        image_quality=asked.image_quality,
        scheduler_options=tuple(asked.scheduler_options.items()),
        pipeline_options=tuple(asked.pipeline_options.items()),
        loras=_pinned_loras(asked, commits),
        vae=None if asked.vae is None else split_revision(asked.vae)[0],
        vae_revision=None if asked.vae is None else _pin_vae(asked.vae, commits, begun.vae_revision if begun else None),
        variant=asked.t2i_variant,
        without=asked.t2i_without,
        config=config,
        config_revision=config_revision,
        attention=asked.attention,
        channels_last=asked.channels_last,
        compile=asked.compile,
        vae_slicing=asked.vae_slicing,
        vae_tiling=asked.vae_tiling,
        prompt_cache=asked.prompt_cache,
        offload=asked.offload,
    )


def pin_t2i(model: str, revision: str | None, *, version: int = GENERATOR_VERSION, begun: str | None = None) -> str:
    """The revision of a text-to-image NAME: sha256 of a folder, staged folder or file, commit of a repo, "" of null.

    begun: the commit that counts where no revision is asked for; None: the newest.

    Raises InputError when the repo cannot be reached to look a branch up; a full commit hash needs no look-up.
    """
    refuse_credentials(model)
    if model == "null":
        if revision is not None:
            raise InputError(f"--t2i-revision {revision}: null draws nothing; leave it out")
        return ""
    source = Path(local_name(model_source(model)))
    if source.exists() and revision is not None:
        raise InputError(f"--t2i-revision {revision}: {model} is no repo, and has none; leave it out")
    if source.is_file():
        if source.suffix != ".safetensors":
            raise InputError(f"text-to-image file {model!r}: give a .safetensors file; pickles are not read")
        return folder_revision(source)
    if source.is_dir():
        if not (source / MODEL_INDEX).is_file():
            raise InputError(f"text-to-image folder {model!r}: has no {MODEL_INDEX}; give a diffusers folder")
        return whole_folder_revision(source) if model == "embedded" or version == 1 else pipeline_revision(source)
    return pin_repo(model, revision or begun, option="--t2i-revision COMMIT")


@dataclass(frozen=True)
class OtherModel:
    """A model of a spec that is another at its place `name` than the one that was pinned. option: of jobs.generate."""

    option: str
    name: str
    pinned: str
    now: str


def other_models(spec: GeneratorSpec, *, version: int) -> list[OtherModel]:
    """Which of the models that a recorded spec names are others now: the generator, and what is fused into it or put
    in. A repo's commit never moves, so it is not looked up. `version`: pcm.spec.GENERATOR_VERSION of the spec.

    Raises InputError for what is no model at all.
    """
    found = []
    for option, name, pinned, pin in _pins(spec, version):
        if is_uri(name) and version > 1:
            now = read_manifest(open_store(name)).revision  # nothing is fetched to be compared
        elif Path(model_source(name)).exists() or is_uri(name) or name == "null":
            now = pin(name)
        else:
            now = pinned if is_commit(pinned) else "not there"
        if now != pinned:
            found.append(OtherModel(option, name, pinned, now or "no model"))
    return found


def refuse_other_models(spec: DatasetSpec) -> None:
    """For a process that is about to load the generator: raises InputError where a folder or file of it is another than
    the one that was pinned. What comes from a hub or a URI is known by its commit or digest.
    """
    for option, name, pinned, pin in _pins(spec.generator, spec.generator_version):
        place = Path(model_source(name))
        if is_uri(name) or not pinned.startswith(DIGEST) or not place.exists():  # loading says that it is not there
            continue
        if (now := revision_once(place, pinned, partial(pin, name))) != pinned:
            hint = "go on with the release that began it" if name == "embedded" else "put the same files there"
            raise InputError(
                f"--{option} {name}: its files are {now}, but {pinned} were pinned; {hint}, or begin another dataset"
            )


def _pins(spec: GeneratorSpec, version: int) -> Iterator[tuple[str, str, str, Callable[[str], str]]]:
    """(option, name, what was pinned, what says that of a name now) of each model that a spec names."""
    parts: list[tuple[str, str | None, str | None, Callable[[str], str]]] = [
        ("t2i", spec.model, spec.revision, lambda name: pin_t2i(name, None, version=version)),
        ("t2i-config", spec.config, spec.config_revision, _pin_config),
        ("vae", spec.vae, spec.vae_revision, lambda name: _pin_vae(name, recorded=spec.vae_revision)),
        *(("lora", name, revision, _pin_lora) for name, revision, _ in spec.loras),
    ]
    for option, name, pinned, pin in parts:
        if name is not None and pinned is not None:
            yield option, name, pinned, pin


def _refuse_for_null(asked: GenerationOptions) -> None:
    if useless := [name for name in given(asked) if name in DRAWING_FIELDS]:
        flags = ", ".join(flag(type(asked), name) for name in useless)
        raise InputError(f"{flags}: without effect with --t2i null, which draws no prompts; leave it out")


def _commits(spec: GeneratorSpec) -> _Commits:
    named = [
        ("t2i", spec.model, spec.revision),
        ("t2i-config", spec.config, spec.config_revision),
        ("vae", spec.vae, spec.vae_revision),
        *((f"lora {number}", name, revision) for number, (name, revision, _) in enumerate(spec.loras)),
    ]
    return {(role, name): revision for role, name, revision in named if revision and is_commit(revision)}


def _pinned_loras(asked: GenerationOptions, commits: _Commits) -> tuple[tuple[str, str, float], ...]:
    return tuple(
        (split_revision(name)[0], _pin_lora(name, commits, f"lora {number}"), weight)
        for number, (name, weight) in enumerate(asked.lora)
    )


def _pinned_config(asked: GenerationOptions, model: str, commits: _Commits) -> tuple[str | None, str | None]:
    """(where the configuration of a single file comes from, its revision); both None of anything but a file."""
    if not Path(model).is_file():
        if asked.t2i_config is not None:
            raise InputError(f"--t2i-config {asked.t2i_config}: is for a single file of weights; leave it out")
        return None, None
    if asked.t2i_variant or asked.t2i_without:
        raise InputError("--t2i-variant, --t2i-without: are for a folder or a repo, not for a file; leave it out")
    config = asked.t2i_config
    if config is None:
        from pcm.generation.single_file import inferred_config  # torch and diffusers

        config = inferred_config(Path(model))
        log.info("%s: configured as %s (--t2i-config)", model, config)
        try:
            return config, _pin_config(config, commits)
        except InputError as error:
            raise InputError(
                f"text-to-image file {model!r}: holds weights alone; its configuration is that of {config}, which "
                f"cannot be had ({first_line(error)}); give --t2i-config FOLDER, a diffusers folder of "
                "the same kind of model"
            ) from None
    return split_revision(config)[0], _pin_config(config, commits)


def _pin_config(name: str, commits: _Commits | None = None) -> str:
    if Path(name).is_dir():
        return pipeline_revision(Path(name), weights=False)
    return _pin_repo("t2i-config", name, commits)


def _pin_lora(name: str, commits: _Commits | None = None, role: str = "lora") -> str:
    path = Path(name)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"--lora {name}: give a .safetensors file; pickles are not read")
        return folder_revision(path)
    if path.is_absolute() or split_repo_file(name)[0].count("/") != 1:
        raise InputError(f"--lora {name}: no such file; give one, or a repo ORG/NAME or ORG/NAME/FILE.safetensors")
    return _pin_repo(role, name, commits)


def _pin_vae(name: str, commits: _Commits | None = None, recorded: str | None = None) -> str:
    """`recorded`: as in `folder_revision`."""
    if name.endswith(".safetensors") or Path(name).is_file():
        raise InputError(f"--vae {name}: is a file; give the folder of a decoder, with its config.json, or a repo id")
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"--vae {name}: has no config.json; give the folder of a decoder, or a repo id")
        return folder_revision(Path(name), recorded)
    return _pin_repo("vae", name, commits)


def _pin_repo(role: str, name: str, commits: _Commits | None) -> str:
    """The commit of a repo, or of the repo of a LoRA's file: the one asked for, the one begun with, or the newest."""
    plain, revision = split_revision(name)
    option = f"--{role.partition(' ')[0]}"
    repo = split_repo_file(plain)[0] if option == "--lora" else plain
    if "@" in repo:
        raise InputError(f"{option} {name}: not there, and no repo at a commit; after '@' give all its 40 digits")
    begun = (commits or {}).get((role, plain))
    return pin_repo(repo, revision or begun, option=f"{option} {at_revision(plain, 'COMMIT')}")


def _signature(asked: GenerationOptions, model: str, revision: str) -> "PipelineSignature | None":
    """The pipeline's; None of null, and of the embedded one where nothing asked for depends on it."""
    if model == "null" or (model == "embedded" and not any(getattr(asked, name) for name in _OF_PIPELINE)):
        return None
    from pcm.generation.pipeline_signature import read_signature  # diffusers takes seconds to import

    try:
        return read_signature(model, revision)
    except UnreachableIndex as error:  # of a pinned commit, which the generators' nodes may have
        log.warning("%s; options are not checked, and Stable Diffusion's steps and guidance hold unless given", error)
        return None


def _steps_and_guidance(
    asked: GenerationOptions,
    model: str,
    signature: "PipelineSignature | None",
    version: int,
    begun: GeneratorSpec | None,
    own: Collection[str] | None,
) -> tuple[int, float | None]:
    steps: int = GeneratorSpec.num_inference_steps
    guidance_scale: float | None = GeneratorSpec.guidance_scale
    asked_scale, is_own = asked.guidance_scale, own is None or "guidance_scale" in own
    if own and "t2i" in own and not is_own and signature is not None and not signature.heeds_guidance():
        asked_scale = None  # that was another model's
    if begun is not None:
        steps, guidance_scale = begun.num_inference_steps, begun.guidance_scale
    elif model == "embedded":
        steps, guidance_scale = embedded.STEPS, embedded.GUIDANCE_SCALE
    elif signature is not None and version > 1:
        steps = signature.defaults.get("num_inference_steps") or steps
        guidance_scale = signature.defaults.get("guidance_scale")
        if found := few_steps(model, tuple(name for name, _ in asked.lora), asked.t2i_config):
            steps = found.steps
            if guidance_scale is not None and found.guidance_scale is not None:
                guidance_scale = found.guidance_scale
        elif (signature.defaults.get("true_cfg_scale") or 0) > 1 and asked.negative_prompt is None:
            log.warning(
                "%s (%s): drawn without guidance, which it has only beside a negative prompt; give --negative-prompt "
                "' ' to be guided with an empty one",
                model,
                signature.name,
            )
        if is_own and asked_scale != guidance_scale:  # what holds anyway may be given
            signature.check_guidance(asked_scale)
        scale = "its own" if guidance_scale is None else f"{guidance_scale:g}"
        unasked = [f"{steps} steps"] * (asked.steps is None) + [f"guidance {scale}"] * (asked_scale is None)
        if unasked:
            log.info("%s (%s): %s, as nothing else was asked", model, signature.name, " and ".join(unasked))
    return (
        steps if asked.steps is None else asked.steps,
        guidance_scale if asked_scale is None else asked_scale,
    )


def _check(
    asked: GenerationOptions, signature: "PipelineSignature", guidance_scale: float | None, *, taken: Collection[str]
) -> None:
    """`taken`: parts of --t2i-without that another release took; of the dataset that is gone on with, or of --spec."""
    options: Mapping[str, Any] = asked.pipeline_options
    signature.check_options(options)
    signature.check_negative_prompt(asked.negative_prompt, guidance_scale, options)
    signature.check_size(asked.width, asked.height)
    if asked.scheduler or asked.scheduler_options:
        signature.check_scheduler(asked.scheduler, asked.scheduler_options)
    if asked.prompt_cache:
        signature.check_prompt_cache()
    if asked.lora:
        signature.check_loras()
    for part in asked.t2i_without:
        if part not in (*signature.index.components, *taken):
            raise not_known(f"--t2i-without of {signature.name}", part, signature.index.components)
    if asked.vae is not None and "vae" not in signature.index.components:
        raise InputError(f"--vae: {signature.name} has none to replace; leave it out")
    source = Path(model_source(signature.index.model))
    if source.is_dir():
        named_files(source, variant=asked.t2i_variant)  # refuses a variant that is not there
