"""Training sets of drawn scenes, kept as one .npz file each so that training never waits for the drawing."""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from pcm.embedded.making.art import Artist
from pcm.embedded.making.captions import describe
from pcm.embedded.making.world import (
    COLOURS,
    FIRST,
    MOST_THINGS,
    NOUNS,
    PLACES,
    SIZE,
    Domain,
    Scene,
    Variety,
    sample_scene,
)

CAPTIONS_PER_SCENE = 4
NOUN_INDEX = {noun.name: index for index, noun in enumerate(NOUNS)}


@dataclass(frozen=True)
class SceneSet:
    """`n` drawn scenes: pictures, captions, and which noun is where."""

    images: np.ndarray  # (n, 64, 64, 3) uint8
    captions: list[list[str]]  # n lists of CAPTIONS_PER_SCENE
    nouns: np.ndarray  # (n, 3) index into NOUNS from left to right, -1 = nothing
    boxes: np.ndarray  # (n, 3, 4) float32 left, top, right, bottom in pixels
    places: np.ndarray  # (n,) index into PLACES
    colours: np.ndarray  # (n, 3) index into COLOURS, -1 = the drawing's own, or nothing

    def __len__(self) -> int:
        return len(self.images)

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part.npz")
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        np.savez(part, **(arrays | {"captions": np.array(self.captions)}))
        os.replace(part, path)  # a set is there whole or not at all

    @classmethod
    def load(cls, path: Path) -> "SceneSet":
        data = np.load(path)
        arrays = {field.name: data[field.name] for field in fields(cls)}
        return cls(**(arrays | {"captions": data["captions"].tolist()}))

    @staticmethod
    def size(path: Path) -> int:
        """How many scenes a file holds; its pictures are not read."""
        with np.load(path) as data:
            return len(data["places"])


def sample_scenes(
    seed: int,
    count: int,
    *,
    style: str,
    varieties: Sequence[Variety],
    domains: Sequence[Domain] = (FIRST,),
    things: int | None = None,
) -> list[Scene]:
    """`count` random scenes in one style, varieties and domains drawn evenly."""
    rng = random.Random(seed)
    return [
        sample_scene(rng, style=style, variety=rng.choice(varieties), things=things, domain=rng.choice(domains))
        for _ in range(count)
    ]


def draw_scenes(scenes: Sequence[Scene], art_folder: Path, seed: int, *, processes: int = 1) -> SceneSet:
    """Draws every scene and writes its captions."""
    chunk = max(1, -(-len(scenes) // max(1, 4 * processes)))
    chunks = [scenes[start : start + chunk] for start in range(0, len(scenes), chunk)]
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            images = np.concatenate(list(pool.map(_draw_chunk, chunks, [art_folder] * len(chunks))))
    else:
        images = np.concatenate([_draw_chunk(part, art_folder) for part in chunks])
    rng = random.Random(seed)
    captions = [[describe(scene, rng) for _ in range(CAPTIONS_PER_SCENE)] for scene in scenes]
    nouns = np.full((len(scenes), MOST_THINGS), -1, np.int64)
    boxes = np.zeros((len(scenes), MOST_THINGS, 4), np.float32)
    colours = np.full((len(scenes), MOST_THINGS), -1, np.int64)
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            nouns[row, column] = NOUN_INDEX[thing.noun]
            boxes[row, column] = thing.box
            colours[row, column] = COLOURS.index(thing.colour) if thing.colour else -1
    places = np.array([PLACES.index(scene.place) for scene in scenes])
    return SceneSet(images, captions, nouns, boxes, places, colours)


def _draw_chunk(scenes: Sequence[Scene], art_folder: Path) -> np.ndarray:
    artist = Artist(art_folder)
    pictures = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for row, scene in enumerate(scenes):
        pictures[row] = artist.draw(scene)
    return pictures
