"""The drawn world: which nouns, places and colours exist, its two domains, and how a scene is composed.

A scene is one to three things in one place. `sample_scene` draws one at random; `pcm.embedded.making.art` draws its
picture and `pcm.embedded.making.captions` says it in words. Nothing here renders anything, so it needs no drawing
library.

The two domains stand to each other as MSCOCO and Flickr30k do: other nouns and places, other sentences, and "real
photos" in another drawing style. No training sees either of those two styles.
"""

import random
from dataclasses import dataclass, field
from typing import Literal

SIZE = 64  # pixels, both sides of a picture
PLACES = ("grass", "street", "table", "beach", "snow", "sky", "room", "water", "mountain", "stage")
COLOURS = ("red", "blue", "green", "yellow", "purple", "pink")
SEEN_STYLES = (  # drawing styles any training may use; only the first, second and third have every noun
    "twemoji",
    "noto",
    "openmoji",
    "emojione",
    "noto-v1",
    "emojione-v1",
    "streamline-emojis",
    "emojione-monotone",
)
MIXED = "mixed"  # as a scene's style: every thing in a seen style of its own, one that has its noun
PAINTER_STYLE = "twemoji"  # the one style the text-to-image model learns: fewer shapes to learn, better shapes

Variety = Literal["plain", "varied", "wild"]
Manner = Literal["stands", "lies", "parked", "floats", "grows", "swims"]  # which verbs fit


@dataclass(frozen=True)
class Noun:
    """A kind of thing: its words, the usual name of its icon, which verbs fit, and the colours it is painted in."""

    name: str
    plural: str
    icon: str
    manner: Manner
    colours: tuple[str, ...] = ()


PAINTS = ("red", "blue", "green", "yellow", "purple", "pink")

NOUNS: tuple[Noun, ...] = (
    Noun("apple", "apples", "red-apple", "lies", ("red", "green", "yellow")),
    Noun("banana", "bananas", "banana", "lies"),
    Noun("orange", "oranges", "tangerine", "lies"),
    Noun("pizza", "pizzas", "pizza", "lies"),
    Noun("cake", "cakes", "birthday-cake", "lies"),
    Noun("donut", "donuts", "doughnut", "lies"),
    Noun("carrot", "carrots", "carrot", "lies"),
    Noun("cup", "cups", "hot-beverage", "lies"),
    Noun("book", "books", "closed-book", "lies", PAINTS),
    Noun("clock", "clocks", "alarm-clock", "stands"),
    Noun("umbrella", "umbrellas", "umbrella", "stands", PAINTS),
    Noun("laptop", "laptops", "laptop", "stands"),
    Noun("scissors", "scissors", "scissors", "lies"),
    Noun("couch", "couches", "couch-and-lamp", "stands"),
    Noun("bed", "beds", "bed", "stands"),
    Noun("toilet", "toilets", "toilet", "stands"),
    Noun("television", "televisions", "television", "stands"),
    Noun("phone", "phones", "mobile-phone", "lies"),
    Noun("backpack", "backpacks", "backpack", "lies", PAINTS),
    Noun("ball", "balls", "soccer-ball", "lies"),
    Noun("kite", "kites", "kite", "lies"),
    Noun("tree", "trees", "deciduous-tree", "grows"),
    Noun("flower", "flowers", "tulip", "grows"),
    Noun("house", "houses", "house", "stands"),
    Noun("dog", "dogs", "dog", "stands"),
    Noun("cat", "cats", "cat", "stands"),
    Noun("horse", "horses", "horse", "stands"),
    Noun("cow", "cows", "cow", "stands"),
    Noun("sheep", "sheep", "ewe", "stands"),
    Noun("elephant", "elephants", "elephant", "stands"),
    Noun("bear", "bears", "bear", "stands"),
    Noun("zebra", "zebras", "zebra", "stands"),
    Noun("giraffe", "giraffes", "giraffe", "stands"),
    Noun("bird", "birds", "bird", "stands"),
    Noun("car", "cars", "automobile", "parked", PAINTS),
    Noun("bus", "buses", "bus", "parked", PAINTS),
    Noun("truck", "trucks", "delivery-truck", "parked", PAINTS),
    Noun("train", "trains", "locomotive", "parked"),
    Noun("boat", "boats", "sailboat", "floats"),
    Noun("airplane", "airplanes", "airplane", "parked"),
    Noun("bicycle", "bicycles", "bicycle", "parked"),
    Noun("motorcycle", "motorcycles", "motorcycle", "parked"),
    # of the second domain only
    Noun("guitar", "guitars", "guitar", "lies"),
    Noun("camera", "cameras", "camera", "lies"),
    Noun("hat", "hats", "top-hat", "lies"),
    Noun("balloon", "balloons", "balloon", "lies", PAINTS),
    Noun("fish", "fish", "fish", "swims"),
    Noun("tractor", "tractors", "tractor", "parked"),
    Noun("monkey", "monkeys", "monkey", "stands"),
    Noun("shoe", "shoes", "running-shoe", "lies"),
)
BY_NAME = {noun.name: noun for noun in NOUNS}


@dataclass(frozen=True)
class Domain:
    """Where each of its nouns is found (a place named twice is twice as likely), which nouns come `often` times as
    often as the others, the drawing style of its "real photos", which no training sees, what its corpus and test sets
    are called on command lines, and the seeds they are made with."""

    name: str
    unseen_style: str
    corpus: str  # as in --corpus
    test_sets: dict[str, str] = field(repr=False)  # by split, as in --images embedded:...
    corpus_seed: int
    test_seeds: dict[str, int] = field(repr=False)
    places: dict[str, tuple[str, ...]] = field(repr=False)
    often: dict[str, int] = field(repr=False)

    @property
    def nouns(self) -> tuple[Noun, ...]:
        return tuple(noun for noun in NOUNS if noun.name in self.places)

    def neighbours(self, noun: Noun, place: str) -> list[Noun]:
        """The other nouns that are found in a place, frequent ones several times."""
        others = [other for other in self.nouns if other is not noun and place in self.places[other.name]]
        return [other for other in others for _ in range(self.often.get(other.name, 1))]

    def frequent(self) -> list[Noun]:
        """Every noun, frequent ones several times."""
        return [noun for noun in self.nouns for _ in range(self.often.get(noun.name, 1))]


_OUTDOORS = ("grass", "street", "beach", "snow")

FIRST = Domain(
    name="first",
    unseen_style="fluent-emoji-flat",
    corpus="embedded",
    test_sets={"val": "val", "test": "test"},
    corpus_seed=1000,
    test_seeds={"val": 2000, "test": 3000},
    often={},
    places={
        "apple": ("table", "grass", "room"),
        "banana": ("table", "room", "beach"),
        "orange": ("table", "grass", "room"),
        "pizza": ("table", "room", "grass"),
        "cake": ("table", "table", "room"),
        "donut": ("table", "room", "beach"),
        "carrot": ("table", "table", "grass"),
        "cup": ("table", "room"),
        "book": ("table", "room", "grass"),
        "clock": ("table", "room"),
        "umbrella": ("beach", "grass", "street", "snow"),
        "laptop": ("table", "room"),
        "scissors": ("table", "room"),
        "couch": ("room", "room", "street"),
        "bed": ("room",),
        "toilet": ("room",),
        "television": ("room", "table"),
        "phone": ("table", "room"),
        "backpack": ("room", "table", "grass", "beach"),
        "ball": ("grass", "beach", "street", "snow", "room"),
        "kite": ("sky", "sky", "sky", "beach"),
        "tree": ("grass", "street", "snow", "beach"),
        "flower": ("grass", "table", "room", "snow"),
        "house": ("grass", "street", "snow", "beach"),
        "dog": (*_OUTDOORS, "room"),
        "cat": ("grass", "street", "snow", "room", "table"),
        "horse": _OUTDOORS,
        "cow": _OUTDOORS,
        "sheep": ("grass", "snow", "street"),
        "elephant": ("grass", "beach", "street", "water"),
        "bear": ("grass", "snow", "water"),
        "zebra": ("grass", "grass", "street", "water"),
        "giraffe": ("grass", "grass", "street", "beach"),
        "bird": ("grass", "snow", "water", "sky", "sky"),
        "car": _OUTDOORS,
        "bus": ("street", "snow", "grass"),
        "truck": _OUTDOORS,
        "train": ("grass", "snow", "street"),
        "boat": ("water", "water", "water", "beach"),
        "airplane": ("sky", "sky", "sky", "street", "grass"),
        "bicycle": _OUTDOORS,
        "motorcycle": _OUTDOORS,
    },
)
SECOND = Domain(
    name="second",
    unseen_style="fxemoji",
    corpus="embedded-second",
    test_sets={"val": "val@second", "test": "test@second"},
    corpus_seed=1001,
    test_seeds={"val": 2001, "test": 3001},
    often={"dog": 3, "ball": 2, "bicycle": 2, "guitar": 2},
    places={
        "apple": ("stage", "grass", "room"),
        "cup": ("room", "stage"),
        "book": ("room", "stage", "mountain"),
        "clock": ("room", "street"),
        "umbrella": ("street", "street", "beach", "mountain"),
        "backpack": ("mountain", "mountain", "street", "room"),
        "ball": ("grass", "beach", "street", "stage"),
        "tree": ("mountain", "mountain", "street", "grass"),
        "flower": ("mountain", "grass", "room", "stage"),
        "house": ("mountain", "mountain", "beach", "snow"),
        "dog": ("beach", "snow", "grass", "water", "mountain", "street"),
        "cat": ("street", "room", "stage"),
        "horse": ("mountain", "beach", "snow", "water"),
        "elephant": ("street", "stage", "water"),
        "car": ("street", "mountain", "snow"),
        "bus": ("street", "street", "mountain"),
        "truck": ("mountain", "snow", "beach"),
        "train": ("mountain", "snow"),
        "boat": ("water", "water", "beach"),
        "bicycle": ("street", "street", "mountain", "snow"),
        "motorcycle": ("street", "mountain", "beach"),
        "television": ("stage", "room"),
        "cake": ("stage", "room", "beach"),
        "guitar": ("stage", "stage", "room", "beach"),
        "camera": ("stage", "room", "mountain"),
        "hat": ("stage", "beach", "snow", "room"),
        "balloon": ("stage", "room", "street", "grass"),
        "fish": ("water", "water", "beach"),
        "tractor": ("mountain", "grass", "snow"),
        "monkey": ("grass", "stage", "street"),
        "shoe": ("room", "beach", "street"),
    },
)
DOMAINS = {domain.name: domain for domain in (FIRST, SECOND)}


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
    """Things in a place, ordered left to right. `backdrop` seeds what varies in its drawing."""

    place: str
    things: tuple[Thing, ...]
    style: str
    variety: Variety
    backdrop: int
    domain: str  # one of DOMAINS, whose words tell it

    @property
    def nouns(self) -> frozenset[str]:
        return frozenset(thing.noun for thing in self.things)

    @property
    def content(self) -> tuple:
        """What a caption can tell: the place and (noun, colour) from left to right."""
        return self.place, tuple((thing.noun, thing.colour) for thing in self.things)


MOST_THINGS = 3
_COUNTS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3)  # 35, 45 and 20 %
#: Centre of each thing from left to right, and their size, for one, two and three things; pixels.
_SITES = {1: ((32.0,), 42.0), 2: ((16.5, 47.5), 29.0), 3: ((11.5, 32.0, 52.5), 22.0)}


def sample_scene(
    rng: random.Random, *, style: str, variety: Variety, things: int | None = None, domain: Domain = FIRST
) -> Scene:
    """A random scene of `things` (1, 2 or 3, drawn when None) things of a domain.

    "plain": fixed sites, sizes and background, as in the text-to-image model's training pictures: what a caption does
    not say is hardly ever left to chance, so the model needs fewer steps. "varied": sizes, heights, tilt, mirror image
    and background vary, as in photographs. "wild": poses vary as in "varied", and the drawings too (colours,
    proportions, outlines), so that a model learns shapes and no one's way to draw them.
    """
    count = things or rng.choice(_COUNTS)
    first = rng.choice(domain.frequent())
    place = rng.choice(domain.places[first.name])
    nouns = _company(rng, domain, first, place, count)
    colours: dict[str, str] = {}  # things of one kind share a colour, so that "two red cars" can be said
    placed = []
    for site, noun in enumerate(nouns):
        colour = colours.setdefault(noun.name, _colour(rng, noun))
        placed.append(_place(rng, noun, colour, place, site, count, variety))
    return Scene(place, tuple(placed), style, variety, rng.randrange(2**31), domain.name)


def _company(rng: random.Random, domain: Domain, first: Noun, place: str, count: int) -> list[Noun]:
    """`first` and what stands beside it, left to right; things of one kind stand together."""
    if count == 1:
        return [first]
    neighbours = domain.neighbours(first, place)
    kinds = 1 if rng.random() < 0.3 else 2 if count == 2 or rng.random() < 0.6 else 3
    others: list[Noun] = []
    while len(others) < kinds - 1:
        other = rng.choice(neighbours)
        if other not in others:
            others.append(other)
    row = [first, *others]
    rng.shuffle(row)
    doubled = rng.randrange(len(row))
    return [noun for at, noun in enumerate(row) for _ in range(1 + (count - kinds) * (at == doubled))]


def _colour(rng: random.Random, noun: Noun) -> str:
    return rng.choice(noun.colours) if noun.colours and rng.random() < 0.8 else ""


def _place(rng: random.Random, noun: Noun, colour: str, place: str, site: int, count: int, variety: Variety) -> Thing:
    sites, size = _SITES[count]
    x = sites[site]
    flies = place == "sky"
    y = 31.0 if flies else 55.0 - size / 2
    if variety == "plain":
        return Thing(noun.name, colour, x, y, size)
    size *= rng.uniform(0.8, 1.12)
    y = y + rng.uniform(-7, 7) if flies else 55.0 - size / 2 + rng.uniform(-5, 4)
    x += rng.uniform(-7, 7) if count == 1 else rng.uniform(-2, 2)
    return Thing(noun.name, colour, x, y, size, rng.uniform(-12, 12), rng.random() < 0.5)
