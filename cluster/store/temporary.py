"""Files that are gone once they have been used, in the machine's folder for such: what TMPDIR names, else /tmp."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.store.retries import FULL_ERRNO, RERUN
from pcm.errors import StoreFailure


@contextmanager
def named_temporary_folder() -> Iterator[None]:
    """Around what writes temporary files and nothing else: a disk that is full is said to be that folder's.

    Raises StoreFailure there, and where no folder for temporary files can be written at all.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise StoreFailure(
            "no folder for temporary files can be written, neither TMPDIR's nor /tmp; name one with TMPDIR that can"
        ) from None
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise StoreFailure(
            f"{folder}: the disk for temporary files is full; free space there, or name another folder with TMPDIR, "
            f"and {RERUN}"
        ) from None


def _is_full(error: BaseException) -> bool:
    """Also of an error that a library raises in place of the system's: torch's while it handles that, safetensors'."""
    inner = error.__context__
    return any(
        (isinstance(link, OSError) and link.errno in FULL_ERRNO) or "No space left on device" in str(link)
        for link in (error, inner)
    )
