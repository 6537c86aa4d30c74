"""From the names a user gives to a spec that pins everything: revisions, device, dtype, defaults."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.generation.request import AUTO, GenerationOptions
from pcm import embedded
from pcm.clip.names import HUB_PREFIX, activation_of, folder_revision, is_commit, resolve_clip_name
from pcm.credentials import refuse_credentials
from pcm.errors import InputError, first_line
from pcm.generation.names import IMPORTED, model_source
from pcm.spec import TAG_REVISION, ClipSpec, DatasetSpec, GeneratorSpec

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

    from pcm.clip.weights import TowerFacts

log = logging.getLogger(__name__)


def dataset_spec(asked: GenerationOptions, *, gpus: float) -> DatasetSpec:
    """The spec that a request means, with every default resolved and every revision pinned; `gpus`: the cluster's.

    With batch_size auto its batch size is a placeholder. Raises InputError.
    """
    check_scheduler(asked.scheduler, asked.scheduler_options)
    device = resolve_device(asked.device, cluster_gpus=gpus)
    dtype = resolve_dtype(asked.dtype, device=device)
    t2i = asked.t2i or "embedded"
    steps, guidance_scale = GeneratorSpec.num_inference_steps, GeneratorSpec.guidance_scale
    if t2i == "embedded":
        steps, guidance_scale = embedded.STEPS, embedded.GUIDANCE_SCALE
    clip = asked.clip or ("null" if t2i == "null" else "embedded")
    return DatasetSpec(
        generator=GeneratorSpec(
            model=t2i,
            revision=pin_t2i(t2i, asked.t2i_revision),
            num_inference_steps=steps if asked.steps is None else asked.steps,
            guidance_scale=guidance_scale if asked.guidance_scale is None else asked.guidance_scale,
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
            attention=asked.attention,
            channels_last=asked.channels_last,
            compile=asked.compile,
            vae_slicing=asked.vae_slicing,
            vae_tiling=asked.vae_tiling,
            prompt_cache=asked.prompt_cache,
        ),
        clip=clip_spec(
            clip,
            revision=asked.clip_revision,
            dtype=dtype,
            device=device,
            batch_size=asked.clip_batch_size,
        ),
        seed=asked.seed,
        images_per_caption=asked.images_per_caption,
    )


def on_device(spec: DatasetSpec, *, device: str, dtype: str) -> DatasetSpec:
    """The same spec drawn and scored on a device in a precision."""
    return replace(
        spec,
        generator=replace(spec.generator, device=device, dtype=dtype),
        clip=replace(spec.clip, device=device, dtype=dtype),
    )


def pin_t2i(model: str, revision: str | None) -> str:
    """The revision of a text-to-image NAME: sha256 of a folder, commit of a repo, "" of the null generator.

    Raises InputError when the repo cannot be reached to look a branch up; a full commit hash needs no look-up.
    """
    refuse_credentials(model)
    if model == "null":
        if revision is not None:
            raise InputError(f"--t2i-revision {revision}: null draws nothing; leave it out")
        return ""
    source = model_source(model)
    if Path(source).is_dir():
        if revision is not None:
            raise InputError(f"--t2i-revision {revision}: {model} is a folder, which has none; leave it out")
        if not (Path(source) / "model_index.json").is_file():
            raise InputError(f"text-to-image folder {model!r}: has no model_index.json; give a diffusers folder")
        return folder_revision(Path(source))
    return _pin_repo(model, revision)


def pin_clip(model: str, revision: str | None) -> tuple[str, str | None]:
    """(revision, sha256 of the weights or None) of a CLIP NAME.

    A folder or checkpoint file: sha256 of what is there. A hub repo, also a tag's: the commit, and the digest that the
    hub has of the weights. A tag whose repo can neither be reached nor is in the local cache: "open_clip:TAG", which
    is said, because it pins nothing.
    """
    if model == "null":
        return "", None
    architecture, pretrained = resolve_clip_name(model)
    folder = architecture.removeprefix("local-dir:") if architecture.startswith("local-dir:") else None
    file = pretrained if pretrained and Path(pretrained).is_file() else None
    if local := folder or file:
        if revision is not None:
            raise InputError(f"--clip-revision {revision}: {model!r} is not on the hub; leave it out")
        return folder_revision(Path(local)), None
    from pcm.clip.weights import hub_place

    if pretrained is None:
        return _pin_weights(architecture.removeprefix(HUB_PREFIX), None, revision)
    import open_clip

    if pretrained not in open_clip.list_pretrained_tags_by_model(architecture):
        allowed = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise InputError(f"CLIP weights {pretrained!r} of {architecture}: allowed are {allowed}, or a checkpoint file")
    repo, filename = hub_place(architecture, pretrained)
    try:
        if repo:
            return _pin_weights(repo, filename, revision)
    except InputError as error:
        if revision is not None:
            raise
        log.warning("CLIP %s: not pinned (%s); every process loads what the hub has then", model, error)
    return f"{TAG_REVISION}{pretrained}", None


def clip_spec(model: str, *, device: str, dtype: str, revision: str | None = None, **sizes: int) -> ClipSpec:
    """The spec of a CLIP NAME with everything about its weights pinned; `sizes`: batch_size, cpu_threads.

    Says what it gives and how large a row is. Raises InputError when there is no such model, or its revision cannot be
    looked up.
    """
    pinned, weights = pin_clip(model, revision)
    activation = None if model == "null" else activation_of(*resolve_clip_name(model))
    if model not in ("null", "embedded"):
        log.info("CLIP %s: %s", model, describe_tower(model))
    return ClipSpec(
        model=model, revision=pinned, device=device, dtype=dtype, activation=activation, weights=weights, **sizes
    )


def require_joint_patches(model: str) -> None:
    """Raises InputError where a CLIP gives no patches in the joint space, which PCM-Net needs. At most the model's
    configuration is downloaded.
    """
    if model not in ("null", "embedded") and not (tower := describe_tower(model)).has_head:
        raise InputError(
            f"--clip {model}: gives {tower}; PCM-Net needs patches in the joint space: give a CLIP that pools a token "
            "or their mean, such as ViT-L-14/openai"
        )


def joint_dimensions(model: str) -> int:
    """D of a CLIP's joint space. Raises InputError for the null CLIP, which has none."""
    if model == "null":
        raise InputError("--concepts: without effect with --clip null, which has no features; leave it out")
    return describe_tower(model).features.embed_dim


def describe_tower(model: str) -> "TowerFacts":
    from pcm.clip.weights import tower_facts  # seconds to import

    return tower_facts(model)


def clip_of_given_features(model: str) -> ClipSpec:
    """The spec of features that somebody made elsewhere with this CLIP, which need not be here: it may be a folder of
    another machine. A tag tells its activation.
    """
    try:
        activation = activation_of(*resolve_clip_name(model))
    except InputError:
        activation = None
    return ClipSpec(model=model, revision=IMPORTED, activation=activation)


def check_scheduler(name: str | None, options: Iterable[str] = ()) -> None:
    """Raises InputError for a scheduler, or an option of it, that diffusers lacks, before anything is planned."""
    if name is not None:
        # seconds to import, so only where one is named
        from pcm.generation.pipeline_loading import check_scheduler_options, scheduler_class

        check_scheduler_options(scheduler_class(name), options)


def _pin_weights(repo: str, filename: str | None, revision: str | None) -> tuple[str, str | None]:
    """The commit of a repo with open_clip weights, and the sha256 that the hub has of the file that is loaded.

    Of a repo in the local cache neither needs the hub.
    """
    from pcm.clip.weights import loaded_names

    names = loaded_names(filename)
    if revision and is_commit(revision):
        return revision, _cached(repo, names, revision)[1]
    try:
        found = _look_up(repo, revision)
    except InputError:
        commit, digest = _cached(repo, names, revision or "main")
        if commit is None:
            raise
        return commit, digest
    digests = {file.rfilename: file.lfs.sha256 for file in found.siblings or () if file.lfs}
    weights = next((digests[name] for name in names if name in digests), None)
    return found.sha or "", f"sha256:{weights}" if weights else None


def _cached(repo: str, names: list[str], revision: str) -> tuple[str | None, str | None]:
    """(commit, digest) of a repo's weights in the local cache of the hub, which names large files by their sha256."""
    from huggingface_hub import try_to_load_from_cache

    for name in names:
        cached = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(cached, str):
            blob = Path(cached).resolve().name
            return Path(cached).parent.name, f"sha256:{blob}" if len(blob) == 64 else None
    return None, None


def _pin_repo(repo: str, revision: str | None) -> str:
    if revision and is_commit(revision):
        return revision
    return _look_up(repo, revision).sha or ""


def _look_up(repo: str, revision: str | None) -> "ModelInfo":
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().model_info(repo, revision=revision, files_metadata=True)
    except HFValidationError:
        raise InputError(f"model {repo!r}: neither a folder nor a repo id ORG/NAME; give one of the two") from None
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"model {repo!r}: its revision cannot be looked up ({first_line(error)}); "
            "give a 40-digit commit with the revision argument, or a local folder"
        ) from None


def resolve_device(device: str, *, cluster_gpus: float) -> str:
    """'auto' is cuda where the cluster has a GPU now, else cpu."""
    if device != "auto":
        return device
    return "cuda" if cluster_gpus else "cpu"


def resolve_dtype(dtype: str, *, device: str) -> str:
    """'auto' is bfloat16 on a GPU, float32 on a CPU."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device == "cuda" else "float32"
