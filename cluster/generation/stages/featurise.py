"""Second stage: pictures to CLIP scores and features."""

import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pyarrow as pa

from cluster.generation.stages.asking import ask
from cluster.generation.stages.shard_row import ERRORS_KEPT, ShardRow
from cluster.generation.stages.watchdog import Watchdog
from cluster.gpu_share import keep_to_gpu_share
from cluster.releases import check_releases
from cluster.store.retries import load_with_retries
from cluster.weights.node_copy import local_clip
from pcm.errors import InputError, typed_first_line
from pcm.images import open_image
from pcm.reasons import CLIP_ERROR
from pcm.records import NULL_FEATURES, FeatureShape, with_features
from pcm.spec import ClipSpec

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from cluster.dataset.vocabularies import ConceptsOfShard
    from cluster.generation.limits import FaultPolicy
    from pcm.clip.encoder import ClipEncoder, ImageFeatures

log = logging.getLogger(__name__)


class FeaturiseShard:
    """Adds clip_score, global_feature and patch_features, computed from the stored image bytes.

    With a monitor (and the run's policy) CLIP is watched. `concepts` are stored before the features of their shard.
    `before_again` is called before a shard that was begun before, of which a process may have died.
    """

    def __init__(
        self,
        spec: ClipSpec,
        watched_by: "tuple[ActorHandle, FaultPolicy] | None" = None,
        concepts: "ConceptsOfShard | None" = None,
        before_again: Callable[[], None] | None = None,
    ) -> None:
        self._monitor = watched_by[0] if watched_by else None
        self._before_again = before_again
        self._concepts = concepts
        check_releases()
        keep_to_gpu_share(spec.device)
        self._encoder = None if spec.model == "null" else load_with_retries(lambda: self.load(spec), model=spec.model)
        self._watchdog = _watchdog(*watched_by) if watched_by and self._encoder else None
        self._batch_timeout = watched_by[1].batch_timeout if watched_by else math.inf
        self._shard = -1
        self._errors: list[dict] = []  # of the present shard, the first few

    @staticmethod
    def load(spec: ClipSpec) -> "ClipEncoder":
        """The model; a subclass may bring its own."""
        return _load_encoder(spec)

    @property
    def features(self) -> FeatureShape:
        return self._encoder.features if self._encoder else NULL_FEATURES

    def __call__(self, block: pa.Table) -> pa.Table:
        row = ShardRow.from_block(block)
        self._shard = row.shard
        if self._monitor is not None and self._encoder:
            again = _begin_scoring(self._monitor, row.shard)
            if again and self._before_again:
                self._before_again()
        self.store_concepts(row.shard)
        started = time.time()
        samples = self.featurise(row.samples)
        stats = row.stats | {"featurise_seconds": time.time() - started}
        stats["errors"] = (row.stats.get("errors", []) + self._errors)[:ERRORS_KEPT]
        if self._encoder:
            stats["clip_batch_size"] = self._encoder.batch_size
        return replace(row, samples=samples, stats=stats).to_block()

    def store_concepts(self, shard: int) -> None:
        """Store what the dataset needs of CLIP besides, if it is for this shard's scorer to do and not done yet."""
        if self._encoder and self._concepts and self._concepts.shard == shard:
            self._concepts.store(self._encoder)
            self._concepts = None

    def featurise(self, drawn: pa.Table) -> pa.Table:
        """The samples with their features; one on which CLIP raises, or with features that are not finite, loses its
        picture and gets a reason.

        After CLIP has run out of memory, this actor's later batches are half as large; the stats say how large.
        """
        self._errors = []
        shape = self.features
        global_feature = np.zeros((len(drawn), shape.embed_dim), np.float16)
        patch_features = np.zeros((len(drawn), shape.num_patches, shape.patch_dim), np.float16)
        clip_score = np.zeros(len(drawn), np.float32)
        has_image = [row for row, image in enumerate(drawn["image"]) if len(image.as_buffer())]
        bad: list[int] = []
        if self._encoder and has_image:
            for rows, encoded, texts in self._encode(drawn, has_image, bad):
                with np.errstate(over="ignore"):  # told apart below
                    global_feature[rows] = encoded.global_feature
                    patch_features[rows] = encoded.patch_features
                clip_score[rows] = (encoded.global_feature * texts).sum(axis=1)
                for row in rows:
                    stored = (global_feature[row], patch_features[row], clip_score[row])
                    if not all(np.isfinite(values).all() for values in stored):
                        for column in (global_feature, patch_features, clip_score):
                            column[row] = 0
                        self._refuse(drawn, row, bad, "a feature is not finite as float16")
        if bad:
            drawn = _without_images(drawn, bad)
        drawn = drawn.append_column("clip_score", pa.array(clip_score))
        return with_features(drawn, global_feature, patch_features)

    def _encode(
        self, drawn: pa.Table, rows: list[int], bad: list[int]
    ) -> "Iterator[tuple[list[int], ImageFeatures, np.ndarray]]":
        """(rows, features, text features) batch by batch; rows on which CLIP raises alone go to `bad`."""
        from pcm.model_faults import free_memory, is_out_of_memory, is_sticky

        assert self._encoder is not None
        waiting = [rows]
        while waiting:
            batch = waiting.pop(0)
            try:
                with self._time_limit(len(batch)):
                    encoded = self.encode_rows(drawn, batch)
            except Exception as error:
                said = typed_first_line(error)
                if is_sticky(error):
                    if self._monitor is None:
                        raise
                    _end_process(self._monitor, self._shard, said)
                smaller = self._encoder.batch_size // 2 if is_out_of_memory(error) else 0
            else:
                yield batch, *encoded
                continue
            free_memory()
            if smaller:
                log.warning("out of memory (%s): CLIP takes %d pictures at once from now on", said, smaller)
                self._encoder.batch_size = smaller
                waiting.insert(0, batch)
            elif len(batch) > 1:
                waiting[:0] = [[row] for row in batch]
            else:
                self._refuse(drawn, batch[0], bad, said)

    def _refuse(self, drawn: pa.Table, row: int, bad: list[int], said: str) -> None:
        """Add a row to `bad`, and count it."""
        bad.append(row)
        sample = drawn["sample_id"][row].as_py()
        self._errors = [*self._errors, {"sample_id": sample, "error": f"{CLIP_ERROR}: {said}"}][:ERRORS_KEPT]
        if self._monitor is not None:
            self._monitor.failed.remote(1, said)

    def _time_limit(self, pictures: int) -> AbstractContextManager[None]:
        """What ends this process when CLIP takes too long over so many pictures."""
        if self._watchdog is None or self._encoder is None:
            return nullcontext()
        return self._watchdog.limit(math.ceil(pictures / self._encoder.batch_size) * self._batch_timeout)

    def encode_rows(self, drawn: pa.Table, rows: list[int]) -> "tuple[ImageFeatures, np.ndarray]":
        """Features of these rows' pictures, and (B, D) of their captions."""
        assert self._encoder is not None
        images = [
            partial(open_image, drawn["image"][row].as_py(), name=drawn["sample_id"][row].as_py()) for row in rows
        ]
        texts = self._encoder.encode_texts([drawn["caption"][row].as_py() for row in rows])  # (B, D)
        return self._encoder.encode_images(images), texts


def _without_images(drawn: pa.Table, rows: list[int]) -> pa.Table:
    """The samples, these rows without their pictures: they did not fail by seed, so a retry draws the same ones."""
    gone = set(rows)
    changed = {
        "image": [b"" if row in gone else image.as_py() for row, image in enumerate(drawn["image"])],
        "reason": [CLIP_ERROR if row in gone else reason for row, reason in enumerate(drawn["reason"].to_pylist())],
        "attempts": [tried - (row in gone) for row, tried in enumerate(drawn["attempts"].to_pylist())],
    }
    for name, values in changed.items():
        at = drawn.schema.get_field_index(name)
        drawn = drawn.set_column(at, drawn.schema.field(name), pa.array(values, drawn.schema.field(name).type))
    return drawn


def _watchdog(monitor: "ActorHandle", policy: "FaultPolicy") -> Watchdog:
    """Tells the monitor where the process before this one hung, if it did."""
    import ray

    watchdog = Watchdog(f"{ray.get_runtime_context().get_actor_id()}-clip", within="featurise.py")
    if hung := watchdog.last_words():
        said = f"CLIP took longer than {policy.batch_timeout:g} s a batch, at {hung}"
        log.warning("the process before this one: %s", said)
        monitor.scorer_broken.remote(said)
    return watchdog


def _begin_scoring(monitor: "ActorHandle", shard: int) -> bool:
    """Whether the shard was begun before. Raises InputError when the run is not worth going on with."""
    stop, again = ask(monitor, "begin_scoring", shard)
    if stop:
        raise InputError(stop)
    return again


def _end_process(monitor: "ActorHandle", shard: int, said: str) -> NoReturn:
    """Leave, so that Ray restarts this actor on a fresh device context."""
    ask(monitor, "scorer_broken", said)
    log.warning("shard %d: CLIP's device fails (%s); this process ends and is restarted", shard, said)
    sys.stderr.flush()
    os._exit(1)


def _load_encoder(spec: ClipSpec) -> "ClipEncoder":
    import torch

    from pcm.clip.encoder import ClipEncoder  # seconds to import, and null needs none of it

    if spec.device == "cpu":
        torch.set_num_threads(spec.cpu_threads)
    return ClipEncoder.from_spec(local_clip(spec))
