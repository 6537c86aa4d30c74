"""Seeds of redraws are a function of (caption, seed, attempt) that meets no other seed."""

import hashlib
import json

import pytest

from pcm.generation.seeds import REDRAW_STEP, attempt_seed, redraw_id, redraw_seed, sample_seed
from pcm.spec import ClipSpec, DatasetSpec, GeneratorSpec

CAPTION = "A dog on the beach."


def test_the_stated_formula() -> None:
    assert redraw_id("000000123-00", 77, 3) == "000000123-00/77+3"
    key = json.dumps(["redraw", "000000123-00/77", CAPTION]).encode()
    bits = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 11
    assert redraw_seed("000000123-00/77+3", CAPTION) == 2**54 + bits + 2 * 4099


def test_redraws_of_a_sample_and_their_further_attempts_never_meet() -> None:
    seeds = [
        attempt_seed(redraw_seed(redraw_id("000000001-00", 5, attempt), CAPTION), further)
        for attempt in range(1, 9)
        for further in (*range(8), REDRAW_STEP - 2)
    ]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**63


def test_no_seed_of_a_datasets_own_pictures_is_met() -> None:
    """By range: the largest of these is below the smallest of those."""
    spec = DatasetSpec(generator=GeneratorSpec(model="null", revision=""), clip=ClipSpec(model="null", revision=""))
    assert all(sample_seed(spec, str(number), 0) < 2**53 for number in range(100))
    assert attempt_seed(2**53 - 1, REDRAW_STEP) < 2**54 <= redraw_seed(redraw_id("000000001-00", 2**53 - 1, 1), CAPTION)


@pytest.mark.parametrize(
    "changed", [("000000002-00", 5, CAPTION), ("000000001-00", 6, CAPTION), ("000000001-00", 5, "A cat.")]
)
def test_another_caption_picture_or_sample_has_other_seeds(changed: tuple[str, int, str]) -> None:
    sample, seed, caption = changed
    assert redraw_seed(redraw_id(sample, seed, 1), caption) != redraw_seed(redraw_id("000000001-00", 5, 1), CAPTION)
