"""Real photos with their captions to one of our datasets: a row for each (photo, caption) pair.

Captions become the plan, grouped by photo, so that a shard is made from its plan part and the photos alone. Photos are
stored as the bytes that they are, once for each of their captions. CLIP sees each photo of a shard once, in a place
of its batch that follows from the photo's number among all: neither shard size nor neighbours nor resumes decide its
features. What is missing or damaged is quarantined with its reason, as everywhere.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from cluster.dataset.committed import committed
from cluster.dataset.documents import Manifest, Plan
from cluster.dataset.environment import tell_encoder
from cluster.dataset.parquet import read_table
from cluster.dataset.plan import begun_plan, make_plan
from cluster.dataset.vocabularies import (
    GivenConcepts,
    store_vocabularies,
    stored_features,
    vocabularies_stored,
)
from cluster.device import resolve_device, resolve_dtype, warn_of_slow_bfloat16_here
from cluster.generation.pinning import clip_spec, joint_dimensions
from cluster.generation.pipeline import write_manifest
from cluster.generation.stages.draw import DRAWN_SCHEMA
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.shard_row import ShardRow, check_picture_bytes
from cluster.generation.stages.write import WriteShard
from cluster.ingest.request import FeaturiseRequest
from cluster.ingest.shards import check_gpu, counts, import_shards, picture_size, sample_row, undrawn
from cluster.sources.concept_file import fitting_concepts
from cluster.sources.corpus import CorpusRecord, read_corpus
from cluster.sources.pictures import PictureFiles, find_pictures, resolved
from cluster.store.store import Store, open_store
from pcm.clip.encoder import ClipEncoder, ImageFeatures
from pcm.errors import InputError
from pcm.generation.names import PHOTOS
from pcm.images import open_image
from pcm.model_faults import room_for_model
from pcm.reasons import BAD_IMAGE, MISSING_IMAGE, USABLE
from pcm.spec import ClipSpec, DatasetSpec

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class PhotoResult:
    """What a run did. `photos`: those that captions name, there or not."""

    manifest: Manifest
    photos: int
    skipped: int  # pairs that were there already
    seconds: float
    pairs_per_second: float

    def summary(self) -> dict[str, Any]:
        """What a job prints."""
        return {
            **counts(self.manifest),
            "photos": self.photos,
            "skipped": self.skipped,
            "pairs_per_second": round(self.pairs_per_second, 1),
            "seconds": round(self.seconds, 2),
        }


def featurise_photos(request: FeaturiseRequest) -> PhotoResult:
    """Make the dataset, or go on making it. Memory: the captions, then `workers` shards; a Parquet of photos whole.

    Raises InputError when captions or photos cannot be read, none of the photos is captioned, or the place holds
    another dataset.
    """
    assert request.images is not None and request.captions is not None
    started = time.monotonic()
    store = open_store(request.out)
    planned = begun_plan(store)
    spec = _spec(request, begun=planned.spec.clip if planned else None)
    concepts = None
    if request.concepts is not None:
        concepts = fitting_concepts(request.concepts, embed_dim=joint_dimensions(request.clip, spec.clip.revision))
    captions = read_corpus(resolved(request.captions), split=request.split)
    corpus = PhotoCorpus(captions, limit=request.limit)
    files = find_pictures(request.images)
    photos = files.match(corpus.numbers)
    if not photos:
        raise InputError(
            f"--images {files.place}: none of its {len(files.names)} pictures (such as {files.names[0]!r}) is among "
            f"the {len(corpus.numbers)} photos of the captions (such as {next(iter(corpus.numbers), None)!r}); "
            "check --captions and --split"
        )
    plan = make_plan(
        store,
        corpus.records,
        spec,
        corpus=request.captions,
        shard_size=request.shard_size,
        is_truncated=lambda prompt: False,  # nothing is prompted
    )
    if concepts is not None:
        GivenConcepts(concepts).store(store)
    made = committed(store, plan)
    missing = [shard for shard in range(plan.num_shards) if shard not in made]
    making, rows = time.monotonic(), 0
    if missing or not vocabularies_stored(store, plan):  # else there is nothing to do for CLIP, nor for its GPU
        check_gpu(spec.clip.device)
        with room_for_model(f"CLIP {spec.clip.model}", spec.clip.device):
            featuriser = FeaturisePhotos(spec.clip)
        store_vocabularies(store, plan, encoder=featuriser.encoder)
        if missing:
            tell_encoder(store, spec.clip)
        making = time.monotonic()
        by_number = {corpus.numbers[image_id]: position for image_id, position in photos.items()}
        shards = PhotoShards(store, plan, featuriser, corpus, files, by_number)
        rows = import_shards(shards, made, plan, missing, workers=request.workers)
    return PhotoResult(
        manifest=write_manifest(store, plan, stored_features(store, plan)),
        photos=len(corpus.numbers),
        skipped=plan.expected - rows,
        seconds=time.monotonic() - started,
        pairs_per_second=rows / (time.monotonic() - making),
    )


def _spec(request: FeaturiseRequest, *, begun: ClipSpec | None) -> DatasetSpec:
    device = resolve_device(request.device, cluster_gpus=torch.cuda.device_count())
    dtype = resolve_dtype(request.dtype, device=device)
    if begun is None:
        check_gpu(device)
        warn_of_slow_bfloat16_here(device, dtype)
    return DatasetSpec(
        generator=undrawn(PHOTOS, revision=""), clip=clip_spec(request.clip, dtype=dtype, device=device, begun=begun)
    )


class PhotoCorpus:
    """Captions grouped by photo, photos in the order of their first caption, so that those of one share a shard.

    records: ids IMAGE_ID#NUMBER, so that the corpus fingerprint says which photo a caption belongs to. A caption that
    names no photo comes last, and will be `missing_image`.
    numbers: image id -> its number among the photos. photo_of: record index -> the number of its photo, -1 for none.
    Raises InputError when no caption names a photo.
    """

    def __init__(self, captions: Iterable[CorpusRecord], *, limit: int | None) -> None:
        by_photo: dict[str, list[CorpusRecord]] = {}
        unnamed = []
        for record in captions:
            if record.image_id is None:
                unnamed.append(record)
            elif limit is None or len(by_photo) < limit or record.image_id in by_photo:
                by_photo.setdefault(record.image_id, []).append(record)
        if not by_photo:
            raise InputError(
                f"--captions: none of its {len(unnamed)} captions names a photo; "
                "use a format that does, such as Karpathy's JSON or a CSV with the columns image and caption"
            )
        self.records: list[CorpusRecord] = []
        self.photo_of: list[int] = []
        self.numbers = {image_id: number for number, image_id in enumerate(by_photo)}
        for image_id, records in by_photo.items():
            for k, record in enumerate(records):
                self._add(f"{image_id}#{k}", record, self.numbers[image_id])
        for record in unnamed if limit is None else ():
            self._add(record.corpus_id, record, -1)

    def _add(self, corpus_id: str, record: CorpusRecord, photo: int) -> None:
        self.records.append(replace(record, index=len(self.records), corpus_id=corpus_id))
        self.photo_of.append(photo)


_BLANK = Image.new("RGB", (1, 1))  # in slots that no photo has


class FeaturisePhotos(FeaturiseShard):
    """Encodes each photo once for all its captions. Needs the columns `photo` and `record`, their numbers."""

    @property
    def encoder(self) -> ClipEncoder:
        assert self._encoder is not None
        return self._encoder

    def encode_rows(self, drawn: pa.Table, rows: list[int]) -> tuple[ImageFeatures, np.ndarray]:
        photos, records = (drawn[name].take(rows).to_pylist() for name in ("photo", "record"))
        opened: dict[int, Image.Image | Callable[[], Image.Image]] = {
            photo: _opener(drawn, row) for photo, row in zip(photos, rows, strict=True)
        }
        captions = {record: drawn["caption"][row].as_py() for record, row in zip(records, rows, strict=True)}
        images, image_places = in_slots(opened, _BLANK, self.encoder.batch_size)
        texts, text_places = in_slots(captions, "", self.encoder.batch_size)
        encoded = self.encoder.encode_images(images)
        places = [image_places[photo] for photo in photos]
        features = ImageFeatures(encoded.global_feature[places], encoded.patch_features[places])
        return features, self.encoder.encode_texts(texts)[[text_places[record] for record in records]]


def in_slots(values: Mapping[int, T], filler: T, batch_size: int) -> tuple[list[T], dict[int, int]]:
    """(layout, number -> place in it): whole batches, in which the value numbered n has slot n modulo `batch_size`.

    A model's kernels may round differently for another slot, but take no notice of what the other slots hold.
    """
    batches = sorted({number // batch_size for number in values})
    slots = [batch * batch_size + slot for batch in batches for slot in range(batch_size)]
    places = {number: place for place, number in enumerate(slots) if number in values}
    return [values.get(number, filler) for number in slots], places


def _opener(drawn: pa.Table, row: int) -> Callable[[], Image.Image]:
    return partial(open_image, drawn["image"][row].as_py(), name=drawn["corpus_id"][row].as_py())


@dataclass(frozen=True)
class Photo:
    """The bytes of a file and its (width, height), or the reason why there are none."""

    reason: str
    data: bytes = b""
    size: tuple[int, int] = (0, 0)


class PhotoShards:
    """One shard at a time, from any number of threads: plan part in, shard, quarantine and stats out."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        featuriser: FeaturisePhotos,
        corpus: PhotoCorpus,
        files: PictureFiles,
        positions: Mapping[int, int],  # number of a photo -> where it is among the files
    ) -> None:
        self._store = store
        self._plan = plan
        self._featuriser = featuriser
        self._corpus = corpus
        self._files = files
        self._positions = positions
        self._writer = WriteShard(store, plan.schema_version)
        self._model = threading.Lock()  # one forward pass at a time; photos are read and decoded beside it

    def __call__(self, shard: int) -> dict:
        """The stats of the shard, once it is committed. Raises InputError when its photos are too many bytes."""
        started, began = time.monotonic(), time.time()
        samples = self._samples(shard, read_table(self._store, self._plan.part_key(shard)).to_pylist())
        block = ShardRow(shard, samples, {"start_time": began, "draw_seconds": time.monotonic() - started}).to_block()
        del samples
        with self._model:
            block = self._featuriser(block)
        return self._writer.write(ShardRow.from_block(block))

    def _samples(self, shard: int, planned: list[dict]) -> pa.Table:
        photos = [self._corpus.photo_of[row["record_index"]] for row in planned]
        usable = {photo for row, photo in zip(planned, photos, strict=True) if row["reason"] in USABLE}
        read = {photo: self._read(photo) for photo in sorted(usable)}
        rows = []
        num_bytes = 0
        for row, photo in zip(planned, photos, strict=True):
            if row["reason"] in USABLE:
                found = read[photo]
                rows.append(sample_row(row, found.reason or row["reason"], found.data, found.size))
            else:
                rows.append(sample_row(row, row["reason"], b"", (0, 0)))
            num_bytes += len(rows[-1]["image"])
        check_picture_bytes(num_bytes, shard, pictures="photos (each once a caption)")
        samples = pa.Table.from_pylist(rows, schema=DRAWN_SCHEMA)
        samples = samples.append_column("photo", pa.array(photos, pa.int64()))
        return samples.append_column("record", pa.array([row["record_index"] for row in planned], pa.int64()))

    def _read(self, number: int) -> Photo:
        position = self._positions.get(number)
        if position is None:
            return Photo(MISSING_IMAGE)
        try:
            data = self._files.read(position)
            return Photo("", data, picture_size(data))
        except (FileNotFoundError, IsADirectoryError):  # a link that leads nowhere or to itself, a file that vanished
            return Photo(MISSING_IMAGE)
        except InputError as error:
            log.warning("%s: %s", self._files.names[position], error)
            return Photo(BAD_IMAGE)
