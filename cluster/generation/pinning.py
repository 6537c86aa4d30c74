"""From the names a user gives to a spec that pins everything: revisions, device, dtype, defaults."""

import logging
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.device import resolve_device, resolve_dtype
from cluster.generation.picture_spec import generator_spec
from cluster.generation.request import GenerationOptions
from cluster.options import flag, given
from cluster.weights.hub import look_up
from cluster.weights.node_copy import local_name
from pcm.clip.names import HUB_PREFIX, activation_of, folder_revision, is_commit, resolve_clip_name
from pcm.errors import InputError
from pcm.generation.names import IMPORTED
from pcm.spec import GENERATOR_VERSION, TAG_REVISION, ClipSpec, DatasetSpec

if TYPE_CHECKING:
    from pcm.clip.weights import TowerFacts

log = logging.getLogger(__name__)


def dataset_spec(
    asked: GenerationOptions,
    *,
    gpus: float,
    version: int = GENERATOR_VERSION,
    begun: DatasetSpec | None = None,
    own: Collection[str] | None = None,
) -> DatasetSpec:
    """The spec that a request means, with every default resolved and every revision pinned; `gpus`: the cluster's.

    With batch_size auto its batch size is a placeholder. `version`: by whose rules (`pcm.spec.GENERATOR_VERSION`).
    `begun`: what a dataset that is gone on with was begun with. `own`: the options that the user gave, where the others
    are those of another dataset (--spec); None: all. Raises InputError.
    """
    device = resolve_device(asked.device, cluster_gpus=gpus)
    dtype = resolve_dtype(asked.dtype, device=device)
    clip = asked.clip or ("null" if asked.t2i == "null" else "embedded")
    named = given(asked) if own is None else own
    if clip == "null" and begun is None and (useless := [n for n in ("clip_batch_size", "nouns") if n in named]):
        flags = ", ".join(flag(type(asked), name) for name in useless)
        raise InputError(f"{flags}: without effect with --clip null, which has no features; leave it out")
    return DatasetSpec(
        generator=generator_spec(
            asked,
            device=device,
            dtype=dtype,
            version=version,
            begun=None if begun is None else begun.generator,
            own=own,
        ),
        clip=clip_spec(
            clip,
            revision=asked.clip_revision,
            begun=None if begun is None else begun.clip,
            dtype=dtype,
            device=device,
            batch_size=asked.clip_batch_size,
            compile=None if asked.compile == "none" or clip == "null" else asked.compile,
        ),
        seed=asked.seed,
        images_per_caption=asked.images_per_caption,
        generator_version=version,
    )


def on_device(spec: DatasetSpec, *, device: str, dtype: str) -> DatasetSpec:
    """The same spec drawn and scored on a device in a precision."""
    return replace(
        spec,
        generator=replace(spec.generator, device=device, dtype=dtype),
        clip=replace(spec.clip, device=device, dtype=dtype),
    )


def pin_clip(model: str, revision: str | None, begun: ClipSpec | None = None) -> tuple[str, str | None]:
    """(revision, sha256 of the weights or None) of a CLIP NAME.

    A folder, checkpoint file or staged folder: sha256 of what is there. A hub repo, also a tag's: the commit, and the
    digest that the hub has of the weights. Of a repo that a dataset was `begun` with these are what it recorded, unless
    another revision is asked for: by now the newest commit may be another. A tag whose repo can neither be reached nor
    is in the local cache: "open_clip:TAG", which is said, because it pins nothing.

    Raises InputError when there is no such model, or its revision cannot be looked up.
    """
    if model == "null":
        return "", None
    architecture, pretrained = resolve_clip_name(local_name(model))
    folder = architecture.removeprefix("local-dir:") if architecture.startswith("local-dir:") else None
    file = pretrained if pretrained and Path(pretrained).is_file() else None
    if local := folder or file:
        if revision is not None:
            raise InputError(f"--clip-revision {revision}: {model!r} is not on the hub; leave it out")
        return folder_revision(Path(local), begun.revision if begun else None), None
    if begun is not None and begun.model == model and is_commit(begun.revision) and revision in (None, begun.revision):
        return begun.revision, begun.weights
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
    if revision is not None:
        raise InputError(f"--clip-revision {revision}: the weights of {model} are in no repo of the hub; leave it out")
    return f"{TAG_REVISION}{pretrained}", None


def clip_spec(
    model: str,
    *,
    device: str,
    dtype: str,
    revision: str | None = None,
    begun: ClipSpec | None = None,
    compile: str | None = None,
    **sizes: int,
) -> ClipSpec:
    """The spec of a CLIP NAME with everything about its weights pinned; `begun`: as in `pin_clip`; `sizes`: batch_size,
    cpu_threads.

    Says what it gives and how large a row is. Raises InputError as pin_clip does.
    """
    pinned, weights = pin_clip(model, revision, begun)
    activation = None if model == "null" else activation_of(*resolve_clip_name(local_name(model)))
    if model not in ("null", "embedded"):
        log.info("CLIP %s: %s", model, describe_tower(model, pinned))
    return ClipSpec(
        model=model,
        revision=pinned,
        device=device,
        dtype=dtype,
        activation=activation,
        weights=weights,
        compile=compile,
        **sizes,
    )


def require_joint_patches(model: str, revision: str | None = None) -> None:
    """Raises InputError where a CLIP gives no patches in the joint space, which PCM-Net needs. At most the model's
    configuration is downloaded.
    """
    if model not in ("null", "embedded") and not (tower := describe_tower(model, revision)).has_head:
        raise InputError(
            f"--clip {model}: gives {tower}; PCM-Net needs patches in the joint space: give a CLIP that pools a token "
            "or their mean, such as ViT-L-14/openai"
        )


def joint_dimensions(model: str, revision: str | None = None) -> int:
    """D of a CLIP's joint space. Raises InputError for the null CLIP, which has none."""
    if model == "null":
        raise InputError("--concepts: without effect with --clip null, which has no features; leave it out")
    return describe_tower(model, revision).features.embed_dim


def describe_tower(model: str, revision: str | None = None) -> "TowerFacts":
    from pcm.clip.weights import tower_facts  # seconds to import

    return tower_facts(local_name(model, revision), revision)


def clip_of_given_features(model: str) -> ClipSpec:
    """The spec of features that somebody made elsewhere with this CLIP, which need not be here: it may be a folder of
    another machine. A tag tells its activation.
    """
    try:
        activation = activation_of(*resolve_clip_name(model))
    except InputError:
        activation = None
    return ClipSpec(model=model, revision=IMPORTED, activation=activation)


def _pin_weights(repo: str, filename: str | None, revision: str | None) -> tuple[str, str | None]:
    """The commit of a repo with open_clip weights, and the sha256 that the hub has of the file that is loaded.

    Of a repo in the local cache neither needs the hub. The digest of a commit that is asked for, and is neither there
    nor on a hub in reach, is None.
    """
    from pcm.clip.weights import loaded_names

    names = loaded_names(filename)
    asked = revision if revision and is_commit(revision) else None
    if asked and (digest := _cached(repo, names, asked)[1]):
        return asked, digest
    try:
        found = look_up(repo, revision, option="--clip-revision COMMIT")
    except InputError:
        commit, digest = _cached(repo, names, revision or "main")
        if commit or asked:
            return commit or str(asked), digest
        raise
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
