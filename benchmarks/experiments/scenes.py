"""The scenes behind a domain's captions: nobody drew them, but the corpus is made from them and can be made again."""

import csv
import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.experiments.settings import Domain
from pcm import embedded
from pcm.embedded.making.captions import corpus_scenes
from pcm.embedded.making.world import DOMAINS, Scene
from pcm.errors import InputError


def scenes_of(domain: Domain, count: int) -> list[tuple[Scene, str]]:
    """(scene, caption) of the first `count` captions of a domain's corpus.

    Raises InputError where the pack's captions are not these: it was made by other code.
    """
    world = DOMAINS[domain.name]
    found = list(corpus_scenes(random.Random(world.corpus_seed), count, world))
    with open(embedded.caption_file(domain.corpus), encoding="utf-8") as lines:
        for number, (line, (_, caption)) in enumerate(itertools.zip_longest(itertools.islice(lines, count), found)):
            if line is None or line.rstrip("\n") != caption:
                raise InputError(f"{domain.corpus}: caption {number} is not what its scene says; make the pack again")
    return found


def render(pairs: Sequence[tuple[Scene, str]], folder: Path, art: Path) -> tuple[Path, Path]:
    """(pictures, captions.csv) for jobs.featurise: the scenes as a perfect text-to-image model would draw them.

    Raises InputError where the art has not been fetched (jobs.pretrain_embedded --stage art).
    """
    from PIL import Image

    from pcm.embedded.making.art import Artist  # needs the extra "world"

    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    artist = Artist(art)
    for number, (scene, _) in enumerate(pairs):
        path = pictures / f"{number:06d}.png"
        if not path.exists():
            part = path.with_suffix(".part")
            Image.fromarray(artist.draw(scene)).save(part, "PNG")
            part.rename(path)
    captions = folder / "captions.csv"
    with captions.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows((f"{number:06d}.png", caption) for number, (_, caption) in enumerate(pairs))
    return pictures, captions


def thing_masks(scene: Scene, *, side: int, grid: int) -> np.ndarray:
    """(things, grid * grid) share of each patch that a thing's box covers; `side` pixels, row-major patches."""
    edges = np.linspace(0, side, grid + 1)
    masks = np.zeros((len(scene.things), grid, grid))
    for row, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        across = (np.minimum(edges[1:], right) - np.maximum(edges[:-1], left)).clip(0)
        down = (np.minimum(edges[1:], bottom) - np.maximum(edges[:-1], top)).clip(0)
        masks[row] = np.outer(down, across) * (grid / side) ** 2
    return masks.reshape(len(scene.things), -1)
