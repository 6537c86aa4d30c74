"""From the names a user gives to a spec that pins everything: revisions, device, dtype, defaults."""

import logging
from collections.abc import Iterable
from pathlib import Path

from pcm.clip.names import activation_of, folder_revision, resolve_clip_name
from pcm.credentials import refuse_credentials
from pcm.errors import InputError, first_line
from pcm.generation.names import IMPORTED, model_source
from pcm.spec import TAG_REVISION, ClipSpec

log = logging.getLogger(__name__)


def pin_t2i(model: str, revision: str | None) -> str:
    """The revision of a text-to-image NAME: sha256 of a folder, commit of a repo, "" of the null generator.

    Raises InputError when the repo cannot be reached to look a branch up; a full commit hash needs no look-up.
    """
    refuse_credentials(model)
    if model == "null":
        return ""
    source = model_source(model)
    if Path(source).is_dir():
        if not (Path(source) / "model_index.json").is_file():
            raise InputError(f"text-to-image folder {model!r}: has no model_index.json; give a diffusers folder")
        return folder_revision(Path(source))
    return _pin_repo(model, revision)


def pin_clip(model: str, revision: str | None) -> str:
    """The revision of a CLIP NAME: sha256 of a folder or checkpoint file, or the tag that open_clip itself pins."""
    if model == "null":
        return ""
    architecture, pretrained = resolve_clip_name(model)
    if architecture.startswith("local-dir:"):
        return folder_revision(Path(architecture.removeprefix("local-dir:")))
    if architecture.startswith("hf-hub:"):
        return _pin_repo(architecture.removeprefix("hf-hub:"), revision)
    if pretrained and Path(pretrained).is_file():
        return folder_revision(Path(pretrained))
    import open_clip

    if pretrained not in open_clip.list_pretrained_tags_by_model(architecture):
        allowed = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none"
        raise InputError(f"CLIP weights {pretrained!r} of {architecture}: allowed are {allowed}, or a checkpoint file")
    return f"{TAG_REVISION}{pretrained}"


def clip_spec(model: str, *, device: str, dtype: str, revision: str | None = None, **sizes: int) -> ClipSpec:
    """The spec of a CLIP NAME with everything about its weights pinned; `sizes`: batch_size, cpu_threads.

    Raises InputError when there is no such model, or its revision cannot be looked up.
    """
    pinned = pin_clip(model, revision)
    activation = None if model == "null" else activation_of(*resolve_clip_name(model))
    return ClipSpec(model=model, revision=pinned, device=device, dtype=dtype, activation=activation, **sizes)


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


def _pin_repo(repo: str, revision: str | None) -> str:
    if revision and len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return HfApi().model_info(repo, revision=revision).sha or ""
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
