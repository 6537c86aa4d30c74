"""What is staged at a URI: weights.json, and below the digest of the whole its files.

    URI/weights.json            put last: what it names is there
    URI/SHA256/unet/...         the model's folder

Whoever stages other weights at the same place puts them beside the earlier ones, and then the new weights.json: nobody
reads a mixture.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.store.paths import inside
from cluster.store.store import Store
from pcm.clip.names import folder_revision
from pcm.documents import document_bytes, read_document
from pcm.errors import InputError, first_line
from pcm.generation.pipeline_files import pipeline_revision
from pcm.generation.pipeline_index import MODEL_INDEX
from pcm.spec import DIGEST

MANIFEST = "weights.json"
VERSION = 1
#: A model has some dozens of files, of some 100 bytes each.
LARGEST_MANIFEST = 2**22
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


class LaterManifest(InputError):
    """weights.json of another release: it says what this one cannot read, and nothing that it names is touched."""


@dataclass(frozen=True)
class StagedFile:
    """A file of the model's folder."""

    name: str  # relative, with forward slashes
    size: int  # bytes
    sha256: str  # "sha256:..."


@dataclass(frozen=True)
class WeightsManifest:
    """weights.json. source: where the weights came from, for people. revision: what the folder has for a commit."""

    source: str
    revision: str
    files: tuple[StagedFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def key(self, file: StagedFile) -> str:
        """Where a file lies below the URI."""
        return f"{digits(self.revision)}/{file.name}"

    def to_bytes(self) -> bytes:
        files = {file.name: {"bytes": file.size, "sha256": file.sha256} for file in self.files}
        return document_bytes({"version": VERSION, "source": self.source, "revision": self.revision, "files": files})

    @staticmethod
    def from_bytes(data: bytes, *, place: str) -> "WeightsManifest":
        """Raises InputError for what is no such manifest, or names files outside its folder, and LaterManifest."""
        try:
            values = read_document(data)
            if values["version"] != VERSION:
                raise LaterManifest(
                    f"{place}: of version {str(values['version'])[:20]}, and this release knows {VERSION}; use the "
                    "release that staged the weights, or give another place"
                )
            found = WeightsManifest(
                str(values["source"]), values["revision"], tuple(_file(*item) for item in values["files"].items())
            )
            digits(found.revision)
        except LaterManifest:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{place}: is no manifest of weights ({first_line(error)}); stage them with python -m jobs.stage_models"
            ) from None
        for file in found.files:
            inside(Path("."), file.name)
        names = {file.name for file in found.files}
        for name in names:
            if both := names & {str(parent) for parent in PurePosixPath(name).parents}:
                raise InputError(f"{place}: {both.pop()!r} is a file and a folder at once; stage the weights again")
        return found


def read_manifest(store: Store) -> WeightsManifest:
    """Of what is staged at a URI. Raises InputError where nothing is."""
    place = f"{store.root}/{MANIFEST}"
    try:
        with store.open(MANIFEST) as file:
            data = file.read(LARGEST_MANIFEST + 1)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(
            f"{store.root}: has no {MANIFEST}, so no weights are staged there; put them there with "
            f"python -m jobs.stage_models --out {shlex.quote(store.root)}"
        ) from None
    if len(data) > LARGEST_MANIFEST:
        raise InputError(f"{place}: over {LARGEST_MANIFEST} bytes, which no manifest of weights has")
    return WeightsManifest.from_bytes(data, place=place)


def revision_of(folder: Path, recorded: str | None = None) -> str:
    """The revision that `--t2i` and `--clip` record of a model's folder; `recorded`: as of `folder_revision`."""
    return pipeline_revision(folder) if (folder / MODEL_INDEX).is_file() else folder_revision(folder, recorded)


def digits(revision: str) -> str:
    """The 64 digits of a "sha256:..."; the name of a folder. Raises ValueError for anything else."""
    if not isinstance(revision, str) or not _SHA256.fullmatch(revision):
        raise ValueError(f"revision {str(revision)[:80]!r} is no sha256:...")
    return revision.removeprefix(DIGEST)


def _file(name: Any, values: Any) -> StagedFile:
    size, sha256 = values["bytes"], values["sha256"]
    if type(size) is not int or size < 0:
        raise ValueError(f"{str(name)[:80]!r} has no size")
    digits(sha256)
    return StagedFile(name, size, sha256)
