"""A test of a loaded pipeline: does a picture depend on what is drawn beside it?

A few families pad prompts to the longest of the batch, and a picture's pixels then depend on its neighbours (CogView4,
OmniGen, Z-Image, Qwen-Image, Lumina2). Which families do is not written down here: the pipeline is asked. Both batches
have the shape in which everything is drawn, and two steps: the test costs about a fifth of a batch of twenty steps.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

#: Prompts of middle length, of hardly any, and of more than most encoders take.
PROMPT = "A red bus drives along a street."
SHORT = "Rain."
LONG = "A crowded market square with many people, stalls of fruit and a very old clock tower. " * 8
#: Denoising steps of each test batch.
STEPS = 2

#: Draws these prompts at once with these seeds: (B, H, W, 3) floats.
DrawPrompts = Callable[[Sequence[str], Sequence[int]], np.ndarray]


@dataclass(frozen=True)
class Found:
    """What the test found of a batch size."""

    independent: bool
    seconds: float  # of a picture, at two steps
    size: tuple[int, int]  # width, height in pixels


def find_dependence(draw: DrawPrompts, batch_size: int) -> Found:
    """Draw a prompt beside copies of itself, then beside a short and a long one, in its first and in its last slot.

    Independent: the floats are equal, bit for bit. A picture has one slot, whatever else is drawn, so that the same
    prompt in another slot need not give the same floats.
    """
    seeds = range(batch_size)
    started = time.perf_counter()
    beside_itself = draw([PROMPT] * batch_size, seeds)
    seconds = (time.perf_counter() - started) / batch_size
    height, width = beside_itself.shape[1:3]
    found = True
    if batch_size > 1:
        for others in _neighbours(batch_size):
            with _length_unsaid():
                beside_others = draw(others, seeds)
            kept = [slot for slot, prompt in enumerate(others) if prompt == PROMPT]
            found = found and all(np.array_equal(beside_itself[slot], beside_others[slot], True) for slot in kept)
    return Found(found, seconds, (width, height))


@contextmanager
def _length_unsaid() -> Iterator[None]:
    """Without the tokenizer's warning of a prompt that is too long: LONG is meant to be, and is nobody's caption."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _neighbours(batch_size: int) -> list[list[str]]:
    """Batches of the prompt, in its first and last slot, beside a short and a long neighbour in the others."""
    if batch_size == 2:
        return [[PROMPT, LONG], [SHORT, PROMPT]]
    others = [(LONG, SHORT)[slot % 2] for slot in range(batch_size - 2)]
    return [[PROMPT, *others, PROMPT]]
