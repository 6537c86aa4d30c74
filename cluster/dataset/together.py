"""Several datasets as one: that they fit together, their common words and concepts."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import safetensors.torch
import torch

from cluster.dataset.documents import Manifest, StoredShard
from cluster.dataset.keys import CLIP_HEAD_KEY, CONCEPTS_KEY, VOCABULARY_KEY
from cluster.dataset.rows import read_shard
from cluster.dataset.vocabularies import least_count
from cluster.dataset.vocabulary_files import stored_concepts
from cluster.store.store import Store
from pcm.errors import InputError
from pcm.records import FeatureShape
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary, count_words

log = logging.getLogger(__name__)

_READ_THREADS = 8


class Dataset(Protocol):
    """What is needed of a dataset here."""

    @property
    def store(self) -> Store: ...

    @property
    def manifest(self) -> Manifest: ...


@dataclass(frozen=True)
class Vocabularies:
    """What training needs besides the rows, as the files of a dataset."""

    words: bytes  # vocabulary.txt
    concepts: bytes  # concepts.safetensors
    clip_head: bytes  # clip_head.safetensors


def check_same_clip(sets: Sequence[Dataset]) -> None:
    """Features may only be mixed when the same CLIP made them: its visual head tells CLIPs apart, names do not.

    Raises InputError.
    """
    first, *others = sets
    scored = first.manifest.spec.clip.model != "null"
    head = safetensors.torch.load(first.store.read_bytes(CLIP_HEAD_KEY)) if others and scored else {}
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
        if not scored:
            continue
        other_head = safetensors.torch.load(other.store.read_bytes(CLIP_HEAD_KEY))
        if not all(torch.equal(head[name], other_head[name]) for name in head):
            raise InputError(
                f"{other.store.root}: features of another CLIP ({other.manifest.spec.clip.model}) than "
                f"{first.store.root} ({first.manifest.spec.clip.model}); featurise both with one CLIP"
            )


def _sizes(features: FeatureShape) -> str:
    return f"{features.num_patches} x {features.patch_dim} and {features.embed_dim}"


def common_vocabularies(sets: Sequence[Dataset]) -> Vocabularies:
    """Of one dataset its own; of several as `vocabularies_of`, over the captions of all their rows.

    Weights do not count: they say how often a row comes, not how often a word is used.
    """
    return vocabularies_of(sets, _captions(sets), rows=sum(each.manifest.stored for each in sets))


def vocabularies_of(sets: Sequence[Dataset], captions: Iterable[str], *, rows: int) -> Vocabularies:
    """Of one dataset its own, whatever the captions. Of several: words counted over `rows` captions, by the rule by
    which a dataset counts its own; concepts of all, the most frequent of each in turn, as many as the largest has.
    """
    first = sets[0].store
    head = first.read_bytes(CLIP_HEAD_KEY)
    if len(sets) == 1:
        return Vocabularies(first.read_bytes(VOCABULARY_KEY), first.read_bytes(CONCEPTS_KEY), head)
    concepts = [stored_concepts(each.store) for each in sets]
    words = count_words(captions)
    vocabulary = Vocabulary.of_counts(words, min_count=least_count(words, rows))
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


def _captions(sets: Sequence[Dataset]) -> Iterator[str]:
    places = [(each.store, shard) for each in sets for shard in each.manifest.stored_shards]

    def read(place: tuple[Store, StoredShard]) -> list[str]:
        return read_shard(*place, ["caption"], checksum=False)["caption"].to_pylist()

    window = 8 * _READ_THREADS
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(places), window):
            for captions in pool.map(read, places[start : start + window]):
                yield from captions
