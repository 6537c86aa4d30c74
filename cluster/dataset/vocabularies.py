"""The words and concepts of a dataset, built from its planned captions and stored beside its shards."""

import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import ray

from cluster.dataset.documents import MadeWith, Plan, read_plan_part
from cluster.dataset.keys import (
    CLIP_HEAD_KEY,
    CONCEPTS_KEY,
    GIVEN_CONCEPTS_KEY,
    NOUNS_KEY,
    PLAN_KEY,
    VOCABULARIES_KEY,
    VOCABULARY_KEY,
)
from cluster.dataset.vocabulary_files import (
    intact_vocabularies,
    refuse_rebuilding,
    stored_concepts,
    stored_document,
    vocabulary_keys,
)
from cluster.gpu_share import gpu_task
from cluster.numbers import duration
from cluster.session import user_error, waiting_for
from cluster.shard_work import AUTO, MANY_SAMPLES, PROCESS, shard_work
from cluster.store.store import Store
from cluster.weights.load_clip import load_clip
from pcm.documents import document_bytes
from pcm.errors import InputError
from pcm.generation.names import IMPORTED
from pcm.line_timer import LineTimer
from pcm.reasons import USABLE
from pcm.records import NULL_FEATURES, FeatureShape
from pcm.spec import ClipSpec
from pcm.text.concepts import (
    CONCEPTS,
    LEXICON_NOUNS,
    ConceptVocabulary,
    count_nouns,
    embed,
    frequent_nouns,
    noun_finder,
    noun_versions,
)
from pcm.text.vocabulary import Vocabulary, count_words

if TYPE_CHECKING:
    from pcm.clip.encoder import ClipEncoder

log = logging.getLogger(__name__)

#: Words rarer than this are unknown words, as in the published vocabularies - once the corpus is large enough for it.
MIN_WORD_COUNT = 5
SMALL_CORPUS = 10_000  # captions; below it every word counts

_FEATURES_FIELD = "features"

#: Of a GPU, for some hundred texts: it finds a place beside whatever leaves a share of one. No cap on its memory
#: (cluster.gpu_share).
TEXT_TOWER_GPUS = 0.2

#: Plan parts that are counted in one go, and read at once.
_PARTS_AT_ONCE, _READERS = 32, 8


def store_vocabularies(
    store: Store,
    plan: Plan,
    *,
    encoder: "ClipEncoder | None" = None,
    words: "CorpusWords | None" = None,
    node_label: tuple[str, str] | None = None,
) -> FeatureShape:
    """Make sure that vocabulary, concepts and CLIP head are on the store; the shape of the dataset's features.

    Done before generation, so that training can start while pictures are still being made. When the corpus has grown
    they are built again; `vocabularies.json`, written last, says of which captions they are, and their sha256. Of the
    same captions those that are intact stay, for another device or spaCy would make others. With `encoder`, the plan's
    CLIP, everything is done in this process; else a Ray task loads it, on a node with `node_label`. A run that draws
    has no such task: its first generator does this on the device that it has. `words`: those that were counted before.
    Raises InputError where they were imported, and where concepts that a user gave are not there any more.
    """
    if not vocabularies_stored(store, plan):
        refuse_rebuilding(store, plan)
        intact = intact_vocabularies(store, plan)
        words = words or count_corpus_words(store, plan, run_on=AUTO if encoder is None else PROCESS)
        if VOCABULARY_KEY not in intact:
            store.write_bytes(VOCABULARY_KEY, words.vocabulary.to_text().encode())
            log.info("vocabulary: %d words with at least %d occurrences", len(words.vocabulary), words.min_count)
        if encoder is not None:
            _store_clip_files(store, plan, words, encoder)
        elif not intact >= set(vocabulary_keys(plan)) - {VOCABULARY_KEY}:
            run_with_clip(_load_and_store_clip_files, store, plan, words, clip=plan.spec.clip, node_label=node_label)
        keys = vocabulary_keys(plan)
        digests = {key: hashlib.sha256(store.read_bytes(key)).hexdigest() for key in keys}
        said = {"corpus_fingerprint": plan.corpus_fingerprint, "min_count": words.min_count, "sha256": digests}
        store.write_bytes(VOCABULARIES_KEY, document_bytes(said))
    return stored_features(store, plan)


@dataclass(frozen=True)
class ConceptsOfShard:
    """`store_vocabularies` as work of whoever scores one shard, because CLIP is loaded there anyway.

    The shard is one that the store lacks: a dataset whose shards are all there has its vocabularies. words: of a large
    corpus, where many have counted them before.
    """

    dataset: Store
    plan: Plan
    shard: int
    words: "CorpusWords | None" = None

    @staticmethod
    def of(dataset: Store, plan: Plan, shard: int) -> "ConceptsOfShard | None":
        """None where the vocabularies are there. Counts the words on Ray if they are many, before pools take its CPUs.
        Raises InputError as `store_vocabularies` does, and as `count_corpus_words`."""
        if vocabularies_stored(dataset, plan):
            return None
        refuse_rebuilding(dataset, plan)
        words = count_corpus_words(dataset, plan, run_on=AUTO) if plan.expected >= MANY_SAMPLES else None
        return ConceptsOfShard(dataset, plan, shard, words)

    def store(self, encoder: "ClipEncoder") -> None:
        store_vocabularies(self.dataset, self.plan, encoder=encoder, words=self.words)


@dataclass(frozen=True)
class CorpusWords:
    """What the captions of a plan say.

    min_count: how often a word, and a noun, occurs at least.
    nouns: of the concepts, most frequent first, what found them and which versions of it; none where the dataset needs
    none.
    """

    vocabulary: Vocabulary
    min_count: int
    nouns: tuple[str, ...]
    noun_source: str
    noun_versions: dict[str, str]


def count_corpus_words(store: Store, plan: Plan, *, run_on: str) -> CorpusWords:
    """Count words and nouns of the planned captions; `run_on`: one of cluster.shard_work.RUN_ON, to the same result.

    Raises InputError where the captions have no word at all.
    """
    has_concepts = store.exists(GIVEN_CONCEPTS_KEY) or CONCEPTS_KEY in intact_vocabularies(store, plan)
    needs_nouns = plan.spec.clip.model != "null" and not has_concepts
    finder = (stored_nouns(store) or LEXICON_NOUNS) if needs_nouns else None
    work = shard_work(run_on, samples=plan.expected, landmarks=[(store, PLAN_KEY)], threads=_READERS)
    timer = LineTimer()
    words: Counter[str] = Counter()
    nouns: Counter[str] = Counter()
    every = range(plan.num_shards)
    parts = [every[start : start + _PARTS_AT_ONCE] for start in every[::_PARTS_AT_ONCE]]
    for done, (some_words, some_nouns) in enumerate(work.in_order(_WordCounter(store, plan, finder), parts), start=1):
        words.update(some_words)
        nouns.update(some_nouns)
        if timer.due():
            left = duration((len(parts) - done) * timer.elapsed / done)
            log.info("words of %d of %d plan parts counted, %s left", parts[done - 1].stop, plan.num_shards, left)
    min_count = least_count(words, plan.records)
    if min_count < MIN_WORD_COUNT and plan.records >= SMALL_CORPUS:
        log.warning(
            "words that occur %d times or more are less than half of the text, so all %d different words are kept (a "
            "caption without spaces is one word)",
            MIN_WORD_COUNT,
            len(words),
        )
    return CorpusWords(
        Vocabulary.of_counts(words, min_count=min_count),
        min_count,
        # A corpus of few nouns can be generated all the same; training says so when it needs more of them.
        frequent_nouns(nouns, CONCEPTS, min_count=min_count),
        noun_finder(finder)[0] if finder else "",
        noun_versions(finder) if finder else {},
    )


@dataclass(frozen=True)
class _WordCounter:
    """Called with shards: how often each word, and each noun, occurs in their captions."""

    dataset: Store
    plan: Plan
    finder: str | None

    def __call__(self, shards: Sequence[int]) -> tuple[Counter[str], Counter[str]]:
        captions = [caption for shard in shards for caption in part_captions(self.dataset, self.plan, shard)]
        nouns = count_nouns(captions, _finder(self.finder)) if self.finder else Counter()
        return count_words(captions), nouns


@functools.cache
def _finder(nouns: str) -> Callable[[Iterable[str]], Iterable[str]]:
    return noun_finder(nouns)[1]


def least_count(words: Counter[str], captions: int) -> int:
    """How often a word must occur to be in the vocabulary of so many captions.

    Where the frequent ones are less than half of what is said each counts, or hardly anything would be left: captions
    written without spaces, such as Chinese or Japanese ones, are each one word.
    """
    frequent = sum(count for count in words.values() if count >= MIN_WORD_COUNT)
    return MIN_WORD_COUNT if captions >= SMALL_CORPUS and 2 * frequent >= words.total() else 1


@dataclass(frozen=True)
class GivenConcepts:
    """A user's concepts, in place of those that `store_vocabularies` would build."""

    concepts: ConceptVocabulary

    def check(self, store: Store) -> None:
        """Raises InputError where the dataset has others, its own or given ones."""
        if store.exists(GIVEN_CONCEPTS_KEY):
            if store.read_bytes(GIVEN_CONCEPTS_KEY) != self._document():
                raise InputError(
                    f"{store.root}: was begun with other --concepts; give the same file, leave the option out, or "
                    "begin another dataset"
                )
        elif store.exists(CONCEPTS_KEY) and store.exists(VOCABULARIES_KEY) and not self._are_stored(store):
            raise InputError(
                f"{store.root}: was begun with the concepts of its own captions; leave --concepts out, or begin "
                "another dataset. jobs.train takes --concepts too"
            )

    def store(self, store: Store) -> None:
        """Put them beside the shards; those that were given before again where they are damaged. Raises as `check`."""
        self.check(store)
        if not self._are_stored(store):
            store.write_bytes(CONCEPTS_KEY, self.concepts.to_bytes())
        if not store.exists(GIVEN_CONCEPTS_KEY):
            store.write_bytes(GIVEN_CONCEPTS_KEY, self._document())

    def _are_stored(self, store: Store) -> bool:
        return store.exists(CONCEPTS_KEY) and store.read_bytes(CONCEPTS_KEY) == self.concepts.to_bytes()

    def _document(self) -> bytes:
        sha256 = hashlib.sha256(self.concepts.to_bytes()).hexdigest()
        return document_bytes({"sha256": sha256, "concepts": len(self.concepts)})


@dataclass(frozen=True)
class NounFinder:
    """What finds the nouns of the concepts that `store_vocabularies` builds: "lexicon" or a spaCy model."""

    nouns: str

    def check(self, store: Store) -> None:
        """Raises InputError where the model is not installed, or the dataset was begun with another finder."""
        noun_finder(self.nouns)
        begun = stored_nouns(store)
        if begun is None and store.exists(VOCABULARIES_KEY):
            begun = LEXICON_NOUNS if self.nouns == LEXICON_NOUNS else _finder_of_concepts(store)
        if begun not in (None, self.nouns):
            raise InputError(f"{store.root}: was begun with --nouns {begun}; give the same, or another --out")

    def store(self, store: Store) -> None:
        """Say it beside the shards. Raises as `check`."""
        self.check(store)
        if self.nouns != LEXICON_NOUNS and not store.exists(NOUNS_KEY):
            store.write_bytes(NOUNS_KEY, document_bytes({"nouns": self.nouns}))


def _finder_of_concepts(store: Store) -> str:
    """What found a dataset's own concepts: a nouns.json that was damaged may have been deleted."""
    if store.exists(GIVEN_CONCEPTS_KEY) or not store.exists(CONCEPTS_KEY):
        return LEXICON_NOUNS
    found, _, model = stored_concepts(store).source.partition(":")
    return model if found == "spacy" else LEXICON_NOUNS


def stored_nouns(store: Store) -> str | None:
    """The spaCy model that finds a dataset's nouns; None: the lexicon. Raises InputError for a damaged object."""
    found = stored_document(store, NOUNS_KEY, "nouns")
    return None if found is None else str(found["nouns"])


def made_with(store: Store, plan: Plan) -> MadeWith:
    """What a plan was asked for with, and where its concepts come from. Raises InputError for a damaged object."""
    given = stored_document(store, GIVEN_CONCEPTS_KEY, "sha256")
    if given is not None:
        return MadeWith(shard_size=plan.shard_size, source=plan.source, concepts=given["sha256"])
    found = stored_document(store, NOUNS_KEY, "nouns") or {"nouns": LEXICON_NOUNS}
    return MadeWith(
        shard_size=plan.shard_size,
        source=plan.source,
        nouns=found["nouns"],
        noun_versions=found.get("versions", {}),
    )


def stored_features(store: Store, plan: Plan) -> FeatureShape:
    """The shape of a dataset's features, by its CLIP files. Raises InputError where these are missing or damaged."""
    return NULL_FEATURES if plan.spec.clip.model == "null" else features_of_head(store)


def features_of_head(store: Store) -> FeatureShape:
    """The shape of the features that the CLIP of clip_head.safetensors makes. Raises InputError where it is missing or
    damaged."""
    try:
        metadata = safetensors_metadata(store.read_bytes(CLIP_HEAD_KEY))
        return FeatureShape(**json.loads(metadata[_FEATURES_FIELD]))
    except FileNotFoundError:
        raise InputError(
            f"{store.root}: has no {CLIP_HEAD_KEY} yet, which comes with the first scores; run the command that makes "
            "this dataset again"
        ) from None
    except (ValueError, TypeError, LookupError, AttributeError):
        raise InputError(f"{store.root}/{CLIP_HEAD_KEY}: damaged; delete it and run the same command again") from None


def vocabularies_stored(store: Store, plan: Plan) -> bool:
    """Whether vocabulary, concepts and head are there, and of the captions that are planned now, or were imported."""
    there = all(map(store.exists, vocabulary_keys(plan)))
    if plan.spec.generator.model == IMPORTED:  # which writes no vocabularies.json
        return there
    try:
        fingerprint = json.loads(store.read_bytes(VOCABULARIES_KEY))["corpus_fingerprint"]
    except (FileNotFoundError, ValueError, TypeError, LookupError):
        return False
    return there and fingerprint == plan.corpus_fingerprint


def planned_captions(store: Store, plan: Plan) -> Iterator[str]:
    """Every usable caption once, in corpus order, with a few plan parts in memory at a time."""
    window = 64
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, plan.num_shards, window):
            shards = range(start, min(start + window, plan.num_shards))
            for captions in pool.map(lambda shard: part_captions(store, plan, shard), shards):
                yield from captions


def part_captions(store: Store, plan: Plan, shard: int) -> list[str]:
    """The usable captions whose first picture is of this shard."""
    table = read_plan_part(store, plan.part_key(shard), ["caption", "reason", "image_index"])
    first = pc.equal(table["image_index"], 0)
    usable = pc.is_in(table["reason"], pa.array(USABLE))
    return table["caption"].filter(pc.and_(first, usable)).to_pylist()


def safetensors_metadata(data: bytes) -> dict[str, str]:
    """The string metadata of a safetensors file in memory (8 bytes of header length, then a JSON header)."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})


def _load_and_store_clip_files(store: Store, plan: Plan, words: CorpusWords) -> None:
    _store_clip_files(store, plan, words, load_clip(plan.spec_to_load.clip))


def _store_clip_files(store: Store, plan: Plan, words: CorpusWords, encoder: "ClipEncoder") -> None:
    intact = intact_vocabularies(store, plan)
    if not (store.exists(GIVEN_CONCEPTS_KEY) or CONCEPTS_KEY in intact):
        embeddings = embed(words.nouns, encoder.encode_texts)
        concepts = ConceptVocabulary(words.nouns, embeddings, words.noun_source)
        store.write_bytes(CONCEPTS_KEY, concepts.to_bytes())
        if words.noun_versions:
            found = {"nouns": stored_nouns(store), "versions": words.noun_versions}
            store.write_bytes(NOUNS_KEY, document_bytes(found))
    if CLIP_HEAD_KEY not in intact:
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


def run_with_clip(
    work: Callable[..., None], *arguments: object, clip: ClipSpec, node_label: tuple[str, str] | None = None
) -> None:
    """Call `work`, which loads `clip`, in a task of Ray on a node with `node_label`, and wait for it. Raises InputError
    where the work does."""
    asked = clip_resources(clip, node_label)
    try:
        with waiting_for(cpus=asked["num_cpus"], gpus=asked["num_gpus"], labels=asked.get("label_selector")):
            ray.get(gpu_task(work, **asked).remote(*arguments))
    except ray.exceptions.RayError as error:
        raise user_error(error) or error from None


def clip_resources(spec: ClipSpec, node_label: tuple[str, str] | None = None) -> dict:
    """What Ray is asked for by a task that loads CLIP, for some seconds: no whole GPU, which others may need."""
    asked = {"num_cpus": 1, "num_gpus": TEXT_TOWER_GPUS if spec.device == "cuda" else 0}
    return asked | ({"label_selector": dict([node_label])} if node_label else {})
