"""When a generation run gives up: a batch, a sample, or itself; and what it may cost. Changes no byte of the result."""

import math
from dataclasses import dataclass

from pcm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FaultPolicy:
    """When a run gives a batch up, a sample, and itself."""

    batch_timeout: float = 900.0  # seconds a batch may take; four times that where torch.compile compiles it
    max_error_share: float = 0.5  # of the samples tried so far, and of those drawn last, may fail in the generator
    max_deaths: int = 3  # of a process with the same sample in its batch, until that sample is given up

    def __post_init__(self) -> None:
        if self.batch_timeout <= 0:
            raise InputError(f"batch timeout {self.batch_timeout:g}: must be more than 0 seconds")
        if not 0 < self.max_error_share <= 1:
            raise InputError(f"max error share {self.max_error_share:g}: allowed are more than 0, up to 1")
        if self.max_deaths < 2:
            raise InputError(f"max deaths {self.max_deaths}: must be at least 2, because a batch dies as a whole")


@dataclass(frozen=True, kw_only=True)
class RunLimits:
    """How a run is watched: what an hour costs, and when to give up. Changes no byte of the result."""

    price_per_hour: float | None = None  # of one GPU, or of one machine when drawing on CPUs
    spot: bool = False  # a label on the price
    stop_below_clip_score: float | None = None  # raw cosine

    def __post_init__(self) -> None:
        price, threshold = self.price_per_hour, self.stop_below_clip_score
        if price is not None and not (math.isfinite(price) and price >= 0):
            raise InputError(f"price per hour {price:g}: must be a number of at least 0")
        if threshold is not None and not -1 < threshold < 1:
            raise InputError(f"stop below clip score {threshold:g}: a cosine, allowed are numbers between -1 and 1")


@dataclass(frozen=True)
class PilotSize:
    """What `--pilot` asks for: a share of the samples, 0..1, or a number of them."""

    share: float | None = None
    samples: int | None = None

    @staticmethod
    def parse(text: str) -> "PilotSize":
        """ "1%" or "2000". Raises InputError for anything else."""
        try:
            if text.endswith("%") and 0 < float(text[:-1]) <= 100:
                return PilotSize(share=float(text[:-1]) / 100)
            if not text.endswith("%") and int(text) > 0:
                return PilotSize(samples=int(text))
        except ValueError:
            pass
        raise InputError(
            f"pilot {text!r}: must be a share such as 1% (more than 0%, up to 100%) or a number of samples such as 2000"
        )

    def of(self, expected: int) -> int:
        """How many of so many samples. Raises InputError when there are not so many."""
        if self.share is not None:
            return math.ceil(self.share * expected)
        assert self.samples is not None
        if self.samples > expected:
            raise InputError(
                f"pilot {self.samples}: the whole has {expected} samples; give fewer, or a share such as 1%"
            )
        return self.samples
