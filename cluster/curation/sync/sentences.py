"""What compares two captions: a sentence-transformers model, or the text tower of the CLIP that finds the pictures."""

import functools
import importlib.metadata
import importlib.util
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.store.retries import load_with_retries
from cluster.weights.hub import pin_repo
from pcm.clip.names import folder_revision, is_commit
from pcm.documents import read_document
from pcm.errors import InputError
from pcm.model_faults import is_out_of_memory, is_sticky, room_for_model, why_unusable

log = logging.getLogger(__name__)

#: The published encoder, https://huggingface.co/sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2
PUBLISHED = "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2"
#: Names the text tower of the CLIP that finds the pictures.
CLIP = "clip"

_PACKAGE = "sentence_transformers"
_INSTALL = "pip install -c constraints.txt -e '.[sentences]'"
_MODULES_FILE = "modules.json"
#: Parts that a model may be made of: those whose loading runs no Python but the package's own.
_PARTS = ("Transformer", "Pooling", "Normalize", "Dense")
#: What is downloaded of a repo: no code, and no pickles.
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class SentenceSpec:
    """A sentence encoder, pinned. revision: commit of the repo, or sha256 of the folder. library: its release."""

    model: str
    revision: str = ""
    library: str = ""

    @property
    def is_clip(self) -> bool:
        return self.model == CLIP

    def decides(self) -> dict[str, str]:
        """What decides its vectors: where a folder lies does not."""
        values = asdict(self)
        return values if self.is_clip or is_commit(self.revision) else values | {"model": ""}


class SentenceEncoder(Protocol):
    """What is needed of an encoder."""

    def encode(self, captions: list[str]) -> np.ndarray:
        """(B, E) float32."""


def resolve_sentences(name: str | None, begun: object = None) -> SentenceSpec:
    """The encoder that a NAME stands for; None is the published one where its package is installed, else CLIP. A view
    that was begun (`begun`: what its lineage says of its sentences) goes on with that of the two that it has, and with
    the commit of its repo.

    Raises InputError for a name whose package is missing, a folder that is no sentence-transformers model, and a repo
    that cannot be looked up and is not in the local cache.
    """
    installed = importlib.util.find_spec(_PACKAGE) is not None
    was = begun.get("model") if isinstance(begun, dict) else None
    if name is None and was in (PUBLISHED, CLIP):
        name = str(was)
    if name is None:
        name = PUBLISHED if installed else CLIP
        why = "" if installed else f", for sentence-transformers is not installed ({_INSTALL})"
        log.info("sentences are compared by %s%s", "CLIP's text tower" if name == CLIP else name, why)
    if name == CLIP:
        return SentenceSpec(model=CLIP)
    if not installed:
        raise InputError(
            f"--sentences {name}: needs sentence-transformers, which is not installed; install it with {_INSTALL}, or "
            f"give --sentences {CLIP}"
        )
    library = f"sentence-transformers {importlib.metadata.version('sentence-transformers')}"
    if Path(name).is_dir():
        refuse_own_code(Path(name))
        before = str(begun.get("revision")) if isinstance(begun, dict) else None
        return SentenceSpec(model=name, revision=folder_revision(Path(name), before), library=library)
    if name.startswith(("/", ".")):
        raise InputError(f"--sentences {name}: no such folder; give a folder, a repo id ORG/NAME, or {CLIP}")
    before = str(begun.get("revision")) if isinstance(begun, dict) and was == name else ""
    return SentenceSpec(model=name, revision=before if is_commit(before) else _commit(name), library=library)


def refuse_own_code(folder: Path) -> None:
    """Raises InputError for what is no sentence-transformers model, and where it names Python of its own."""
    place = folder / _MODULES_FILE
    try:
        parts = read_document(place.read_bytes())
        types = [part["type"] for part in parts]
    except FileNotFoundError:
        raise InputError(f"--sentences {folder}: no sentence-transformers model (no {_MODULES_FILE})") from None
    except (ValueError, TypeError, LookupError):
        raise InputError(f"{place}: not a list of parts; give a sentence-transformers model") from None
    for kind in types:
        package, _, part = str(kind).rpartition(".")
        if package.partition(".")[0] != _PACKAGE or part not in _PARTS:
            raise InputError(
                f"{place}: {kind!r} is not on the list of parts that are loaded; allowed are "
                f"{', '.join(_PARTS)} of sentence-transformers: give another model, or --sentences {CLIP}"
            )


@functools.lru_cache(maxsize=1)
def load_sentences(spec: SentenceSpec, device: str) -> SentenceEncoder:
    """A sentence-transformers model in float32. Raises InputError when it cannot be loaded or is not the pinned one."""
    with room_for_model(f"--sentences {spec.model}", device):
        return load_with_retries(lambda: _SentenceTransformer(spec, device), model=spec.model)


class _SentenceTransformer:
    def __init__(self, spec: SentenceSpec, device: str) -> None:
        # Seconds to import, and of an extra.
        import pcm.torchvision_shim  # noqa: F401  isort: skip
        from sentence_transformers import SentenceTransformer

        folder = Path(spec.model)
        if is_commit(spec.revision):
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(spec.model, revision=spec.revision, allow_patterns=_FILES))
        elif (now := folder_revision(folder, spec.revision)) != spec.revision:
            raise InputError(
                f"--sentences {folder}: its files are {now} on this machine, but {spec.revision} were begun with; put "
                "the same files there"
            )
        refuse_own_code(folder)
        settings: dict[str, Any] = {"use_safetensors": True}
        try:
            self._model = SentenceTransformer(
                str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs=settings
            ).float()
        except Exception as error:  # whatever a library says of files that are damaged or none
            if is_out_of_memory(error) or is_sticky(error):
                raise
            raise InputError(
                f"--sentences {spec.model}: cannot be loaded ({why_unusable(error)}); get its files again if they may "
                f"be damaged, or give another, or {CLIP}"
            ) from error

    def encode(self, captions: list[str]) -> np.ndarray:
        if not captions:
            return np.zeros((0, self._model.encode(["a"]).shape[1]), np.float32)
        return self._model.encode(captions, batch_size=_BATCH_SIZE, normalize_embeddings=True, show_progress_bar=False)


def _commit(repo: str) -> str:
    """The repo's commit now; without a connection that of the local cache."""
    from huggingface_hub import try_to_load_from_cache

    try:
        return pin_repo(repo, None)
    except InputError as error:
        cached = try_to_load_from_cache(repo, _MODULES_FILE)
        if isinstance(cached, str):
            return Path(cached).parent.name
        raise InputError(
            f"--sentences {repo}: is not in the local cache, and {error}; or give --sentences {CLIP}"
        ) from None
