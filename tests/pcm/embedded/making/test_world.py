"""Rules of the drawn world and of its captions; nothing here draws."""

import random
from itertools import pairwise

import pytest

from pcm.embedded.making import world
from pcm.embedded.making.art import HUES, STYLE_ICONS, recolour
from pcm.embedded.making.captions import (
    NUMBERS,
    PLACE_PHRASES,
    SECOND_PLACE_PHRASES,
    corpus,
    corpus_scenes,
    describe,
    references,
)
from pcm.embedded.making.test_sets import test_scenes as scenes_of_test_set
from pcm.embedded.making.tokens import learn_merges
from pcm.embedded.making.world import BY_NAME, DOMAINS, FIRST, NOUNS, PLACES, SECOND, SIZE, Domain, sample_scene

both_domains = pytest.mark.parametrize("domain", DOMAINS.values(), ids=lambda domain: domain.name)


def scenes(count: int, variety: world.Variety = "varied", domain: Domain = FIRST) -> list[world.Scene]:
    rng = random.Random(5)
    return [sample_scene(rng, style=domain.unseen_style, variety=variety, domain=domain) for _ in range(count)]


@both_domains
def test_things_stand_where_their_nouns_belong_and_wear_their_own_colours(domain):
    for scene in scenes(500, domain=domain):
        for thing in scene.things:
            assert scene.place in domain.places[thing.noun]
            assert thing.colour in ("", *BY_NAME[thing.noun].colours)


def test_scenes_have_one_two_or_three_things_of_which_like_ones_stand_together():
    counts = {1: 0, 2: 0, 3: 0}
    for scene in scenes(1000):
        counts[len(scene.things)] += 1
        names = [thing.noun for thing in scene.things]
        kinds = [name for at, name in enumerate(names) if at == 0 or name != names[at - 1]]
        assert len(kinds) == len(set(kinds))
    assert min(counts.values()) > 150


def test_the_domains_share_nouns_and_places_and_have_some_of_their_own():
    first, second = set(FIRST.places), set(SECOND.places)
    assert len(first) >= 40 and first & second and first - second and second - first
    assert first | second == {noun.name for noun in NOUNS}
    places = [{place for found in domain.places.values() for place in found} for domain in DOMAINS.values()]
    assert places[0] | places[1] == set(PLACES) and places[0] - places[1] and places[1] - places[0]
    assert places == [set(PLACE_PHRASES), set(SECOND_PLACE_PHRASES)]


def test_the_domains_speak_differently():
    first, second = (set(corpus(random.Random(3), 4000, domain)) for domain in DOMAINS.values())
    assert not first & second
    words = [{word for caption in captions for word in caption.split()} for captions in (first, second)]
    assert {"next", "couple"} <= words[0] - words[1] and {"rests", "together", "indoors"} <= words[1] - words[0]


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


@both_domains
def test_no_training_style_is_an_unseen_one(domain):
    assert domain.unseen_style not in world.SEEN_STYLES
    assert world.PAINTER_STYLE in world.SEEN_STYLES


@both_domains
def test_the_unseen_style_draws_every_noun_of_its_domain(domain):
    icons = STYLE_ICONS.get(domain.unseen_style, {})
    assert all(icons.get(noun.name) != "" for noun in domain.nouns)


@both_domains
def test_captions_name_every_thing_and_are_short_lower_case_english(domain):
    rng = random.Random(1)
    for scene in scenes(800, domain=domain):
        caption = describe(scene, rng)
        assert caption == caption.lower() and caption.isascii() and len(caption.split()) <= 20
        for thing in scene.things:
            noun = BY_NAME[thing.noun]
            assert noun.name in caption or noun.plural in caption


@both_domains
def test_captions_say_no_colour_that_is_not_there(domain):
    rng = random.Random(2)
    for scene in scenes(800, domain=domain):
        said = set(describe(scene, rng).split()) & set(world.COLOURS)
        assert said <= {thing.colour for thing in scene.things}


@both_domains
def test_captions_count_right(domain):
    rng = random.Random(12)
    for scene in scenes(800, domain=domain):
        words = describe(scene, rng).split()
        names = [thing.noun for thing in scene.things]
        most = max(names.count(name) for name in names)
        said = [word for word in words if word in NUMBERS.values()]
        if said:
            assert said == [NUMBERS[most]]
        elif most > 1:
            assert most == 2 and "couple" in words


def test_left_and_right_of_the_first_domain_are_told_as_they_are():
    rng = random.Random(3)
    told = 0
    for scene in scenes(1500):
        caption = describe(scene, rng)
        names = [thing.noun for thing in scene.things]
        if "the left of" in caption:
            told += 1
            assert caption.index(names[0]) < caption.index("the left of") < caption.rindex(names[-1])
        elif "the right of" in caption:
            told += 1
            assert caption.index(names[-1]) < caption.index("the right of") < caption.rindex(names[0])
    assert told > 50


def test_left_and_right_of_the_second_domain_are_told_as_they_are():
    rng = random.Random(3)
    told = 0
    for scene in scenes(1500, domain=SECOND):
        caption = describe(scene, rng)
        names = [thing.noun for thing in scene.things]
        for side, first, last in (("left of", names[0], names[-1]), ("right of", names[-1], names[0])):
            if side in caption:
                told += 1
                assert caption.index(first) < caption.index(side) < caption.rindex(last)
    assert told > 50


@both_domains
def test_references_of_a_scene_all_differ(domain):
    rng = random.Random(4)
    for scene in scenes(100, domain=domain):
        assert len(set(references(scene, rng))) == 5


@both_domains
def test_articles_fit(domain):
    for caption in corpus(random.Random(6), 2000, domain):
        for article, word in pairwise(caption.split()):
            if article in ("a", "an"):
                assert (article == "an") == (word[0] in "aeiou"), caption


@both_domains
def test_the_corpus_is_the_same_every_time(domain):
    assert corpus(random.Random(8), 50, domain) == corpus(random.Random(8), 50, domain)
    scene, caption = next(corpus_scenes(random.Random(8), 50, domain))
    assert caption == corpus(random.Random(8), 50, domain)[0] and scene.domain == domain.name


@both_domains
def test_test_scenes_are_in_the_unseen_style_and_all_of_different_content(domain):
    found = scenes_of_test_set(9, 60, domain)
    assert {scene.style for scene in found} == {domain.unseen_style}
    assert len({scene.content for scene in found}) == 60


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
