"""jobs.caption: captions of picture files, or of features."""

import contextlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
import ray.data

from cluster.dataset.given_features import FeatureSet, all_features
from cluster.evaluation.captioners import check_checkpoint, check_clip, device_here, load_captioner
from cluster.evaluation.captioning import LESS_MEMORY, batches
from cluster.evaluation.request import CaptionRequest
from cluster.gpu_share import gpu_task, keep_to_shared_gpu
from cluster.session import cluster_gpus, is_joined, start_ray, user_error, waiting_for
from cluster.sources.pictures import picture_keys
from cluster.store.store import join, local_copy, open_store
from pcm.captioners.captioner import BATCH_SIZE, Captioner, CaptionResult
from pcm.clip.names import clip_anywhere
from pcm.documents import json_bytes
from pcm.errors import InputError
from pcm.model_faults import enough_memory

log = logging.getLogger(__name__)


def caption(request: CaptionRequest) -> dict[str, Any]:
    """A caption and its concepts for every picture; null, and one line in `errors`, for those that cannot be read.

    With `out` captions and concepts go into a file, and the summary has its place and how many there are. Raises
    InputError when there is no captioner at the place, or none of the pictures can be read.
    """
    request = replace(request, images=tuple(each for image in request.images for each in _pictures_at(image)))
    results = _captions(request) if request.gpus_per_worker is None else _captions_of_worker(request)
    for image, result in results.items():
        log.info("%s", result.error or f"{image}: {result.caption}")
    errors = {image: result.error for image, result in results.items() if result.error}
    if len(errors) == len(results):
        raise InputError(f"none of {len(results)} pictures can be read; the first: {next(iter(errors.values()))}")
    concepts = {
        image: [[name, round(probability, 4)] for name, probability in result.concepts]
        for image, result in results.items()
    }
    if request.out is not None:
        rows = [
            {"image_id": image, "caption": result.caption, "concepts": concepts[image]}
            for image, result in results.items()
            if not result.error
        ]
        data = json.dumps(rows, ensure_ascii=False, indent=0) + "\n"
        open_store(request.out).write_bytes("", json_bytes(data))
        return {"captions": request.out, "n": len(rows), "errors": errors}
    return {
        "captions": {image: None if result.error else result.caption for image, result in results.items()},
        "concepts": concepts,
        "errors": errors,
    }


def _pictures_at(image: str) -> Sequence[str]:
    """The pictures in a folder, by name; anything else is a picture itself, or not. Raises InputError without any."""
    is_remote = "://" in image
    if not is_remote and not os.path.isdir(image):
        return [image]
    try:
        store = open_store(image)
        keys = [] if store.is_file() else picture_keys(store)
    except InputError:  # told of this picture alone, when it is opened
        return [image]
    if not keys and not is_remote:
        raise InputError(f"{image}: no pictures; give a folder of JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF files")
    return [join(image, key) for key in keys] or [image]


@enough_memory(LESS_MEMORY)
def _captions(request: CaptionRequest) -> dict[str, CaptionResult]:
    """One result for each picture, or each of the features, in order."""
    captioner = load_captioner(request.checkpoints, request)
    if request.features is not None:
        return _described(captioner, all_features(request.features, limit=request.limit))
    results: dict[str, CaptionResult] = {}
    for batch in batches(len(request.images), BATCH_SIZE):
        images = request.images[batch.start : batch.stop]
        with contextlib.ExitStack() as copies:  # of these alone: a disk need not hold all
            results |= zip(images, captioner.caption([_local(image, copies) for image in images]), strict=True)
    return results


def _captions_of_worker(request: CaptionRequest) -> dict[str, CaptionResult]:
    """The same, by a task on a GPU of the cluster, which is waited for where one is joined. Raises InputError for a
    cluster without one that does not grow, and what the worker raises.
    """
    assert request.gpus_per_worker is not None
    for checkpoint in request.checkpoints:  # before a GPU is waited for
        check_checkpoint(checkpoint)
    start_ray()
    waits = request.device == "cuda" and is_joined()
    if not cluster_gpus() and not waits:
        raise InputError(
            f"--gpus-per-worker {request.gpus_per_worker:g}: the cluster has no GPU; leave it out, or give --device "
            "cuda on one that grows"
        )
    there = replace(
        request,
        images=tuple(map(_anywhere, request.images)),
        checkpoint=tuple(map(_anywhere, request.checkpoints)),
        features=request.features and _anywhere(request.features),
        concepts=request.concepts and _anywhere(request.concepts),
        clip=request.clip and clip_anywhere(request.clip),
    )
    task = gpu_task(_captions_on_gpu, num_cpus=0, num_gpus=request.gpus_per_worker, max_retries=3)
    try:
        with waiting_for(cpus=0, gpus=request.gpus_per_worker):
            found = ray.get(task.remote(there))
    except ray.exceptions.RayError as error:
        raise user_error(error) or error from None
    as_given = {_anywhere(image): image for image in request.images}
    return {as_given.get(name, name): result for name, result in found.items()}


def _captions_on_gpu(request: CaptionRequest) -> dict[str, CaptionResult]:
    keep_to_shared_gpu()
    return _captions(replace(request, device=device_here(request.device), gpus_per_worker=None))


def _anywhere(place: str) -> str:
    """The same place for every node: an absolute path, or a URI."""
    return place if "://" in place else os.path.abspath(place)


def _described(captioner: Captioner, given: FeatureSet) -> dict[str, CaptionResult]:
    """One result for each of the features, in order."""
    check_clip(captioner, given)
    results: dict[str, CaptionResult] = {}
    for batch in batches(len(given), BATCH_SIZE):
        encoded = given.encoded(batch, captioner.features)
        described = captioner.describe(encoded.features) if encoded.image_ids else []
        found = dict(zip(encoded.image_ids, described, strict=True))
        for image_id in (given.image_ids[number] for number in batch):
            results[image_id] = found.get(image_id) or CaptionResult("", (), 0.0, encoded.unreadable[image_id])
    return results


def _local(image: str, copies: contextlib.ExitStack) -> str:
    """A local path of a picture at a URI; a URI with nothing there stays, to be reported as the file it is not."""
    if "://" not in image:
        return image
    try:
        return str(copies.enter_context(local_copy(image)))
    except InputError:
        return image
