"""How many pictures to draw at once on a device: sizes are tried until memory ends or nothing is gained."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pcm.generation.drawing import Request
from pcm.model_faults import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from pcm.generation.diffusers_pipeline import DiffusersTextToImage

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
#: A size must draw this much faster than the best before it, or the search ends: a larger batch costs memory, and
#: wastes more of the last batch of a shard.
LEAST_GAIN = 0.05
#: A caption of ordinary length; what it says does not matter.
CAPTION = "A man riding a wave on top of a surfboard."


@dataclass(frozen=True)
class Trial:
    """A batch size and the pictures a second it drew; None: it did not fit into memory."""

    size: int
    images_per_second: float | None


def try_sizes(draw: Callable[[int], object], sizes: Sequence[int] = SIZES, *, repeats: int = 2) -> list[Trial]:
    """Draw a batch of each size once to warm up (and compile), then `repeats` times, the fastest of which counts.

    Ends with the first size that does not fit or does not gain LEAST_GAIN. Errors that do not speak of memory are
    raised.
    """
    trials: list[Trial] = []
    for size in sizes:
        best = best_rate(trials)
        try:
            rate = max(_rates(draw, size, repeats))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            rate = None
        free_memory()
        trials.append(Trial(size, rate))
        if rate is None or rate < best * (1 + LEAST_GAIN):
            break
    return trials


def best_rate(trials: Iterable[Trial]) -> float:
    return max((trial.images_per_second or 0.0 for trial in trials), default=0.0)


def best_size(trials: list[Trial]) -> int | None:
    """The largest size that gained on the one before; None when not even one picture fits into memory."""
    gained = trials[:1]
    for trial in trials[1:]:
        if (trial.images_per_second or 0.0) >= best_rate(gained) * (1 + LEAST_GAIN):
            gained.append(trial)
    return gained[-1].size if gained[-1].images_per_second is not None else None


def rate_of(trials: Iterable[Trial], size: int) -> float:
    """Pictures a second that a size drew. Raises StopIteration for a size that was not tried."""
    return next(trial.images_per_second or 0.0 for trial in trials if trial.size == size)


def try_generator(generator: "DiffusersTextToImage", *, search: bool = True) -> list[Trial]:
    """`try_sizes` of a generator; without `search`, of its own batch size alone.

    A generator whose pictures depend on their neighbours has one size.
    """

    def draw(size: int) -> None:
        requests = {slot: Request(position=slot, caption=CAPTION, seed=slot) for slot in range(size)}
        generator.draw_batch(requests, size)

    if search:
        return try_sizes(draw, SIZES[:1] if generator.one_at_a_time else SIZES)
    return try_sizes(draw, (generator.batch_size,), repeats=1)


def table(trials: Iterable[Trial]) -> str:
    """One line for people: "1: 1.20, 2: 1.90, 4: out of memory"."""
    return ", ".join(
        f"{trial.size}: {'out of memory' if trial.images_per_second is None else f'{trial.images_per_second:.2f}'}"
        for trial in trials
    )


def _rates(draw: Callable[[int], object], size: int, repeats: int) -> list[float]:
    draw(size)
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        draw(size)
        rates.append(size / (time.perf_counter() - started))
    return rates
