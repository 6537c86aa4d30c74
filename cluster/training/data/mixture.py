"""Several datasets as one training set: what --data says, that they fit together, their common words and concepts."""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import safetensors
import safetensors.torch
import torch

from cluster.dataset.layout import (
    CLIP_HEAD_KEY,
    CONCEPTS_KEY,
    MANIFEST_KEY,
    PLAN_KEY,
    VOCABULARY_KEY,
    Manifest,
    Plan,
    StoredShard,
    load_manifest,
)
from cluster.dataset.rows import read_shard
from cluster.dataset.vocabularies import MIN_WORD_COUNT, SMALL_CORPUS
from cluster.store.store import Store, open_store
from cluster.training.request import DataSource
from pcm.errors import InputError, one_line
from pcm.records import FeatureShape
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_READ_THREADS = 8


@dataclass(frozen=True)
class TrainingSet:
    """A finished dataset and its weight."""

    store: Store
    manifest: Manifest
    weight: float
    #: The document whose digest says which rows these are.
    defined_by: str = MANIFEST_KEY

    @property
    def shards(self) -> tuple[StoredShard, ...]:
        return self.manifest.stored_shards

    def description(self) -> dict:
        """For config.json: what decides the rows."""
        digest = hashlib.sha256(self.store.read_bytes(self.defined_by)).hexdigest()
        return {"path": self.store.root, "sha256": digest, "weight": self.weight}


@dataclass(frozen=True)
class Vocabularies:
    """What training needs besides the rows, as the files of a dataset."""

    words: bytes  # vocabulary.txt
    concepts: bytes  # concepts.safetensors
    clip_head: bytes  # clip_head.safetensors


def open_training_sets(sources: Sequence[DataSource]) -> tuple[TrainingSet, ...]:
    """The datasets of --data. Raises InputError unless each is finished, not empty and of the first one's features."""
    if not sources:
        raise InputError("--data: give at least one dataset")
    sets = []
    for source in sources:
        store = open_store(source.uri)
        manifest = load_manifest(store)
        if not manifest.stored:
            raise InputError(f"{store.root}: holds no stored pair; generate a dataset with some first")
        for key in (VOCABULARY_KEY, CONCEPTS_KEY, CLIP_HEAD_KEY):
            if not store.exists(key):
                null = (
                    " (a dataset of the null generator has no features)" if manifest.spec.clip.model == "null" else ""
                )
                raise InputError(f"{store.root}: has no {key}; it cannot be trained on{null}")
        _check_vocabularies(store)
        sets.append(TrainingSet(store, manifest, source.weight))
    if len({training_set.store.prefix for training_set in sets}) < len(sets):
        raise InputError(f"--data {' '.join(source.uri for source in sources)}: a dataset twice; give it a weight")
    _check_same_clip(sets)
    return tuple(sets)


def _check_vocabularies(store: Store) -> None:
    """Raises InputError where words, concepts or CLIP head cannot be read."""
    readers: dict[str, Callable[[bytes], object]] = {
        VOCABULARY_KEY: lambda data: Vocabulary.from_text(data.decode()),
        CONCEPTS_KEY: ConceptVocabulary.from_bytes,
        CLIP_HEAD_KEY: safetensors.torch.load,
    }
    for key, read in readers.items():
        try:
            read(store.read_bytes(key))
        except (ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{store.root}/{key}: damaged ({one_line(error, longest=200)}); delete it and rerun the same "
                "jobs.generate command, which builds it again"
            ) from None


def arriving_set(store: Store, plan: Plan, features: FeatureShape) -> TrainingSet:
    """A dataset that is being made, as its plan describes it: no shards yet, and whatever is planned will be stored."""
    manifest = Manifest(
        spec=plan.spec,
        corpus=plan.corpus,
        corpus_fingerprint=plan.corpus_fingerprint,
        features=features,
        expected=plan.expected,
        stored=plan.usable,
        quarantined=plan.expected - plan.usable,
        quarantined_by_reason={},
        clip_score_mean=None,
        shard_bytes=0,
        shards=(),
        schema_version=plan.schema_version,
    )
    return TrainingSet(store, manifest, 1.0, defined_by=PLAN_KEY)


def _check_same_clip(sets: Sequence[TrainingSet]) -> None:
    """Features may only be mixed when the same CLIP made them: its visual head tells CLIPs apart, names do not."""
    first, *others = sets
    head = safetensors.torch.load(first.store.read_bytes(CLIP_HEAD_KEY)) if others else {}
    for other in others:
        features = first.manifest.features, other.manifest.features
        if features[0] != features[1]:
            raise InputError(
                f"{other.store.root}: features {_sizes(features[1])}, but those of {first.store.root} are "
                f"{_sizes(features[0])}; featurise both with one CLIP"
            )
        if conflicts := first.manifest.spec.clip.conflicts(other.manifest.spec.clip):
            raise InputError(
                f"{other.store.root}: features of another CLIP than {first.store.root} ({'; '.join(conflicts)}); "
                "featurise both with one CLIP"
            )
        other_head = safetensors.torch.load(other.store.read_bytes(CLIP_HEAD_KEY))
        if not all(torch.equal(head[name], other_head[name]) for name in head):
            raise InputError(
                f"{other.store.root}: features of another CLIP ({other.manifest.spec.clip.model}) than "
                f"{first.store.root} ({first.manifest.spec.clip.model}); featurise both with one CLIP"
            )


def _sizes(features: FeatureShape) -> str:
    return f"{features.num_patches} x {features.patch_dim} and {features.embed_dim}"


def common_vocabularies(sets: Sequence[TrainingSet]) -> Vocabularies:
    """Of one dataset its own. Of several: words counted over the captions of all their rows, by the rule by which a
    dataset counts its own; concepts of all, the most frequent of each in turn, as many as the largest dataset has.

    Weights do not count: they say how often a row comes, not how often a word is used.
    """
    first = sets[0].store
    head = first.read_bytes(CLIP_HEAD_KEY)
    concepts = [ConceptVocabulary.from_bytes(each.store.read_bytes(CONCEPTS_KEY)) for each in sets]
    if len(sets) == 1:
        return Vocabularies(first.read_bytes(VOCABULARY_KEY), first.read_bytes(CONCEPTS_KEY), head)
    rows = sum(each.manifest.stored for each in sets)
    vocabulary = Vocabulary.build(_captions(sets), min_count=MIN_WORD_COUNT if rows >= SMALL_CORPUS else 1)
    merged = merged_concepts(concepts)
    log.info("%d datasets: %d words, %d concepts in common", len(sets), len(vocabulary), len(merged))
    return Vocabularies(vocabulary.to_text().encode(), merged.to_bytes(), head)


def merged_concepts(vocabularies: Sequence[ConceptVocabulary]) -> ConceptVocabulary:
    """The first of each, the second of each and so on, every noun once, as many as the largest has."""
    size = max(map(len, vocabularies))
    found: dict[str, np.ndarray] = {}
    for rank in itertools.zip_longest(
        *(zip(vocabulary.names, vocabulary.embeddings, strict=True) for vocabulary in vocabularies)
    ):
        for name, embedding in filter(None, rank):
            found.setdefault(name, embedding)
    names = tuple(found)[:size]
    source = " + ".join(dict.fromkeys(vocabulary.source for vocabulary in vocabularies))
    return ConceptVocabulary(names, np.stack([found[name] for name in names]), source)


def _captions(sets: Sequence[TrainingSet]) -> Iterator[str]:
    places = [(each.store, shard) for each in sets for shard in each.shards]

    def read(place: tuple[Store, StoredShard]) -> list[str]:
        return read_shard(*place, ["caption"], checksum=False)["caption"].to_pylist()

    window = 8 * _READ_THREADS
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(places), window):
            for captions in pool.map(read, places[start : start + window]):
                yield from captions
