"""The concepts a picture may hold: the most frequent nouns of a corpus, each with its CLIP text embedding.

Equation 1 of arXiv 2501.00437 retrieves concepts from this vocabulary. Nouns are found with the noun lexicon in
`pcm/text/nouns` (made from WordNet), or by an installed spaCy model that is asked for by name. Nothing is downloaded,
and the vocabulary does not depend on what else is installed.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy

from pcm.documents import read_document
from pcm.errors import InputError
from pcm.text.vocabulary import CAPTIONS_AT_ONCE

# The paper's template and some in the manner of CLIP's own; a concept is the mean of them all.
TEMPLATES = (
    "A photo of {}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a close-up photo of a {}.",
    "a picture of a {}.",
    "there is a {} in the scene.",
)
#: How many a dataset has: the most frequent nouns of its corpus. The published runs all read one file of 446.
CONCEPTS = 400
#: The `nouns` that need nothing installed.
LEXICON_NOUNS = "lexicon"
LEXICON = Path(__file__).parent / "nouns" / "nouns.txt"

_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")
_IRREGULAR = {
    "people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "oxen": "ox", "dice": "die", "wolves": "wolf", "calves": "calf",
    "halves": "half", "leaves": "leaf", "loaves": "loaf", "thieves": "thief", "cacti": "cactus", "fungi": "fungus",
    "octopi": "octopus", "tshirt": "t-shirt", "tshirts": "t-shirt", "tee-shirt": "t-shirt", "donuts": "doughnut",
    "donut": "doughnut",
}  # fmt: skip
_PLURALS = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"), ("men", "man"))


class TextEncoder(Protocol):
    """What is needed of `pcm.ClipEncoder`."""

    def encode_texts(self, texts: list[str], /) -> np.ndarray:
        """(B, D) float32, rows L2-normalised."""


@dataclass(frozen=True, eq=False)
class ConceptVocabulary:
    """names: C nouns, most frequent first. embeddings: (C, D) float32, unit rows. source: how they were found."""

    names: tuple[str, ...]
    embeddings: np.ndarray
    source: str = ""

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.names) != len(self.embeddings):
            raise InputError(f"{len(self.names)} concept names do not fit embeddings of shape {self.embeddings.shape}")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def build(
        cls,
        captions: Iterable[str],
        encoder: TextEncoder,
        *,
        size: int = CONCEPTS,
        at_least: int = 5,
        min_count: int = 1,
        nouns: str = LEXICON_NOUNS,
    ) -> ConceptVocabulary:
        """The `size` most frequent nouns of the captions, or as many as there are; never padded.

        at_least: the number a model needs (its `top_concepts`, K). nouns: see `noun_finder`.
        Raises InputError where fewer than `at_least` nouns occur `min_count` times.
        """
        source, find = noun_finder(nouns)
        counts = count_nouns(captions, find)
        names = frequent_nouns(counts, size, min_count=min_count)
        if len(names) < at_least:
            raise InputError(
                f"only {len(names)} different nouns occur {min_count} times or more in the captions ({source}), "
                f"but the model picks {at_least} concepts a picture: give more captions or ask for fewer concepts"
            )
        return cls(names, embed(names, encoder.encode_texts), source)

    @classmethod
    def load(cls, path: str | Path) -> ConceptVocabulary:
        """Read our `.safetensors` or the published pickle of (list of names, (C, D) tensor). Raises InputError."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: concepts cannot be read ({error.strerror})") from error
        try:
            if path.suffix == ".safetensors":
                return cls.from_bytes(data)
            from pcm.safe_pickle import reader as safe_pickle  # brings torch: seconds to import

            return cls.from_published(safe_pickle.load(data))
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def from_published(cls, value: object) -> ConceptVocabulary:
        """The published pair (list of names, (C, D) tensor or array), as `pcm.safe_pickle.reader` reads it."""
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not isinstance(value[0], (list, tuple)):
            raise InputError(f"not a published concept vocabulary: wanted (list of names, tensor), got {type(value)}")
        names, embeddings = value
        if not all(isinstance(name, str) for name in names):
            raise InputError("a concept name is no string")
        array = embeddings.float().numpy() if hasattr(embeddings, "float") else embeddings
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fi" or array.ndim != 2:
            raise InputError(
                "not a published concept vocabulary: wanted (list of names, tensor of a row a name), got "
                f"{type(embeddings).__name__} in its second place"
            )
        return cls(tuple(names), _unit_rows(array), "published")

    def save(self, path: str | Path) -> None:
        Path(path).write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Safetensors: the tensor `concept_embeddings`; names and source as JSON in the metadata `concepts`."""
        metadata = {"concepts": json.dumps({"names": self.names, "source": self.source}, ensure_ascii=False)}
        return safetensors.numpy.save({"concept_embeddings": np.ascontiguousarray(self.embeddings)}, metadata)

    @classmethod
    def from_bytes(cls, data: bytes) -> ConceptVocabulary:
        """The inverse of `to_bytes`. Raises InputError."""
        try:
            embeddings = safetensors.numpy.load(data)["concept_embeddings"]
            header = read_document(data[8 : 8 + int.from_bytes(data[:8], "little")])
            concepts = read_document(header["__metadata__"]["concepts"])
            return cls(tuple(concepts["names"]), embeddings.astype(np.float32, copy=False), concepts["source"])
        except InputError:
            raise
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise InputError(f"not a concept vocabulary in safetensors ({type(error).__name__}: {error})") from error


def embed(names: Sequence[str], encode_texts: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Concept embeddings (C, D) float32: the normalised mean over TEMPLATES of normalised text features."""
    texts = [template.format(name) for name in names for template in TEMPLATES]
    features = _unit_rows(encode_texts(texts))
    features = features.reshape(len(names), len(TEMPLATES), features.shape[1])  # (C, templates, D)
    return _unit_rows(features.mean(axis=1))  # (C, D)


def count_nouns(captions: Iterable[str], find: Callable[[Iterable[str]], Iterable[str]]) -> Counter[str]:
    """How often each noun, in the singular, occurs. With `lexicon_nouns` each word is looked up once."""
    if find is not lexicon_nouns:
        return Counter(find(captions))
    words: Counter[str] = Counter()
    remaining = iter(captions)
    while some := list(itertools.islice(remaining, CAPTIONS_AT_ONCE)):
        words.update(_WORD.findall("\n".join(some).lower()))  # a line end is in no word
    nouns: Counter[str] = Counter()
    for word, count in words.items():
        if noun := _singular_noun(word):
            nouns[noun] += count
    return nouns


def frequent_nouns(counts: Counter[str], size: int, *, min_count: int) -> tuple[str, ...]:
    """The names of a concept vocabulary: `most_frequent`, of those that occur often enough."""
    return tuple(name for name in most_frequent(counts, size) if counts[name] >= min_count)


def most_frequent(counts: Counter[str], size: int) -> list[str]:
    """The `size` most frequent nouns; ties by spelling, so that the order of the corpus does not matter."""
    return sorted(counts, key=lambda name: (-counts[name], name))[:size]


def noun_finder(nouns: str = LEXICON_NOUNS) -> tuple[str, Callable[[Iterable[str]], Iterable[str]]]:
    """How nouns are found: (what to record as the source, a function from captions to every noun in them).

    nouns: "lexicon", or the name of an installed spaCy model. Raises InputError.
    """
    if nouns == LEXICON_NOUNS:
        return LEXICON_NOUNS, lexicon_nouns
    return f"spacy:{nouns}", _spacy_nouns(nouns)


def noun_versions(nouns: str) -> dict[str, str]:
    """Package -> version of what finds nouns, as for `noun_finder`: spaCy and the model; none of the lexicon, which is
    part of this package. Raises InputError."""
    if nouns == LEXICON_NOUNS:
        return {}
    model = _spacy_model(nouns)
    import spacy

    return {"spacy": spacy.__version__, nouns: str(model.meta.get("version", "not known"))}


def lexicon_nouns(captions: Iterable[str]) -> Iterable[str]:
    """Every noun of the shipped lexicon in the captions, in the singular."""
    for caption in captions:
        for word in _WORD.findall(caption.lower()):
            if noun := _singular_noun(word):
                yield noun


@cache
def _lexicon() -> frozenset[str]:
    return frozenset(LEXICON.read_text(encoding="utf-8").split())


@cache
def _singular_noun(word: str) -> str | None:
    """The noun a word is a form of, or None: "dogs" gives "dog", "people" "person", "running" None."""
    lexicon = _lexicon()
    word = _IRREGULAR.get(word, word)
    if word in lexicon:
        return word
    singulars = (word[: -len(plural)] + singular for plural, singular in _PLURALS if word.endswith(plural))
    return next((singular for singular in singulars if singular in lexicon), None)


@cache
def _spacy_model(model: str) -> Any:
    try:
        import spacy

        return spacy.load(model, exclude=["parser", "ner"])
    except (ImportError, OSError) as error:
        raise InputError(f"spaCy model {model!r} is not installed; install it, or use the lexicon") from error


def _spacy_nouns(model: str) -> Callable[[Iterable[str]], Iterable[str]]:
    nlp = _spacy_model(model)

    def find(captions: Iterable[str]) -> Iterable[str]:
        for document in nlp.pipe(captions, batch_size=1000):
            for token in document:
                if token.pos_ == "NOUN" and _WORD.fullmatch(noun := token.lemma_.lower()):
                    yield _IRREGULAR.get(noun, noun)

    return find


def _unit_rows(features: np.ndarray) -> np.ndarray:
    """A float32 copy with the last axis L2-normalised. Raises InputError for a zero or NaN row."""
    features = np.array(features, dtype=np.float32)
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise InputError("a concept embedding is zero or not finite")
    return features / norms
