"""Drawing scenes: open-licensed emoji art on simple backgrounds, composed as one SVG and rendered by resvg.

The art comes from four npm packages of the Iconify project (credits in pack/LICENSES.md) and is not part of this
repository: `fetch_art` installs it into a cache folder.
"""

import colorsys
import io
import json
import random
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from pcm.embedded.world import BY_NAME, NOUNS, SEEN_STYLES, SIZE, UNSEEN_STYLE, Scene
from pcm.errors import InputError

ART_PACKAGES = {
    "noto": "@iconify-json/noto@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.9",
}
DEFAULT_ART_FOLDER = Path.home() / ".cache" / "pcmnet-ray" / "art"
STYLES = (*SEEN_STYLES, UNSEEN_STYLE)
HUES = {"red": 0.0, "yellow": 0.14, "green": 0.36, "blue": 0.60, "purple": 0.77, "pink": 0.90}
OVERRIDES = {("apple", "green"): "green-apple"}  # an icon of its own where the art has one
BETTER_ICONS = {("twemoji", "bus"): "trolleybus"}  # twemoji's bus is grey: no paint would show


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
    """Draws scenes. Holds the icons of the world's nouns in every style (a few hundred kilobytes)."""

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
        background = _background(scene)
        things = "".join(self._thing(scene.style, thing) for thing in scene.things)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {SIZE} {SIZE}">{background}{things}</svg>'
        )

    def _thing(self, style: str, thing) -> str:
        body, units = self._icon(style, thing.noun, thing.colour)
        scale = thing.size / units
        mirror = -1 if thing.flipped else 1
        move = f"translate({thing.x:.2f} {thing.y:.2f}) rotate({thing.tilt:.1f})"
        move += f" scale({mirror * scale:.4f} {scale:.4f}) translate({-units / 2} {-units / 2})"
        return f'<g transform="{move}">{body}</g>'

    @lru_cache(maxsize=1024)  # noqa: B019 - one Artist lives as long as its process
    def _icon(self, style: str, noun: str, colour: str) -> tuple[str, float]:
        override = OVERRIDES.get((noun, colour))
        body, units = self._icons[style][override or BETTER_ICONS.get((style, noun)) or BY_NAME[noun].icon]
        return (body if override or not colour else recolour(body, HUES[colour])), units


def recolour(body: str, hue: float) -> str:
    """SVG text with every clearly coloured hex colour turned to `hue` (0..1); greys, blacks and whites stay."""

    def turn(match: re.Match) -> str:
        digits = match.group(1)
        if len(digits) == 3:
            digits = "".join(digit * 2 for digit in digits)
        red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
        own_hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
        chroma = max(red, green, blue) - min(red, green, blue)
        windows = 0.45 < own_hue < 0.62 and lightness > 0.7  # pale blue glass stays glass
        if chroma < 0.25 or windows:
            return match.group(0)
        bright = hue in (HUES["pink"], HUES["yellow"])  # a dark yellow is olive, a dark pink is purple
        lightness = min(max(lightness, 0.5 if bright else 0.3), 0.72 if bright else 0.6)
        turned = colorsys.hls_to_rgb(hue, lightness, max(saturation, 0.6))
        return "#" + "".join(f"{round(255 * part):02x}" for part in turned)

    return re.sub(r"#([0-9a-fA-F]{6}|[0-9a-fA-F]{3})(?![0-9a-zA-Z])", turn, body)


def _icons_file(folder: Path, style: str) -> Path:
    return folder / "node_modules" / "@iconify-json" / style / "icons.json"


def _read_icons(path: Path) -> dict[str, tuple[str, float]]:
    data = json.loads(path.read_text())
    aliases = data.get("aliases", {})
    wanted = {noun.icon for noun in NOUNS} | {*OVERRIDES.values(), *BETTER_ICONS.values()}
    units = float(data.get("width", 16))
    return {name: (data["icons"][aliases.get(name, {}).get("parent", name)]["body"], units) for name in wanted}


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'


def _shade(fill: str, rng: random.Random, amount: float) -> str:
    parts = [int(fill[i : i + 2], 16) for i in (1, 3, 5)]
    step = rng.uniform(-amount, amount)
    return "#" + "".join(f"{min(255, max(0, round(p + step + rng.uniform(-amount, amount) / 2))):02x}" for p in parts)


def _background(scene: Scene) -> str:
    """The place. A plain scene's is always the same; a varied one shifts its colours and horizon and adds details."""
    rng = random.Random(scene.backdrop)
    varied = scene.variety == "varied"
    amount = 22.0 if varied else 0.0
    dy = rng.uniform(-6, 5) if varied else 0.0

    def c(fill: str) -> str:
        return _shade(fill, rng, amount) if varied else fill

    def cloud(x: float, y: float, r: float) -> str:
        white = c("#ffffff")
        return f'<ellipse cx="{x:.1f}" cy="{y:.1f}" rx="{2 * r:.1f}" ry="{r:.1f}" fill="{white}"/>'

    def sky(fill: str) -> str:
        extra = (
            cloud(rng.uniform(6, 58), rng.uniform(4, 12), rng.uniform(2, 4)) if varied and rng.random() < 0.5 else ""
        )
        return _rect(0, 0, SIZE, SIZE, c(fill)) + extra

    horizon = 34 + dy
    match scene.place:
        case "grass":
            tufts = "".join(
                _rect(x, horizon + 6 + (x * 7) % 20, 2, 3, c("#4d9a33"))
                for x in range(3 + rng.randrange(5) * varied, 64, 11)
            )
            return sky("#bfe3f7") + _rect(0, horizon, SIZE, SIZE, c("#6abf4b")) + tufts
        case "street":
            walls = "".join(
                _rect(x, 8 + (x * 5) % 13 + dy, 13, 40, c(("#c9b7a7", "#b3a79f")[(x // 13) % 2]))
                for x in range(0, 64, 13)
            )
            lines = "".join(_rect(x, 56 + dy / 2, 8, 2.5, c("#f2f2f2")) for x in range(2, 64, 14))
            return sky("#dfe8ee") + walls + _rect(0, horizon, SIZE, SIZE, c("#7d8088")) + lines
        case "table":
            legs = _rect(0, horizon + 3, SIZE, 2, c("#8a5a2b"))
            return _rect(0, 0, SIZE, SIZE, c("#f4e8d0")) + _rect(0, horizon + 5, SIZE, SIZE, c("#b9814a")) + legs
        case "beach":
            return (
                sky("#a9dcf5")
                + _rect(0, horizon - 8, SIZE, 12, c("#3b9fd1"))
                + _rect(0, horizon + 3, SIZE, SIZE, c("#f0d9a0"))
            )
        case "snow":
            flakes = "".join(
                f'<circle cx="{(x * 17 + 5) % 64}" cy="{(x * 29 + 3) % 36}" r="1.1" fill="#ffffff"/>' for x in range(9)
            )
            return sky("#b8c4d3") + flakes + _rect(0, horizon, SIZE, SIZE, c("#f6f9fc"))
        case "sky":
            clouds = cloud(12, 52 + dy, 5) + cloud(50, 10 + dy / 2, 4) + (cloud(40, 58, 4) if not varied else "")
            return _rect(0, 0, SIZE, SIZE, c("#5fb2ea")) + clouds
        case "room":
            picture = _rect(46, 6 + dy / 2, 12, 10, c("#a86a5b")) + _rect(48, 8 + dy / 2, 8, 6, c("#f5f0d8"))
            return _rect(0, 0, SIZE, SIZE, c("#e9cfc0")) + picture + _rect(0, horizon + 4, SIZE, SIZE, c("#a5744f"))
        case "water":
            waves = "".join(_rect(x, horizon + 6 + (x * 3) % 22, 9, 1.6, c("#8fd0ee")) for x in range(2, 64, 12))
            return sky("#d5eefa") + _rect(0, horizon - 3, SIZE, SIZE, c("#2f86c5")) + waves
    raise InputError(f"unknown place {scene.place!r}: expected one of the world's places")
