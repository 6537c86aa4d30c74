"""Captions of many pictures by beam search, in this process or by Ray actors, the same either way.

Pictures are captioned in batches that depend on their number alone (the first 64, the next 64, ...), whoever does it,
so a caption does not depend on how many workers there are, nor on which of them captioned it.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from cluster.dataset.given_features import FeatureSet, load_feature_set
from cluster.device import resolve_device
from cluster.evaluation.captioners import device_here, load_from
from cluster.gpu_share import keep_to_shared_gpu
from cluster.ray_state import actors_are_placed
from cluster.releases import check_releases
from cluster.session import cluster_gpus, cpus_for_each, is_joined, room_for, start_ray, user_error, waiting_for
from cluster.sources.picture_source import FeatureSource
from cluster.sources.pictures import PictureSet, PictureSource, encode_pictures, load_picture_set
from cluster.store.retries import load_with_retries
from pcm.captioners.captioner import BATCH_SIZE, Captioner
from pcm.errors import InputError
from pcm.line_timer import LineTimer
from pcm.model_faults import enough_memory
from pcm.text.concepts import ConceptVocabulary

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captioned:
    """Pictures of one or more batches."""

    captions: dict[str, str]  # by image id
    global_feature: np.ndarray  # (n, D) float32, in their order
    unreadable: dict[str, str]  # image id -> why it has no caption
    seconds: float = 0.0  # since the first batch was begun, with the models loaded

    @staticmethod
    def concatenate(parts: Sequence["Captioned"]) -> "Captioned":
        return Captioned(
            {image_id: caption for part in parts for image_id, caption in part.captions.items()},
            np.concatenate([part.global_feature for part in parts]),
            {image_id: why for part in parts for image_id, why in part.unreadable.items()},
        )


LESS_MEMORY = "while pictures are captioned; give a smaller --beam-size, or --device cpu where it is a GPU's"


def load_pictures(source: PictureSource, *, limit: int | None) -> PictureSet | FeatureSet:
    """What a source means: pictures, or features in place of them. Raises InputError as loading either does."""
    if isinstance(source, FeatureSource):
        return load_feature_set(source, limit=limit)
    return load_picture_set(source, limit=limit)


def caption_pictures(
    captioner: Captioner, pictures: PictureSet | FeatureSet, *, batch_size: int = BATCH_SIZE
) -> Captioned:
    """All pictures, in this process."""
    if not isinstance(pictures, FeatureSet):
        _ = captioner.clip  # loaded before time is taken
    timer, every = LineTimer(), batches(len(pictures), batch_size)
    said = _with_progress_lines(every, timer, pictures=len(pictures), batch_size=batch_size)
    found = Captioned.concatenate([caption_batch(captioner, pictures, batch) for batch in said])
    return replace(found, seconds=timer.elapsed)


def batches(count: int, size: int) -> list[range]:
    """Positions of the pictures that are captioned together."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@enough_memory(LESS_MEMORY)
def caption_batch(captioner: Captioner, pictures: PictureSet | FeatureSet, positions: Sequence[int]) -> Captioned:
    if isinstance(pictures, FeatureSet):
        encoded = [pictures.encoded(positions, captioner.features)]
    else:
        encoded = list(encode_pictures(pictures, captioner.clip, positions=positions))
    image_ids = [image_id for part in encoded for image_id in part.image_ids]
    features = [part.features for part in encoded]
    joined = type(features[0])(
        np.concatenate([part.global_feature for part in features]),
        np.concatenate([part.patch_features for part in features]),
    )
    described = captioner.describe(joined) if image_ids else []
    return Captioned(
        {image_id: found.caption for image_id, found in zip(image_ids, described, strict=True)},
        joined.global_feature,
        {image_id: why for part in encoded for image_id, why in part.unreadable.items()},
    )


@dataclass(frozen=True, kw_only=True)
class CaptionerSource:
    """Where a worker finds its captioner and its pictures; paths or URIs that mean the same on every node."""

    checkpoint: str | tuple[str, ...]
    clip: str | None
    device: str
    beam_size: int
    pictures: PictureSource
    limit: int | None
    concepts: ConceptVocabulary | None = None
    batch_size: int = BATCH_SIZE
    weights: tuple[str, ...] | None = None  # sha256 of each checkpoint's; None of whatever lies there

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return (self.checkpoint,) if isinstance(self.checkpoint, str) else self.checkpoint


def caption_on_cluster(
    source: CaptionerSource, *, pictures: int, num_workers: int, gpus_per_worker: float = 1
) -> Captioned:
    """The same by `num_workers` Ray actors, each with so much GPU where the cluster has any. A lost one's batch is done
    again.

    With a device that is named they are waited for on a cluster that is joined, because it may grow. Raises InputError
    for more workers than the cluster has room for, or what a worker's captioner raises.
    """
    start_ray()
    on_gpus = resolve_device(source.device, cluster_gpus=cluster_gpus()) == "cuda"
    if not on_gpus and gpus_per_worker < 1:
        raise InputError(
            f"--gpus-per-worker {gpus_per_worker:g}: the cluster has no GPU; leave it out, or give --device"
        )
    cpus, gpus = (0.0, gpus_per_worker) if on_gpus else (1.0, 0.0)
    room = room_for(cpus=cpus, gpus=gpus)
    waits = source.device != "auto" and is_joined()
    if num_workers > room and not waits:
        has = f"{cluster_gpus():g} GPUs" if on_gpus else f"{room} CPUs"
        raise InputError(f"--num-workers {num_workers}: the cluster has {has}; on one that grows, give --device")
    threads = cpus_for_each(num_workers, gpus=gpus)
    numbers = list(range(len(batches(pictures, source.batch_size))))
    dataset = ray.data.from_items([{"batch": number} for number in numbers], override_num_blocks=len(numbers))
    captioned = dataset.map_batches(
        _CaptionWorker,  # type: ignore[arg-type]
        fn_constructor_kwargs={"source": source, "threads": threads},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    parts, seconds, timer = {}, 0.0, LineTimer()
    try:
        with waiting_for(cpus=cpus, gpus=gpus, workers=num_workers, placed=actors_are_placed):
            rows = _with_progress_lines(captioned.iter_rows(), timer, pictures=pictures, batch_size=source.batch_size)
            for row in rows:
                timer.began(row["seconds"])
                seconds = timer.elapsed
                parts[row["batch"]] = _unpacked(row)
    except ray.exceptions.RayError as error:
        raise user_error(error) or error from None
    return replace(Captioned.concatenate([parts[number] for number in numbers]), seconds=seconds)


class _CaptionWorker:
    """A captioner in a Ray actor."""

    def __init__(self, *, source: CaptionerSource, threads: int) -> None:
        check_releases()
        device = device_here(source.device)
        if device == "cpu":
            torch.set_num_threads(threads)
        keep_to_shared_gpu()
        self.captioner = load_with_retries(
            lambda: _load_whole(source, device=device), model=" ".join(source.checkpoints)
        )
        self.pictures = load_pictures(source.pictures, limit=source.limit)
        self.batches = batches(len(self.pictures), source.batch_size)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, Any]:
        number, started = int(rows["batch"][0]), time.monotonic()
        found = caption_batch(self.captioner, self.pictures, self.batches[number])
        return {
            "batch": [number],
            "captions": [json.dumps(found.captions)],
            "unreadable": [json.dumps(found.unreadable)],
            "global_feature": [found.global_feature.astype(np.float32).tobytes()],
            "embed_dim": [self.captioner.features.embed_dim],
            "seconds": [time.monotonic() - started],
        }


def _load_whole(source: CaptionerSource, *, device: str) -> Captioner:
    """The captioner, with its CLIP where pictures need one."""
    captioner = load_from(
        source.checkpoints,
        clip=source.clip,
        device=device,
        beam_size=source.beam_size,
        concepts=source.concepts,
        weights=source.weights,
    )
    if not isinstance(source.pictures, FeatureSource):
        _ = captioner.clip
    return captioner


def _unpacked(row: dict[str, Any]) -> Captioned:
    features = np.frombuffer(row["global_feature"], np.float32).reshape(-1, row["embed_dim"])
    return Captioned(json.loads(row["captions"]), features, json.loads(row["unreadable"]))


def _with_progress_lines(items: Any, timer: LineTimer, *, pictures: int, batch_size: int) -> Iterator[Any]:
    """The items, with a line about how far they are every so often."""
    for done, item in enumerate(items):
        yield item
        if timer.due():
            captioned = min((done + 1) * batch_size, pictures)
            log.info("%d of %d pictures captioned, %.1f a second", captioned, pictures, captioned / timer.elapsed)
