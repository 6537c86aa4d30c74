"""Published data - pictures, annotation pickles, npz features - to one of our datasets.

Annotations become the plan, so that a shard is imported from its plan part, the pictures and the features alone:
whatever is missing or damaged is quarantined with its reason, shards that are there are not made again, and
`jobs.verify` proves the result as it proves any dataset. One process and some threads: the work is reading files,
decoding pictures and compressing, which run beside each other in one Python.
"""

import hashlib
import json
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors.torch
import torch

from cluster.dataset.committed import committed
from cluster.dataset.documents import Manifest, Plan
from cluster.dataset.environment import tell_encoder
from cluster.dataset.keys import CLIP_HEAD_KEY, CONCEPTS_KEY, VOCABULARY_KEY
from cluster.dataset.parquet import read_table
from cluster.dataset.plan import begun_plan, make_plan
from cluster.dataset.vocabularies import features_of_head, planned_captions, safetensors_metadata
from cluster.device import resolve_device, resolve_dtype, warn_of_slow_bfloat16_here
from cluster.generation.pinning import clip_of_given_features, clip_spec
from cluster.generation.pipeline import write_manifest
from cluster.generation.stages.draw import DRAWN_SCHEMA
from cluster.generation.stages.featurise import FeaturiseShard
from cluster.generation.stages.shard_row import ShardRow, check_picture_bytes
from cluster.generation.stages.write import IMAGE_PATH, WriteShard
from cluster.ingest.request import ImportRequest
from cluster.ingest.shards import check_gpu, counts, import_shards, picture_size, sample_row, undrawn
from cluster.sources.concept_file import read_concepts
from cluster.sources.published_annotations import AnnotationCorpus, CaptionFile
from cluster.sources.published_folders import PublishedFolders
from cluster.store.outputs import put_captioner
from cluster.store.store import Store, join, local_copy, open_store, read_uri
from cluster.weights.load_clip import load_clip
from pcm.captioners.captioner import MODEL_FILE
from pcm.errors import InputError
from pcm.generation.names import IMPORTED
from pcm.official.checkpoint import import_checkpoint
from pcm.official.settings import CLIP_SCORE_SCALE
from pcm.official.state_dict import read_tensors
from pcm.reasons import (
    BAD_FEATURES,
    BAD_IMAGE,
    FEATURES_BEYOND_FLOAT16,
    FEATURES_OF_ANOTHER_SHAPE,
    MISSING_CLIP_SCORE,
    MISSING_FEATURES,
    MISSING_IMAGE,
    USABLE,
)
from pcm.records import FeatureShape, with_features
from pcm.safe_pickle import reader as safe_pickle
from pcm.spec import ClipSpec, DatasetSpec
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

#: A mean cosine above this is none of picture and caption by a CLIP of open_clip's.
HIGH_COSINE = 0.45
_HEAD = ("ln_post.weight", "ln_post.bias", "proj")


@dataclass(frozen=True)
class ImportResult:
    """What an import did. captions_from_file + captions_recovered are the records with a sentence."""

    manifest: Manifest
    skipped: int
    captions_from_file: int
    captions_recovered: int
    seconds: float
    images_per_second: float

    def summary(self) -> dict[str, Any]:
        """What a job prints."""
        return {
            **counts(self.manifest),
            "skipped": self.skipped,
            "captions_from_file": self.captions_from_file,
            "captions_recovered": self.captions_recovered,
            "images_per_second": round(self.images_per_second, 1),
            "seconds": round(self.seconds, 2),
        }


def import_official(request: ImportRequest) -> dict[str, Any]:
    """Import the dataset, or the captioner, that the request names, and summarise. Raises InputError."""
    if request.checkpoint is not None:
        return import_captioner(request, request.checkpoint)
    return {**import_dataset(request).summary(), "dataset": request.out}


def import_captioner(request: ImportRequest, checkpoint: str) -> dict[str, Any]:
    """A published .pth as one of our captioners: checkpoint, model, bytes.

    Raises InputError when a file is unreadable, unsafe or no PCM-Net, or OUT holds something else.
    """
    assert request.concepts is not None
    with local_copy(checkpoint) as path:
        files = import_checkpoint(
            path,
            vocabulary=read_vocabulary(request.vocabulary),
            concepts=read_concepts(request.concepts),
            clip=clip_of_given_features(request.clip).identity(),
            settings=dict(request.settings),
        )
    put_captioner(open_store(request.out), files)
    log.info("imported %s", checkpoint)
    return {"checkpoint": request.out, "model": join(request.out, MODEL_FILE), "bytes": sum(map(len, files.values()))}


def import_dataset(request: ImportRequest) -> ImportResult:
    """Import, or go on importing. Memory: the annotations, then `workers` shards.

    Raises InputError when a file is unreadable or unsafe, when no picture is where it should be, or when the place
    holds another dataset.
    """
    started = time.monotonic()
    assert request.annotations is not None and request.images is not None
    store = open_store(request.out)
    raw = read_uri(request.annotations)
    planned = begun_plan(store)
    spec = _spec(request, hashlib.sha256(raw).hexdigest(), begun=planned.spec.clip if planned else None)
    vocabulary = read_vocabulary(request.vocabulary)
    annotations = safe_pickle.load(raw, name=request.annotations)
    del raw
    if not isinstance(annotations, list) or not annotations:
        raise InputError(f"{request.annotations}: not a list of annotations, or empty; give the published pickle")
    places = PublishedFolders(images=request.images, features=request.features)
    found = places.probe(annotations, score_scale=request.clip_score_scale)
    corpus = AnnotationCorpus(annotations, vocabulary, _caption_file(request), score_scale=request.clip_score_scale)
    plan = make_plan(
        store,
        corpus.records(),
        spec,
        corpus=request.annotations,
        shard_size=request.shard_size,
        is_truncated=lambda prompt: False,
    )
    _warn_of_scale(corpus, plan, request)
    _store_vocabulary(store, vocabulary)
    made = committed(store, plan)
    missing = [shard for shard in range(plan.num_shards) if shard not in made]
    features = _store_clip_files(store, plan, request, found, are_shards_missing=bool(missing))
    if missing and places.features is None:
        tell_encoder(store, plan.spec.clip)
    importing, rows = time.monotonic(), 0
    if missing:
        importer = ShardImporter(store, plan, features, places, corpus)
        importing = time.monotonic()
        rows = import_shards(importer, made, plan, missing, workers=request.workers)
    return ImportResult(
        manifest=write_manifest(store, plan, features),
        skipped=plan.expected - rows,
        captions_from_file=corpus.from_file,
        captions_recovered=corpus.recovered,
        seconds=time.monotonic() - started,
        images_per_second=rows / (time.monotonic() - importing),
    )


def _warn_of_scale(corpus: AnnotationCorpus, plan: Plan, request: ImportRequest) -> None:
    """Say so where the scores are no cosines of a picture and its caption by a known CLIP, which are 0.2 to 0.4."""
    scores = np.array(corpus.clip_scores)
    known = plan.spec.clip.activation is not None and bool((~np.isnan(scores)).any())
    if known and (mean := float(np.nanmean(scores))) > HIGH_COSINE:
        log.warning(
            "clipscore / %g is %.2f on average, more than %s gives; SynC's refined annotations hold 5 times the "
            "cosine, for which there is --clip-score-scale 5",
            request.clip_score_scale, mean, request.clip,
        )  # fmt: skip


def read_vocabulary(uri: str) -> Vocabulary:
    """A published vocabulary.txt at a path or URI. Raises InputError."""
    try:
        return Vocabulary.from_text(read_uri(uri).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{uri}: not a vocabulary ({error}); wanted one word a line in id order") from None
    except InputError as error:
        raise InputError(f"--vocabulary {uri}: {error}") from None


def _caption_file(request: ImportRequest) -> CaptionFile:
    if request.captions is None:
        return CaptionFile()
    return CaptionFile.read(request.captions, format=request.captions_format, split=request.captions_split)


def _spec(request: ImportRequest, digest: str, *, begun: ClipSpec | None) -> DatasetSpec:
    """What is true of imported pictures: nobody here knows how they were drawn, so they cannot be drawn again."""
    given = request.features is not None
    if request.clip_score_scale != CLIP_SCORE_SCALE:  # read otherwise, the same file is other data
        digest += f" clipscore / {request.clip_score_scale:g}"
    return DatasetSpec(
        generator=undrawn(IMPORTED, f"sha256:{digest}"),
        clip=clip_of_given_features(request.clip) if given else _clip_to_load(request, begun),
    )


def _clip_to_load(request: ImportRequest, begun: ClipSpec | None) -> ClipSpec:
    device = resolve_device(request.device, cluster_gpus=torch.cuda.device_count())
    dtype = resolve_dtype(request.dtype, device=device)
    if begun is None:
        check_gpu(device)
        warn_of_slow_bfloat16_here(device, dtype)
    return clip_spec(request.clip, dtype=dtype, device=device, begun=begun)


def _store_clip_files(
    store: Store, plan: Plan, request: ImportRequest, found: FeatureShape | None, *, are_shards_missing: bool
) -> FeatureShape:
    """Put concepts and CLIP head on the store; the shape of the dataset's features.

    The CLIP itself is loaded only where one of them, or the features, are not given, and not where all is there
    already. Concepts that are not given are those that the dataset was begun with. Raises InputError when the parts do
    not belong together, or the dataset was begun with others.
    """
    spec = plan.spec.clip
    begun = _begun_with(store)
    is_all_there = not are_shards_missing and len(begun) == 2
    encoder = None
    if not is_all_there and (found is None or request.concepts is None or request.clip_head is None):
        here = plan.spec_to_load.clip
        check_gpu(here.device)
        encoder = load_clip(here)
    shape = found or (encoder.features if encoder else features_of_head(store))
    if request.clip_head:
        head = _published_head(request.clip_head)
    else:
        head = encoder.head() if encoder else safetensors.torch.load(begun[CLIP_HEAD_KEY])
    if not head:
        raise InputError(
            f"--clip {request.clip}: gives no patches in the joint space; give the CLIP that made the features"
        )
    if request.concepts is not None:
        concepts = read_concepts(request.concepts)
    elif CONCEPTS_KEY in begun:
        concepts = ConceptVocabulary.from_bytes(begun[CONCEPTS_KEY])
    else:
        assert encoder is not None
        concepts = ConceptVocabulary.build(planned_captions(store, plan), encoder, at_least=0)
    sizes = {
        "the features": (shape.patch_dim, shape.embed_dim),
        "the CLIP head": tuple(head["proj"].shape),
        "the concepts": (shape.patch_dim, concepts.embeddings.shape[1]),
    }
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise InputError(f"sizes (D_v, D) differ: {listed}; give features, concepts and CLIP of one model")
    metadata = {"features": json.dumps(vars(shape)), "clip": spec.model}
    made = {CONCEPTS_KEY: concepts.to_bytes(), CLIP_HEAD_KEY: safetensors.torch.save(head, metadata)}
    for key, option in ((CONCEPTS_KEY, "--concepts"), (CLIP_HEAD_KEY, "--clip-head")):
        if key not in begun:
            store.write_bytes(key, made[key])
        elif not _same_tensors(made[key], begun[key]):
            raise _begun_with_another(store, key, option)
    return shape


def _store_vocabulary(store: Store, vocabulary: Vocabulary) -> None:
    """Raises InputError where another one lies there; a damaged one is put there again."""
    try:
        begun = Vocabulary.from_text(store.read_bytes(VOCABULARY_KEY).decode())
    except (FileNotFoundError, ValueError):
        begun = None
    if begun is None:
        store.write_bytes(VOCABULARY_KEY, vocabulary.to_text().encode())
    elif begun.to_text() != vocabulary.to_text():
        raise _begun_with_another(store, VOCABULARY_KEY, "--vocabulary")


def _begun_with_another(store: Store, key: str, option: str) -> InputError:
    return InputError(f"{store.root}: was begun with another {key}; give the same {option} as then, or another --out")


def _begun_with(store: Store) -> dict[str, bytes]:
    """Concepts and CLIP head that are on the store, whole; a damaged one is made again."""
    found = {key: store.read_bytes(key) for key in (CONCEPTS_KEY, CLIP_HEAD_KEY) if store.exists(key)}
    return {key: data for key, data in found.items() if _same_tensors(data, data)}


def _same_tensors(one: bytes, other: bytes) -> bool:
    """Whether two safetensors files say the same: their metadata come in any order. False where one is damaged."""
    try:
        if safetensors_metadata(one) != safetensors_metadata(other):
            return False
        ours, theirs = safetensors.torch.load(one), safetensors.torch.load(other)
    except (safetensors.SafetensorError, ValueError, AttributeError, TypeError):
        return False
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _published_head(uri: str) -> dict[str, torch.Tensor]:
    with local_copy(uri) as path:
        tensors = read_tensors(path)
    missing = [name for name in _HEAD if f"visual_embed.{name}" not in tensors]
    if missing:
        raise InputError(f"--clip-head {uri}: has no visual_embed.{missing[0]}; give a published PCM-Net checkpoint")
    return {name: tensors[f"visual_embed.{name}"].float().contiguous() for name in _HEAD}


class ShardImporter:
    """One shard at a time, from any number of threads: plan part in, shard, quarantine and stats out."""

    def __init__(
        self,
        store: Store,
        plan: Plan,
        features: FeatureShape,
        places: PublishedFolders,
        corpus: AnnotationCorpus,
    ) -> None:
        self._store = store
        self._plan = plan
        self._features = features
        self._places = places
        self._corpus = corpus
        self._writer = WriteShard(store, plan.schema_version)
        self._featuriser = None if places.features else FeaturiseShard(plan.spec_to_load.clip)
        self._model = threading.Lock()  # one forward pass at a time; pictures are read and decoded beside it

    def __call__(self, shard: int) -> dict:
        """The stats of the shard, once it is committed."""
        started, began = time.monotonic(), time.time()
        rows = read_table(self._store, self._plan.part_key(shard)).to_pylist()
        patches = np.zeros((len(rows), self._features.num_patches, self._features.patch_dim), np.float16)
        images = np.zeros((len(rows), self._features.embed_dim), np.float16)
        scores = np.array([self._corpus.clip_scores[row["record_index"]] for row in rows], np.float32)
        read = [
            self._row(row, patches=patches[number], image=images[number], score=scores[number])
            for number, row in enumerate(rows)
        ]
        check_picture_bytes(sum(len(row["image"]) for row in read), shard)
        paths = pa.array([row.pop(IMAGE_PATH) for row in read], pa.string())
        samples = pa.Table.from_pylist(read, schema=DRAWN_SCHEMA)
        read_at, featurised = time.monotonic(), 0.0
        if self._featuriser is not None:
            with self._model:
                has_model = time.monotonic()
                samples = self._featuriser.featurise(samples)
                featurised = time.monotonic() - has_model
            computed = samples["clip_score"].to_numpy()
            scores = np.where(np.isnan(scores), computed, scores)
            samples = samples.drop_columns(["clip_score"])
        else:
            samples = with_features(samples, images, patches)
        samples = samples.append_column("clip_score", pa.array(scores)).append_column(IMAGE_PATH, paths)
        times = {"start_time": began, "draw_seconds": read_at - started, "featurise_seconds": featurised}
        return self._writer.write(ShardRow(shard, samples, times))

    def _row(self, row: dict, *, patches: np.ndarray, image: np.ndarray, score: np.float32) -> dict:
        """The sample of a plan row; its features are written into `patches` (N, D_v) and `image` (D,)."""
        picture, path, reason = b"", "", row["reason"]
        size = (0, 0)
        if reason in USABLE:
            image_id = row["corpus_id"].rpartition("#")[0]
            split_id = self._corpus.split_ids[row["record_index"]]
            try:
                picture, path = self._places.read_image(image_id, split_id)
                size = picture_size(picture)
                reason = self._read_features(image_id, split_id, patches, image, score)
            except FileNotFoundError:
                reason = MISSING_IMAGE
            except InputError:
                reason = BAD_IMAGE
        if reason not in USABLE:
            picture, size = b"", (0, 0)
        return {**sample_row(row, reason, picture, size), IMAGE_PATH: path}

    def _read_features(
        self, image_id: str, split_id: int, patches: np.ndarray, image: np.ndarray, score: np.float32
    ) -> str:
        """Why a picture has no usable features, or ""."""
        if self._featuriser is not None:
            return ""
        if np.isnan(score):
            return MISSING_CLIP_SCORE
        try:
            given_patches, given_image = self._places.read_features(image_id, split_id)
        except FileNotFoundError:
            return MISSING_FEATURES
        except InputError:
            return BAD_FEATURES
        wanted = self._features
        if given_patches.shape != (wanted.num_patches, wanted.patch_dim) or len(given_image) != wanted.embed_dim:
            return FEATURES_OF_ANOTHER_SHAPE
        with np.errstate(over="ignore"):
            patches[:] = given_patches
            image[:] = given_image
        return "" if np.isfinite(patches).all() and np.isfinite(image).all() else FEATURES_BEYOND_FLOAT16
