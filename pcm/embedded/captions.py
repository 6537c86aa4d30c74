"""Captions of scenes: COCO-like English from a small grammar (counts, colours, places, left and right).

The text-only corpus and the references of the test pictures come from this one grammar.
"""

import random

from pcm.embedded.world import BY_NAME, SEEN_STYLES, Noun, Scene, Thing, sample_scene

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
DOING = {
    "stands": ("standing", "standing", "sitting"),
    "lies": ("sitting", "lying"),
    "parked": ("parked", "standing"),
    "floats": ("floating", "sailing"),
    "grows": ("growing", "standing"),
}
OPENINGS = ("a picture of {}", "a photo of {}", "there is {}", "a view of {}")
PLURAL_OPENINGS = ("a picture of {}", "a photo of {}", "there are {}", "a view of {}")


def describe(scene: Scene, rng: random.Random) -> str:
    """One caption of a scene: lower case, no full stop, at most 20 words."""
    where = rng.choice(PLACE_PHRASES[scene.place])
    if len(scene.things) == 1:
        return _one(scene.things[0], scene.place, where, rng)
    left, right = scene.things
    if left.noun == right.noun:
        return _twins(left, scene.place, where, rng)
    return _pair(left, right, scene.place, where, rng)


def references(scene: Scene, rng: random.Random, count: int = 5) -> list[str]:
    """`count` different captions of one scene."""
    found: list[str] = []
    while len(found) < count:
        caption = describe(scene, rng)
        if caption not in found:
            found.append(caption)
    return found


def corpus(rng: random.Random, count: int) -> list[str]:
    """A text-only corpus: captions of scenes that nobody draws, several of them alike as in real corpora."""
    return [describe(sample_scene(rng, style=SEEN_STYLES[0], variety="plain"), rng) for _ in range(count)]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _phrase(thing: Thing, rng: random.Random) -> str:
    """The thing with its article: "a red car"; one colour in ten goes unsaid."""
    noun = BY_NAME[thing.noun]
    if noun.name == "scissors":
        return "a pair of scissors"
    said = thing.colour if thing.colour and rng.random() < 0.9 else ""
    return _with_article(f"{said} {noun.name}".strip())


def _doing(noun: Noun, place: str, rng: random.Random) -> str:
    if place == "sky":
        return "flying"
    return rng.choice(DOING[noun.manner])


def _one(thing: Thing, place: str, where: str, rng: random.Random) -> str:
    noun = BY_NAME[thing.noun]
    what, doing = _phrase(thing, rng), _doing(noun, place, rng)
    plural = noun.name == "scissors"
    return rng.choice(
        (
            f"{what} {where}",
            f"{what} {doing} {where}",
            f"{what} {'are' if plural else 'is'} {doing} {where}",
            rng.choice(OPENINGS).format(f"{what} {where}"),
            f"{what} that {'are' if plural else 'is'} {where}",
        )
    )


def _twins(thing: Thing, place: str, where: str, rng: random.Random) -> str:
    noun = BY_NAME[thing.noun]
    colour = f"{thing.colour} " if thing.colour and rng.random() < 0.9 else ""
    what = "two pairs of scissors" if noun.name == "scissors" else f"two {colour}{noun.plural}"
    doing = _doing(noun, place, rng)
    couple = what if noun.name == "scissors" else f"a couple of {colour}{noun.plural}"
    return rng.choice(
        (
            f"{what} {where}",
            f"{what} {doing} {where}",
            f"{what} next to each other {where}",
            f"{couple} {where}",
            f"{what} are {doing} side by side {where}",
            rng.choice(PLURAL_OPENINGS).format(f"{what} {where}"),
        )
    )


def _pair(left: Thing, right: Thing, place: str, where: str, rng: random.Random) -> str:
    first, second = _phrase(left, rng), _phrase(right, rng)
    beside = rng.choice(("next to", "beside"))
    mirrored = (second, first) if rng.random() < 0.5 else (first, second)
    doing = _doing(BY_NAME[left.noun], place, rng)
    return rng.choice(
        (
            f"{first} and {second} {where}",
            f"{mirrored[0]} and {mirrored[1]} {where}",
            f"{first} {doing} {beside} {second} {where}",
            f"{mirrored[0]} {beside} {mirrored[1]} {where}",
            f"{first} {rng.choice(('on', 'to'))} the left of {second} {where}",
            f"{second} {rng.choice(('on', 'to'))} the right of {first} {where}",
            rng.choice(OPENINGS).format(f"{first} {beside} {second} {where}"),
            f"{first} on the left and {second} on the right {where}",
        )
    )
