"""Sums of clip scores over many shards, and the gate that stops a run whose pictures do not show their captions."""

import math
from dataclasses import dataclass
from typing import Any

from cluster.dataset.keys import shard_key
from cluster.dataset.parquet import read_table
from cluster.store.store import Store
from pcm.errors import InputError

#: Bins of a shard's histogram: equal ones over -1..1.
NUM_BINS = 40

#: Fewer scores than this say too little to stop a run.
GATE_MIN_SCORES = 64


@dataclass(frozen=True)
class ClipScores:
    """Count, sums and histogram of raw cosines; `+` adds them up exactly as one large shard would."""

    count: int = 0
    sum: float = 0.0
    sum_of_squares: float = 0.0
    histogram: tuple[int, ...] = (0,) * NUM_BINS

    @staticmethod
    def of_shard(stats: dict[str, Any]) -> "ClipScores":
        """Of a shard's stats object."""
        return ClipScores(
            count=stats["successes"],
            sum=stats["clip_score_sum"],
            sum_of_squares=stats["clip_score_sum_of_squares"],
            histogram=tuple(stats["clip_score_histogram"]),
        )

    def __add__(self, other: "ClipScores") -> "ClipScores":
        bins = zip(self.histogram, other.histogram, strict=True)
        return ClipScores(
            count=self.count + other.count,
            sum=self.sum + other.sum,
            sum_of_squares=self.sum_of_squares + other.sum_of_squares,
            histogram=tuple(one + two for one, two in bins),
        )

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean: sample standard deviation over sqrt(count); None for fewer than two scores."""
        if self.count < 2:
            return None
        spread = max(0.0, self.sum_of_squares - self.sum**2 / self.count)
        return math.sqrt(spread / (self.count - 1) / self.count)

    def percentile(self, percent: float) -> float | None:
        """Read off the histogram, linear inside a bin: right to a bin's width, 0.05."""
        if not self.count:
            return None
        wanted = percent / 100 * self.count
        below = 0
        for index, scores in enumerate(self.histogram):
            if scores and below + scores >= wanted:
                return bin_edge(index + (wanted - below) / scores)
            below += scores
        return 1.0


def bin_edge(index: float) -> float:
    """Lower edge of a histogram's bin; fractions lie inside it."""
    return -1.0 + 2.0 * index / NUM_BINS


def check_gate(scores: ClipScores, threshold: float | None, *, store: Store, shard: int) -> None:
    """Raise InputError when the mean is below the threshold beyond doubt: even two standard errors higher it would be.

    `shard` is a committed one; its worst picture is named as an example.
    """
    if threshold is None or scores.count < GATE_MIN_SCORES:
        return
    assert scores.mean is not None and scores.standard_error is not None
    if scores.mean + 2 * scores.standard_error >= threshold:
        return
    raise InputError(
        f"mean clip score {scores.mean:.3f} +- {2 * scores.standard_error:.3f} of {scores.count} pictures is below "
        f"--stop-below-clip-score {threshold:g}: stopped; what is committed stays.{_example(store, shard)} "
        "Look at pictures, then at --t2i, --steps, --guidance-scale, --prompt-template and --clip"
    )


def _example(store: Store, shard: int) -> str:
    rows = read_table(store, shard_key(shard), ["sample_id", "caption", "clip_score"]).to_pylist()
    if not rows:
        return ""
    worst = min(rows, key=lambda row: (row["clip_score"], row["sample_id"]))
    return (
        f" Worst of the last shard: {worst['clip_score']:.3f} for {worst['caption'][:80]!r}, shown by "
        f"jobs.generate --out {store.root} --only {worst['sample_id']} --image-out worst.png."
    )
