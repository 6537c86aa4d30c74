"""A run on the screen: a progress bar on a terminal, a line now and then in a log, Prometheus metrics in both."""

import logging
import math
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, TextIO

import ray
from ray.actor import ActorHandle
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from cluster.generation.progress import STAGES, MonitorSnapshot, RunProgress, Status
from cluster.generation.stages.monitor import ANSWER_SECONDS
from cluster.generation.telemetry import Telemetry
from cluster.numbers import duration, size
from cluster.session import SECONDS_TO_START, cluster_nodes, labels_text, resources_now, who_has

log = logging.getLogger(__name__)

#: How often the monitor is asked; what is shown changes no faster.
TICK_SECONDS = 1.0
#: Columns of a terminal that does not say how many it has.
UNKNOWN_WIDTH = 120
#: How often a silent monitor is asked again: each question costs its timeout.
SILENT_TICK_SECONDS = 10.0

#: Log lines come this often at first, and that often once a run is known to be a long one.
FIRST_LINES_SECONDS = 10.0
LATER_LINES_SECONDS = 60.0
FIRST_LINES_FOR = 120.0


@dataclass(frozen=True, kw_only=True)
class ClusterState:
    """What can be asked of a running cluster."""

    live: MonitorSnapshot | None = None  # None: the monitor does not answer
    machines: int = 1
    gpus: float = 0.0  # of the nodes on which generators may be
    no_room: str = ""  # what others leave too little of for a generator
    full: str = ""  # what is too little for one generator more, whoever has it
    full_for_clip: str = ""  # the same of an actor of CLIP alone


def ask_cluster(monitor: ActorHandle | None, *, room: "Room", clip_room: "Room") -> ClusterState:
    """Ask Ray and the run's monitor. Takes up to ANSWER_SECONDS; raises whatever Ray raises when it is in trouble."""
    has, free = resources_now(room.labels)
    no_room, full = room.lacking(has, free), room.full(has, free)
    state = ClusterState(
        machines=len(cluster_nodes()),
        gpus=has["GPU"],
        no_room=no_room,
        full=full,
        full_for_clip=clip_room.full(has, free),
    )
    if monitor is None:
        return state
    try:
        said: Any = ray.get(monitor.snapshot.remote(), timeout=ANSWER_SECONDS)
    except ray.exceptions.RayError:
        return state
    # The monitor remembers every generator, those on lost nodes too; there are no more than there are GPUs for.
    most = int(state.gpus / room.gpus + 1e-6) if room.gpus else said["generators"]
    live = MonitorSnapshot(
        drawn=said["drawn"],
        in_flight=said["in_flight"],
        generators=min(said["generators"], most),
        scorers=said["scorers"],
    )
    return replace(state, live=live)


class Room:
    """Whether a cluster has room for this run's actors of one kind, of which each takes so much of Ray's resources, on
    a node with these labels: `has` and `free` are of such nodes alone."""

    def __init__(self, takes: Mapping[str, float], labels: Mapping[str, str] | None = None) -> None:
        self._takes, self.labels = takes, labels or {}
        self._others: dict[str, float] = {}  # the least that was in use: what the run has itself comes on top

    @property
    def gpus(self) -> float:
        """That one takes."""
        return self._takes.get("GPU", 0.0)

    def few_gpus(self, gpus: float, actors: int) -> str:
        """That so many GPUs are too few for so many actors, whoever has them; "" where they are enough."""
        return f"{who_has(self.labels)} {gpus:g} GPUs now" if gpus < actors * self.gpus else ""

    def lacking(self, has: Mapping[str, float], free: Mapping[str, float]) -> str:
        """Which resource others leave too little of for one of them, of what the cluster has; "": none."""
        for name, wanted in self._takes.items():
            whole, left = has.get(name, 0.0), free.get(name, 0.0)
            others = self._others[name] = min(whole - left, self._others.get(name, math.inf))
            if max(left, whole - others) + 1e-6 < wanted:
                return self._too_little(name, whole, left, wanted)
        return ""

    def full(self, has: Mapping[str, float], free: Mapping[str, float]) -> str:
        """Which resource has too little left for one more, the run's own in it; "": none."""
        for name, wanted in self._takes.items():
            if (left := free.get(name, 0.0)) + 1e-6 < wanted:
                return self._too_little(name, has.get(name, 0.0), left, wanted)
        return ""

    def _too_little(self, name: str, whole: float, left: float, wanted: float) -> str:
        them = f"{whole:g} {name}s"
        them = f"the {them} of nodes with {labels_text(self.labels)}" if self.labels else f"the cluster's {them}"
        return f"{left:g} of {them} are free, and one takes {wanted:g}"


class Display:
    """Shows a RunProgress, and exports it, until it is closed; a context manager. Asks the cluster in a thread."""

    def __init__(
        self,
        progress: RunProgress,
        telemetry: Telemetry,
        monitor: ActorHandle | None,
        *,
        room: Room,
        clip_room: Room,
        stream: TextIO | None = None,
    ) -> None:
        self._progress, self._telemetry, self._monitor = progress, telemetry, monitor
        self._room, self._clip_room = room, clip_room
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._tick_until_closed, name="progress", daemon=True)
        stream = stream or sys.stderr
        self._view: _Bar | _Log = _Bar(stream, progress.status()) if stream.isatty() else _Log()

    def add(self, stats: dict) -> None:
        """One committed shard."""
        self._progress.add(stats)
        self._telemetry.add(stats)

    def __enter__(self) -> "Display":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join(timeout=2 * SILENT_TICK_SECONDS)
        status = self._progress.status()
        self._telemetry.update(status)
        self._view.close(status)

    def _tick_until_closed(self) -> None:
        pause = 0.0
        while not self._closing.wait(pause):
            try:
                news = ask_cluster(self._monitor, room=self._room, clip_room=self._clip_room)
            except Exception as error:  # a run does not stop for its display
                log.debug("the cluster does not answer: %s", error)
                news = ClusterState()
            self._progress.observe(news.live, machines=news.machines)
            status = self._progress.status()
            self._telemetry.update(status)
            few = self._room.few_gpus(news.gpus, status.wanted_generators)
            wrong = trouble(status, few_gpus=few, no_room=news.no_room)
            who = wrong or absent(status, few_gpus=few, full=news.full)
            said = "; ".join(filter(None, (who, absent_clip(status, full=news.full_for_clip))))
            self._view.show(status, wrong and said, said)
            pause = TICK_SECONDS if news.live else SILENT_TICK_SECONDS


class _Log:
    """A line at a time, rarer when a run is long, so that days of it stay readable."""

    def __init__(self) -> None:
        self._next = 0.0

    def show(self, status: Status, trouble: str, said: str) -> None:
        if status.seconds < self._next or (status.seconds < FIRST_LINES_SECONDS and not status.samples):
            return
        self._next = next_line(status.seconds)
        log.info("%s", log_line(status, said))

    def close(self, status: Status) -> None:
        log.info("%s", log_line(status, ""))


class _Bar:
    """Two lines that stay where they are: how far, and how well. Log lines go above them."""

    def __init__(self, stream: TextIO, status: Status) -> None:
        width = os.get_terminal_size(stream.fileno()).columns
        columns = {"dynamic_ncols": True} if width else {"ncols": UNKNOWN_WIDTH}  # recorded sessions may have none
        bars: dict[str, Any] = {"file": stream, "leave": True, **columns}
        self._bar = tqdm(
            total=status.total,
            initial=status.skipped,
            position=0,
            bar_format=_bar_format(status),
            **bars,
        )
        self._details = tqdm(total=1, position=1, bar_format="     {desc}", **bars)
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()

    def show(self, status: Status, trouble: str, said: str) -> None:
        self._bar.n = _done(status)
        self._bar.bar_format = _bar_format(status)
        parts = (duration(status.seconds), rate_and_eta(status))
        self._bar.set_description_str(f"[{', '.join(part for part in parts if part)}]")
        self._details.set_description_str(trouble or ", ".join(filter(None, (said, details(status)))))

    def close(self, status: Status) -> None:
        self.show(status, "", "")
        self._bar.close()
        self._details.close()
        self._redirect.__exit__(None, None, None)


def _bar_format(status: Status) -> str:
    return f"{math.floor(_percent(status)):3d}%|{{bar}}| {{n_fmt}}/{{total_fmt}} samples {{desc}}"


def next_line(seconds: float) -> float:
    """When the next log line is due, in seconds since the start, if one is written now."""
    return seconds + (FIRST_LINES_SECONDS if seconds < FIRST_LINES_FOR else LATER_LINES_SECONDS)


def log_line(status: Status, said: str) -> str:
    """`said`: what `trouble` or `absent` says."""
    share = f" ({_percent(status):.1f}%)" if status.total else ""
    parts = [f"{_done(status):,}/{status.total:,} samples{share}", said, rate_and_eta(status), details(status)]
    return "; ".join(part for part in parts if part)


def _done(status: Status) -> int:
    return status.skipped + status.samples + status.drawn


def _percent(status: Status) -> float:
    """How much is done, rounded down to a tenth: 100 is said when nothing is left."""
    return 1000 * _done(status) // max(status.total, 1) / 10


def rate_and_eta(status: Status) -> str:
    overall, recent = status.images_per_second, status.recent_images_per_second
    if overall is None:
        return ""
    rate = f"{recent:.4g} images/s ({overall:.4g} overall)" if recent is not None else f"{overall:.4g} images/s"
    if not status.missing and not status.drawn:
        return f"{overall:.4g} images/s"
    return f"{rate}, ETA {'unknown' if status.eta_seconds is None else duration(status.eta_seconds)}"


def details(status: Status) -> str:
    """Scores, failures, bytes, busy shares and cost, each once it is known."""
    parts = []
    if status.utilisation:
        shares = ", ".join(f"{stage} {100 * status.utilisation[stage]:.0f}%" for stage in STAGES)
        parts.append(f"busy: {shares}")
    if status.scores.mean is not None:
        parts.append(f"clip score {status.scores.mean:.3f}")
    if status.samples:
        failures = ", ".join(f"{reason} {count}" for reason, count in status.reasons.items()) or "none"
        parts += [size(status.bytes), f"quarantined: {failures}"]
    if status.cost is not None:
        forecast = "" if status.cost_forecast is None or not status.missing else f" of about {status.cost_forecast:.4g}"
        parts.append(f"cost {status.cost:.4g}{forecast}")
    return ", ".join(parts)


def trouble(status: Status, *, few_gpus: str, no_room: str) -> str:
    """Why nothing moves, if nothing does; "" when all is well.

    `few_gpus`: what `Room.few_gpus` says. `no_room`: what `Room.lacking` says: another job has what this one waits for.
    """
    wanted = status.wanted_generators
    here = f"; {few_gpus}" if few_gpus else ""
    if not status.samples and not status.drawn and not status.in_flight:
        waiting = wanted if status.generators is None else wanted - status.generators
        them = f"{waiting} generator{'' if waiting == 1 else 's'}"
        if waiting > 0 and here:
            return f"waiting for {them}, for {duration(status.short_seconds)}{here}"
        if waiting > 0 and no_room:
            return f"waiting for {them} to start, for {duration(status.short_seconds)}; {no_room}"
        return f"generators are starting and loading their models, for {duration(status.seconds)}"
    if status.stalled:
        drawing = "" if status.generators is None else f"; {status.in_flight} of {wanted} generators are drawing"
        return f"nothing finished for {duration(status.idle_seconds)}{drawing}{here}"
    return ""


def absent(status: Status, *, few_gpus: str, full: str) -> str:
    """How many generators have not started while others draw, for how long, and what they wait for; "" when none.

    `few_gpus`, `full`: what these functions of `Room` say.
    """
    if status.generators is None or status.generators >= status.wanted_generators or not status.missing:
        return ""
    waiting = status.wanted_generators - status.generators
    why = few_gpus or full
    how = f"wait{'s' if waiting == 1 else ''}" if why else f"{'is' if waiting == 1 else 'are'} starting"
    since = f"{waiting} {how}, for {duration(status.short_seconds)}"
    return f"{status.generators} of {status.wanted_generators} generators; {since}{': ' if why else ''}{why}"


def absent_clip(status: Status, *, full: str) -> str:
    """How many actors of CLIP alone have no place, and for how long; "" when none: without one nothing is stored.

    `full`: what `Room.full` says of one of them. One that has its place starts within seconds.
    """
    waiting = status.waiting_scorers
    if not waiting or not full or status.short_of_scorers_seconds < SECONDS_TO_START:
        return ""
    them = "1 actor of CLIP waits" if waiting == 1 else f"{waiting} actors of CLIP wait"
    return f"{them}, for {duration(status.short_of_scorers_seconds)}: {full}"
