"""How far a run is: rate, ETA, busy shares, failures, scores and cost, from shard stats and from what the monitor says.

Everything here is arithmetic on what it is told; asking and showing is cluster/generation/display.py.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cluster.dataset.clip_scores import ClipScores
from cluster.generation.cost import SECONDS_AN_HOUR, Billing

STAGES = ("draw", "featurise", "encode", "store")

#: Seconds over which "now" is measured, and over which the ETA is.
RECENT_SECONDS = 60.0
ETA_SECONDS = 600.0
#: Counts are kept this far apart, whatever the rate.
POINT_SECONDS = 0.5
#: A rate over less drawing than this says nothing.
MIN_RATE_SECONDS = 5.0
#: Without an advance for this long, and for several times the longest gap so far, the run is said to stand still.
STALL_SECONDS = 60.0
STALL_GAPS = 3.0


@dataclass(frozen=True, kw_only=True)
class MonitorSnapshot:
    """What the run's monitor says between commits."""

    drawn: int  # pictures in shards that are not committed yet
    in_flight: int  # batches being drawn
    generators: int  # that have started; on GPUs no more than there are GPUs for
    scorers: int = 0  # actors of CLIP alone that have started


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run at one moment. Counts, bytes, seconds, hours and cost are of this run; skipped samples are another's."""

    total: int  # samples wanted, skipped ones included
    skipped: int  # samples that were there already
    samples: int  # committed, quarantined ones included
    images: int  # stored
    drawn: int  # not committed yet
    seconds: float
    idle_seconds: float  # since the last picture or commit
    stalled: bool
    generators: int | None  # that have started; None: the monitor is silent
    in_flight: int  # batches being drawn
    wanted_generators: int
    short_seconds: float  # for which fewer generators than wanted have started
    waiting_scorers: int  # actors of CLIP alone that have not started
    short_of_scorers_seconds: float
    images_per_second: float | None
    recent_images_per_second: float | None
    eta_seconds: float | None
    utilisation: dict[str, float]  # stage -> busy share of its pool, 0..1
    reasons: dict[str, int]
    scores: ClipScores
    bytes: int
    retried: int
    generator_hours: float
    unit_hours: float  # GPU-hours, or machine-hours on CPUs
    cost: float | None
    cost_forecast: float | None  # of this run when it is done

    @property
    def missing(self) -> int:
        return max(0, self.total - self.skipped - self.samples - self.drawn)


def steady_clock() -> Callable[[], float]:
    """Seconds since 1970, counted on from now: that the machine's clock is set meanwhile does not change a rate."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()


class RunProgress:
    """Adds up shard stats as they are committed, and what the monitor sees meanwhile. Safe to use from two threads.

    Rates count from the start of the first shard's drawing: loading models is not drawing. With a silent monitor they
    move with commits alone.
    """

    def __init__(
        self,
        *,
        total: int,
        skipped: int,
        actors: Mapping[str, int],
        billing: Billing,
        scorers: int = 0,
        scored: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`scorers`: actors of CLIP alone. `scored`: by a CLIP, and not the null one. `clock`: seconds since 1970 that
        never go back (steady_clock)."""
        self._total, self._skipped, self._actors, self._billing = total, skipped, actors, billing
        self._scorers, self._scored = scorers, scored
        self._clock = clock or steady_clock()
        self._lock = threading.Lock()
        self._started = self._observed = self._advanced = self._clock()
        self._longest_gap = 0.0
        # Since when fewer than wanted have started; at the beginning, and once a machine is lost.
        self._short_since: float | None = self._started
        self._short_of_scorers_since: float | None = self._started
        self._first_draw: float | None = None
        self._last_commit: float | None = None
        self._live: MonitorSnapshot | None = None
        self._machines = 1
        self._history: deque[tuple[float, int]] = deque()  # (time, samples done), oldest first
        self._furthest = 0
        self._samples = self._images = self._bytes = self._retried = 0
        self._reasons: dict[str, int] = {}
        self._stage_seconds = dict.fromkeys(STAGES, 0.0)
        self._scores = ClipScores()
        self._generator_seconds = self._drawing_generator_seconds = self._unit_seconds = 0.0
        self._drawing_until_commit = 0.0  # of these seconds, those before the last commit

    def add(self, stats: Mapping[str, Any]) -> None:
        """One committed shard."""
        with self._lock:
            now = self._clock()
            self._samples += stats["count"]
            self._images += stats["successes"]
            self._bytes += stats["bytes"]
            self._retried += stats["retried"]
            if self._scored:
                self._scores += ClipScores.of_shard(dict(stats))
            for reason, count in stats["quarantined_by_reason"].items():
                self._reasons[reason] = self._reasons.get(reason, 0) + count
            for stage in STAGES:
                self._stage_seconds[stage] += max(0.0, stats[f"{stage}_seconds"])  # a clock may have been set back
            # Workers' clocks may differ from this one: a shard was not drawn before the run, nor after its commit.
            began = min(max(stats["start_time"], self._started), now)
            self._drawing_began(began)
            self._pay(now)
            self._last_commit, self._drawing_until_commit = now, self._drawing_generator_seconds
            if self._live:  # the monitor was last asked when this shard was still one of those it counts
                self._live = replace(self._live, drawn=max(0, self._live.drawn - stats["count"]))
            self._advance(now)

    def observe(self, live: MonitorSnapshot | None, *, machines: int = 1) -> None:
        """What the monitor says now (None: it is silent), and how many machines the cluster has."""
        with self._lock:
            now = self._clock()
            if (live is None) != (self._live is None):
                self._history.clear()  # two ways of counting do not make one rate
            self._pay(now)  # for what was there until now
            self._live, self._machines = live, machines
            if live:
                self._short_since = _since(self._short_since, live.generators, self._actors["draw"], now)
                self._short_of_scorers_since = _since(self._short_of_scorers_since, live.scorers, self._scorers, now)
            if live and live.in_flight and self._first_draw is None:
                self._drawing_began(now)
            self._advance(now)

    def status(self) -> Status:
        with self._lock:
            now = self._clock()
            self._pay(now)
            done, drawn = self._done(), self._drawn()
            missing = max(0, self._total - self._skipped - done)
            overall = self._overall(now, done)
            recent = self._recent(now, RECENT_SECONDS)
            per_sample = self._images / self._samples if self._samples else 1.0
            lately = self._recent(now, ETA_SECONDS)
            pace = overall if lately is None else lately
            eta = 0.0 if not missing else missing / pace if pace else None
            cost = self._billing.cost(self._unit_seconds)
            ahead = None if eta is None else self._billing.cost(eta * self._units())
            idle = now - self._advanced
            return Status(
                total=self._total,
                skipped=self._skipped,
                samples=self._samples,
                images=self._images,
                drawn=drawn,
                seconds=now - self._started,
                idle_seconds=idle,
                stalled=self._is_unfinished() and idle > max(STALL_SECONDS, STALL_GAPS * self._longest_gap),
                generators=self._live.generators if self._live else None,
                in_flight=self._live.in_flight if self._live else 0,
                wanted_generators=self._actors["draw"],
                short_seconds=0.0 if self._short_since is None else now - self._short_since,
                waiting_scorers=max(0, self._scorers - self._live.scorers) if self._live else 0,
                short_of_scorers_seconds=(
                    0.0 if self._short_of_scorers_since is None else now - self._short_of_scorers_since
                ),
                images_per_second=None if overall is None else overall * per_sample,
                recent_images_per_second=None if recent is None else recent * per_sample,
                eta_seconds=eta,
                utilisation=self._utilisation(now),
                reasons=dict(sorted(self._reasons.items())),
                scores=self._scores,
                bytes=self._bytes,
                retried=self._retried,
                generator_hours=self._generator_seconds / SECONDS_AN_HOUR,
                unit_hours=self._unit_seconds / SECONDS_AN_HOUR,
                cost=cost,
                cost_forecast=None if cost is None or ahead is None else cost + ahead,
            )

    @property
    def scores(self) -> ClipScores:
        with self._lock:
            return self._scores

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Busy seconds by stage, all actors together."""
        with self._lock:
            return dict(self._stage_seconds)

    @property
    def longest_pause_seconds(self) -> float:
        """The longest time in which nothing was drawn or stored, after the first picture."""
        with self._lock:
            return self._longest_gap

    @property
    def startup_seconds(self) -> float | None:
        """From the start to the first drawing: actors start and load their models. None: nothing was drawn."""
        with self._lock:
            return None if self._first_draw is None else self._first_draw - self._started

    def _is_unfinished(self) -> bool:
        """Whether samples are not stored; drawn ones too, which may wait for CLIP or for the store."""
        return self._total - self._skipped > self._samples

    def _drawn(self) -> int:
        """Not committed yet. What the monitor counts is more where a sample is drawn with several seeds, or by two, and
        where it was asked before the last commit."""
        return min(self._live.drawn, max(0, self._total - self._skipped - self._samples)) if self._live else 0

    def _done(self) -> int:
        return self._samples + self._drawn()

    def _generators(self) -> int:
        return self._live.generators if self._live else self._actors["draw"]

    def _units(self) -> float:
        return self._billing.units(generators=self._generators(), machines=self._machines)

    def _drawing_began(self, began: float) -> None:
        """The first drawing began then, or earlier than was known: what is paid since is time of drawing."""
        known = self._observed if self._first_draw is None else min(self._first_draw, self._observed)
        self._drawing_generator_seconds += max(0.0, known - began) * self._generators()
        self._first_draw = began if self._first_draw is None else min(self._first_draw, began)

    def _pay(self, now: float) -> None:
        spent = max(0.0, now - self._observed)
        self._observed = now
        self._generator_seconds += spent * self._generators()
        self._unit_seconds += spent * self._units()
        if self._first_draw is not None:
            self._drawing_generator_seconds += min(spent, now - self._first_draw) * self._generators()

    def _advance(self, now: float) -> None:
        done = self._done()
        steps = done + self._samples  # each sample is drawn, then stored
        if steps > self._furthest:
            if self._furthest:  # what came before the first picture was start-up
                self._longest_gap = max(self._longest_gap, now - self._advanced)
            self._furthest, self._advanced = steps, now
        if self._live or self._last_commit == now:
            if len(self._history) > 1 and now - self._history[-2][0] < POINT_SECONDS:
                self._history.pop()
            self._history.append((now, done))
        while self._history and self._history[0][0] < now - ETA_SECONDS:
            self._history.popleft()

    def _overall(self, now: float, done: int) -> float | None:
        """Samples a second since the first drawing."""
        drawing = self._live is not None and self._is_unfinished()
        until = now if drawing else self._last_commit
        if self._first_draw is None or until is None or not done or until <= self._first_draw:
            return None
        if drawing and until - self._first_draw < MIN_RATE_SECONDS:
            return None
        return done / (until - self._first_draw)

    def _recent(self, now: float, window: float) -> float | None:
        """Samples a second over the last `window` seconds; None before there were so many of drawing."""
        if self._first_draw is None or now - self._first_draw < window:
            return None
        since = [point for point in self._history if point[0] >= now - window]
        if len(since) < 2 or since[-1][0] - since[0][0] < window / 2:
            return None
        if self._live is None and len(since) <= 2 * self._actors["draw"]:
            return None  # commits come in bursts, a shard of each generator
        return max(0.0, (since[-1][1] - since[0][1]) / (since[-1][0] - since[0][0]))

    def _utilisation(self, now: float) -> dict[str, float]:
        """Busy seconds of committed shards over what their actors had; the draw pool also counts what it drew since.

        Generators have the time since they have started, whatever was asked for; where they score, for all stages.
        """
        if self._first_draw is None or self._last_commit is None or not self._samples:
            return {}
        working = self._live is not None and self._is_unfinished()
        available = dict.fromkeys(STAGES, self._drawing_generator_seconds if working else self._drawing_until_commit)
        if self._scorers:
            wall = (now if working else self._last_commit) - self._first_draw
            available |= {stage: self._actors[stage] * wall for stage in STAGES if stage != "draw"}
        busy = dict(self._stage_seconds)
        if working:
            busy["draw"] *= self._done() / self._samples
        return {stage: min(1.0, busy[stage] / available[stage]) if available[stage] > 0 else 0.0 for stage in STAGES}


def _since(before: float | None, started: int, wanted: int, now: float) -> float | None:
    """Since when fewer than wanted have started, by what was known before; None: all have."""
    return None if started >= wanted else now if before is None else before
