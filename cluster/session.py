"""Starting or joining Ray: the same call in a job, on a laptop and in a test."""

import contextlib
import logging
import os
import re
import resource
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import ray

from pcm.errors import InputError, first_line

log = logging.getLogger(__name__)

START_ATTEMPTS = 3
#: For a node to say what it has.
RESOURCES_SECONDS = 60.0
#: Of `ulimit -n`, as Ray recommends; of `ulimit -u`, about the threads of Ray's processes on 64 CPUs.
ENOUGH_FILES, ENOUGH_PROCESSES = 8192, 8192
SECONDS_BETWEEN_WAITING_LINES = 30.0
#: Actors of one pool that may die as they start, in a row.
MAX_FAILED_ACTORS = 3
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
    if os.environ.get("RAY_ADDRESS"):
        protect_token_file()
        ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=runtime_env)
        _wait_for_resources()
        log.info("joined the Ray cluster at RAY_ADDRESS: %s", _resources())
    else:
        _start_local(num_cpus, runtime_env)
        _wait_for_resources()
        log.info("started Ray on this machine: %s", _resources())
    importing.join()
    from ray.data import DataContext

    logging.getLogger("ray.data.exceptions").addFilter(is_no_user_error)
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


def _start_local(num_cpus: int | None, runtime_env: dict | None) -> None:
    """Start a cluster on this machine, which no other machine can reach (cluster/__init__.py) and no other user join.

    On a busy machine its processes can miss Ray's fixed 30 seconds: tried again.
    """
    if not any(name in os.environ for name in _AUTHENTICATION):
        # Of this run alone. Ray's own would lie in ~/.ray, readable by all; and there may be no home to write to.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
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
            if attempt == START_ATTEMPTS:
                raise InputError(
                    f"Ray did not start on this machine, {START_ATTEMPTS} times tried ({first_line(error)}"
                    f"{_low_limits()}); let other "
                    "work on it end, or look into /tmp/ray/session_latest/logs, and run the same command again"
                ) from error
            log.warning("Ray did not start; trying again (%d of %d)", attempt + 1, START_ATTEMPTS)


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


def user_error(error: BaseException) -> InputError | None:
    """The InputError that a worker raised, somewhere down the chain of causes that Ray wraps around it."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if type(link) is InputError:
            return link
        link = getattr(link, "cause", None) or link.__cause__
    # Of an actor that could not start, Ray keeps the text alone.
    raised = re.findall(r"^pcm\.errors\.InputError: (.+)$", str(error), re.MULTILINE)
    return InputError(raised[-1]) if raised else None


def is_no_user_error(record: logging.LogRecord) -> bool:
    """False of what Ray Data says about an exception that the job is going to report as the user's, in one line."""
    error = sys.exc_info()[1]
    return error is None or user_error(error) is None


@contextmanager
def waiting_for(*, cpus: float, gpus: float, workers: int = 1) -> Iterator[None]:
    """Says now and then what the cluster lacks, while it has no room for so many workers: Ray waits in silence.

    `cpus`, `gpus`: of each worker.
    """
    over = threading.Event()

    def say() -> None:
        started = time.monotonic()
        while room_for(cpus=cpus, gpus=gpus) < workers:
            has_cpus, has_gpus = cluster_cpus(), cluster_gpus()
            is_split = workers * cpus <= has_cpus and workers * gpus <= has_gpus
            log.info(
                "waiting for %g CPUs and %g GPUs%s; the cluster has %g and %g now (for %.0f s)",
                workers * cpus, workers * gpus, f", on one node for each of {workers} workers" if is_split else "",
                has_cpus, has_gpus, time.monotonic() - started,
            )  # fmt: skip
            if over.wait(SECONDS_BETWEEN_WAITING_LINES):
                return

    speaker = threading.Thread(target=say, name="waiting", daemon=True)
    speaker.start()
    try:
        yield
    finally:
        over.set()
        speaker.join()


def cluster_gpus() -> float:
    return ray.cluster_resources().get("GPU", 0.0)


def cluster_cpus() -> float:
    return ray.cluster_resources().get("CPU", 0.0)


def room_for(*, cpus: float, gpus: float) -> int:
    """How many workers with so many CPUs and GPUs each the nodes have room for, were they idle: a worker is on one."""
    return _room(_node_resources(), cpus=cpus, gpus=gpus)


def cpus_for_each(workers: int, *, gpus: float = 0) -> int:
    """The most CPUs that each of so many workers can have, with so many GPUs, on the nodes that are there; at least 1.

    Not the cluster's CPUs by their number: on three nodes of two CPUs, one worker with six would never start.
    """
    nodes = _node_resources()
    most = int(max((node.get("CPU", 0.0) for node in nodes), default=0.0))
    return next((cpus for cpus in range(most, 1, -1) if _room(nodes, cpus=cpus, gpus=gpus) >= workers), 1)


def _node_resources() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(nodes: Sequence[Mapping[str, float]], *, cpus: float, gpus: float) -> int:
    wanted = {name: count for name, count in (("CPU", cpus), ("GPU", gpus)) if count}
    rounding = 1e-6  # three GPUs of 0.333333
    return sum(int(min(node.get(name, 0.0) / count for name, count in wanted.items()) + rounding) for node in nodes)


def cluster_nodes() -> list[str]:
    """The ids of the nodes that are alive."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


def _resources() -> str:
    resources = ray.cluster_resources()
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if name in resources)
