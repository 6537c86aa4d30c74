"""The word vocabulary: published id order, one end token, targets shifted by one."""

from collections import Counter

import numpy as np
import pytest

from pcm.errors import InputError
from pcm.text.concepts import count_nouns, lexicon_nouns
from pcm.text.vocabulary import UNKNOWN, Vocabulary, count_words, tokenise

CAPTIONS = ["A dog runs.", "a dog sleeps", "The dog, a brown dog!", "a cat"]


def test_words_are_lowercase_without_punctuation():
    assert tokenise("A man's “T-shirt”, on the (red) sofa — wow!") == [
        "a", "mans", "tshirt", "on", "the", "red", "sofa", "wow",
    ]  # fmt: skip
    assert tokenise("cafe\u0301") == tokenise("CAFÉ") == ["café"]
    assert tokenise("... !?") == []


def test_build_keeps_words_that_occur_often_enough_most_frequent_first():
    vocabulary = Vocabulary.build(CAPTIONS, min_count=2)
    assert vocabulary.words == ("a", "dog", UNKNOWN)
    assert len(vocabulary) == 4  # and id 0
    assert Vocabulary.build(reversed(CAPTIONS), min_count=1) == Vocabulary.build(CAPTIONS, min_count=1)


def test_build_without_a_frequent_word_says_so():
    with pytest.raises(InputError, match="no word occurs 5 times or more among 7 different words"):
        Vocabulary.build(CAPTIONS)
    with pytest.raises(InputError, match="the captions have no word, only punctuation"):
        Vocabulary.build(["...", "?!"], min_count=1)


def test_inputs_start_with_zero_and_targets_are_the_next_words():
    vocabulary = Vocabulary(("a", "dog", "runs", UNKNOWN))
    token_ids, target_ids = vocabulary.encode("A dog runs.", 6)
    np.testing.assert_array_equal(token_ids, [0, 1, 2, 3, 0, 0])
    np.testing.assert_array_equal(target_ids, [1, 2, 3, 0, -1, -1])
    assert token_ids.dtype == target_ids.dtype == np.int64


def test_long_captions_are_cut_and_still_end():
    vocabulary = Vocabulary(("a", "b"))
    token_ids, target_ids = vocabulary.encode("a b a b a b", 4)
    np.testing.assert_array_equal(token_ids, [0, 1, 2, 1])
    np.testing.assert_array_equal(target_ids, [1, 2, 1, 0])


def test_rare_words_become_the_unknown_word_or_are_left_out():
    with_unknown = Vocabulary(("a", "dog", UNKNOWN))
    np.testing.assert_array_equal(with_unknown.encode("a fluffy dog", 5)[1], [1, 3, 2, 0, -1])
    published = Vocabulary(("a", "dog"))
    np.testing.assert_array_equal(published.encode("a fluffy dog", 5)[1], [1, 2, 0, -1, -1])


def test_decoding_stops_at_the_first_zero_and_renders_it_as_a_full_stop():
    vocabulary = Vocabulary(("a", "dog", "runs", UNKNOWN))
    assert vocabulary.decode([1, 2, 3, 0, 2, 2]) == "a dog runs ."
    assert vocabulary.decode(np.array([1, 2])) == "a dog"
    assert vocabulary.decode([1, 4, 2, 0]) == "a dog ."
    assert vocabulary.decode([0]) == "."


@pytest.mark.parametrize("caption", ["a dog runs", "the brown dog sleeps", "a cat"])
def test_decoding_inverts_encoding_for_known_words(caption):
    vocabulary = Vocabulary.build(CAPTIONS, min_count=1)
    assert vocabulary.decode(vocabulary.encode(caption, 20)[1]) == caption + " ."


def test_published_file_gives_its_first_word_id_one(tmp_path):
    (tmp_path / "vocabulary.txt").write_text("a\non\nof\nUNK\n", encoding="utf-8")
    vocabulary = Vocabulary.load(tmp_path / "vocabulary.txt")
    assert vocabulary.ids == {"a": 1, "on": 2, "of": 3, "UNK": 4}
    assert len(vocabulary) == 5 and vocabulary.unknown_id == 4


def test_saved_vocabulary_loads_equal(tmp_path):
    vocabulary = Vocabulary.build([*CAPTIONS, "café 🐶"], min_count=1)
    vocabulary.save(tmp_path / "vocabulary.txt")
    assert Vocabulary.load(tmp_path / "vocabulary.txt") == vocabulary
    assert Vocabulary.from_text(vocabulary.to_text()) == vocabulary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 is blank"),
        (b"a\n\nb\n", "line 2 is blank"),
        (b"a\nb\na\n", "'a' occurs twice"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused(tmp_path, content, message):
    (tmp_path / "vocabulary.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        Vocabulary.load(tmp_path / "vocabulary.txt")
    with pytest.raises(InputError, match="not a vocabulary"):
        Vocabulary.load(tmp_path / "absent.txt")


def test_words_of_many_captions_are_those_of_each() -> None:
    captions = [
        "A man's T-shirt.", "", "ΟΔΟΣ", "ΟΔΟΣ.", "Σ", "Σ\u0301", "\u0301 begins with an accent", "cafe\u0301", "café",
        "ends with a hyphen-", "-begins with one", "\u200d joiner", "İstanbul", "DŽ", "日本語 の 猫", "two\nlines",
    ]  # fmt: skip
    captions = 200 * captions
    assert count_words(captions) == Counter(word for caption in captions for word in tokenise(caption))
    one_by_one = Counter(noun for caption in captions for noun in lexicon_nouns([caption]))
    assert count_nouns(captions, lexicon_nouns) == one_by_one and one_by_one["man"] == 200
