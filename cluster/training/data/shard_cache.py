"""Decoded shards as raw arrays on a local disk or in /dev/shm, shared by all workers of a machine.

For datasets that lie far away, and those of schema version 2, whose features Arrow decodes value by value: a shard is
fetched and decoded once. A dataset of version 3 on a local disk is read faster without, unless features are kept in 8
bits.
"""

import errno
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from cluster.dataset.documents import StoredShard
from cluster.dataset.rows import Rows, no_scale, read_rows
from cluster.store.paths import inside
from cluster.store.store import Store
from pcm.records import FeatureShape

log = logging.getLogger(__name__)

_ARRAYS = ("clip_score", "global_feature", "patch_features")
_SCALE = "patch_scale"  # beside int8 features only
_TEXTS = ("sample_ids", "captions")
#: With less than this share of a shard's rows, only their pages are read.
_MAPPED_SHARE = 0.5


@dataclass(frozen=True)
class ShardCache:
    """`folder` belongs to one dataset in one state, and to `int8` features (pcm.kernels.quantised) or those as stored:
    callers name the folder after the manifest's digest and `int8`.

    A shard is there as a whole or not at all. Where it cannot be written (the disk is full) or read (it is another
    user's, or is being deleted), it is read as without a cache and a warning logged.
    """

    folder: Path
    int8: bool = False

    def read_rows(self, store: Store, shard: StoredShard, rows: np.ndarray, features: FeatureShape) -> Rows:
        """cluster.dataset.rows.read_rows by way of the cache."""
        place = inside(self.folder, shard.key)
        decoded = None
        try:
            if not place.exists():
                decoded = self._decoded(store, shard, features)
                _write(place, decoded)
            return _read(place, rows)
        except OSError as error:
            log.warning("%s: not cached (%s)", place, error.strerror)
        return (decoded or self._decoded(store, shard, features)).select(rows)

    def _decoded(self, store: Store, shard: StoredShard, features: FeatureShape) -> Rows:
        decoded = read_rows(store, shard, None, features)
        return decoded.in_8_bits() if self.int8 else decoded


def _write(place: Path, rows: Rows) -> None:
    """In another folder first: renaming it is one step, and whoever comes second finds the same there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.parent / f".writing-{uuid.uuid4().hex}"  # to be read by whom the umask allows it
    temporary.mkdir()
    try:
        for name in (*_ARRAYS, _SCALE) if rows.patch_scale.size else _ARRAYS:
            np.save(temporary / f"{name}.npy", getattr(rows, name))
        texts = {name: getattr(rows, name).tolist() for name in _TEXTS}
        (temporary / "texts.json").write_text(json.dumps(texts))
        if not place.exists():
            os.rename(temporary, place)
    except OSError as failure:
        if failure.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(place: Path, rows: np.ndarray) -> Rows:
    """Of few rows only their pages; else the whole, from which what is not wanted is left out: mapped memory costs a
    fault every few pages, which makes it slower than reading all."""
    texts = json.loads((place / "texts.json").read_text())
    mapped: Literal["r"] | None = "r" if len(rows) < _MAPPED_SHARE * len(texts["captions"]) else None
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode=mapped) for name in _ARRAYS}
    if arrays["patch_features"].dtype == np.int8:
        scale = np.load(place / f"{_SCALE}.npy", mmap_mode=mapped)
    else:
        scale = no_scale(len(texts["captions"]))
    whole = Rows(**{name: np.array(texts[name], dtype=object) for name in _TEXTS}, **arrays, patch_scale=scale)
    return whole.select(rows)
