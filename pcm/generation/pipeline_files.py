"""Which files of a folder are its pipeline: those of the parts that model_index.json names."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pcm.errors import InputError
from pcm.generation.pipeline_index import MODEL_INDEX, read_index
from pcm.spec import DIGEST

#: Files read at once. hashlib lets go of the interpreter lock.
READERS = 8
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".msgpack", ".onnx")


def named_files(folder: Path, *, weights: bool = True, variant: str | None = None) -> list[Path]:
    """model_index.json and the files of the parts that it names, sorted; not what a download left beside them.

    Raises InputError where a variant is asked for that no part has.
    """
    index = read_index(str(folder), None)
    found = [folder / MODEL_INDEX]
    for part in index.components:
        files = (file for file in (folder / part).rglob("*") if file.is_file())
        found += [file for file in files if not _is_hidden(file, folder) and (weights or file.suffix not in WEIGHTS)]
    if variant is not None and not any(f".{variant}." in file.name for file in found):
        raise InputError(f"--t2i-variant {variant}: {folder} has no file of it; leave it out")
    return sorted(found)


def pipeline_revision(folder: Path, *, weights: bool = True) -> str:
    """sha256 over the names and digests of `named_files`: what a folder has instead of a commit."""
    files = named_files(folder, weights=weights)
    with ThreadPoolExecutor(READERS) as pool:
        digests = list(pool.map(_digest, files))
    whole = hashlib.sha256()
    for file, digest in zip(files, digests, strict=True):
        whole.update(file.relative_to(folder).as_posix().encode() + b"\0" + digest)
    return f"{DIGEST}{whole.hexdigest()}"


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _is_hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)
