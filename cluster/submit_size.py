"""`python -m cluster.submit_size`: what `ray job submit --working-dir .` would send from here, before it is tried.

Ray packs the folder before any line of a job runs, and a package that is too large ends in a traceback. So this is a
command of its own, which counts by Ray's own rules: `.gitignore`, `.rayignore` and what Ray leaves out.
"""

import argparse
import logging
import sys
from pathlib import Path

MEBIBYTE = 1 << 20
SHOWN = 5
_A_FILES_ENTRY = 200  # bytes, about: Ray's package is a zip without compression, with two headers a file


def packed_files(folder: Path) -> list[tuple[int, str]]:
    """(bytes, path within the folder) of each file that Ray would pack, the largest first."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    folder = folder.absolute()
    found: list[tuple[int, str]] = []

    def add(path: Path) -> None:
        if path.is_file():
            found.append((path.stat().st_size, path.relative_to(folder).as_posix()))

    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    _dir_travel(folder, excludes, add, include_gitignore=True, logger=logging.getLogger(__name__))
    return sorted(found, reverse=True)


def most_bytes() -> int:
    """What the head's job server takes at most."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    return int(DASHBOARD_CLIENT_MAX_SIZE)


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 = Ray takes it, 2 = too large, or no folder (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m cluster.submit_size", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=".", help="the --working-dir (default: this folder)")
    folder = Path(parser.parse_args(arguments).folder)
    if not folder.is_dir():
        print(f"error: {folder}: not a folder; give the --working-dir of ray job submit", file=sys.stderr)
        return 2
    files = packed_files(folder)
    total, most = sum(size + _A_FILES_ENTRY for size, _ in files), most_bytes()
    largest = ", ".join(f"{path} {size / MEBIBYTE:.1f}" for size, path in files[:SHOWN])
    said = (
        f"{total / MEBIBYTE:.1f} MiB in {len(files)} files; Ray takes {most / MEBIBYTE:g} MiB; the largest: {largest}"
    )
    if total >= most:
        print(f"error: {said}; name in .rayignore what the job does not need", file=sys.stderr)
        return 2
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
