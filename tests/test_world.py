"""Rules of the drawn world and of its captions; nothing here draws."""

import random
from itertools import pairwise

import pytest

from pcm.embedded import world
from pcm.embedded.art import HUES, recolour
from pcm.embedded.captions import PLACE_PHRASES, corpus, describe, references
from pcm.embedded.tokens import learn_merges
from pcm.embedded.world import BY_NAME, NOUNS, PLACES, SIZE, sample_scene


def scenes(count: int, variety: str = "varied") -> list[world.Scene]:
    rng = random.Random(5)
    return [sample_scene(rng, style=world.UNSEEN_STYLE, variety=variety) for _ in range(count)]


def test_things_stand_where_their_nouns_belong_and_wear_their_own_colours():
    for scene in scenes(500):
        for thing in scene.things:
            assert scene.place in BY_NAME[thing.noun].places
            assert thing.colour in ("", *BY_NAME[thing.noun].colours)


def test_things_are_ordered_left_to_right_and_lie_inside_the_picture():
    for scene in scenes(500):
        assert [t.x for t in scene.things] == sorted(t.x for t in scene.things)
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert left > -SIZE / 8 and top > -SIZE / 8 and right < SIZE * 9 / 8 and bottom < SIZE * 9 / 8


def test_plain_scenes_of_one_content_have_one_pose():
    poses: dict[tuple, tuple] = {}
    for scene in scenes(800, "plain"):
        assert poses.setdefault(scene.content, scene.things) == scene.things
    assert len(poses) < 800  # some contents did come twice


def test_varied_scenes_of_one_content_differ():
    first, *others = [s for s in scenes(3000) if s.content == ("room", (("cup", ""),))]
    assert others and all(other.things != first.things for other in others)


def test_no_training_style_is_the_unseen_one():
    assert world.UNSEEN_STYLE not in world.SEEN_STYLES
    assert world.PAINTER_STYLE in world.SEEN_STYLES


def test_every_place_is_used_and_can_be_said():
    assert {place for noun in NOUNS for place in noun.places} == set(PLACES) == set(PLACE_PHRASES)


def test_captions_name_every_thing_and_are_short_lower_case_english():
    rng = random.Random(1)
    for scene in scenes(800):
        caption = describe(scene, rng)
        assert caption == caption.lower() and caption.isascii() and len(caption.split()) <= 19
        for thing in scene.things:
            noun = BY_NAME[thing.noun]
            assert noun.name in caption or noun.plural in caption


def test_captions_say_no_colour_that_is_not_there():
    rng = random.Random(2)
    for scene in scenes(800):
        said = set(describe(scene, rng).split()) & set(world.COLOURS)
        assert said <= {thing.colour for thing in scene.things}


def test_left_and_right_are_told_as_they_are():
    rng = random.Random(3)
    told = 0
    for scene in scenes(1500):
        caption = describe(scene, rng)
        names = [thing.noun for thing in scene.things]
        if "the left of" in caption:
            told += 1
            assert caption.index(names[0]) < caption.index("the left of") < caption.rindex(names[1])
        elif "the right of" in caption:
            told += 1
            assert caption.index(names[1]) < caption.index("the right of") < caption.rindex(names[0])
    assert told > 50


def test_references_of_a_scene_all_differ():
    rng = random.Random(4)
    for scene in scenes(100):
        assert len(set(references(scene, rng))) == 5


def test_articles_fit():
    for caption in corpus(random.Random(6), 2000):
        words = caption.split()
        for article, word in pairwise(words):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), caption


def test_the_corpus_is_the_same_every_time():
    assert corpus(random.Random(8), 50) == corpus(random.Random(8), 50)


def test_recolouring_turns_paint_and_leaves_greys():
    body = '<path fill="#dd2e44"/><path fill="#292f33"/><path fill="#fff"/>'
    turned = recolour(body, HUES["blue"])
    assert "#292f33" in turned and "#fff" in turned and "#dd2e44" not in turned
    red, green, blue = (int(turned[turned.index("#") + i :][:2], 16) for i in (1, 3, 5))
    assert blue > red and blue > green


@pytest.mark.parametrize("words", [["apple", "maple", "ape"], ["aaa", "aa", "a"]])
def test_merges_join_every_word_into_one_token(words):
    merges = learn_merges(words)
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = [pair for pair in pairwise(pieces) if pair in ranks]
            assert pairs, f"{word} stays in pieces {pieces}"
            best = min(pairs, key=ranks.__getitem__)
            at = next(i for i in range(len(pieces) - 1) if (pieces[i], pieces[i + 1]) == best)
            pieces[at : at + 2] = ["".join(best)]
        assert pieces == [word + "</w>"]
