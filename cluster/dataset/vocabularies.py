"""The words and concepts of a dataset, built from its planned captions and stored beside its shards."""

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.dataset.layout import (
    CLIP_HEAD_KEY,
    CONCEPTS_KEY,
    GIVEN_CONCEPTS_KEY,
    NOUNS_KEY,
    VOCABULARIES_KEY,
    VOCABULARY_KEY,
    Plan,
    read_table,
)
from cluster.session import user_error
from cluster.store.retries import load_with_retries
from cluster.store.store import Store
from cluster.weights.node_copy import local_clip
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.reasons import USABLE
from pcm.records import NULL_FEATURES, FeatureShape
from pcm.spec import ClipSpec
from pcm.text.concepts import LEXICON_NOUNS, ConceptVocabulary, noun_finder
from pcm.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pcm.clip.encoder import ClipEncoder

log = logging.getLogger(__name__)

#: Words rarer than this are unknown words, as in the published vocabularies - once the corpus is large enough for it.
MIN_WORD_COUNT = 5
SMALL_CORPUS = 10_000  # captions; below it every word counts

CONCEPTS = 400  # the corpus's most frequent nouns; the published runs all read one file of 446, see --concepts
_FEATURES_FIELD = "features"


def store_vocabularies(
    store: Store,
    plan: Plan,
    *,
    encoder: "ClipEncoder | None" = None,
    node_label: tuple[str, str] | None = None,
) -> FeatureShape:
    """Make sure that vocabulary, concepts and CLIP head are on the store; the shape of the dataset's features.

    Done before generation, so that training can start while pictures are still being made. When the corpus has grown
    they are built again; `vocabularies.json`, written last, says of which captions they are. With `encoder`, the
    plan's CLIP, everything is done in this process; else a Ray task loads it, on a node with `node_label`. A run that
    draws has no such task: its first generator does this on the device that it has.
    """
    min_count = MIN_WORD_COUNT if plan.records >= SMALL_CORPUS else 1
    if not vocabularies_stored(store, plan):
        vocabulary = Vocabulary.build(planned_captions(store, plan), min_count=min_count)
        store.write_bytes(VOCABULARY_KEY, vocabulary.to_text().encode())
        log.info("vocabulary: %d words with at least %d occurrences", len(vocabulary), min_count)
        if encoder is not None:
            _store_clip_files(store, plan, min_count, encoder)
        elif plan.spec.clip.model != "null":
            try:
                task: Any = _load_and_store_clip_files.options(**clip_resources(plan.spec.clip, node_label))
                ray.get(task.remote(store, plan, min_count))
            except ray.exceptions.RayError as error:
                raise user_error(error) or error from None
        document = json.dumps({"corpus_fingerprint": plan.corpus_fingerprint, "min_count": min_count})
        store.write_bytes(VOCABULARIES_KEY, f"{document}\n".encode())
    return stored_features(store, plan)


@dataclass(frozen=True)
class ConceptsOfShard:
    """`store_vocabularies` as work of whoever scores one shard, because CLIP is loaded there anyway.

    The shard is one that the store lacks: a dataset whose shards are all there has its vocabularies.
    """

    dataset: Store
    plan: Plan
    shard: int

    def store(self, encoder: "ClipEncoder") -> None:
        store_vocabularies(self.dataset, self.plan, encoder=encoder)


def store_given_concepts(store: Store, concepts: ConceptVocabulary) -> None:
    """Put a user's concepts beside the shards, in place of those that `store_vocabularies` would build.

    Raises InputError where the dataset has others, its own or given ones.
    """
    data = concepts.to_bytes()
    document = document_bytes({"sha256": hashlib.sha256(data).hexdigest(), "concepts": len(concepts)})
    if store.exists(GIVEN_CONCEPTS_KEY):
        if store.read_bytes(GIVEN_CONCEPTS_KEY) != document:
            raise InputError(
                f"{store.root}: was begun with other --concepts; give the same file, leave the option out, or begin "
                "another dataset"
            )
        return
    if store.exists(CONCEPTS_KEY) and store.exists(VOCABULARIES_KEY) and store.read_bytes(CONCEPTS_KEY) != data:
        raise InputError(
            f"{store.root}: was begun with the concepts of its own captions; leave --concepts out, or begin another "
            "dataset. jobs.train takes --concepts too"
        )
    store.write_bytes(CONCEPTS_KEY, data)
    store.write_bytes(GIVEN_CONCEPTS_KEY, document)


def store_noun_finder(store: Store, nouns: str) -> None:
    """Say what finds the nouns of the concepts that `store_vocabularies` builds: "lexicon" or a spaCy model.

    Raises InputError where the model is not installed, or the dataset was begun with another finder.
    """
    noun_finder(nouns)
    begun = stored_nouns(store)
    if begun is None and not store.exists(VOCABULARIES_KEY):
        if nouns != LEXICON_NOUNS:
            store.write_bytes(NOUNS_KEY, document_bytes({"nouns": nouns}))
    elif (begun or LEXICON_NOUNS) != nouns:
        raise InputError(
            f"{store.root}: was begun with --nouns {begun or LEXICON_NOUNS}; give the same, or another --out"
        )


def stored_nouns(store: Store) -> str | None:
    """The spaCy model that finds a dataset's nouns; None: the lexicon. Raises InputError for a damaged object."""
    try:
        return str(json.loads(store.read_bytes(NOUNS_KEY))["nouns"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, LookupError):
        raise InputError(f"{store.root}/{NOUNS_KEY}: damaged; delete it and run the same command again") from None


def stored_features(store: Store, plan: Plan) -> FeatureShape:
    """The shape of the features of a dataset whose CLIP files are on the store. Raises FileNotFoundError."""
    return NULL_FEATURES if plan.spec.clip.model == "null" else features_of_head(store)


def features_of_head(store: Store) -> FeatureShape:
    """The shape of the features that the CLIP of clip_head.safetensors makes. Raises FileNotFoundError."""
    metadata = safetensors_metadata(store.read_bytes(CLIP_HEAD_KEY))
    return FeatureShape(**json.loads(metadata[_FEATURES_FIELD]))


def vocabularies_stored(store: Store, plan: Plan) -> bool:
    """Whether vocabulary, concepts and head are there, and of the captions that are planned now."""
    try:
        fingerprint = json.loads(store.read_bytes(VOCABULARIES_KEY))["corpus_fingerprint"]
    except (FileNotFoundError, ValueError, TypeError, LookupError):
        return False
    keys = (VOCABULARY_KEY,) if plan.spec.clip.model == "null" else (VOCABULARY_KEY, CONCEPTS_KEY, CLIP_HEAD_KEY)
    return fingerprint == plan.corpus_fingerprint and all(map(store.exists, keys))


def planned_captions(store: Store, plan: Plan) -> Iterator[str]:
    """Every usable caption once, in corpus order, with a few plan parts in memory at a time."""

    def part(shard: int) -> list[str]:
        table = read_table(store, plan.part_key(shard), ["caption", "reason", "image_index"])
        first = pc.equal(table["image_index"], 0)
        usable = pc.is_in(table["reason"], pa.array(USABLE))
        return table["caption"].filter(pc.and_(first, usable)).to_pylist()

    window = 64
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, plan.num_shards, window):
            for captions in pool.map(part, range(start, min(start + window, plan.num_shards))):
                yield from captions


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """The string metadata of a safetensors file in memory (8 bytes of header length, then a JSON header)."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


@ray.remote
def _load_and_store_clip_files(store: Store, plan: Plan, min_count: int) -> None:
    from pcm.clip.encoder import ClipEncoder  # seconds to import, and the driver needs none of it

    clip = plan.spec.clip
    encoder = load_with_retries(lambda: ClipEncoder.from_spec(local_clip(clip)), model=clip.model)
    _store_clip_files(store, plan, min_count, encoder)


def _store_clip_files(store: Store, plan: Plan, min_count: int, encoder: "ClipEncoder") -> None:
    if not store.exists(GIVEN_CONCEPTS_KEY):
        concepts = ConceptVocabulary.build(
            # A corpus of few nouns can be generated all the same; training says so when it needs more of them.
            planned_captions(store, plan),
            encoder,
            size=CONCEPTS,
            at_least=0,
            min_count=min_count,
            nouns=stored_nouns(store) or LEXICON_NOUNS,
        )
        store.write_bytes(CONCEPTS_KEY, concepts.to_bytes())
    store.write_bytes(CLIP_HEAD_KEY, clip_head_bytes(encoder, plan.spec.clip.model))


def clip_head_bytes(encoder: "ClipEncoder", model: str) -> bytes:
    """clip_head.safetensors of a CLIP; `model`: its NAME. Its metadata tells the shape of the features."""
    import safetensors.torch

    logits = {name: repr(value) for name, value in encoder.logits.items()}
    metadata = {_FEATURES_FIELD: json.dumps(vars(encoder.features)), "clip": model, **logits}
    return _metadata_in_order(safetensors.torch.save(encoder.head(), metadata))


def _metadata_in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in another order in each process."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def clip_resources(spec: ClipSpec, node_label: tuple[str, str] | None = None) -> dict:
    """What Ray is asked for by a task that loads CLIP."""
    asked = {"num_cpus": 1, "num_gpus": 1 if spec.device == "cuda" else 0}
    return asked | ({"label_selector": dict([node_label])} if node_label else {})
