"""Names that come from outside - a store's listing, a manifest - as paths that stay in a folder."""

from pathlib import Path

from pcm.errors import InputError


def inside(folder: Path, key: str) -> Path:
    """The path of `key` below `folder`. Raises InputError for a key that is absolute, leads elsewhere, or is odd:
    with empty parts, control characters, or a part longer than a file's name may be.
    """
    parts = key.split("/")
    if not key.isprintable() or any(part in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
        raise outside(key, str(folder))
    return folder.joinpath(*parts)


def outside(key: str, place: str) -> InputError:
    return InputError(f"{place}: the key {key[:200]!r} is no path inside it; it is neither read nor written")
