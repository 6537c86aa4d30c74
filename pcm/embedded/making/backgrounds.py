"""The places of scenes as SVG: flat shapes behind the things."""

import random

from pcm.embedded.making.world import SIZE, Scene
from pcm.errors import InputError


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'


def _peak(x: float, foot: float, height: float, fill: str) -> str:
    corners = f"M{x - 24:.1f} {foot:.1f} L{x:.1f} {foot - height:.1f} L{x + 24:.1f} {foot:.1f} Z"
    return f'<path d="{corners}" fill="{fill}"/>'


def _shade(fill: str, rng: random.Random, amount: float) -> str:
    parts = [int(fill[i : i + 2], 16) for i in (1, 3, 5)]
    step = rng.uniform(-amount, amount)
    return "#" + "".join(f"{min(255, max(0, round(p + step + rng.uniform(-amount, amount) / 2))):02x}" for p in parts)


def background(scene: Scene) -> str:
    """The place. A plain scene's is always the same; a varied one shifts its colours and horizon and adds details."""
    rng = random.Random(scene.backdrop)
    varied = scene.variety != "plain"
    amount = {"plain": 0.0, "varied": 22.0, "wild": 34.0}[scene.variety]
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
        case "mountain":
            peaks = "".join(
                _peak(x, horizon + 2, height, c(fill))
                for x, height, fill in (
                    (10 + dy, 26, "#7f8fa6"),
                    (54 - dy, 22, "#8e9bb0"),
                    (33 + 2 * dy, 30, "#6d7c94"),
                )
            )
            return sky("#cfe6f5") + peaks + _rect(0, horizon, SIZE, SIZE, c("#8fa36a"))
        case "stage":
            folds = "".join(_rect(x, 0, 4, horizon + 6, c("#6e1f2c")) for x in range(2, 64, 10))
            boards = "".join(_rect(0, y, SIZE, 1, c("#6b4a2e")) for y in (horizon + 13, horizon + 21))
            return (
                _rect(0, 0, SIZE, SIZE, c("#8a2a3a")) + folds + _rect(0, horizon + 6, SIZE, SIZE, c("#8b6440")) + boards
            )
    raise InputError(f"unknown place {scene.place!r}: expected one of the world's places")
