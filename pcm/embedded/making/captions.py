"""Captions of scenes: COCO-like English from two small grammars, one a domain (counts, colours, places, relations).

The text-only corpora and the references of the test pictures come from these grammars. The first domain's sentences
are those of MSCOCO ("two dogs sitting on the beach"); the second's tell more of what goes on, as Flickr30k's do ("a
dog rests near a boat by the sea"), and have words, verbs and orders of their own.
"""

import random
from collections.abc import Iterator
from itertools import groupby

from pcm.embedded.making.world import BY_NAME, FIRST, PAINTER_STYLE, Domain, Noun, Scene, sample_scene

PLACE_PHRASES = {
    "grass": ("on the grass", "on the grass", "in a grassy field", "in a field"),
    "street": ("on the street", "on the street", "on a city street", "on the road"),
    "table": ("on a table", "on a table", "on a wooden table", "on top of a table"),
    "beach": ("on the beach", "on the beach", "on a sandy beach", "on the sand"),
    "snow": ("in the snow", "in the snow", "on the snowy ground", "in a snowy field"),
    "sky": ("in the sky", "in the sky", "up in the sky", "in the air"),
    "room": ("in a room", "in a room", "in a living room", "on the floor"),
    "water": ("on the water", "on the water", "in the water", "on the sea"),
}
SECOND_PLACE_PHRASES = {
    "grass": ("in the park", "in the park", "on a wide lawn", "across a meadow"),
    "street": ("along the sidewalk", "in the city", "by the road", "downtown"),
    "beach": ("by the ocean", "by the ocean", "along the shore", "near the waves"),
    "snow": ("on a snowy hill", "on a snowy hill", "through the snow", "in winter"),
    "room": ("indoors", "indoors", "inside a building", "in a small apartment"),
    "water": ("in a lake", "in a lake", "across the lake", "in a river"),
    "mountain": ("in the mountains", "on a mountain trail", "by a rocky hill", "outdoors"),
    "stage": ("on stage", "on stage", "at a concert", "before an audience"),
}
DOING = {
    "stands": ("standing", "standing", "sitting"),
    "lies": ("sitting", "lying"),
    "parked": ("parked", "standing"),
    "floats": ("floating", "sailing"),
    "grows": ("growing", "standing"),
    "swims": ("swimming", "lying"),
}
DOES = {  # one thing, several things
    "stands": (("stands", "stand"), ("waits", "wait"), ("rests", "rest")),
    "lies": (("lies", "lie"), ("rests", "rest"), ("was left", "were left")),
    "parked": (("waits", "wait"), ("has stopped", "have stopped"), ("stands", "stand")),
    "floats": (("drifts", "drift"), ("floats", "float")),
    "grows": (("grows", "grow"), ("stands", "stand")),
    "swims": (("swims", "swim"), ("rests", "rest")),
}
OPENINGS = ("a picture of {}", "a photo of {}", "there is {}", "a view of {}")
PLURAL_OPENINGS = ("a picture of {}", "a photo of {}", "there are {}", "a view of {}")
CORPUS_SIZE = 24_000
NUMBERS = {2: "two", 3: "three"}

Group = tuple[Noun, str, int]  # a kind of thing, its colour, how many stand together


def describe(scene: Scene, rng: random.Random) -> str:
    """One caption of a scene in its domain's words: lower case, no full stop, at most 20 words."""
    groups = [(BY_NAME[name], next(run).colour) for name, run in groupby(scene.things, key=lambda thing: thing.noun)]
    counts = [len(list(run)) for _, run in groupby(scene.things, key=lambda thing: thing.noun)]
    counted = [(noun, colour, count) for (noun, colour), count in zip(groups, counts, strict=True)]
    return (_first if scene.domain == FIRST.name else _second)(counted, scene.place, rng)


def references(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """`count` different captions of one scene."""
    found: list[str] = []
    while len(found) < count:
        caption = describe(scene, rng)
        if caption not in found:
            found.append(caption)
    return found


def corpus(rng: random.Random, count: int, domain: Domain = FIRST) -> list[str]:
    """A text-only corpus: captions of scenes that nobody draws, several of them alike as in real corpora."""
    return [caption for _, caption in corpus_scenes(rng, count, domain)]


def corpus_scenes(rng: random.Random, count: int, domain: Domain = FIRST) -> Iterator[tuple[Scene, str]]:
    """The captions of `corpus` with the scenes they tell, in its order. A domain's own corpus (the pack's file) is
    that of random.Random(domain.corpus_seed) with CORPUS_SIZE captions."""
    for _ in range(count):
        scene = sample_scene(rng, style=PAINTER_STYLE, variety="plain", domain=domain)
        yield scene, describe(scene, rng)


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _phrase(group: Group, rng: random.Random, one: str = "a", many: str = "") -> str:
    """The things with their article or number: "a red car", "two dogs"; one colour in ten goes unsaid.

    `one` is the article of a single thing, `many` takes the place of a number.
    """
    noun, colour, count = group
    said = f"{colour} " if colour and rng.random() < 0.9 else ""
    number = many or NUMBERS.get(count, "")
    if noun.name == "scissors":
        return f"{number} pairs of scissors" if count > 1 else f"{one} pair of scissors"
    if count > 1:
        return f"{number} {said}{noun.plural}"
    return with_article(f"{said}{noun.name}") if one == "a" else f"{one} {said}{noun.name}"


def _many(groups: list[Group]) -> bool:
    """Whether the verb is plural."""
    return len(groups) > 1 or groups[0][2] > 1 or groups[0][0].name == "scissors"


def _first(groups: list[Group], place: str, rng: random.Random) -> str:
    """A sentence of the first domain."""
    where = rng.choice(PLACE_PHRASES[place])
    doing = "flying" if place == "sky" else rng.choice(DOING[groups[0][0].manner])
    openings = PLURAL_OPENINGS if groups[0][2] > 1 else OPENINGS
    if len(groups) == 1:
        count = groups[0][2]
        what, verb = _phrase(groups[0], rng), "are" if _many(groups) else "is"
        forms = [
            f"{what} {where}",
            f"{what} {doing} {where}",
            f"{what} {verb} {doing} {where}",
            rng.choice(openings).format(f"{what} {where}"),
        ]
        if count == 1:
            forms.append(f"{what} that {verb} {where}")
        else:
            forms.append(f"{what} are {doing} {'side by side' if count == 2 else 'in a row'} {where}")
            forms.append(f"{what} next to each other {where}")
            alike = "a couple of" if count == 2 and groups[0][0].name != "scissors" else ""
            forms.append(f"{_phrase(groups[0], rng, many=alike)} {where}")
        return rng.choice(forms)
    left, *_, right = names = [_phrase(group, rng) for group in groups]
    beside = rng.choice(("next to", "beside"))
    mixed = rng.sample(names, len(names))
    if len(groups) == 2:
        forms = [
            f"{left} and {right} {where}",
            f"{mixed[0]} and {mixed[1]} {where}",
            f"{left} {doing} {beside} {right} {where}",
            f"{mixed[0]} {beside} {mixed[1]} {where}",
            f"{left} {rng.choice(('on', 'to'))} the left of {right} {where}",
            f"{right} {rng.choice(('on', 'to'))} the right of {left} {where}",
            rng.choice(openings).format(f"{left} {beside} {right} {where}"),
            f"{left} on the left and {right} on the right {where}",
        ]
    else:
        forms = [
            f"{left} and {names[1]} and {right} {where}",
            f"{mixed[0]} with {mixed[1]} and {mixed[2]} {where}",
            f"{names[1]} between {left} and {right} {where}",
            f"{names[1]} in between {right} and {left} {where}",
            rng.choice(OPENINGS).format(f"{left} {beside} {names[1]} and {right} {where}"),
        ]
    return rng.choice(forms)


def _second(groups: list[Group], place: str, rng: random.Random) -> str:
    """A sentence of the second domain."""
    where = rng.choice(SECOND_PLACE_PHRASES[place])
    one, close = rng.choice(("a", "a", "one", "the")), rng.choice(("near", "close to", "by"))
    left, *others = groups
    if not others:
        what, does = _phrase(left, rng, one), _does(left, rng)
        forms = [
            f"{what} {does} {where}",
            f"{what} {does} {'alone' if left[2] == 1 else 'together'} {where}",
            f"{where} {what} {does}",
            f"{what} can be seen {where}",
            f"{where} we see {what}",
        ]
        return rng.choice(forms)
    first, *others = rng.sample(groups, len(groups))
    what, does = _phrase(first, rng, one), _does(first, rng)
    rest = " and ".join(_phrase(other, rng) for other in others)
    forms = [
        f"{what} {does} {close} {rest} {where}",
        f"{where} {what} {does} {close} {rest}",
        f"{what} {does} {where} with {rest}",
        f"{what} and {rest} are together {where}",
        f"{where} we see {what} and {rest}",
    ]
    if len(groups) == 2:
        side = "left" if first is left else "right"
        forms += [
            f"{what} {does} {side} of {rest} {where}",
            f"{where} {what} {'are' if first[2] > 1 else 'is'} {side} of {rest}",
        ]
    return rng.choice(forms)


def _does(group: Group, rng: random.Random) -> str:
    noun, _, count = group
    return rng.choice(DOES[noun.manner])[min(count, 2) - 1]
