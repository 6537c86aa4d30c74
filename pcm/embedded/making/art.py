"""Drawing scenes: open-licensed emoji art on simple backgrounds, composed as one SVG and rendered by resvg.

The art comes from npm packages of the Iconify project (credits in pack/LICENSES.md) and is not part of this
repository: `fetch_art` installs it into a cache folder.
"""

import colorsys
import io
import json
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pcm.embedded.making.backgrounds import background
from pcm.embedded.making.world import BY_NAME, DOMAINS, MIXED, NOUNS, SEEN_STYLES, SIZE, Scene, Thing
from pcm.errors import InputError

ART_PACKAGES = {
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "noto": "@iconify-json/noto@1.2.9",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "emojione": "@iconify-json/emojione@1.2.3",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
    "streamline-emojis": "@iconify-json/streamline-emojis@1.2.4",
    "emojione-monotone": "@iconify-json/emojione-monotone@1.2.1",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
DEFAULT_ART_FOLDER = Path.home() / ".cache" / "pcmnet-ray" / "art"
STYLES = (*SEEN_STYLES, *(domain.unseen_style for domain in DOMAINS.values()))
HUES = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.60, "purple": 0.77, "pink": 0.90}
OVERRIDES = {("apple", "green"): "green-apple"}  # an icon of its own where the art has one
#: Icons that a style calls otherwise, draws better elsewhere ("" = has none that shows the noun).
STYLE_ICONS: dict[str, dict[str, str]] = {
    "twemoji": {"bus": "trolleybus"},  # twemoji's bus is grey: no paint would show
    "openmoji": {"truck": "pickup-truck"},  # so is openmoji's delivery truck
    "noto-v1": {"laptop": ""},  # a desktop computer
    "emojione-v1": {"laptop": "", "umbrella": "umbrella-with-rain-drops"},
    "streamline-emojis": {
        "pizza": "pizza-1",
        "cake": "birthday-cake-1",
        "donut": "doughnut-1",
        "cup": "hot-beverage-1",
        "book": "green-book",
        "backpack": "school-backpack",
        "house": "house-with-garden",
        "sheep": "ewe-1",
        "bird": "bird-1",
    },
    "fxemoji": {
        "apple": "redapple",
        "orange": "tangerine",
        "pizza": "sliceofpizza",
        "cake": "birthdaycake",
        "cup": "hotbeverage",
        "book": "closedbook",
        "clock": "alarmclock",
        "umbrella": "umbrellawithraindrops",
        "laptop": "",  # a desktop computer
        "scissors": "blackscissors",
        "bed": "",  # its "bed" is a hotel
        "phone": "cellphone",
        "backpack": "schoolsatchel",
        "ball": "soccerball",
        "tree": "deciduoustree",
        "house": "housebuilding",
        "dog": "dogside",
        "cat": "catside",
        "sheep": "sheep",
        "truck": "deliverytruck",
        "train": "steamlocomotive",
        "hat": "tophat",
        "shoe": "mensrunner",
    },
}
#: Other icons of a noun, in the seen styles that have them; for "wild" scenes only.
EXTRA_ICONS = {
    "dog": ("dog-face", "poodle"),
    "cat": ("cat-face",),
    "horse": ("horse-face",),
    "cow": ("cow-face", "ox"),
    "sheep": ("ram",),
    "bus": ("oncoming-bus", "trolleybus", "minibus"),
    "truck": ("articulated-lorry", "pickup-truck"),
    "train": ("tram-car", "railway-car"),
    "car": ("sport-utility-vehicle", "taxi"),
    "tree": ("evergreen-tree",),
    "flower": ("rose", "hibiscus", "sunflower"),
    "house": ("house-with-garden",),
    "cake": ("shortcake",),
    "clock": ("mantelpiece-clock", "stopwatch"),
    "cup": ("teacup-without-handle",),
    "fish": ("tropical-fish", "blowfish"),
    "camera": ("camera-with-flash",),
    "umbrella": ("umbrella-with-rain-drops",),
    "book": ("green-book", "notebook-with-decorative-cover"),
    "hat": ("womans-hat",),
    "boat": ("speedboat", "canoe"),
    "motorcycle": ("motor-scooter",),
    "apple": ("green-apple",),
}
EXTRA_SHARE = 0.25
MONOTONE, INK = "emojione-monotone", "currentColor"  # a style of silhouettes in any one colour


def fetch_art(folder: Path = DEFAULT_ART_FOLDER) -> Path:
    """Installs the icon packages into `folder` with npm (once) and returns the folder.

    Raises InputError when npm is missing or cannot install them.
    """
    if all(_icons_file(folder, style).exists() for style in STYLES):
        return folder
    if shutil.which("npm") is None:
        raise InputError("npm not found: it is needed once to fetch the open-licensed art; install Node.js and retry")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *ART_PACKAGES.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"npm could not install the art into {folder}: {last}")
    return folder


class Artist:
    """Draws scenes. Holds the icons of the world's nouns in every style (a few megabytes)."""

    def __init__(self, folder: Path = DEFAULT_ART_FOLDER):
        missing = [style for style in STYLES if not _icons_file(folder, style).exists()]
        if missing:
            raise InputError(f"no {missing[0]} art in {folder}: run `python -m jobs.pretrain_embedded --stage art`")
        self._icons = {style: _read_icons(_icons_file(folder, style)) for style in STYLES}

    def draw(self, scene: Scene) -> np.ndarray:
        """The picture, (64, 64, 3) uint8 RGB."""
        import resvg_py  # optional dependency (extra "world"), needed only to draw

        png = bytes(resvg_py.svg_to_bytes(svg_string=self.svg(scene)))
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))  # (64, 64, 3)

    def svg(self, scene: Scene) -> str:
        rng = random.Random(scene.backdrop + 1)
        styles: dict[str, tuple[str, str]] = {}  # things of one kind are drawn alike
        things = []
        for thing in scene.things:
            style, icon = styles.get(thing.noun) or self._icon_of(scene, thing, rng)
            styles[thing.noun] = style, icon
            body = self._body(style, icon, thing.colour)
            if style == MONOTONE and not thing.colour:
                body = body.replace(INK, _dark(rng))
            units, wild = self._icons[style][icon][1], scene.variety == "wild"
            if wild:
                body = _redrawn(body, units, rng, painted=bool(thing.colour))
            things.append(_placed(body, units, thing, wild, rng))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {SIZE} {SIZE}">{background(scene)}{"".join(things)}</svg>'
        )

    def has(self, style: str, noun: str) -> bool:
        """Whether a style can draw a noun."""
        return usual_icon(style, noun) in self._icons[style]

    def _icon_of(self, scene: Scene, thing: Thing, rng: random.Random) -> tuple[str, str]:
        """(style, icon) of a thing."""
        if scene.style != MIXED:
            return scene.style, self._usual(scene.style, thing)
        styles = [style for style in SEEN_STYLES if self.has(style, thing.noun)]
        style = rng.choice(styles)
        extras = [icon for icon in EXTRA_ICONS.get(thing.noun, ()) if icon in self._icons[style]]
        if scene.variety == "wild" and extras and rng.random() < EXTRA_SHARE:
            extra = rng.choice(extras)
            if not thing.colour or self._body(style, extra, thing.colour) != self._body(style, extra, ""):
                return style, extra  # else it is grey: no paint would show
        return style, self._usual(style, thing)

    def _usual(self, style: str, thing: Thing) -> str:
        override = OVERRIDES.get((thing.noun, thing.colour), "")
        return override if override in self._icons[style] else usual_icon(style, thing.noun)

    @lru_cache(maxsize=2048)  # noqa: B019 - one Artist lives as long as its process
    def _body(self, style: str, icon: str, colour: str) -> str:
        """The icon as SVG text, painted."""
        body, _ = self._icons[style][icon]
        if not colour:
            return body
        if style == MONOTONE:
            return body.replace(INK, _hex(HUES[colour], 0.45, 0.8))
        return body if icon in OVERRIDES.values() else recolour(body, HUES[colour])


def usual_icon(style: str, noun: str) -> str:
    """The name under which a style draws a noun; "" where it has nothing that shows it."""
    return STYLE_ICONS.get(style, {}).get(noun, BY_NAME[noun].icon)


def recolour(body: str, hue: float) -> str:
    """SVG text with every clearly coloured hex colour turned to `hue` (0..1); greys, blacks and whites stay."""

    def turn(own: float, lightness: float, saturation: float, chroma: float) -> tuple[float, float, float] | None:
        windows = 0.45 < own < 0.62 and lightness > 0.7  # pale blue glass stays glass
        if chroma < 0.25 or windows:
            return None
        bright = hue in (HUES["pink"], HUES["yellow"])  # a dark yellow is olive, a dark pink is purple
        lightness = min(max(lightness, 0.5 if bright else 0.3), 0.72 if bright else 0.6)
        return hue, lightness, max(saturation, 0.6)

    return _each_colour(body, turn)


def _redrawn(body: str, units: float, rng: random.Random, *, painted: bool) -> str:
    """The icon as another hand might have drawn it: other shades, now and then an outline. Paint keeps its hue."""
    shift = rng.uniform(-0.012, 0.012) if painted else rng.gauss(0, 0.06)
    light, contrast = rng.uniform(-0.08, 0.08), rng.uniform(0.8, 1.2)
    rich = rng.uniform(0.85, 1.2) if painted else rng.uniform(0.4, 1.3)

    def turn(hue: float, lightness: float, saturation: float, chroma: float) -> tuple[float, float, float]:
        lightness = min(1.0, max(0.0, 0.5 + (lightness - 0.5) * contrast + light))
        return (hue + shift) % 1.0, lightness, min(1.0, saturation * rich)

    body = _each_colour(body, turn)
    if rng.random() < 0.25:
        ink, width = _dark(rng), units * rng.uniform(0.015, 0.035)
        body = f'<g stroke="{ink}" stroke-width="{width:.3f}" stroke-linejoin="round">{body}</g>'
    return body


def _placed(body: str, units: float, thing: Thing, wild: bool, rng: random.Random) -> str:
    mirror = -1 if thing.flipped else 1
    tall, lean = (rng.gauss(1, 0.09), rng.gauss(0, 5)) if wild else (1.0, 0.0)
    tall = min(1.25, max(0.8, tall))
    move = f"translate({thing.x:.2f} {thing.y:.2f}) rotate({thing.tilt:.1f}) skewX({lean:.1f})"
    scale = thing.size / units
    move += f" scale({mirror * scale / tall:.5f} {scale * tall:.5f}) translate({-units / 2} {-units / 2})"
    return f'<g transform="{move}">{body}</g>'


Change = Callable[[float, float, float, float], tuple[float, float, float] | None]


def _each_colour(body: str, change: Change) -> str:
    """SVG text with `change` (hue, lightness, saturation, chroma, all 0..1) applied to every hex colour; None keeps."""

    def turn(match: re.Match) -> str:
        digits = match.group(1)
        if len(digits) == 3:
            digits = "".join(digit * 2 for digit in digits)
        red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
        hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
        turned = change(hue, lightness, saturation, max(red, green, blue) - min(red, green, blue))
        return match.group(0) if turned is None else _hex(*turned)

    return re.sub(r"#([0-9a-fA-F]{6}|[0-9a-fA-F]{3})(?![0-9a-zA-Z])", turn, body)


def _hex(hue: float, lightness: float, saturation: float) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, lightness, saturation))


def _dark(rng: random.Random) -> str:
    return _hex(rng.random(), rng.uniform(0.08, 0.3), rng.uniform(0.0, 0.5))


def _icons_file(folder: Path, style: str) -> Path:
    return folder / "node_modules" / "@iconify-json" / style / "icons.json"


def _read_icons(path: Path) -> dict[str, tuple[str, float]]:
    """The icons of a package that the world can use: SVG text and the side of its box."""
    data = json.loads(path.read_text())
    aliases, units = data.get("aliases", {}), float(data.get("width", 16))
    wanted = {noun.icon for noun in NOUNS} | set(OVERRIDES.values())
    wanted |= {icon for icons in STYLE_ICONS.values() for icon in icons.values()}
    wanted |= {icon for icons in EXTRA_ICONS.values() for icon in icons}
    found = {name: aliases.get(name, {}).get("parent", name) for name in wanted}
    return {name: (data["icons"][own]["body"], units) for name, own in found.items() if own in data["icons"]}
