"""Files of torch.save, read by PyTorch's restricted reader in memory that does not exceed the file.

They are zip archives whose members are stored as they are. A member that is compressed, or that several names share,
could stand for a thousand times the file's size; so could a tensor whose rows are one row again and again.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from pcm.errors import InputError


def load_torch(source: Path | io.BytesIO) -> Any:
    """What torch.save wrote, on the CPU; nothing is executed.

    Raises InputError for a file that stands for more than it holds, and whatever torch.load raises.
    """
    check_archive(source)
    content = torch.load(source, map_location="cpu", weights_only=True)
    _check_tensors(content)
    return content


def check_archive(source: Path | io.BytesIO) -> None:
    """Raises InputError for a zip archive whose members are larger than it. What is no archive, torch.load judges."""
    if not zipfile.is_zipfile(source):
        _rewind(source)
        return
    size = source.stat().st_size if isinstance(source, Path) else len(source.getbuffer())
    with zipfile.ZipFile(source) as archive:
        held = sum(member.file_size for member in archive.infolist())
    _rewind(source)
    if held > size:
        raise InputError(f"refused: {size:,} bytes that stand for {held:,}; torch.save does not compress")


def _rewind(source: Path | io.BytesIO) -> None:
    if isinstance(source, io.BytesIO):
        source.seek(0)


def _check_tensors(content: Any) -> None:
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.nbytes > value.untyped_storage().nbytes():
                raise InputError("refused: it has a tensor that is larger than its values")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
