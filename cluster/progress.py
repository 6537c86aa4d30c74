"""What a person watching a generation run sees: rate, ETA, failures by reason."""

import logging
import time
from dataclasses import dataclass

log = logging.getLogger(__name__)

#: A line at most this often, so that logs of long runs stay readable.
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How a run is watched: what an hour costs, and when to give up. Changes no byte of the result."""

    price_per_hour: float | None = None  # of one GPU, or of one machine when drawing on CPUs
    spot: bool = False  # a label on the price
    stop_below_clip_score: float | None = None  # raw cosine


class Progress:
    """Adds up shard stats as they are committed and logs a line now and then.

    The rate counts from the start of the first shard's drawing: loading models is not drawing.
    """

    def __init__(self, *, total: int, skipped: int) -> None:
        self._total = total
        self._done = skipped
        self._drawn_from: float | None = None
        self._last_end = 0.0
        self._last_line = 0.0
        self.images = 0
        self.reasons: dict[str, int] = {}
        self.stage_seconds = {"draw": 0.0, "featurise": 0.0, "encode": 0.0, "store": 0.0}
        self._score_sum = 0.0
        self._bytes = 0

    def add(self, stats: dict) -> None:
        self._done += stats["count"]
        self.images += stats["successes"]
        for reason, count in stats["quarantined_by_reason"].items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for stage in self.stage_seconds:
            self.stage_seconds[stage] += stats[f"{stage}_seconds"]
        self._score_sum += stats["clip_score_sum"]
        self._bytes += stats["bytes"]
        self._drawn_from = min(self._drawn_from or stats["start_time"], stats["start_time"])
        self._last_end = max(self._last_end, stats["end_time"])
        if time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self._total:
            self._last_line = time.monotonic()
            log.info("%s", self.line())

    @property
    def images_per_second(self) -> float:
        elapsed = self._last_end - (self._drawn_from or 0.0)
        return self.images / elapsed if self.images and elapsed > 0 else 0.0

    def line(self) -> str:
        rate = self.images_per_second
        eta = f"{(self._total - self._done) / rate:.0f} s" if rate else "unknown"
        score = f"{self._score_sum / self.images:.3f}" if self.images else "-"
        failures = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items())) or "none"
        return (
            f"{self._done}/{self._total} samples, {rate:.2f} images/s, ETA {eta}, mean clip score {score}, "
            f"{self._bytes / 1e6:.1f} MB, quarantined: {failures}"
        )

    def close(self) -> None:
        busy = sum(self.stage_seconds.values()) or 1.0
        shares = ", ".join(f"{stage} {100 * spent / busy:.1f}%" for stage, spent in self.stage_seconds.items())
        log.info("time by stage: %s", shares)
