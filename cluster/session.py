"""Starting or joining Ray: the same call in a job, on a laptop and in a test."""

import contextlib
import logging
import os
import re
import resource
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import ray

from cluster.numbers import duration
from cluster.ray_state import free_resources
from pcm.errors import InputError, OneLineError, StoreFailure, first_line

log = logging.getLogger(__name__)

START_ATTEMPTS = 3
#: For a node to say what it has.
RESOURCES_SECONDS = 60.0
#: Of `ulimit -n`, as Ray recommends; of `ulimit -u`, about the threads of Ray's processes on 64 CPUs.
ENOUGH_FILES, ENOUGH_PROCESSES = 8192, 8192
SECONDS_BETWEEN_WAITING_LINES = 30.0
SECONDS_BETWEEN_LOOKS = 2.0
#: For what has its room and no process yet.
SECONDS_TO_START = 10.0
#: Until Ray counts as free what has ended.
SECONDS_TO_BE_FREED = 2.0
#: Actors of one pool that may die as they start, in a row.
MAX_FAILED_ACTORS = 3
_TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"
_AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
#: Where Ray's own commands keep the token of a cluster that is joined.
_TOKEN_FILE = Path("~/.ray/auth_token")


def start_ray(*, num_cpus: int | None = None, worker_env: Mapping[str, str] | None = None) -> None:
    """Join the cluster that RAY_ADDRESS names (a submitted job has it), else start one on this machine. Idempotent.

    `worker_env`: environment variables that this job's workers start with. Usage statistics are off unless the user
    turned them on; a local cluster starts no dashboard.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    # No progress bars of Ray's own: the jobs report their progress, and logs must stay readable without a terminal.
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    runtime_env = {"env_vars": dict(worker_env)} if worker_env else None
    # It takes a second to import, and Ray's start is mostly waiting for its processes.
    importing = threading.Thread(target=import_module, args=("ray.data",), daemon=True)
    importing.start()
    if is_joined():
        protect_token_file()
        _join(runtime_env)
        _wait_for_resources()
        log.info("joined the Ray cluster at RAY_ADDRESS: %s", _resources())
    else:
        _start_local(num_cpus, runtime_env)
        _wait_for_resources()
        log.info("started Ray on this machine: %s", _resources())
    importing.join()
    from ray.data import DataContext

    logging.getLogger("ray.data.exceptions").addFilter(is_no_user_error)
    # The jobs say themselves how far they are, and that they have ended.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray Data ends an execution in which no block moves for 30 minutes. A slow model, a queue for GPUs or a lack of
    # spot machines takes longer; what hangs is for the watchdog of the generators to say.
    context.execution_no_progress_timeout_s = -1
    # Nor does it end one because an actor dies as it starts, on a bad machine, say: it starts another.
    context.max_consecutive_actor_init_deaths = MAX_FAILED_ACTORS
    # Nor does it read each worker's whole memory map every second, for statistics that nobody sees: a tenth of the CPU
    # of a generator that loads its models.
    context.memory_usage_poll_interval_s = None


def _join(runtime_env: dict | None) -> None:
    """Join the cluster at RAY_ADDRESS. Raises InputError where that is of another Ray or Python, or is not there."""
    try:
        ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=runtime_env)
    except (ConnectionError, RuntimeError) as error:
        address = f"RAY_ADDRESS {os.environ['RAY_ADDRESS']}"
        releases = re.findall(r"(?:Ray|Python): (\S+)", str(error))
        if len(releases) == 4:
            there, here = (f"Ray {of_ray} on Python {of_python}" for of_ray, of_python in (releases[:2], releases[2:]))
            raise InputError(
                f"{address}: that cluster runs {there}, and this process {here}; run the job with the cluster's, as "
                "in its image"
            ) from error
        raise InputError(
            f"{address}: the cluster cannot be joined ({first_line(error)}); give the address of one that runs, and "
            "its token (RAY_AUTH_MODE=token), or unset RAY_ADDRESS to start Ray on this machine"
        ) from error


def _start_local(num_cpus: int | None, runtime_env: dict | None) -> None:
    """Start a cluster on this machine, which no other machine can reach (cluster/__init__.py) and no other user join.

    On a busy machine its processes can miss Ray's fixed 30 seconds: tried again.
    """
    if not any(name in os.environ for name in _AUTHENTICATION):
        # Of this run alone. Ray's own would lie in ~/.ray, readable by all; and there may be no home to write to.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger(_TOKEN_LOGGER).addFilter(_is_no_word_of_tokens)
    _raise_file_limit()
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                "local",  # without it Ray joins a cluster that somebody started on this machine, and says nothing
                num_cpus=num_cpus,
                include_dashboard=False,
                logging_level=logging.WARNING,
                runtime_env=runtime_env,
            )
            return
        except Exception as error:  # Ray raises a bare Exception for this
            ray.shutdown()
            folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
            if "AF_UNIX path length" in str(error):
                raise InputError(
                    f"Ray did not start on this machine: {folder} (TMPDIR) is too long a path for its sockets; set "
                    "RAY_TMPDIR=/tmp and run the same command again"
                ) from error
            if attempt == START_ATTEMPTS:
                raise InputError(
                    f"Ray did not start on this machine, {START_ATTEMPTS} times tried ({first_line(error)}"
                    f"{_low_limits()}); let other "
                    f"work on it end, or look into {folder}/ray/session_latest/logs, and run the same command again"
                ) from error
            log.warning("Ray did not start; trying again (%d of %d)", attempt + 1, START_ATTEMPTS)


def _is_no_word_of_tokens(record: logging.LogRecord) -> bool:
    """False of Ray's warning that a local cluster wants a token, and of how to do without."""
    return "authentication is enabled" not in record.getMessage()


def _wait_for_resources() -> None:
    """On a busy machine Ray has started before it knows what there is, and would be taken for one CPU."""
    deadline = time.monotonic() + RESOURCES_SECONDS
    while not ray.cluster_resources() and time.monotonic() < deadline:
        time.sleep(0.1)


def _raise_file_limit() -> None:
    """Allow this process, and what it starts, as many open files as Ray recommends, where that may be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(ENOUGH_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _low_limits() -> str:
    """Of this process's limits those that Ray may have run into, for the end of a sentence; "" where there are none."""
    limits = (
        ("open files", "-n", resource.RLIMIT_NOFILE, ENOUGH_FILES),
        ("processes and threads", "-u", resource.RLIMIT_NPROC, ENOUGH_PROCESSES),
    )
    said = ""
    for what, option, number, enough in limits:
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY and soft < enough:
            said += f"; ulimit {option} allows {soft} {what}: allow {enough}"
    return said


def protect_token_file() -> None:
    """Take away what others may do with the token of a cluster: `ray get-auth-token` writes it readable by all."""
    with contextlib.suppress(OSError, RuntimeError):  # no such file, not ours to change, no home
        file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", _TOKEN_FILE)).expanduser()
        if file.stat().st_mode & 0o077:
            file.chmod(0o600)
            log.warning("%s: could be read by others; its mode is 0600 now", file)


def is_joined() -> bool:
    """Whether RAY_ADDRESS names a cluster, to which machines may come. Without it Ray starts on this machine alone."""
    return bool(os.environ.get("RAY_ADDRESS"))


def user_error(error: BaseException) -> OneLineError | None:
    """What a worker raised that ends a job in one line, somewhere down the chain of causes that Ray wraps around it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if isinstance(link, OneLineError) and not isinstance(
            link, ray.exceptions.RayError
        ):  # Ray's copy has its traceback
            return link
        link = getattr(link, "cause", None) or link.__cause__
    # Of an actor that could not start, Ray keeps the text alone.
    raised = re.findall(r"^pcm\.errors\.(InputError|StoreFailure): (.+)$", str(error), re.MULTILINE)
    return {"InputError": InputError, "StoreFailure": StoreFailure}[raised[-1][0]](raised[-1][1]) if raised else None


def is_no_user_error(record: logging.LogRecord) -> bool:
    """False of what Ray says about an exception that the job is going to report as the user's, in one line."""
    error = record.exc_info[1] if record.exc_info else sys.exc_info()[1]
    return error is None or user_error(error) is None


@contextmanager
def waiting_for(
    *,
    cpus: float,
    gpus: float,
    workers: int = 1,
    labels: Mapping[str, str] | None = None,
    placed: Callable[[], bool] | None = None,
) -> Iterator[None]:
    """Says now and then for what this job waits, while the cluster has no room for so many workers: Ray is silent.

    `cpus`, `gpus`: of each worker, on nodes with these `labels`. `placed`: whether the workers have their room now.
    With it a queue behind other work is said whenever there is one, of groups after the loss of a node too. Without it,
    as for tasks, of which Ray does not tell where they are, it is said once, before the first is asked for.
    """
    over = threading.Event()
    wanted = _Wanted(cpus=cpus, gpus=gpus, workers=workers, labels=labels or {})
    if placed is None and wanted.stays_taken():
        log.info("%s", wanted.line(seconds=0))

    def look() -> None:
        since = said = None
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            now = time.monotonic()
            if wanted.is_missing() or (placed is not None and not placed() and wanted.is_taken()):
                since = now if since is None else since
                if now - since >= SECONDS_TO_START and (said is None or now - said >= SECONDS_BETWEEN_WAITING_LINES):
                    said = now
                    log.info("%s", wanted.line(seconds=now - since))
            elif placed is None:
                return
            else:
                since = said = None

    def say() -> None:
        with contextlib.suppress(
            ray.exceptions.RayError, RuntimeError
        ):  # a head that is gone is told by the job itself
            look()

    speaker = threading.Thread(target=say, name="waiting", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """Workers for which a job needs room: so many, with so many CPUs and GPUs each, on nodes with these labels."""

    cpus: float
    gpus: float
    workers: int
    labels: Mapping[str, str]

    def is_missing(self) -> bool:
        """Whether the cluster has too little for them, were it idle."""
        return room_for(cpus=self.cpus, gpus=self.gpus, labels=self.labels) < self.workers

    def is_taken(self) -> bool:
        """Whether there is no room beside everything that is at work."""
        return free_room(cpus=self.cpus, gpus=self.gpus, labels=self.labels) < self.workers

    def stays_taken(self) -> bool:
        """The same, looked at for two seconds: so long Ray may count what has just ended."""
        deadline = time.monotonic() + SECONDS_TO_BE_FREED
        while self.is_taken():
            if time.monotonic() >= deadline:
                return True
            time.sleep(0.2)
        return False

    def line(self, *, seconds: float) -> str:
        has, free = resources_now(self.labels)
        cpus, gpus = self.workers * self.cpus, self.workers * self.gpus
        lacking = has if self.is_missing() else free
        on_each = ""
        if cpus <= lacking["CPU"] and gpus <= lacking["GPU"]:
            on_each = ", on one node" + (f" for each of {self.workers} workers" if self.workers > 1 else "")
        taken = "" if lacking is has else f", of which {free['CPU']:g} and {free['GPU']:g} are free"
        wanted = f"waiting for {cpus:g} CPUs and {gpus:g} GPUs{on_each}"
        there = f"{who_has(self.labels)} {has['CPU']:g} and {has['GPU']:g} now"
        return f"{wanted}; {there}{taken} (for {duration(seconds)})"


def _sum(nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}


def cluster_gpus(labels: Mapping[str, str] | None = None) -> float:
    """Of the nodes with these labels, whoever uses them; so are `cluster_cpus`."""
    return _has(_nodes(labels))["GPU"]


def cluster_cpus(labels: Mapping[str, str] | None = None) -> float:
    return _has(_nodes(labels))["CPU"]


def resources_now(labels: Mapping[str, str] | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """(has, free): the CPUs and GPUs of the nodes with these labels, and how many of them nobody uses."""
    nodes = _nodes(labels)
    return _has(nodes), _sum(_free(nodes))


def who_has(labels: Mapping[str, str] | None) -> str:
    """The nodes with these labels, for the beginning of a sentence about what they have."""
    return f"nodes with {labels_text(labels)} have" if labels else "the cluster has"


def labels_text(labels: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in labels.items())


def room_for(*, cpus: float, gpus: float, labels: Mapping[str, str] | None = None) -> int:
    """How many workers with so many CPUs and GPUs each the nodes have room for, were they idle: a worker is on one.

    `labels`: only on nodes that have these.
    """
    return _room([node["Resources"] for node in _nodes(labels)], cpus=cpus, gpus=gpus)


def free_room(*, cpus: float, gpus: float, labels: Mapping[str, str] | None = None) -> int:
    """How many more there is room for now, beside everything that is at work."""
    return _room(_free(_nodes(labels)), cpus=cpus, gpus=gpus)


def cpus_for_each(workers: int, *, gpus: float = 0, labels: Mapping[str, str] | None = None) -> int:
    """The most CPUs that each of so many workers can have, with so many GPUs, on the nodes with these labels that are
    there; at least 1.

    Not the cluster's CPUs by their number: on three nodes of two CPUs, one worker with six would never start.
    """
    nodes = [node["Resources"] for node in _nodes(labels)]
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    return next((cpus for cpus in range(most, 1, -1) if _room(nodes, cpus=cpus, gpus=gpus) >= workers), 1)


def _nodes(labels: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Those that are alive and have these labels."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in alive if (labels or {}).items() <= (node.get("Labels") or {}).items()]


def _has(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return _sum([node["Resources"] for node in nodes])


def _free(nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What nobody uses of each of these nodes."""
    free = free_resources()
    return [free.get(node["NodeID"], {}) for node in nodes]


def _room(nodes: Sequence[Mapping[str, float]], *, cpus: float, gpus: float) -> int:
    wanted = {name: count for name, count in (("CPU", cpus), ("GPU", gpus)) if count}
    rounding = 1e-6  # three GPUs of 0.333333
    return sum(int(min(node.get(name, 0.0) / count for name, count in wanted.items()) + rounding) for node in nodes)


def cluster_nodes(labels: Mapping[str, str] | None = None) -> list[str]:
    """The ids of the nodes that are alive and have these labels."""
    return [node["NodeID"] for node in _nodes(labels)]


def _resources() -> str:
    has = [f"{count:g} {name}" for name, count in _has(_nodes()).items() if count]
    return ", ".join(has) or "no CPUs or GPUs yet"
