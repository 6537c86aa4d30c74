"""Decoded shards as raw arrays on a local disk or in /dev/shm, shared by all workers of a machine.

For datasets that lie far away, or whose features Arrow has to decode (see cluster.feature_pages): a shard is fetched
and decoded once, and then only the pages of the rows that are asked for are read. A dataset of ours on a local disk is
read faster without.
"""

import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cluster.rows import Rows, no_scale, read_rows
from cluster.storage import Store
from pcm.records import FeatureShape

log = logging.getLogger(__name__)

_ARRAYS = ("clip_score", "global_feature", "patch_features")
_SCALE = "patch_scale"  # beside int8 features only
_TEXTS = ("sample_ids", "captions")


@dataclass(frozen=True)
class ShardCache:
    """`folder` belongs to one dataset in one state, and to `int8` features (pcm.quantised) or those as stored:
    whoever makes a cache names it by the manifest's digest and that.

    A shard is there as a whole or not at all. Where it cannot be written (the disk is full), it is read as without a
    cache and a warning logged.
    """

    folder: Path
    int8: bool = False

    def read_rows(self, store: Store, key: str, rows: np.ndarray, features: FeatureShape) -> Rows:
        """cluster.rows.read_rows by way of the cache. All rows of a shard are mapped, some are copied."""
        place = self.folder / key
        if not place.exists():
            decoded = read_rows(store, key, None, features)
            if self.int8:
                decoded = decoded.in_8_bits()
            try:
                _write(place, decoded)
            except OSError as error:
                log.warning("%s: not cached (%s)", place, error.strerror)
                return decoded.some(rows)
        whole = _mapped(place)
        if len(rows) == len(whole):
            _read_ahead(place)
        return whole.some(rows)


def _write(place: Path, rows: Rows) -> None:
    """In another folder first: renaming it is one step, and whoever comes second finds the same there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=place.parent))
    try:
        for name in (*_ARRAYS, _SCALE) if rows.patch_scale.size else _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(rows, name))
        texts = {name: getattr(rows, name).tolist() for name in _TEXTS}
        (temporary / "texts.json").write_text(json.dumps(texts))
        if not place.exists():
            os.rename(temporary, place)
    except FileExistsError:
        pass
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mapped(place: Path) -> Rows:
    texts = json.loads((place / "texts.json").read_text())
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
    if arrays["patch_features"].dtype == np.int8:
        scale = np.load(place / f"{_SCALE}.npy", mmap_mode="r")
    else:
        scale = no_scale(len(arrays["clip_score"]))
    return Rows(**{name: np.array(texts[name], dtype=object) for name in _TEXTS}, **arrays, patch_scale=scale)


def _read_ahead(place: Path) -> None:
    """Ask the system for a whole shard, in its own good order: row by row a disk is several times slower."""
    if hasattr(os, "posix_fadvise"):
        with open(place / "patch_features.npy", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
