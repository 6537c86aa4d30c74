"""What a generation run knows about its generators while they work: who draws which shard, deaths, failures.

A generator's process may vanish at any moment - a crash inside a kernel, the watchdog, a spot node taken away - and Ray
restarts it where it can. Somebody must remember which samples it was drawing, or a caption that kills its process would
do so again and again. And somebody must give its shards to others, at once: who reads the dataset in the plan's order
waits for the first one that is missing. That is the monitor, a tiny actor beside the driver. Who has which shard is
kept in `Claims`; here stands who can draw, which samples are suspects, and when a run is not worth going on with.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.generation.limits import FaultPolicy
from cluster.generation.stages.claims import Claim, Claims
from pcm.reasons import GENERATOR_CRASHED, GENERATOR_HUNG

#: No verdict on the share of failures before so many samples.
MIN_SAMPLES_FOR_SHARE = 64

#: The share is also judged over the shards drawn last, of so many samples: what breaks after days must not first fail
#: for as many days. So many that a stretch of 5,000 captions that a model cannot draw ends no run.
RECENT_SAMPLES = 10_000

#: An actor that starts so often in a row without a picture is left out. More often than `max_deaths`: a run that begins
#: with a caption that kills gives that caption up first.
MAX_FRUITLESS_STARTS = 4

#: Actors that have started and are all left out stop the run when for so many seconds no other has started, no node has
#: come and none was on its way.
OTHERS_MAY_START_SECONDS = 60.0

#: Where an actor is that this process of the monitor has not heard start.
UNKNOWN_PLACE = "an unknown node"

#: Starts of one shard that are not explained by samples given up in it, and after which it is not tried again.
MAX_SHARD_STARTS = 12

#: Shards that a generator has begun and that are not on the store yet: while one is stored, the next is drawn. So the
#: death of a process, a driver or a node costs a finished shard a generator, and the one it was drawing.
MAX_IN_HAND = 2

#: How long the driver waits for what is only told.
ANSWER_SECONDS = 5.0


class Pool(Enum):
    """Which of a run's pools of actors; the value is what one of it is, for people."""

    GENERATORS = "a generator"
    SCORERS = "an actor of CLIP"  # CLIP alone: it only scores

    @classmethod
    def of(cls, scores: bool) -> "Pool":
        """The pool of an actor, as it says what it is."""
        return cls.SCORERS if scores else cls.GENERATORS


@dataclass(frozen=True)
class Turn:
    """What a generator does with a turn: draw a shard, ask again later, or nothing (both None and False)."""

    shard: int | None = None
    again: bool = False  # it was begun before, and its drawer may have died of it
    wait: bool = False
    stop: str = ""  # why the run is not worth going on with


@dataclass(frozen=True)
class _Batch:
    shard: int
    positions: tuple[int, ...]


@dataclass
class _Generator:
    """One generator, or actor of CLIP alone, over all its processes; Ray keeps an actor's id when it restarts it."""

    where: str
    scores: bool = False  # it is an actor of CLIP alone
    batch: _Batch | None = None
    drawn_since_start: int = 0  # pictures; shards of an actor of CLIP
    fruitless_starts: int = 0  # in a row
    broken: str = ""  # what the present process said when it gave itself up
    not_loaded: bool = False  # the last start ended so
    left_out: str = ""  # why it draws no more where it is

    @property
    def pool(self) -> Pool:
        return Pool.of(self.scores)


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


@dataclass(frozen=True)
class ShardOutcome:
    """What became of the samples of a drawn shard whose captions are good."""

    samples: int = 0
    failed: int = 0  # by the generator, blank ones included
    blank: int = 0  # whose pictures show nothing, with any of their seeds
    blank_pictures: int = 0  # drawn of these
    blank_reason: str = ""  # of one of these


class RunMonitor:
    """Knows who draws what, each generator's batch in flight, and counts deaths per sample.

    Every answer to a generator may be "stop": one line that says why the run is not worth going on with.
    """

    def __init__(self, policy: FaultPolicy, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._generators: dict[str, _Generator] = {}
        self._wanted = {Pool.GENERATORS: 1, Pool.SCORERS: 0}
        self._last_hope = clock()  # that others can draw
        self._has_pass = False
        self._claims = Claims(clock)
        self._loading: set[str] = set()  # generators
        self._alive: set[str] = set()  # ids of nodes
        self._nodes: dict[str, str] = {}  # of generators and actors of CLIP: the id of each one's node, as it said last
        self._processes: dict[str, int] = {}  # of generators, as each said last
        self._drawing: dict[str, int] = {}  # the turn of each generator that draws in one
        self._suspects: dict[int, dict[int, _Suspect]] = {}  # by shard, position
        self._starts: Counter[int] = Counter()  # by shard
        self._scored: Counter[int] = Counter()  # starts, by shard
        self._drawn: Counter[int] = Counter()  # pictures of shards not yet committed
        self._ended: set[int] = set()  # shards not yet committed that were drawn to the end
        self._good = 0
        self._failed = 0
        self._recent: deque[ShardOutcome] = deque()
        self._last_error = ""
        self._stop = ""

    def begin_pass(
        self,
        shards: Sequence[int],
        generators: int,
        scorers: int = 0,
        in_hand: int = 0,
        late_after: float = math.inf,
    ) -> None:
        """These shards are given out now, to at most so many actors; those of the pass before are gone. Where nothing
        is drawn, those that take turns are the actors of CLIP alone.

        `in_hand`: so many of the first are being drawn or stored, nobody knows where: a monitor that starts again in
        the middle of a pass is told so. `late_after`: what the process before it said.
        """
        for known in (self._generators, self._nodes, self._processes, self._drawing):
            known.clear()
        self._loading.clear()
        self._claims.begin(shards, in_hand, late_after)
        self._wanted = {Pool.GENERATORS: generators, Pool.SCORERS: scorers}
        self._last_hope, self._has_pass = self._clock(), True

    def wants(self) -> tuple[bool, str]:
        """What the driver is to tell: (the pass: this process has taken the place of one that died, and gives nothing
        out yet; whether nodes are coming: why nobody can draw, or "")."""
        return not self._has_pass, self._hopeless()

    def late_after(self) -> float:
        """After how many seconds a shard is late; inf: not known yet. The driver keeps it for the process after this
        one."""
        return self._claims.late_after()

    def start(self, generator: str, where: str, hung: str = "", *, scores: bool = False) -> str:
        """A generator starts to load its model, perhaps after its process has died, or hung at some place, or failed;
        or an actor of CLIP alone, which `scores`.

        Returns why not to: the run stops, or this actor is left out; or "".
        """
        self._last_hope = self._clock()
        self._loading.add(generator)
        self._drawing.pop(generator, None)
        known = self._generators.get(generator)
        if known is None:
            self._generators[generator] = _Generator(where, scores)
            return self._stop
        said = known.broken
        self._bury(known, said, hung)
        if where != known.where:  # Ray restarted it on another node, which has done nothing wrong
            known.fruitless_starts, known.left_out = 0, ""
        if known.drawn_since_start:
            known.fruitless_starts = 0
        if not known.not_loaded:  # that was counted when it was said
            self._count_fruitless(known, said or hung or "killed or crashed")
        known.where, known.drawn_since_start, known.broken, known.not_loaded = where, 0, "", False
        self._claims.give_up({generator})  # others need not wait until it has loaded
        return self._stop or known.left_out

    def not_loaded(
        self, generator: str, error: str, *, again: bool, where: str = UNKNOWN_PLACE, scores: bool = False
    ) -> None:
        """An actor could not load its models. Not to be tried `again`: it is left out at once, for this reason.

        One that is left out says so again and again: this process may not have been there when it started.
        """
        known = self._known(generator, where, scores=scores)
        self._loading.discard(generator)
        known.not_loaded = True
        if known.left_out:
            return
        self._last_error = error
        if again:
            self._count_fruitless(known, error)
        else:
            known.left_out = error

    def turn(
        self,
        generator: str,
        number: int,
        *,
        node: str = "",
        process: int = 0,
        loaded: bool = True,
        anyway: bool = False,
        scores: bool = False,
    ) -> Turn:
        """What a generator does in a turn; the number says which turn, and nothing of the shard.

        With too much in hand that is not on the store yet it waits, unless it is to go on `anyway`. One that could not
        be `loaded` gets no shard: its turns are over when nothing is left to draw. `scores`: an actor of CLIP alone
        takes turns, where nothing is drawn.
        """
        if scores:
            self._heard_of_scorer(generator)
        self._nodes[generator] = node
        if self._processes.setdefault(generator, process) != process:  # the one before it has died
            self._processes[generator] = process
            self._claims.give_up({generator})
        if not loaded and not self._stop:
            self._judge_actors(scores=scores)
        if self._stop:
            return Turn(stop=self._stop)
        if not loaded or not self._has_pass:
            return Turn(wait=self._claims.some_are_left or not self._has_pass)
        self._loading.discard(generator)
        self._drawing.pop(generator, None)
        shard: int | None
        if (again := self._claims.of_turn(number)) is not None:  # Ray Data gives this turn again
            shard, claim = again
            self._moved(claim, shard, generator)
        elif self._claims.is_used(number):
            return Turn()
        else:
            if self._claims.in_hand(generator) >= MAX_IN_HAND and not anyway:
                return Turn(wait=True)
            shard = self._claims.next()
            if shard is None:
                return Turn(wait=self._claims.some_are_out)
        self._claims.take(shard, number, generator)
        self._drawing[generator] = number
        return Turn(shard, again=self._starts[shard] > 0)

    def busy(self) -> int:
        """Generators that load a model or draw: after the last shard, for nothing."""
        return len(self._loading) + len(self._drawing)

    def nodes(self, alive: Sequence[str]) -> None:
        """The ids of the cluster's nodes: what was in hand on others is given out again at once."""
        there = set(alive)
        if there - self._alive:  # an actor may start there
            self._last_hope = self._clock()
        self._alive = there
        lost = {name for name, node in self._nodes.items() if node and node not in there}
        for name in lost:
            del self._nodes[name]
            self._drawing.pop(name, None)
            self._loading.add(name)  # wherever it comes back
            if (known := self._generators.pop(name, None)) is not None:  # it has not started again yet
                self._bury(known, known.broken, "")
        self._claims.give_up(lost, nodes=True)

    def nodes_are_coming(self) -> None:
        """The cluster is about to get another node: a run in which nobody can draw waits for it."""
        self._last_hope = self._clock()

    def _hopeless(self) -> str:
        """Why all that have started are left out, while others that were asked for have not; or ""."""
        for pool in Pool:
            started = self._started(pool)
            others = self._wanted[pool] - len(started)
            if others <= 0 or not self._are_left_out(started):
                continue
            if self._is_same(started) or self._claims.some_are_out_with_unknown:
                continue
            return f"{self._left_out_line(started)}; {others} more that were asked for have not started"
        return ""

    def handed_on(self, turn: int) -> None:
        """The shard of a turn is drawn and on its way to an actor of CLIP alone."""
        self._claims.handed_on(turn)

    def received(self, turn: int, scorer: str, node: str) -> None:
        """An actor of CLIP alone has the shard of a turn."""
        self._nodes[scorer] = node
        self._heard_of_scorer(scorer)
        self._claims.received(turn, scorer)

    def given_back(self, turn: int, scorer: str) -> Turn:
        """An actor of CLIP that could not load it has the shard of a turn, which is drawn again for another one.

        What it does: ask again later, until nothing is left to draw.
        """
        self._claims.given_back(turn, scorer)
        if not self._stop:
            self._judge_actors(scores=True)
        return Turn(stop=self._stop, wait=self._claims.some_are_left or not self._has_pass)

    def may_store(self, shard: int, turn: int) -> bool:
        """Whether a shard that was drawn in this turn is stored, or another drawer's is: the first one to ask wins."""
        if (holder := self._claims.holder(turn)) in self._generators:
            self._loading.discard(holder)
            self._generators[holder].drawn_since_start += self._generators[holder].scores
        self._drawing = {generator: number for generator, number in self._drawing.items() if number != turn}
        return self._claims.may_store(shard, turn)

    def _count_fruitless(self, generator: _Generator, said: str) -> None:
        generator.fruitless_starts += 0 if generator.drawn_since_start else 1
        if generator.fruitless_starts >= max(MAX_FRUITLESS_STARTS, self._policy.max_deaths + 1):
            nothing = "a shard" if generator.pool is Pool.SCORERS else "a picture"
            generator.left_out = (
                f"{generator.fruitless_starts} starts of {generator.pool.value} in a row without {nothing} "
                f"({said}); check that machine and the model, then run the same command again"
            )

    def _moved(self, claim: Claim, shard: int, generator: str) -> None:
        """A turn is given again. If to another generator, then the process of the first one died."""
        other = self._generators.get(claim.generator)
        if claim.generator != generator and other and other.batch and other.batch.shard == shard:
            self._bury(other, other.broken, "")

    def _started(self, pool: Pool) -> list[_Generator]:
        return [state for state in self._generators.values() if state.pool is pool]

    def _judge_actors(self, *, scores: bool) -> None:
        """Stop the run when nobody of a pool can work, and nobody else is to be hoped for."""
        pool = Pool.of(scores)
        started = self._started(pool)
        if not self._has_pass or not self._are_left_out(started):
            return
        others = self._wanted[pool] - len(started)
        if self._claims.some_are_out_with_unknown:
            self._last_hope = self._clock()
        if others > 0 and self._clock() - self._last_hope < OTHERS_MAY_START_SECONDS:
            return
        self._stop = self._left_out_line(started)

    @staticmethod
    def _are_left_out(started: Sequence[_Generator]) -> bool:
        return bool(started) and all(state.left_out for state in started)

    @staticmethod
    def _is_same(started: Sequence[_Generator]) -> bool:
        """Whether two machines have said the same: then it is the run's error, and a third one would say it too."""
        said = Counter(error for error, _ in {(state.left_out, state.where) for state in started})
        return max(said.values(), default=0) > 1

    @staticmethod
    def _left_out_line(started: Sequence[_Generator]) -> str:
        first, *more = started
        return f"{first.left_out} (on {first.where}{f', and {len(more)} more' if more else ''})"

    def begin_shard(self, shard: int) -> tuple[str, ShardFaults]:
        """(why to stop or "", what is known about the shard's samples)."""
        self._drawn[shard] = 0
        self._ended.discard(shard)
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
        if state.batch is not None and not self._claims.is_stored(state.batch.shard):
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

    def begin_scoring(self, shard: int) -> tuple[str, bool]:
        """A scorer begins a shard. Returns (why to stop or "", whether it was begun before: a process may have died of
        it)."""
        self._scored[shard] += 1
        if self._scored[shard] > MAX_SHARD_STARTS:
            self._stop = self._stop or (
                f"shard {shard}: the process of CLIP ended {MAX_SHARD_STARTS} times over it (last: "
                f"{self._last_error or 'killed or crashed'}); check the machine and the model, then run the same "
                "command again"
            )
        return self._stop, self._scored[shard] > 1

    def scorer_broken(self, error: str) -> None:
        """A scorer's process ends itself, because its device fails every call."""
        self._last_error = error

    def end_shard(self, shard: int, outcome: ShardOutcome = ShardOutcome()) -> str:
        """Why to stop, or "": asked once a shard is drawn, so that one with too many failures is not stored. Asked
        twice, it is counted once."""
        if shard in self._ended:
            return self._stop
        self._ended.add(shard)
        # Each picture was counted once it was drawn; but those of a shard begun before this process not all.
        if self._drawn[shard] >= outcome.samples - outcome.failed + outcome.blank_pictures:
            self._good -= outcome.blank_pictures
            self._failed += outcome.blank
            self._last_error = outcome.blank_reason or self._last_error
        self._judge()
        if outcome.samples:
            self._recent.append(outcome)
            self._judge_recent()
        return self._stop

    def committed(self, shard: int) -> None:
        self._claims.stored(shard)
        self._drawn.pop(shard, None)
        self._ended.discard(shard)
        self._starts.pop(shard, None)
        self._scored.pop(shard, None)
        self._suspects.pop(shard, None)

    def begun_again(self) -> int:
        """How often a shard was given out that another turn had, or the same one before: its drawer had died, or was
        late."""
        return self._claims.given_again

    def snapshot(self) -> dict:
        """{"drawn": pictures in shards not yet committed, "in_flight": batches, "generators": those ever started,
        "scorers": the same of actors of CLIP alone}."""
        asked = self._nodes.keys() - self._generators.keys()  # null generators ask for turns, and load nothing
        return {
            "drawn": self._drawn.total(),
            "in_flight": sum(1 for state in self._generators.values() if state.batch is not None),
            "generators": len(self._started(Pool.GENERATORS)) + len(asked),
            "scorers": len(self._started(Pool.SCORERS)),
        }

    def left_out(self) -> list[str]:
        """Where and why actors work no more."""
        return [f"{state.where}: {state.left_out}" for state in self._generators.values() if state.left_out]

    def _known(self, generator: str, where: str = UNKNOWN_PLACE, *, scores: bool = False) -> _Generator:
        """Also where this process has taken the place of one that knew it, or its node was taken for lost."""
        return self._generators.setdefault(generator, _Generator(where, scores))

    def _heard_of_scorer(self, scorer: str) -> None:
        """Its start is yet to be told, or was told to a process that died."""
        self._generators.setdefault(scorer, _Generator(UNKNOWN_PLACE, scores=True, not_loaded=True))

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
        self._judge_share(self._failed, tried, f"{tried}", at_least=MIN_SAMPLES_FOR_SHARE)

    def _judge_recent(self) -> None:
        while (tried := sum(each.samples for each in self._recent)) - self._recent[0].samples >= RECENT_SAMPLES:
            self._recent.popleft()
        failed = sum(each.failed for each in self._recent)
        self._judge_share(failed, tried, f"the last {tried}", at_least=RECENT_SAMPLES)

    def _judge_share(self, failed: int, tried: int, whose: str, *, at_least: int) -> None:
        if tried >= at_least and failed > self._policy.max_error_share * tried:
            self._stop = self._stop or (
                f"{failed} of {whose} samples failed in the generator, more than the share of "
                f"{self._policy.max_error_share:g} allowed (last: {self._last_error}); mend the model or its arguments "
                "and run the same command again, or allow more with --max-error-share"
            )


def start_monitor(policy: FaultPolicy, **named: str) -> ActorHandle:
    """A RunMonitor as an actor on the driver's own node, which the run does not survive anyway.

    `named`: name and namespace. Raises ray.exceptions.ActorAlreadyExistsError where it is taken.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    options |= named
    actor: Any = ray.remote(**options)(RunMonitor)  # Ray's overloads know no options given as a dict
    return actor.remote(policy)


def shards_begun_again(monitor: ActorHandle) -> int | None:
    """What a run's monitor says of it; None where it does not answer."""
    try:
        count: Any = ray.get(monitor.begun_again.remote(), timeout=ANSWER_SECONDS)
        return count
    except ray.exceptions.RayError:
        return None
