"""Weights put beside the data: a repo at a commit, or a folder, each file with its digest, the manifest last."""

import hashlib
import json
import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cluster.store.paths import inside
from cluster.store.retries import load_with_retries
from cluster.store.store import Store, join, open_store
from cluster.store.temporary import temporary_folder
from cluster.weights.hub import pin_repo
from cluster.weights.manifest import (
    MANIFEST,
    LaterManifest,
    StagedFile,
    WeightsManifest,
    digits,
    read_manifest,
    revision_of,
)
from cluster.weights.request import StageModelsRequest
from pcm.clip.names import HUB_PREFIX, LOCAL_PREFIX, is_commit, is_hidden, resolve_clip_name
from pcm.credentials import refuse_credentials
from pcm.errors import InputError, first_line
from pcm.generation.model_memory import loaded_files
from pcm.generation.pipeline_files import WEIGHTS, named_files
from pcm.generation.pipeline_index import MODEL_INDEX, read_index
from pcm.spec import DIGEST

log = logging.getLogger(__name__)

#: Files that are read or put at once.
WORKERS = 8
#: Of a pipeline's part in a repo, what its library reads; pickles are not read.
_PART_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
#: Of a repo with a CLIP, what open_clip and its tokenizer read.
_CLIP_FILES = ("*.json", "*.txt", "*.model", "open_clip_*.safetensors")


def stage(request: StageModelsRequest) -> dict[str, Any]:
    """Put a model's folder at --out, or two below it, and return the job's summary. Run again, it puts what is not
    there yet; of a repo without a revision that is the commit that is staged there.

    The summary: weights (what a job is given), source, revision, files, bytes, put, digests (by file). Of two models
    `t2i` and `clip` have the first three, the rest is of both, with names of files below --out. Raises InputError for a
    model that cannot be had, or that names Python of its own.
    """
    started = time.monotonic()
    places = places_of(request)
    staged = {kind: _stage_one(request, kind, place) for kind, place in places.items()}
    if len(staged) == 1:
        (summary,) = staged.values()
        return {**summary, "seconds": round(time.monotonic() - started, 2)}
    below = {kind: place.removeprefix(join(request.out, "")) for kind, place in places.items()}
    return {
        **{kind: {key: one[key] for key in ("weights", "source", "revision")} for kind, one in staged.items()},
        **{key: sum(one[key] for one in staged.values()) for key in ("files", "bytes", "put")},
        "digests": {
            f"{below[kind]}/{name}": digest for kind, one in staged.items() for name, digest in one["digests"].items()
        },
        "seconds": round(time.monotonic() - started, 2),
    }


def places_of(request: StageModelsRequest) -> dict[str, str]:
    """Where the weights of each of "t2i" and "clip" go. The last part of a place is the model's own name, by which
    few-step models are known."""
    if request.t2i is None or request.clip is None:
        return {"clip" if request.t2i is None else "t2i": request.out}
    t2i = Path(request.t2i).absolute().name
    architecture, pretrained = resolve_clip_name(request.clip)
    clip = Path(architecture.removeprefix(LOCAL_PREFIX)).absolute().name
    if pretrained is not None:
        clip = f"{architecture}-{Path(pretrained).name}"
    return {"t2i": join(request.out, f"t2i/{t2i}"), "clip": join(request.out, f"clip/{clip}")}


def _stage_one(request: StageModelsRequest, kind: str, place: str) -> dict[str, Any]:
    store = open_store(place)
    before = _staged(store)
    there = before.source if before else ""
    with temporary_folder("stage") as folder:
        if kind == "t2i":
            assert request.t2i is not None
            source = _link_pipeline(request.t2i, request.revision, request.t2i_variant, folder, there)
        else:
            assert request.clip is not None
            source = _link_clip(request.clip, request.revision, folder, there)
        for file in folder.rglob("*.safetensors"):
            try:
                with safe_open(file, "np"):
                    pass
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{source}: {file.relative_to(folder)} cannot be read ({first_line(error)}); get it again whole"
                ) from None
        manifest = _manifest(folder, source)
        if before is not None and before.revision != manifest.revision:
            log.warning(
                "%s: %s (%s) replaces %s (%s); what was begun with those weights needs them there to go on",
                place, source, manifest.revision, before.source, before.revision,
            )  # fmt: skip
        missing = _missing(store, manifest)
        log.info("%s: putting %d of %d files at %s", source, len(missing), len(manifest.files), place)
        with ThreadPoolExecutor(WORKERS, thread_name_prefix="stage") as pool:
            list(pool.map(lambda file: store.put_file(manifest.key(file), folder / file.name), missing))
        store.write_bytes(MANIFEST, manifest.to_bytes())
    return {
        "weights": place,
        "source": source,
        "revision": manifest.revision,
        "files": len(manifest.files),
        "bytes": manifest.size,
        "put": len(missing),
        "digests": {file.name: file.sha256 for file in manifest.files},
    }


def _staged(store: Store) -> WeightsManifest | None:
    """What lies there; None of nothing, and of a damaged manifest, which is replaced."""
    try:
        return read_manifest(store)
    except LaterManifest:
        raise
    except InputError:
        return None


def _manifest(folder: Path, source: str) -> WeightsManifest:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        inside(folder, file.relative_to(folder).as_posix())  # no name that a machine would refuse
    with ThreadPoolExecutor(WORKERS) as pool:
        digests = list(pool.map(_sha256, files))
    staged = tuple(
        StagedFile(file.relative_to(folder).as_posix(), file.stat().st_size, digest)
        for file, digest in zip(files, digests, strict=True)
    )
    return WeightsManifest(source, revision_of(folder), staged)


def _missing(store: Store, manifest: WeightsManifest) -> list[StagedFile]:
    """Files that are not on the store yet: an object is put whole, below the digest of all, so its size is enough."""
    there = set(store.list(f"{digits(manifest.revision)}/"))
    return [
        file
        for file in manifest.files
        if manifest.key(file) not in there or store.size(manifest.key(file)) != file.size
    ]


def _commit(repo: str, revision: str | None, there: str, source: str) -> str:
    """Of a repo: the one asked for, that of what is staged `there` if it is of the same `source` (which ends before the
    commit), or the newest."""
    staged = there.removeprefix(source)
    if revision is None and there.startswith(source) and is_commit(staged):
        log.info("%s: at the commit that is staged there, %s; --revision main takes the newest", repo, staged)
        return staged
    return pin_repo(repo, revision, option="--revision COMMIT")


def _link_pipeline(name: str, revision: str | None, variant: str | None, folder: Path, there: str) -> str:
    """Make the folder of a pipeline's files; what they are, for people. there: the same of what is staged already."""
    from pcm.generation.own_code import refuse_own_code  # diffusers takes seconds to import

    refuse_credentials(name)
    if Path(name).is_dir():
        _refuse_revision(name, revision)
        if not (Path(name) / MODEL_INDEX).is_file():
            raise InputError(f"--t2i {name}: has no {MODEL_INDEX}; give a diffusers folder or a repo id")
        found, source, of_hub = Path(name), Path(name).absolute().name, False
    else:
        commit = _commit(name, revision, there, f"{name}@")
        found, source, of_hub = _download(name, commit, _pipeline_patterns(name, commit)), f"{name}@{commit}", True
    refuse_own_code(found)
    files = named_files(found, variant=variant)
    if of_hub or variant is not None:
        files = _chosen(found, files, variant)
    _link(found, files, folder)
    return source


def _pipeline_patterns(repo: str, commit: str) -> list[str]:
    """What is downloaded of a repo: the parts that its index names; of their weights those of safetensors."""
    parts = read_index(repo, commit).components
    return [MODEL_INDEX, *(f"{part}/{pattern}" for part in parts for pattern in _PART_FILES)]


def _chosen(folder: Path, files: Iterable[Path], variant: str | None) -> list[Path]:
    """Of the files of weights those alone that are loaded."""
    names = {file.relative_to(folder).as_posix(): file for file in files}
    parts = {name.partition("/")[0] for name in names}
    loaded = {name for part in parts for name in loaded_files(part, names, variant)}
    return [file for name, file in names.items() if name in loaded or file.suffix not in WEIGHTS]


def _link_clip(name: str, revision: str | None, folder: Path, there: str) -> str:
    """Make the folder of a CLIP's files; what they are, for people. there: the same of what is staged already."""
    import pcm.torchvision_shim  # noqa: F401  isort: skip
    from pcm.clip.configuration import CONFIG_FILE, read_config  # seconds to import

    architecture, pretrained = resolve_clip_name(name)
    if pretrained is not None:
        source = _link_named_clip(name, architecture, pretrained, revision, folder, there)
    elif architecture.startswith(HUB_PREFIX):
        repo = architecture.removeprefix(HUB_PREFIX)
        commit = _commit(repo, revision, there, f"{repo}@")
        found, source = _download(repo, commit, list(_CLIP_FILES)), f"{repo}@{commit}"
        _link(found, (file for pattern in _CLIP_FILES for file in found.glob(pattern)), folder)
    else:
        _refuse_revision(name, revision)
        found = Path(architecture.removeprefix("local-dir:"))
        source = found.absolute().name
        _link(found, (file for file in found.rglob("*") if file.is_file() and not is_hidden(file, found)), folder)
    text = read_config(folder / CONFIG_FILE)["text_cfg"]
    _refuse_text_tower_of_the_hub(name, text)
    if text.get("hf_tokenizer_name") and not any(folder.glob("*token*")) and not any(folder.glob("*.model")):
        raise InputError(f"--clip {name}: asks for a tokenizer that is not with it; give a model with its own")
    if not any(file.suffix in WEIGHTS for file in folder.iterdir()):
        raise InputError(f"--clip {name}: has no weights that are read; give a model with open_clip_model.safetensors")
    return source


def _link_named_clip(
    name: str, architecture: str, pretrained: str, revision: str | None, folder: Path, there: str
) -> str:
    """Of ARCHITECTURE/PRETRAINED: its weights, and a configuration that says the same as the two names."""
    from pcm.clip.configuration import CONFIG_FILE
    from pcm.clip.weights import clip_files, hub_place

    source, commit = name, None
    if Path(pretrained).is_file():
        _refuse_revision(name, revision)
        source = f"{architecture}/{Path(pretrained).name}"
    else:
        repo, _ = hub_place(architecture, pretrained)
        if not repo:
            raise InputError(f"--clip {name}: its weights are in no repo, and cannot be pinned; give a checkpoint file")
        commit = _commit(repo, revision, there, f"{name} of {repo}@")
        source = f"{name} of {repo}@{commit}"
    files = load_with_retries(lambda: clip_files(name, commit), model=name)
    config = files.config
    _refuse_text_tower_of_the_hub(name, config["text_cfg"])
    if config["text_cfg"].get("hf_tokenizer_name"):
        raise InputError(
            f"--clip {name}: its tokenizer lies in a repo of its own; stage a repo that has both, as hf-hub:ORG/REPO"
        )
    config = {**config, "quick_gelu": files.activation == "quick_gelu"}
    (folder / CONFIG_FILE).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": files.preprocess}, indent=1))
    weights = files.weights
    kind = "open_clip_model.safetensors" if weights.suffix == ".safetensors" else "open_clip_pytorch_model.bin"
    (folder / kind).symlink_to(weights.resolve())
    return source


def _refuse_text_tower_of_the_hub(name: str, text: dict[str, Any]) -> None:
    if model := text.get("hf_model_name"):
        raise InputError(
            f"--clip {name}: its text tower is of Transformers, which reads the configuration of {model} from the hub; "
            "give a CLIP whose text tower is open_clip's own"
        )


def _download(repo: str, commit: str, patterns: list[str]) -> Path:
    from httpx2 import HTTPError  # of the hub's client: no connection
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            load_with_retries(
                lambda: snapshot_download(repo, revision=commit, allow_patterns=patterns), model=f"{repo}@{commit}"
            )
        )
    except (HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise InputError(f"model {repo!r} at {commit}: cannot be downloaded ({first_line(error)})") from None


def _link(source: Path, files: Iterable[Path], folder: Path) -> None:
    for file in files:
        link = folder / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.resolve())


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise InputError(f"--revision {revision}: {name} is no repo, and has none; leave it out")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return f"{DIGEST}{hashlib.file_digest(stream, 'sha256').hexdigest()}"
