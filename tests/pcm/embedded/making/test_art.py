"""Composing scenes of icons, with one plain square for every icon: the real drawings come from npm."""

import json
import random
import re
from dataclasses import replace

import pytest

from pcm.embedded.making.art import EXTRA_ICONS, OVERRIDES, STYLE_ICONS, STYLES, Artist
from pcm.embedded.making.world import DOMAINS, FIRST, MIXED, NOUNS, SECOND, SEEN_STYLES, Scene, sample_scene
from pcm.errors import InputError

#: A style's icon names its style and itself, so that the picture's text tells which one was drawn.
ICON = '<path id="{style}/{icon}" fill="#dd2e44" d="M0 0h36v36z"/>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("art")
    names = {noun.icon for noun in NOUNS} | set(OVERRIDES.values())
    names |= {icon for icons in EXTRA_ICONS.values() for icon in icons}
    for style in STYLES:
        wanted = names | set(STYLE_ICONS.get(style, {}).values()) - {""}
        if style not in SEEN_STYLES[:3]:
            wanted.discard("giraffe")  # as in the older sets
        package = root / "node_modules" / "@iconify-json" / style
        package.mkdir(parents=True)
        icons = {icon: {"body": ICON.format(style=style, icon=icon)} for icon in wanted}
        (package / "icons.json").write_text(json.dumps({"icons": icons, "width": 36}))
    return root


@pytest.fixture(scope="module")
def artist(folder):
    return Artist(folder)


def scene_of(noun: str, style: str, variety: str = "plain", seed: int = 1, colour: str = "") -> Scene:
    domain = FIRST if noun in FIRST.places else SECOND
    rng = random.Random(seed)
    while True:
        scene = sample_scene(rng, style=style, variety=variety, things=1, domain=domain)  # type: ignore[arg-type]
        if scene.things[0].noun == noun:
            return replace(scene, things=(replace(scene.things[0], colour=colour),))


def drawn(artist: Artist, scene: Scene) -> list[str]:
    """style/icon of every thing."""
    return re.findall(r'id="([^"]+)"', artist.svg(scene))


def test_one_scene_is_drawn_the_same_every_time(artist):
    scene = scene_of("dog", MIXED, "wild")
    assert artist.svg(scene) == artist.svg(scene)


def test_a_scene_in_one_style_takes_its_own_names_for_icons(artist):
    assert drawn(artist, scene_of("dog", "fxemoji")) == ["fxemoji/dogside"]
    assert drawn(artist, scene_of("cup", "streamline-emojis")) == ["streamline-emojis/hot-beverage-1"]


def test_mixed_scenes_take_every_seen_style_that_has_the_noun_and_no_unseen_one(artist):
    styles = {drawn(artist, scene_of("giraffe", MIXED, seed=seed))[0].split("/")[0] for seed in range(40)}
    assert styles == set(SEEN_STYLES[:3])
    styles = {drawn(artist, scene_of("horse", MIXED, seed=seed))[0].split("/")[0] for seed in range(80)}
    assert styles == set(SEEN_STYLES)


def test_things_of_one_kind_are_drawn_alike(artist):
    rng = random.Random(2)
    for _ in range(200):
        scene = sample_scene(rng, style=MIXED, variety="wild")
        icons = drawn(artist, scene)
        assert len(set(icons)) == len(scene.nouns)


def test_other_icons_of_a_noun_are_for_wild_scenes_only(artist):
    plain = {drawn(artist, scene_of("sheep", MIXED, seed=seed))[0].split("/")[1] for seed in range(30)}
    wild = {drawn(artist, scene_of("sheep", MIXED, "wild", seed=seed))[0].split("/")[1] for seed in range(60)}
    assert "ram" in wild and "ram" not in plain


def test_paint_shows(artist):
    (fill,) = re.findall(r'id="[^"]+" fill="#(\w+)"', artist.svg(scene_of("car", "twemoji", colour="blue")))
    red, green, blue = (int(fill[at : at + 2], 16) for at in (0, 2, 4))
    assert blue > red and blue > green


def test_a_green_apple_has_an_icon_of_its_own(artist):
    assert drawn(artist, scene_of("apple", "twemoji", colour="green")) == ["twemoji/green-apple"]


def test_wild_scenes_change_the_drawing(artist):
    fills = {re.findall(r'fill="#(\w+)" d=', artist.svg(scene_of("dog", MIXED, "wild", seed)))[0] for seed in range(9)}
    assert len(fills) > 5


def test_every_place_of_either_domain_can_be_drawn(artist):
    for domain in DOMAINS.values():
        rng = random.Random(3)
        for _ in range(200):
            scene = sample_scene(rng, style=domain.unseen_style, variety="varied", domain=domain)
            if "giraffe" not in scene.nouns:
                assert artist.svg(scene).startswith("<svg")


def test_missing_art_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"no twemoji art in .*--stage art"):
        Artist(tmp_path)
