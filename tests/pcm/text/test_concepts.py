"""Concepts are the frequent nouns of the captions, embedded with several templates."""

import pickle

import numpy as np
import pytest
import torch

from pcm.errors import InputError
from pcm.text.concepts import (
    TEMPLATES,
    ConceptVocabulary,
    count_nouns,
    embed,
    lexicon_nouns,
    most_frequent,
    noun_finder,
    noun_versions,
)

CAPTIONS = [
    "Two dogs are running on the red beach .",
    "A man stands next to his dog and looks at the sky",
    "People are sitting on a bench, eating apples",
    "three women and their children at the beach",
    "A woman is holding the leashes of her dogs",
    "The man is riding a wave on a surfboard",
    "An old tree with green leaves and a few knives",
    "a kid wearing glasses and a T-shirt flies a kite",
]


class HashEncoder:
    """A text encoder of its own: the direction of a text depends on all of its letters, rows are normalised."""

    def encode_texts(self, texts):
        rows = [np.random.default_rng(list(text.encode())).normal(size=16) for text in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


def test_nouns_are_counted_in_the_singular():
    counts = count_nouns(CAPTIONS, lexicon_nouns)
    assert most_frequent(counts, 4) == ["dog", "beach", "man", "woman"]
    assert counts["dog"] == 3
    assert {"person", "child", "leaf", "knife", "leash", "apple", "glasses", "t-shirt", "kite"} <= set(counts)


def test_verbs_adjectives_and_function_words_are_no_nouns():
    counts = count_nouns(CAPTIONS, lexicon_nouns)
    assert not {
        "running",
        "run",
        "red",
        "stand",
        "look",
        "sit",
        "eating",
        "hold",
        "riding",
        "old",
        "green",
        "few",
    } & set(counts)
    assert not {"two", "the", "his", "hi", "their", "a", "is", "are", "next", "fly", "flies", "doe"} & set(counts)
    assert not count_nouns(["this was its does has as us"], lexicon_nouns)


@pytest.mark.parametrize(
    ("plural", "singular"),
    [("buses", "bus"), ("dresses", "dress"), ("puppies", "puppy"), ("wolves", "wolf"), ("firemen", "fireman"),
     ("shoes", "shoe"), ("feet", "foot"), ("sheep", "sheep"), ("jeans", "jeans"), ("skateboards", "skateboard")],
)  # fmt: skip
def test_plurals_fold_to_their_noun(plural, singular):
    assert list(lexicon_nouns([f"many {plural.upper()}!"])) == [singular]


def test_the_order_of_the_corpus_does_not_matter():
    counts = count_nouns(CAPTIONS, lexicon_nouns)
    assert most_frequent(counts, 50) == most_frequent(count_nouns(reversed(CAPTIONS), lexicon_nouns), 50)


def test_embedding_is_the_normalised_mean_over_templates():
    encoder = HashEncoder()
    embeddings = embed(["dog", "cat"], encoder.encode_texts)
    for name, row in zip(["dog", "cat"], embeddings, strict=True):
        mean = np.mean([encoder.encode_texts([template.format(name)])[0] for template in TEMPLATES], axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
    assert embeddings.dtype == np.float32
    assert TEMPLATES[0] == "A photo of {}"  # the paper's


def test_build_takes_what_there_is_and_never_pads():
    concepts = ConceptVocabulary.build(CAPTIONS, HashEncoder(), size=400)
    assert 10 < len(concepts) < 40 and concepts.embeddings.shape == (len(concepts), 16)
    assert concepts.names[0] == "dog" and concepts.source == "lexicon"
    assert len(ConceptVocabulary.build(CAPTIONS, HashEncoder(), size=7)) == 7
    assert ConceptVocabulary.build(CAPTIONS, HashEncoder(), min_count=3, at_least=1).names == ("dog",)


def test_fewer_nouns_than_the_model_picks_is_an_error_with_numbers():
    with pytest.raises(InputError, match=r"only 2 different nouns occur 1 times .* picks 5 concepts"):
        ConceptVocabulary.build(["a dog and a cat"], HashEncoder())
    with pytest.raises(InputError, match="only 0 different nouns"):
        ConceptVocabulary.build(["... 12 !", ""], HashEncoder())


def test_saved_concepts_load_equal(tmp_path):
    concepts = ConceptVocabulary.build(CAPTIONS, HashEncoder())
    concepts.save(tmp_path / "concepts.safetensors")
    loaded = ConceptVocabulary.load(tmp_path / "concepts.safetensors")
    assert (loaded.names, loaded.source) == (concepts.names, concepts.source)
    np.testing.assert_array_equal(loaded.embeddings, concepts.embeddings)
    assert concepts.to_bytes() == loaded.to_bytes()


@pytest.mark.parametrize("kind", ["tensor", "half", "array"])
def test_published_pickle_loads_as_unit_rows(tmp_path, kind):
    values = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    matrix = {"tensor": torch.tensor(values), "half": torch.tensor(values).half(), "array": values}[kind]
    (tmp_path / "concepts.pkl").write_bytes(pickle.dumps((["dog", "cat", "kite"], matrix)))
    concepts = ConceptVocabulary.load(tmp_path / "concepts.pkl")
    assert concepts.names == ("dog", "cat", "kite")
    np.testing.assert_allclose(concepts.embeddings, values / np.linalg.norm(values, axis=1, keepdims=True), atol=2e-3)


@pytest.mark.parametrize(
    "value",
    [
        ["dog"], (["dog"], np.ones((2, 4), np.float32)), (["dog"], np.zeros((1, 4))), 7, ([1], np.ones((1, 4))),
        (["dog"], [[1.0]]), (["dog"], 3), (["dog"], 3.0), (["dog"], None), (["dog"], np.array([["x"]])),
        (["dog"], np.ones(1)), (["dog"], np.array(1.0)), (["dog"], np.array([[1j, 2]])), (["dog"], torch.ones(1)),
    ],
)  # fmt: skip
def test_pickles_that_are_no_concepts_are_refused(tmp_path, value):
    (tmp_path / "concepts.pkl").write_bytes(pickle.dumps(value))
    with pytest.raises(InputError, match=r"concepts\.pkl"):
        ConceptVocabulary.load(tmp_path / "concepts.pkl")


@pytest.mark.parametrize("data", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"garbage" * 9])
def test_files_that_are_no_safetensors_are_refused(tmp_path, data):
    (tmp_path / "concepts.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="not a concept vocabulary"):
        ConceptVocabulary.load(tmp_path / "concepts.safetensors")


def test_spacy_is_not_used_because_it_is_installed(tmp_path, monkeypatch):
    for package in ("spacy", "en_core_web_sm"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    source, find = noun_finder()
    assert source == "lexicon" and list(find(["Two dogs run."])) == ["dog"]


def test_the_lexicon_is_part_of_this_package():
    assert noun_versions("lexicon") == {}


def test_the_versions_of_spacy_and_its_model_are_told(tmp_path):
    spacy = pytest.importorskip("spacy", reason="spaCy is not installed")
    model = spacy.blank("en")
    rules = model.add_pipe("attribute_ruler")
    rules.add([[{"LOWER": {"IN": ["dog", "dogs"]}}]], {"POS": "NOUN", "LEMMA": "dog"})
    model.meta["version"] = "1.2.3"
    model.to_disk(tmp_path / "model")
    name = str(tmp_path / "model")
    assert noun_versions(name) == {"spacy": spacy.__version__, name: "1.2.3"}
    source, find = noun_finder(name)
    assert source == f"spacy:{name}" and list(find(["Two dogs run."])) == ["dog"]


def test_a_spacy_model_that_is_not_installed_is_named():
    with pytest.raises(InputError, match="'xx_no_such_model' is not installed"):
        noun_versions("xx_no_such_model")
    with pytest.raises(InputError, match="'xx_no_such_model' is not installed"):
        noun_finder("xx_no_such_model")
