"""Captions of many pictures by beam search, in this process or by Ray actors, the same either way.

Pictures are captioned in batches that depend on their number alone (the first 64, the next 64, ...), whoever does it,
so a caption does not depend on how many workers there are, nor on which of them captioned it.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
import torch

from cluster.dataset.given_features import FeatureSet, all_features, load_feature_set
from cluster.evaluation.request import CaptionerOptions, CaptionRequest
from cluster.generation.pinning import resolve_device
from cluster.gpu_share import gpu_task, keep_to_shared_gpu, worker_has_gpu
from cluster.ray_state import actors_are_placed
from cluster.session import cluster_gpus, cpus_for_each, is_joined, room_for, start_ray, user_error, waiting_for
from cluster.sources.concept_file import read_concepts
from cluster.sources.picture_source import FeatureSource
from cluster.sources.pictures import PictureSet, PictureSource, encode_pictures, load_picture_set, picture_keys
from cluster.store.retries import load_with_retries
from cluster.store.store import is_uri, join, local_copy, open_store
from cluster.training.checkpoints import AGAIN, STATE_FILE
from cluster.training.ray_trainer import CHECKPOINTS
from cluster.training.reporting import METRICS_KEY
from cluster.weights.manifest import read_manifest
from cluster.weights.node_copy import local_name
from pcm.captioners.captioner import BATCH_SIZE, MODEL_FILE, Captioner, CaptionResult, no_captioner
from pcm.captioners.interface import CONFIG_FILE
from pcm.captioners.pcmnet.method import PCMNET
from pcm.clip.encoder import ClipEncoder
from pcm.clip.names import clip_anywhere
from pcm.documents import json_bytes
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


_LESS_MEMORY = "while pictures are captioned; give a smaller --beam-size, or --device cpu where it is a GPU's"


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


@enough_memory(_LESS_MEMORY)
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
    return _captions(replace(request, device=_device_here(request.device), gpus_per_worker=None))


def _anywhere(place: str) -> str:
    """The same place for every node: an absolute path, or a URI."""
    return place if "://" in place else os.path.abspath(place)


def _device_here(asked: str) -> str:
    """A worker's; one that Ray gave a GPU of which torch knows nothing captions on its CPU, and says so."""
    return asked if asked == "cpu" or worker_has_gpu("captioning") else "cpu"


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


def load_captioner(
    checkpoints: Sequence[str], asked: CaptionerOptions, *, clip: ClipEncoder | None = None
) -> Captioner:
    """The captioner in one checkpoint, or an ensemble of several. `clip`: one that is loaded already.

    Raises InputError for a GPU that this machine does not have, a URI where no CLIP is staged, and as `Captioner.load`
    does.
    """
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch finds no GPU on this machine; leave --device out, or caption on a cluster's GPUs "
            "(jobs.evaluate --num-workers, jobs.caption --gpus-per-worker)"
        )
    if clip is None and asked.clip is not None and is_uri(asked.clip):
        read_manifest(open_store(asked.clip))  # the CLIP itself is fetched when the first picture comes
    concepts = None if asked.concepts is None else read_concepts(asked.concepts)
    return _load(
        checkpoints,
        clip=clip or asked.clip,
        device=asked.device,
        beam_size=asked.beam_size,
        concepts=concepts,
    )


def _load(
    checkpoints: Sequence[str],
    *,
    clip: ClipEncoder | str | None,
    device: str,
    beam_size: int,
    concepts: ConceptVocabulary | None,
    weights: Sequence[str] | None = None,
) -> Captioner:
    """`Captioner.load` of paths or URIs. Raises InputError as it does, and where they have other weights (sha256)."""
    with contextlib.ExitStack() as copies:
        folders = [copies.enter_context(local_checkpoint(checkpoint)) for checkpoint in checkpoints]
        captioner = Captioner.load(
            folders, clip=clip, device=device, beam_size=beam_size, concepts=concepts, find_clip=local_name
        )
        if weights is not None:  # compared when all is loaded: what was replaced meanwhile does not come back
            for checkpoint, folder, sha256 in zip(checkpoints, folders, weights, strict=True):
                if hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest() != sha256:
                    raise InputError(
                        f"checkpoint {checkpoint}: was replaced while it was evaluated, as by its run, which still "
                        "trains; evaluate one under its checkpoints/, or run the same command again"
                    )
        return captioner


def load_pictures(source: PictureSource, *, limit: int | None) -> PictureSet | FeatureSet:
    """What a source means: pictures, or features in place of them. Raises InputError as loading either does."""
    if isinstance(source, FeatureSource):
        return load_feature_set(source, limit=limit)
    return load_picture_set(source, limit=limit)


def check_clip(captioner: Captioner, pictures: PictureSet | FeatureSet) -> None:
    """Raises InputError for features that are recorded to be of another CLIP than the captioner's."""
    if not isinstance(pictures, FeatureSet) or pictures.given.clip is None:
        return
    theirs = pictures.given.clip
    for name in ("activation", "weights"):
        wanted, given = captioner.recorded.get(name), getattr(theirs, name)
        if wanted and given and wanted != given:
            raise InputError(
                f"--features {pictures.given.place}: the {name} of its CLIP {theirs.model} is {given}, the captioner "
                f"was trained with {wanted}; give features of the same CLIP"
            )


def _local(image: str, copies: contextlib.ExitStack) -> str:
    """A local path of a picture at a URI; a URI with nothing there stays, to be reported as the file it is not."""
    if "://" not in image:
        return image
    try:
        return str(copies.enter_context(local_copy(image)))
    except InputError:
        return image


def check_checkpoint(uri: str) -> None:
    """Raises InputError where no captioner lies at `uri`."""
    store = open_store(uri)
    if not (store.exists(MODEL_FILE) or store.exists(f"best/{MODEL_FILE}")):
        raise no_captioner(uri)


def weights_sha256(checkpoint: str) -> str:
    """Of the captioner in a checkpoint, or of a run's best one. Raises InputError where there is none."""
    store = open_store(checkpoint)
    for key in (MODEL_FILE, f"best/{MODEL_FILE}"):
        with contextlib.suppress(FileNotFoundError):
            return hashlib.sha256(store.read_bytes(key)).hexdigest()
    raise no_captioner(checkpoint)


@contextlib.contextmanager
def local_checkpoint(uri: str) -> Iterator[Path]:
    """A local folder with the captioner at `uri`, for as long as it is read: a checkpoint, or a run, whose best one it
    is.

    The record of a remote run comes with it (`Captioner.load` looks there which CLIP the run was given).
    """
    store = open_store(uri)
    in_run = not store.exists(MODEL_FILE) and store.exists(f"best/{MODEL_FILE}")
    with local_copy(join(uri, "best") if in_run else uri) as folder:
        if in_run and not store.is_local and store.exists(CONFIG_FILE):
            (folder.parent / CONFIG_FILE).write_bytes(store.read_bytes(CONFIG_FILE))
        yield folder


_EPOCH = re.compile(rf"epoch-([0-9]{{3,}})(?:{AGAIN})*")


def epoch_checkpoints(run: str) -> tuple[dict[int, str], int]:
    """(epoch -> the checkpoint at its end, how many epochs were trained) of a run. Raises InputError without any.

    Of an epoch that was made once more it is the last one. Those are left out that lack a file: a run that is killed
    while it writes one leaves it so.
    """
    store = open_store(run)
    files: dict[str, set[str]] = {}
    for key in store.list(f"{CHECKPOINTS}/"):
        name, _, file = key.removeprefix(f"{CHECKPOINTS}/").partition("/")
        files.setdefault(name, set()).add(file)
    whole = {name for name, found in files.items() if found >= {*PCMNET.files, STATE_FILE}}
    ended = {int(match[1]): name for name in sorted(whole) if (match := _EPOCH.fullmatch(name))}  # "-again" comes last
    if not ended:
        raise InputError(f"--every-epoch: {run} has no checkpoints of epochs; give the --out of a jobs.train run")
    try:
        trained = len(store.read_bytes(METRICS_KEY).splitlines())
    except FileNotFoundError:
        trained = max(ended)
    places = {epoch: join(run, CHECKPOINTS, ended[epoch]) for epoch in sorted(ended)}
    return places, max(trained, *ended)


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


@enough_memory(_LESS_MEMORY)
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
        device = _device_here(source.device)
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
    captioner = _load(
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
