"""When a dataset was made and how fast, from what each shard's statistics say of its own time.

Times lie on an axis of working time: hours in which nothing was made, between a run and the one that resumed it, are
left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.generation.cost import SECONDS_AN_HOUR

STAGES = ("draw", "featurise", "encode")
BINS = 60
#: Without a shard in hand for this long, a run has ended and another one begun.
PAUSE_SECONDS = 30.0
#: Of some shards alone: how many times the usual time to the next of them may be work on those between them.
USUAL_GAPS = 3.0
#: So many gaps on either side say what is usual: a run that grows has other ones later.
_NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Arrays of length n are over working time, at `seconds` (n,) from 0 to the end."""

    began: float  # UTC timestamps
    ended: float
    runs: int
    seconds: np.ndarray
    stored: np.ndarray  # pictures so far
    rate: np.ndarray  # pictures a second around that moment
    generator_hours: np.ndarray  # so far: drawing alone
    machine_hours: np.ndarray  # so far: one machine, as long as anything was in hand
    stage_seconds: dict[str, float]  # busy, all actors together
    devices: tuple[str, ...]  # that pictures were drawn on

    @property
    def working_seconds(self) -> float:
        return float(self.seconds[-1])

    @property
    def images_per_second(self) -> float:
        return float(self.stored[-1]) / self.working_seconds if self.working_seconds else 0.0


def throughput(stats: Sequence[Mapping[str, Any]], *, stored: int) -> Throughput | None:
    """None without statistics of any time. Where only some shards are given, they stand for all `stored` pictures."""
    timed = [shard for shard in stats if shard.get("start_time") and shard["end_time"] > shard["start_time"]]
    pictures = sum(shard["successes"] for shard in timed)
    if not pictures:
        return None
    starts, ends = (np.array([shard[name] for shard in timed]) for name in ("start_time", "end_time"))
    drawing = np.array([max(shard["draw_seconds"], 1e-6) for shard in timed])
    weights = np.array([shard["successes"] for shard in timed]) * stored / pictures
    scale = stored / pictures
    working = _WorkingTime(starts, ends, usual=_usual_gaps(starts) if round(scale) > 1 else np.zeros(len(starts)))
    seconds = np.linspace(0.0, working.total, BINS + 1)
    begin, end = working(starts), working(ends)
    drawn = np.minimum(begin + drawing, end)
    shared = _SharedTime(begin, end)
    so_far = _accumulated(shared(seconds), shared(begin), shared(end), weights)
    return Throughput(
        began=float(starts.min()),
        ended=float(ends.max()),
        runs=working.runs,
        seconds=seconds,
        stored=so_far,
        rate=np.maximum(np.gradient(so_far, seconds), 0.0) if working.total else np.zeros(BINS + 1),
        generator_hours=_accumulated(seconds, begin, drawn, drawing * scale) / SECONDS_AN_HOUR,
        machine_hours=seconds / SECONDS_AN_HOUR,
        stage_seconds={
            stage: scale * sum(max(0.0, shard.get(f"{stage}_seconds", 0.0)) for shard in timed) for stage in STAGES
        },
        devices=tuple(sorted({str(shard.get("device_name", "an unknown device")) for shard in timed})),
    )


def _usual_gaps(starts: np.ndarray) -> np.ndarray:
    """(n,) of each start, how long it usually is from one start to the next around it."""
    if len(starts) < 2:
        return np.zeros(len(starts))
    order = np.argsort(starts)
    gaps = np.diff(starts[order], append=np.nan)  # (n,), the last has no next one
    around = np.pad(gaps, _NEIGHBOURS, constant_values=np.nan)
    usual = np.empty(len(starts))
    usual[order] = np.nanmedian(np.lib.stride_tricks.sliding_window_view(around, 2 * _NEIGHBOURS + 1), axis=1)
    return usual


class _WorkingTime:
    """From timestamps to seconds of work before them.

    usual: of each shard, how long those are worked on for which it stands, beside itself; 0 where all are given.
    """

    def __init__(self, starts: np.ndarray, ends: np.ndarray, usual: np.ndarray) -> None:
        spans: list[list[float]] = []
        until = -np.inf  # when the next shard begins at the latest, of the same run
        for start, end, gap in sorted(zip(starts.tolist(), ends.tolist(), usual.tolist(), strict=True)):
            end = max(end, start + gap)
            if start <= until:
                spans[-1][1] = max(spans[-1][1], end)
            else:
                spans.append([start, end])
            until = max(until, spans[-1][1] + PAUSE_SECONDS, start + USUAL_GAPS * gap)
        self.runs = len(spans)
        self._begin = np.array([span[0] for span in spans])
        lengths = np.array([span[1] - span[0] for span in spans])
        self._before = np.concatenate([[0.0], np.cumsum(lengths)])
        self.total = float(self._before[-1])

    def __call__(self, times: np.ndarray) -> np.ndarray:
        span = np.searchsorted(self._begin, times, side="right") - 1
        return self._before[span] + times - self._begin[span]


class _SharedTime:
    """From seconds of work to seconds that a shard has for itself: those in which k shards are in hand count 1 / k.

    A generator begins a shard while those before it are still featurised and stored. Were pictures spread over all of
    that, a second would count for several shards at once, and the rate would wave with them.
    """

    def __init__(self, begin: np.ndarray, end: np.ndarray) -> None:
        self._at = np.unique(np.concatenate([[0.0], begin, end]))
        started = np.searchsorted(np.sort(begin), self._at, side="right")
        in_hand = started - np.searchsorted(np.sort(end), self._at, side="right")
        own = np.diff(self._at) * np.where(in_hand[:-1] > 0, 1 / np.maximum(in_hand[:-1], 1), 0.0)
        self._own = np.concatenate([[0.0], np.cumsum(own)])

    def __call__(self, seconds: np.ndarray) -> np.ndarray:
        return np.interp(seconds, self._at, self._own)


def _accumulated(at: np.ndarray, begin: np.ndarray, end: np.ndarray, amounts: np.ndarray) -> np.ndarray:
    """What has come of the amounts at each moment, each of them coming evenly between its begin and its end."""
    shares = np.clip((at[:, None] - begin) / np.maximum(end - begin, 1e-9), 0.0, 1.0)  # (n, shards)
    return np.maximum.accumulate(shares @ amounts)  # sums that should stay equal may differ in their last digit
