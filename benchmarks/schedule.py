"""The schedule of a run with many generators, simulated: idle time, work done twice, how a run ends.

    python -m benchmarks.schedule --generators 64 --shards-each 20
    python -m benchmarks.schedule --generators 1000 --shards-each 20 --hours-between-deaths 8
    python -m benchmarks.schedule --generators 64 --shards-each 20 --lost 1 --lost-after-hours 1.7

The monitor is the one of a real run (cluster.generation.stages.monitor), on a clock of its own; simulated are Ray Data,
which gives each generator four turns at once that stay bound to it, and the generators. Times are of shards of about
ten minutes; `--no-turns` gives every shard to the generator to which Ray Data gave its turn, and to no other one.

A death takes a generator's node, what it was drawing and what it was storing. Ray knows of it after 15 seconds. It
starts again on another one after `--restart-minutes`, and loads its model again; those of `--lost` do not come back.
Rates differ from generator to generator and from shard to shard.
"""

import argparse
import heapq
import json
import math
import random
import statistics
from collections import deque
from dataclasses import dataclass, field

from cluster.generation.limits import FaultPolicy
from cluster.generation.pools import TURNS_AT_ONCE
from cluster.generation.stages.monitor import RunMonitor, Turn
from cluster.generation.stages.takes_turns import LONGEST_PAUSE


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is simulated; times in seconds."""

    generators: int
    shards: int
    shard_seconds: float = 600.0
    spread_of_generators: float = 0.05  # standard deviation of their rates, as a share
    spread_of_shards: float = 0.1  # of shards on one generator
    load_seconds: float = 90.0
    store_seconds: float = 5.0
    seconds_between_deaths: float = math.inf  # of one generator, on average
    restart_seconds: float = 300.0
    lost: int = 0  # generators whose nodes are lost, and which do not come back
    lost_after_seconds: float = 390.0
    lost_unseen_seconds: float = 15.0  # until Ray knows that a node is lost
    joins_within_seconds: float = 600.0  # the first generator comes at once, the last one so much later
    turns: bool = True  # False: every shard in its own turn alone
    seed: int = 0


@dataclass
class _Generator:
    name: str
    pace: float
    bound: deque[int] = field(default_factory=deque)  # turns, the first one is being worked on
    storing: list[int] = field(default_factory=list)  # turns whose shards are drawn
    life: int = 0  # counts processes
    drawing_since: float | None = None
    shard: int | None = None


class Simulation:
    """One run, from the first generator to the last shard on the store."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.now = 0.0
        self._random = random.Random(settings.seed)
        self._monitor = RunMonitor(FaultPolicy(), clock=lambda: self.now)
        self._monitor.begin_pass(range(settings.shards), settings.generators)
        more = TURNS_AT_ONCE * settings.generators if settings.turns else 0
        self._queue = deque(range(settings.shards + more))
        self._events: list[tuple[float, int, str, int, int, int]] = []  # time, order, kind, generator, life, shard
        self._order = 0
        normal = self._random.normalvariate
        self._generators = [
            _Generator(f"generator {number}", max(0.2, normal(1, settings.spread_of_generators)))
            for number in range(settings.generators)
        ]
        self._stored: set[int] = set()
        self._next_in_order, self._advanced_at, self._longest_wait = 0, 0.0, 0.0  # of who reads in plan order
        self._lost_shards: dict[int, float] = {}  # that a lost generator had begun and not stored: when it was lost
        self._lost_for = 0.0
        self._shards: dict[int, int] = {}  # of each turn
        self._gone: set[str] = set()
        self.drawn = 0.0  # shards, parts of those that were lost or dropped included
        self.busy_seconds = 0.0
        self.joined: list[float] = []

    def run(self) -> dict[str, float]:
        """idle_share: of the generators' time, from when each came to the last shard, what was not drawing (loading and
        restarting too); drawn_twice: work lost or dropped, as a share; longest_wait_in_order: how long one who reads
        in plan order waits at most for the next shard, once it has the first; lost_shards_stored_after: from the loss
        of a generator for good until all that it had in hand is stored."""
        settings = self.settings
        for number in range(settings.generators):
            joins = settings.joins_within_seconds * number / max(1, settings.generators - 1)
            self._at(joins, "start", number)
        while len(self._stored) < settings.shards:
            self.now, _, kind, number, life, shard = heapq.heappop(self._events)
            generator = self._generators[number]
            if kind == "start":
                self._start(number)
            elif kind == "stored":
                self._store(number, shard, turn=life)
            elif life == generator.life:
                getattr(self, f"_{kind}")(number)
        for generator in self._generators:
            self._pause(generator)
        there = sum(max(0.0, self.now - since) for since in self.joined)
        ideal = settings.shards * settings.shard_seconds / sum(1 / each.pace for each in self._generators)
        return {
            "generators": settings.generators,
            "shards": settings.shards,
            "hours": round(self.now / 3600, 3),
            "hours_without_idle_time": round(ideal / 3600, 3),
            "idle_share": round(1 - self.busy_seconds / there, 4),
            "drawn_twice": round(self.drawn / settings.shards - 1, 4),
            "minutes_longest_wait_in_order": round(self._longest_wait / 60, 1),
            "minutes_lost_shards_stored_after": round(self._lost_for / 60, 1),
        }

    def _at(self, after: float, kind: str, number: int, shard: int = -1, turn: int | None = None) -> None:
        self._order += 1
        life = self._generators[number].life if turn is None else turn
        heapq.heappush(self._events, (self.now + after, self._order, kind, number, life, shard))

    def _start(self, number: int) -> None:
        """A process begins to load; its first one joins the run."""
        generator = self._generators[number]
        if not generator.life:
            self.joined.append(self.now)
        generator.life += 1
        self._gone.discard(generator.name)
        self._monitor.start(generator.name, f"node {number}")
        self._at(self.settings.load_seconds, "work", number)
        if number >= self.settings.generators - self.settings.lost:
            self._at(max(0.0, self.settings.lost_after_seconds - self.now), "end", number)
        elif self.settings.seconds_between_deaths < math.inf:
            self._at(self._random.expovariate(1 / self.settings.seconds_between_deaths), "die", number)

    def _work(self, number: int) -> None:
        """The next turn of a generator that is loaded."""
        generator = self._generators[number]
        while self._queue and len(generator.bound) + len(generator.storing) < TURNS_AT_ONCE:
            generator.bound.append(self._queue.popleft())
        while generator.bound:
            turn = self._turn(generator, generator.bound[0])
            if turn.wait:
                self._at(LONGEST_PAUSE, "work", number)
                return
            if turn.shard is not None:
                generator.shard, generator.drawing_since = turn.shard, self.now
                self._shards[generator.bound[0]] = turn.shard
                self._monitor.begin_shard(turn.shard)
                takes = self.settings.shard_seconds * generator.pace
                takes *= max(0.2, self._random.normalvariate(1, self.settings.spread_of_shards))
                self._at(takes, "drawn", number)
                return
            generator.bound.popleft()
            if self._queue:
                generator.bound.append(self._queue.popleft())

    def _turn(self, generator: _Generator, number: int) -> Turn:
        if self.settings.turns:
            return self._monitor.turn(generator.name, number, node=generator.name, anyway=True)
        return Turn(None if number in self._stored else number)

    def _drawn(self, number: int) -> None:
        generator = self._generators[number]
        assert generator.shard is not None
        turn = generator.bound.popleft()
        self._monitor.end_shard(generator.shard)
        generator.storing.append(turn)
        self._at(self.settings.store_seconds, "stored", number, generator.shard, turn)
        self._pause(generator)
        self.drawn += 1
        self._work(number)

    def _die(self, number: int) -> None:
        generator = self._generators[number]
        if generator.drawing_since is not None:
            part = (self.now - generator.drawing_since) / (self.settings.shard_seconds * generator.pace)
            self.drawn += min(1.0, part)
        self._pause(generator)
        generator.bound.extendleft(reversed(generator.storing))
        generator.storing.clear()
        generator.life += 1  # what was to come of this process does not come
        self._gone.add(generator.name)
        if self.settings.lost_unseen_seconds < self.settings.restart_seconds:
            self._at(self.settings.lost_unseen_seconds, "seen", number)
        self._at(self.settings.restart_seconds, "start", number)

    def _end(self, number: int) -> None:
        generator = self._generators[number]
        for turn in [*generator.storing, *list(generator.bound)[: generator.shard is not None]]:
            self._lost_shards[self._shards[turn]] = self.now
        self._pause(generator)
        generator.storing.clear()
        generator.life += 1
        self._gone.add(generator.name)
        self._at(self.settings.lost_unseen_seconds, "seen", number)

    def _seen(self, number: int) -> None:
        """Ray knows that the node is lost, and the monitor is told."""
        self._monitor.nodes([each.name for each in self._generators if each.name not in self._gone])

    def _store(self, number: int, shard: int, *, turn: int) -> None:
        if turn not in self._generators[number].storing:
            return  # its process has died meanwhile
        self._generators[number].storing.remove(turn)
        if not self.settings.turns or self._monitor.may_store(shard, turn):
            self._monitor.committed(shard)
            self._stored.add(shard)
            self._lost_for = max(self._lost_for, self.now - self._lost_shards.pop(shard, self.now))
            self._read_in_order()

    def _read_in_order(self) -> None:
        before = self._next_in_order
        while self._next_in_order in self._stored:
            self._next_in_order += 1
        if self._next_in_order > before:
            if before:
                self._longest_wait = max(self._longest_wait, self.now - self._advanced_at)
            self._advanced_at = self.now

    def _pause(self, generator: _Generator) -> None:
        if generator.drawing_since is not None:
            self.busy_seconds += self.now - generator.drawing_since
        generator.drawing_since = generator.shard = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", type=int, default=64)
    parser.add_argument("--shards-each", type=float, default=20.0, help="shards a generator, on average")
    parser.add_argument("--hours-between-deaths", type=float, default=math.inf, help="of one generator")
    parser.add_argument("--restart-minutes", type=float, default=5.0)
    parser.add_argument("--lost", type=int, default=0, help="generators that are lost for good, with their nodes")
    parser.add_argument("--lost-after-hours", type=float, default=1.0)
    parser.add_argument("--no-turns", action="store_true", help="every shard in its own turn alone")
    parser.add_argument("--minutes-a-shard", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=5, help="runs; the medians are printed")
    args = parser.parse_args()
    runs = [
        Simulation(
            Settings(
                generators=args.generators,
                shards=round(args.generators * args.shards_each),
                shard_seconds=args.minutes_a_shard * 60,
                seconds_between_deaths=args.hours_between_deaths * 3600,
                restart_seconds=args.restart_minutes * 60,
                lost=args.lost,
                lost_after_seconds=args.lost_after_hours * 3600,
                turns=not args.no_turns,
                seed=seed,
            )
        ).run()
        for seed in range(args.seeds)
    ]
    print(json.dumps({name: statistics.median(run[name] for run in runs) for name in runs[0]}))


if __name__ == "__main__":
    main()
