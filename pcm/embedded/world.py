"""The drawn world: which nouns, places and colours exist, and how a scene is composed.

A scene is at most two things in one place. `sample_scene` draws one at random; `pcm.embedded.art` draws its picture
and `pcm.embedded.captions` says it in words. Nothing here renders anything, so it needs no drawing library.
"""

import random
from dataclasses import dataclass
from typing import Literal

SIZE = 64  # pixels, both sides of a picture
PLACES = ("grass", "street", "table", "beach", "snow", "sky", "room", "water")
COLOURS = ("red", "blue", "green", "yellow", "purple", "pink")
SEEN_STYLES = ("twemoji", "noto", "emojione")  # drawing styles any training may use
UNSEEN_STYLE = "fluent-emoji-flat"  # used by nothing but the "real photos" of the test sets
PAINTER_STYLE = "twemoji"  # the one style the text-to-image model learns: fewer shapes to learn, better shapes

Variety = Literal["plain", "varied"]
Manner = Literal["stands", "lies", "parked", "floats", "grows"]  # which verbs fit


@dataclass(frozen=True)
class Noun:
    """A kind of thing: its words, its icon in every drawing style, where it is found (a place named twice is twice as
    likely), what it does there, and the colours it is painted in."""

    name: str
    plural: str
    icon: str
    manner: Manner
    places: tuple[str, ...]
    colours: tuple[str, ...] = ()


OUTDOORS = ("grass", "street", "beach", "snow")
INDOORS = ("table", "room")
PAINTS = ("red", "blue", "green", "yellow", "purple", "pink")

NOUNS: tuple[Noun, ...] = (
    Noun("apple", "apples", "red-apple", "lies", ("table", "grass", "room"), ("red", "green", "yellow")),
    Noun("banana", "bananas", "banana", "lies", ("table", "room", "beach")),
    Noun("orange", "oranges", "tangerine", "lies", ("table", "grass", "room")),
    Noun("pizza", "pizzas", "pizza", "lies", ("table", "room", "grass")),
    Noun("cake", "cakes", "shortcake", "lies", ("table", "room")),
    Noun("donut", "donuts", "doughnut", "lies", ("table", "room", "beach")),
    Noun("cup", "cups", "hot-beverage", "lies", ("table", "room")),
    Noun("book", "books", "closed-book", "lies", ("table", "room", "grass"), PAINTS),
    Noun("clock", "clocks", "alarm-clock", "stands", ("table", "room")),
    Noun("umbrella", "umbrellas", "umbrella", "stands", ("beach", "grass", "street", "snow"), PAINTS),
    Noun("laptop", "laptops", "laptop", "stands", ("table", "room")),
    Noun("scissors", "scissors", "scissors", "lies", ("table", "room")),
    Noun("couch", "couches", "couch-and-lamp", "stands", ("room", "grass", "street")),
    Noun("ball", "balls", "soccer-ball", "lies", ("grass", "beach", "street", "snow", "room")),
    Noun("tree", "trees", "deciduous-tree", "grows", ("grass", "street", "snow", "beach")),
    Noun("flower", "flowers", "tulip", "grows", ("grass", "table", "room", "snow")),
    Noun("house", "houses", "house", "stands", ("grass", "street", "snow", "beach")),
    Noun("dog", "dogs", "dog", "stands", (*OUTDOORS, "room")),
    Noun("cat", "cats", "cat", "stands", ("grass", "street", "snow", "room", "table")),
    Noun("horse", "horses", "horse", "stands", OUTDOORS),
    Noun("cow", "cows", "cow", "stands", OUTDOORS),
    Noun("sheep", "sheep", "ewe", "stands", ("grass", "snow", "street")),
    Noun("elephant", "elephants", "elephant", "stands", ("grass", "beach", "street", "water")),
    Noun("bird", "birds", "bird", "stands", ("grass", "snow", "water", "sky", "sky")),
    Noun("car", "cars", "automobile", "parked", OUTDOORS, PAINTS),
    Noun("bus", "buses", "bus", "parked", ("street", "snow", "grass"), PAINTS),
    Noun("truck", "trucks", "delivery-truck", "parked", OUTDOORS, PAINTS),
    Noun("train", "trains", "locomotive", "parked", ("grass", "snow", "street")),
    Noun("boat", "boats", "sailboat", "floats", ("water", "water", "water", "beach")),
    Noun("airplane", "airplanes", "airplane", "parked", ("sky", "sky", "sky", "street", "grass")),
    Noun("bicycle", "bicycles", "bicycle", "parked", OUTDOORS),
    Noun("motorcycle", "motorcycles", "motorcycle", "parked", OUTDOORS),
)
BY_NAME = {noun.name: noun for noun in NOUNS}


@dataclass(frozen=True)
class Thing:
    """One drawn object: centre and width in pixels, tilt in degrees clockwise; colour "" keeps the icon's own."""

    noun: str
    colour: str
    x: float
    y: float
    size: float
    tilt: float = 0.0
    flipped: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels, tilt ignored."""
        half = self.size / 2
        return self.x - half, self.y - half, self.x + half, self.y + half


@dataclass(frozen=True)
class Scene:
    """Things in a place, ordered left to right. `backdrop` seeds the variation of the background."""

    place: str
    things: tuple[Thing, ...]
    style: str
    variety: Variety
    backdrop: int

    @property
    def nouns(self) -> frozenset[str]:
        return frozenset(thing.noun for thing in self.things)

    @property
    def content(self) -> tuple:
        """What a caption can tell: the place and (noun, colour) from left to right."""
        return self.place, tuple((thing.noun, thing.colour) for thing in self.things)


def sample_scene(rng: random.Random, *, style: str, variety: Variety, things: int | None = None) -> Scene:
    """A random scene of `things` (1 or 2, drawn when None) things.

    "plain": fixed sites, sizes and background, as in the text-to-image model's training pictures: what a caption does
    not say is hardly ever left to chance, so the model needs fewer steps. "varied": sizes, heights, tilt, mirror image
    and background vary, as in photographs.
    """
    count = things or rng.choice((1, 1, 2, 2, 2))
    first = rng.choice(NOUNS)
    place = rng.choice(first.places)
    nouns = [first]
    if count == 2:
        same = rng.random() < 0.3
        neighbours = [noun for noun in NOUNS if place in noun.places and noun is not first]
        nouns.append(first if same else rng.choice(neighbours))
        rng.shuffle(nouns)
    pair_colour = _colour(rng, first)  # a pair of one kind has one colour, so that "two red cars" can be said
    twins = count == 2 and nouns[0] is nouns[1]
    placed = tuple(
        _place(rng, noun, pair_colour if twins else _colour(rng, noun), place, site, count, variety)
        for site, noun in enumerate(nouns)
    )
    return Scene(place=place, things=placed, style=style, variety=variety, backdrop=rng.randrange(2**31))


def _colour(rng: random.Random, noun: Noun) -> str:
    return rng.choice(noun.colours) if noun.colours and rng.random() < 0.8 else ""


def _place(rng: random.Random, noun: Noun, colour: str, place: str, site: int, count: int, variety: Variety) -> Thing:
    size = 42.0 if count == 1 else 29.0
    x = 32.0 if count == 1 else (16.5, 47.5)[site]
    flies = place == "sky"
    y = 31.0 if flies else 55.0 - size / 2
    if variety == "plain":
        return Thing(noun.name, colour, x, y, size)
    size *= rng.uniform(0.8, 1.12)
    y = y + rng.uniform(-7, 7) if flies else 55.0 - size / 2 + rng.uniform(-5, 4)
    x += rng.uniform(-7, 7) if count == 1 else rng.uniform(-2, 2)
    return Thing(noun.name, colour, x, y, size, rng.uniform(-12, 12), rng.random() < 0.5)
