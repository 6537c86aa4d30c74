"""A disk that is nearly full."""

import contextlib
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """A disk of 2 MB at `folder`, full but for 64 KB; yields what frees it. Without root: a limit on file sizes."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True).returncode == 0:
        ballast = folder / "ballast"
        try:
            ballast.write_bytes(bytes((2 << 20) - (64 << 10)))
            yield lambda: ballast.unlink()
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
        try:
            yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
