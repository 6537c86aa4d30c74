"""SynC's choices are those of the published code, and ties follow the rule."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from cluster.curation.sync.choice import (
    captions_of_pictures,
    choose,
    kept_in_order,
    refine_in_memory,
)
from cluster.curation.sync.nearest import nearest
from cluster.curation.sync.settings import UNIT, SyncSettings
from tests.helpers.paths import ROOT
from tests.helpers.vectors import unit

#: What the published code made of 200 random captions and pictures; see tests/data/README.md.
GOLDEN = load_file(ROOT / "tests/data/sync.safetensors")
VECTORS = (GOLDEN["in.caption_clip"], GOLDEN["in.image_clip"], GOLDEN["in.caption_sbert"])
PUBLISHED, SMALL = SyncSettings(), SyncSettings(candidates=5, captions_per_picture=3)


@pytest.mark.parametrize(("name", "settings"), [("published", PUBLISHED), ("small", SMALL)])
@pytest.mark.parametrize("block_size", [7, 64, 4096])
def test_choices_and_scores_are_the_published_ones(name: str, settings: SyncSettings, block_size: int) -> None:
    choice, _ = refine_in_memory(*VECTORS, settings, block_size=block_size)
    np.testing.assert_array_equal(choice.picture, GOLDEN[f"{name}.chosen_image"])
    np.testing.assert_allclose(choice.score * UNIT, GOLDEN[f"{name}.score"], rtol=0, atol=5e-4)


def test_the_kept_rows_are_the_exact_ones_in_order() -> None:
    choice, kept = refine_in_memory(*VECTORS, PUBLISHED)
    np.testing.assert_array_equal(kept, GOLDEN["exact_kept_in_order"])
    published = GOLDEN["published.stored_clipscore"][np.argsort(GOLDEN["published.kept_captions_in_order"])]
    np.testing.assert_allclose(5 * choice.cosine[np.sort(kept)], published, rtol=0, atol=5e-4)


def test_the_nearest_are_the_published_ones() -> None:
    captions, pictures, _ = VECTORS
    np.testing.assert_array_equal(nearest(captions, [pictures], 15).indices, GOLDEN["knn.caption_to_image"])
    np.testing.assert_array_equal(nearest(pictures, [captions], 3).indices, GOLDEN["knn.image_to_caption"])


def test_of_equal_scores_the_nearer_picture_is_taken() -> None:
    scores = np.array([[0.2, 0.9, 0.9 + 4e-7, 0.9]])  # less than a unit apart is equal
    choice = choose(np.array([[4, 7, 1, 2]]), np.array([[0.5, 0.4, 0.3, 0.2]]), scores)
    assert (choice.picture, choice.score, choice.cosine) == (7, 900_000, 0.4)


def test_of_equal_scores_the_first_caption_stays() -> None:
    assert kept_in_order(np.array([5, 9, 5, 9, 1]), 0.8).tolist() == [1, 3, 0, 2]


def test_as_many_stay_as_in_the_published_code() -> None:
    assert len(kept_in_order(np.zeros(100, np.int64), 0.29)) == int(0.29 * 100) == 28


def test_a_caption_that_occurs_twice_stands_twice_for_a_picture() -> None:
    """As where every occurrence is a caption of its own, which is what the published code has."""
    rng = np.random.default_rng(3)
    distinct, pictures = (unit(rng.standard_normal((12, 8))) for _ in range(2))
    of_caption = rng.integers(0, 12, 30)
    members = np.full((12, 2), -1)
    for caption in range(12):
        places = np.flatnonzero(of_caption == caption)[:2]
        members[caption, : len(places)] = places
    known = np.flatnonzero(members[:, 0] >= 0)  # a distinct caption occurs at least once
    numbers = {caption: number for number, caption in enumerate(known)}
    every = nearest(pictures, [distinct[of_caption]], 2)
    found = nearest(pictures, [distinct[known]], 2)
    got = captions_of_pictures(found.indices, found.cosines, members[known])
    wanted = np.vectorize(numbers.get)(of_caption[every.indices])
    np.testing.assert_array_equal(got, wanted)
