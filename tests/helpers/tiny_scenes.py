"""Scenes without drawings: coloured squares stand for things, so that trainings can be tested without the art."""

import numpy as np

from pcm.embedded.making.scenes import SceneSet
from pcm.embedded.making.world import NOUNS, PLACES, SIZE

#: Index into NOUNS -> name, of the nouns that the squares stand for.
SQUARES = {index: NOUNS[index].name for index in (0, 3, 8, 12)}
_PAINT = {0: (220, 40, 40), 3: (40, 60, 220), 8: (240, 220, 40), 12: (20, 20, 20)}


def square_scenes(count: int, *, seed: int, things: int | None = None) -> SceneSet:
    """Scenes of one or two squares on a plain ground; the place decides how light the ground is."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
    nouns = np.full((count, 3), -1, np.int64)
    boxes = np.zeros((count, 3, 4), np.float32)
    places = rng.integers(len(PLACES), size=count)
    captions = []
    for row in range(count):
        images[row] = 90 + 160 * places[row] // len(PLACES)
        kinds = rng.permutation(sorted(SQUARES))[: things or rng.integers(1, 3)]
        for site, noun in enumerate(kinds):
            left, top = (20, 24) if len(kinds) == 1 else (4 + 30 * site, 30)
            images[row, top : top + 24, left : left + 24] = _PAINT[int(noun)]
            nouns[row, site], boxes[row, site] = noun, (left, top, left + 24, top + 24)
        words = " and ".join(f"a {SQUARES[int(noun)]}" for noun in kinds)
        captions.append([f"{words} in {PLACES[places[row]]}", f"{words} at {PLACES[places[row]]}"] * 2)
    return SceneSet(
        images=images, captions=captions, nouns=nouns, boxes=boxes, places=places, colours=np.full_like(nouns, -1)
    )
