"""What a generation run knows about its generators while they work: batches in flight, deaths, failures.

A generator's process may vanish at any moment - a crash inside a kernel, the watchdog, a spot node taken away - and Ray
restarts it and gives it the same shard again. Somebody must remember which samples it was drawing, or a caption that
kills its process would do so for ever: that is the monitor, a tiny actor beside the driver.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.generation.limits import FaultPolicy
from pcm.reasons import GENERATOR_CRASHED, GENERATOR_HUNG

#: No verdict on the share of failures before so many samples.
MIN_SAMPLES_FOR_SHARE = 64

#: A generator whose process ends so often in a row without a picture will not draw the next one either. More often
#: than `max_deaths`: a run that begins with a caption that kills gives that caption up first.
MAX_FRUITLESS_STARTS = 4

#: Starts of one shard that are not explained by samples given up in it, and after which it is not tried again.
MAX_SHARD_STARTS = 12

#: Shards that a generator has begun or drawn and that are not on the store yet: while one is stored, the next is drawn.
#: So the death of a driver or a node costs a finished shard a generator, and the one it was drawing.
MAX_IN_HAND = 2


@dataclass(frozen=True)
class _Batch:
    shard: int
    positions: tuple[int, ...]


@dataclass
class _Generator:
    """One generator over all its processes; Ray keeps an actor's id when it restarts it."""

    where: str
    batch: _Batch | None = None
    drawn_since_start: int = 0
    fruitless_starts: int = 0  # in a row
    broken: str = ""  # what the present process said when it gave itself up


@dataclass
class _Suspect:
    deaths: int = 0
    reason: str = ""
    error: str = ""


@dataclass(frozen=True)
class ShardFaults:
    """What a generator must know before it draws a shard. Keys are positions in the plan."""

    deaths: dict[int, int] = field(default_factory=dict)  # samples to be drawn alone
    refused: dict[int, tuple[str, str]] = field(default_factory=dict)  # (reason, error) of those given up


class RunMonitor:
    """Knows each generator's batch in flight and counts deaths per sample.

    Every answer to a generator may be "stop": one line that says why the run is not worth going on with.
    """

    def __init__(self, policy: FaultPolicy) -> None:
        self._policy = policy
        self._generators: dict[str, _Generator] = {}
        self._suspects: dict[int, dict[int, _Suspect]] = {}  # by shard, position
        self._starts: Counter[int] = Counter()  # by shard
        self._scored: Counter[int] = Counter()  # starts, by shard
        self._drawn: Counter[int] = Counter()  # pictures of shards not yet committed
        self._in_hand: dict[int, str] = {}  # shards drawn or begun, by whom
        self._committed: set[int] = set()
        self._good = 0
        self._failed = 0
        self._last_error = ""
        self._stop = ""

    def start(self, generator: str, where: str, hung: str = "") -> str:
        """A generator's process begins, perhaps after another of it has died, or hung at some place.

        Returns why to stop, or "".
        """
        known = self._generators.get(generator)
        if known is None:
            self._generators[generator] = _Generator(where)
            return self._stop
        said = known.broken
        self._bury(known, said, hung)
        known.fruitless_starts = 0 if known.drawn_since_start else known.fruitless_starts + 1
        if known.fruitless_starts >= max(MAX_FRUITLESS_STARTS, self._policy.max_deaths + 1):
            self._stop = self._stop or (
                f"generator on {known.where}: its process ended {known.fruitless_starts} times in a row without a "
                f"picture ({said or hung or 'killed or crashed'}); check that machine and the model, then run the same "
                "command again"
            )
        known.where, known.drawn_since_start, known.broken = where, 0, ""
        return self._stop

    def admit(self, generator: str, shard: int, *, anyway: bool = False) -> bool:
        """Whether a generator may draw a shard now, or has too much in hand that is not on the store yet."""
        in_hand = sum(1 for owner in self._in_hand.values() if owner == generator)
        if in_hand >= MAX_IN_HAND and shard not in self._in_hand and not anyway:
            return False
        if shard not in self._committed:  # it may be drawn again because a node took its objects away
            self._in_hand[shard] = generator
        return True

    def begin_shard(self, generator: str, shard: int) -> tuple[str, ShardFaults]:
        """(why to stop or "", what is known about the shard's samples)."""
        for other in self._generators.values():
            if other.batch is not None and other.batch.shard == shard:
                self._bury(other, other.broken, "")  # its process died, and Ray gave the shard to this one
        self._drawn[shard] = 0
        self._starts[shard] += 1
        suspects = self._suspects.get(shard, {})
        deaths = {position: suspect.deaths for position, suspect in suspects.items()}
        refused = {at: (suspect.reason, suspect.error) for at, suspect in suspects.items() if suspect.reason}
        if self._starts[shard] - self._policy.max_deaths * len(refused) > MAX_SHARD_STARTS:
            self._stop = self._stop or (
                f"shard {shard} was begun {self._starts[shard]} times and never finished, because its generators died "
                f"(last: {self._last_error or 'killed, crashed or hung'}); look at them, or use a smaller --shard-size "
                "on another --out if machines live too briefly"
            )
        return self._stop, ShardFaults(deaths, refused)

    def begin(self, generator: str, shard: int, positions: Sequence[int]) -> str:
        """A batch is about to be drawn: called and waited for, so that a death cannot come first."""
        self._known(generator).batch = _Batch(shard, tuple(positions))
        return self._stop

    def end(self, generator: str, drawn: int) -> None:
        """The batch in flight is over; `drawn` of its samples were, the others raised and are tried in another way."""
        state = self._known(generator)
        if state.batch is not None:
            self._drawn[state.batch.shard] += drawn
        state.batch = None
        state.drawn_since_start += drawn
        self._good += drawn
        self._judge()

    def failed(self, count: int, error: str) -> None:
        """So many samples were given up because of the generator."""
        self._failed += count
        self._last_error = error
        self._judge()

    def broken(self, generator: str, shard: int, positions: Sequence[int], error: str) -> None:
        """The process ends itself, because it can draw nothing any more; it was drawing these."""
        state = self._known(generator)
        state.broken = self._last_error = error
        state.batch = _Batch(shard, tuple(positions))

    def begin_scoring(self, shard: int) -> str:
        """A scorer begins a shard, perhaps after its process has died over it. Returns why to stop, or ""."""
        self._scored[shard] += 1
        if self._scored[shard] > MAX_SHARD_STARTS:
            self._stop = self._stop or (
                f"shard {shard}: the process of CLIP ended {MAX_SHARD_STARTS} times over it (last: "
                f"{self._last_error or 'killed or crashed'}); check the machine and the model, then run the same "
                "command again"
            )
        return self._stop

    def scorer_broken(self, error: str) -> None:
        """A scorer's process ends itself, because its device fails every call."""
        self._last_error = error

    def end_shard(self) -> str:
        """Why to stop, or "": asked once a shard is drawn, so that one with too many failures is not stored."""
        return self._stop

    def committed(self, shard: int) -> None:
        self._committed.add(shard)
        self._in_hand.pop(shard, None)
        self._drawn.pop(shard, None)
        self._starts.pop(shard, None)
        self._scored.pop(shard, None)
        self._suspects.pop(shard, None)

    def snapshot(self) -> dict:
        """{"drawn": pictures in shards not yet committed, "in_flight": batches, "generators": those ever started}."""
        return {
            "drawn": self._drawn.total(),
            "in_flight": sum(1 for state in self._generators.values() if state.batch is not None),
            "generators": len(self._generators),
        }

    def _known(self, generator: str) -> _Generator:
        return self._generators.setdefault(generator, _Generator("an unknown node"))  # this actor was restarted

    def _bury(self, generator: _Generator, said: str, hung: str) -> None:
        """Count a death for every sample that a dead process had in its batch."""
        batch, generator.batch = generator.batch, None
        if batch is None:
            return
        for position in batch.positions:
            suspect = self._suspects.setdefault(batch.shard, {}).setdefault(position, _Suspect())
            suspect.deaths += 1
            if suspect.deaths >= self._policy.max_deaths and not suspect.reason:
                suspect.reason = GENERATOR_HUNG if hung else GENERATOR_CRASHED
                took = f"took longer than {self._policy.batch_timeout:g} s, at {hung}" if hung else "its process died"
                suspect.error = said or f"{took}, {suspect.deaths} times"
                self.failed(1, suspect.error)

    def _judge(self) -> None:
        tried = self._good + self._failed
        if tried >= MIN_SAMPLES_FOR_SHARE and self._failed > self._policy.max_error_share * tried:
            self._stop = self._stop or (
                f"{self._failed} of {tried} samples failed in the generator, more than the share of "
                f"{self._policy.max_error_share:g} allowed (last: {self._last_error}); mend the model or its arguments "
                "and run the same command again, or allow more with --max-error-share"
            )


def start_monitor(policy: FaultPolicy) -> ActorHandle:
    """A RunMonitor as an actor on the driver's own node, which the run does not survive anyway."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    actor: Any = ray.remote(**options)(RunMonitor)  # Ray's overloads know no options given as a dict
    return actor.remote(policy)
