"""Who has which shard: turns, what has been given out, what is given out next, and whose result is stored.

Ray Data gives generators turns, as many as there are shards and some more (`cluster.generation.turns`). A turn is
for no shard of its own: who has it gets a shard that was lost with a process or a node, else the next one in the
plan's order, else, at the end, one that is late and that nobody is storing. Two draw a late shard at most: a third one
would not be sooner, and a caption that hangs would take one generator after the other. A turn that Ray Data gives
again, because its process died or its result was lost with a node, is for the same shard again, unless another one has
it meanwhile. Then it is for another shard, but only if nothing came out of it before: Ray takes what a call gives the
second time for what it gave the first time, so the row of another shard would be lost.

Of a shard that two have drawn one is stored: that of the first who asks.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

#: A shard is late when it takes so many times as long as the others did, from the beginning to the store.
LATE_FACTOR = 1.5
#: So many of the last shards tell how long one takes, and not before so many of them are known.
SHARDS_TIMED, MIN_SHARDS_TIMED = 200, 3

#: What was in hand when a process of the monitor itself died is taken for lost when it is late, and after so many
#: seconds where too few shards say when that is.
UNKNOWN_SECONDS = 600.0

#: A generator has so many seconds to store its shard before that of another drawer may be stored in its place: longer
#: than a store is waited for.
COMMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Claim:
    """Who draws or stores a shard, in which turn, since when (monotonic seconds; -inf: it was given up)."""

    generator: str
    turn: int | None  # None: the monitor that knew has died
    since: float
    is_second: bool = False  # the one before it is late, and draws it too


@dataclass(frozen=True)
class _Taken:
    """A turn that had a shard: which, and who had the turn last."""

    shard: int
    holder: str  # a generator, or the actor of CLIP alone that scores it
    #: On its way to such an actor, or there: lost with the node that holds it, not with a process.
    is_drawn: bool = False


class Claims:
    """Of the shards of one pass, but for what is stored, which is known for the whole run."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._waiting: deque[int] = deque()  # shards that nobody has begun, in order
        self._claims: dict[int, Claim] = {}  # by shard, the last one of each that is not stored
        self._turns: dict[int, _Taken] = {}
        self._writing: dict[int, tuple[int, float]] = {}  # by shard: the turn that is being stored, since when
        self._used: set[int] = set()  # turns of which something may have come out
        self._refused: set[int] = set()  # turns of which nothing is stored
        self._took: deque[float] = deque(maxlen=SHARDS_TIMED)  # seconds from a shard's beginning to the store
        self._late_before = math.inf  # as `late_after`, of the process of the monitor before this one
        self._stored: set[int] = set()
        self.given_again = 0  # shards that another turn had, or the same one before: over the whole run

    def begin(self, shards: Sequence[int], in_hand: int, late_after: float = math.inf) -> None:
        """These shards are given out now; those of the pass before are gone. `in_hand`: so many of the first are with
        somebody, nobody knows with whom. `late_after`: what a process before this one said last."""
        now = self._clock()
        for known in (self._turns, self._writing, self._used, self._refused):
            known.clear()
        self._claims = {shard: Claim("", None, now) for shard in shards[:in_hand]}
        self._waiting = deque(shards[in_hand:])
        self._stored.difference_update(shards)
        self._late_before = late_after

    @property
    def some_are_left(self) -> bool:
        return bool(self._waiting or self._claims)

    @property
    def some_are_out(self) -> bool:
        """Whether others have shards, of which one may prove to be lost or late."""
        return bool(self._claims)

    @property
    def some_are_out_with_unknown(self) -> bool:
        """Whether shards may be in the hands of actors of which this process has heard nothing yet."""
        return any(claim.turn is None and not self._is_given_up(claim) for claim in self._claims.values())

    def is_stored(self, shard: int) -> bool:
        return shard in self._stored

    def in_hand(self, generator: str) -> int:
        """How many shards a generator has."""
        mine = [claim for claim in self._claims.values() if claim.generator == generator]
        return sum(1 for claim in mine if math.isfinite(claim.since))

    def holder(self, turn: int) -> str | None:
        """Who had a turn last."""
        taken = self._turns.get(turn)
        return None if taken is None else taken.holder

    def of_turn(self, turn: int) -> tuple[int, Claim] | None:
        """The shard of a turn that is given again, and who has it; None where another turn has it, or where it is
        stored.
        """
        shard = self._turns[turn].shard if turn in self._turns else None
        claim = self._claims.get(shard) if shard is not None else None
        return (shard, claim) if shard is not None and claim is not None and claim.turn == turn else None

    def is_used(self, turn: int) -> bool:
        """Whether something may have come out of a turn, so that it is for no other shard."""
        return turn in self._used

    def next(self) -> int | None:
        """The shard of a turn that has none yet, if there is one to be drawn."""
        lost = [shard for shard, claim in self._claims.items() if self._is_given_up(claim)]
        if lost:
            return min(lost)
        while self._waiting:
            if (shard := self._waiting.popleft()) not in self._stored:
                return shard
        late = self._clock() - self.late_after()
        alone = [shard for shard, claim in self._claims.items() if claim.since <= late and not claim.is_second]
        return min(
            (shard for shard in alone if self._storing(shard) is None),
            key=lambda shard: self._claims[shard].since,
            default=None,
        )

    def take(self, shard: int, turn: int, generator: str) -> None:
        before = self._claims.get(shard)
        self.given_again += before is not None
        is_second = before is not None and (before.is_second or (before.turn != turn and not self._is_given_up(before)))
        self._turns[turn] = _Taken(shard, generator)
        self._claims[shard] = Claim(generator, turn, self._clock(), is_second)

    def handed_on(self, turn: int) -> None:
        """The shard of a turn is drawn and on its way to an actor of CLIP alone."""
        self._used.add(turn)
        if turn in self._turns:
            self._turns[turn] = replace(self._turns[turn], is_drawn=True)

    def received(self, turn: int, scorer: str) -> None:
        """An actor of CLIP alone has the shard of a turn."""
        taken = self._turns.get(turn)
        if taken is None:
            return
        self._turns[turn] = _Taken(taken.shard, scorer, is_drawn=True)
        claim = self._claims.get(taken.shard)
        if claim is not None and claim.turn == turn and not math.isfinite(claim.since):  # not lost, after all
            self._claims[taken.shard] = replace(claim, since=self._clock())

    def given_back(self, turn: int, scorer: str) -> None:
        """An actor of CLIP cannot score the shard of a turn: it is drawn again."""
        taken = self._turns.get(turn)
        claim = self._claims.get(taken.shard) if taken is not None and taken.holder == scorer else None
        if taken is not None and claim is not None and claim.turn == turn:
            self._claims[taken.shard] = replace(claim, since=-math.inf)

    def give_up(self, holders: set[str], *, nodes: bool = False) -> None:
        """What these had in hand is drawn again by whoever asks next. Of lost `nodes` also what was drawn.

        One that is cut off, and taken for dead, may store its shard too: the first one to commit it wins (WriteShard).
        """
        for shard, claim in self._claims.items():
            if self._is_lost(claim.turn, holders, nodes):
                self._claims[shard] = replace(claim, since=-math.inf)
        for shard, (turn, _) in list(self._writing.items()):
            if self._is_lost(turn, holders, nodes):
                del self._writing[shard]

    def may_store(self, shard: int, turn: int) -> bool:
        """Whether a shard that was drawn in this turn is stored, or another drawer's is: the first one to ask wins. A
        turn that has lost stays so: its call has ended with nothing."""
        self._used.add(turn)
        if shard in self._stored or turn in self._refused:
            return False
        if (winner := self._storing(shard)) not in (None, turn):
            self._refused.add(turn)
            if winner in self._turns and (claim := self._claims.get(shard)) is not None:  # it is lost with that one now
                self._claims[shard] = Claim(self._turns[winner].holder, winner, claim.since)
            return False
        self._writing[shard] = (turn, self._clock())
        return True

    def _storing(self, shard: int) -> int | None:
        """The turn whose result is being stored, and has the time for it."""
        turn, since = self._writing.get(shard, (None, -math.inf))
        return turn if self._clock() - since < COMMIT_SECONDS else None

    def stored(self, shard: int) -> None:
        self._stored.add(shard)
        claim = self._claims.pop(shard, None)
        # Of one that was given up, or begun before this process, nobody knows how long it took.
        if claim is not None and claim.turn is not None and math.isfinite(claim.since):
            self._took.append(self._clock() - claim.since)
        self._writing.pop(shard, None)

    def _is_given_up(self, claim: Claim) -> bool:
        if claim.turn is None:
            late = self.late_after()
            return self._clock() - claim.since >= (late if math.isfinite(late) else UNKNOWN_SECONDS)
        return not math.isfinite(claim.since)

    def _is_lost(self, turn: int | None, holders: set[str], nodes: bool) -> bool:
        taken = self._turns.get(turn) if turn is not None else None
        return taken is not None and taken.holder in holders and (nodes or not taken.is_drawn)

    def late_after(self) -> float:
        """Seconds from a shard's beginning after which it is late; inf where too few shards say it."""
        if len(self._took) < MIN_SHARDS_TIMED:
            return self._late_before
        return LATE_FACTOR * statistics.median(self._took)
