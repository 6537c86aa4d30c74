"""Several hosts on one machine: network, process and mount namespaces with addresses, memory and folders of their own.

Each host has its own address on a bridge, its own /tmp/ray and /dev/shm, and sees the disk of this machine, as hosts do
that share a file system. A link may be slow (`tests.helpers.slow_link`). Needs root and iproute2.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.paths import ROOT
from tests.helpers.waiting import wait_until

PORT = 6379
#: From a notice to the machine's end, as clouds give at the least.
NOTICE_SECONDS = 30
#: The tests' own Ray is of one machine, and says so to every process that they start.
OF_ONE_MACHINE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_RAY = Path(sys.executable).parent / "ray"
_NETWORK = "10.77.0"


def can_make_hosts() -> bool:
    """Whether this user may make namespaces and bridges here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"pcm-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode == 0
    if made:
        _run("ip", "netns", "del", name)
    return made


@dataclass
class Host:
    """One host: `number` is the last part of its address. It is up from its first process until it is lost."""

    hosts: "Hosts"
    number: int
    first: subprocess.Popen | None = None  # all that runs here dies with it

    @property
    def name(self) -> str:
        return f"{self.hosts.mark}-{self.number}"

    @property
    def address(self) -> str:
        return f"{_NETWORK}.{self.number}"

    @property
    def link(self) -> str:
        """Its end of the link at the bridge."""
        return f"{self.hosts.mark}-v{self.number}"

    def join(self, *, cpus: float, gpus: float = 0, head: bool = False) -> None:
        """Start Ray here: the cluster's head, or a node of it."""
        place = [f"--address={self.hosts.ray_address}"]
        if head:
            place = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        settings = {"node-ip-address": self.address, "num-cpus": f"{cpus:g}", "num-gpus": f"{gpus:g}"}
        options = [f"--{name}={value}" for name, value in settings.items()]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        memory = "--object-store-memory=100000000"
        ray = [str(_RAY), "start", *place, *options, memory, "--disable-usage-stats", "--block"]
        # As a service manager does: on a busy machine a start may miss its time.
        self.start("sh", "-c", 'until "$@"; do sleep 1; done', "sh", *ray, **nowhere)

    def start(self, *command: str, **streams: Any) -> subprocess.Popen:
        """A process of this host."""
        if self.first is None:
            self._boot()
        assert self.first is not None
        (inside,) = psutil.Process(self.first.pid).children()
        enter = ["nsenter", f"--target={inside.pid}", "--mount", "--pid", "--net"]
        environment = os.environ | self.hosts.environment
        environment.pop(OF_ONE_MACHINE, None)
        return subprocess.Popen([*enter, *command], cwd=ROOT, env=environment, text=True, **streams)

    def _boot(self) -> None:
        own = "mount -t tmpfs none /tmp/ray && mount -t tmpfs -o size=400m none /dev/shm && exec sleep infinity"
        Path("/tmp/ray").mkdir(exist_ok=True)
        namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.first = subprocess.Popen(["ip", "netns", "exec", self.name, *namespaces, "sh", "-c", own])
        process = psutil.Process(self.first.pid)
        wait_until(lambda: [each.name() for each in process.children()] == ["sleep"], seconds=30, said="no host")

    def notice(self) -> None:
        """SIGTERM to its raylet, which is all that Ray hears of a spot machine's notice.

        Waits for the raylet's end, NOTICE_SECONDS at most: Ray 2.60 forgets a SIGTERM that comes while the raylet
        starts. Ray is started here again at once, as by a service manager.
        """
        wait_until(lambda: self._raylets(), seconds=300, said=f"no raylet on {self.name}")
        (raylet,) = self._raylets()
        raylet.terminate()
        with contextlib.suppress(psutil.TimeoutExpired):
            raylet.wait(timeout=NOTICE_SECONDS)

    def _raylets(self) -> list[psutil.Process]:
        assert self.first is not None
        (inside,) = psutil.Process(self.first.pid).children()
        here = os.readlink(f"/proc/{inside.pid}/ns/pid")
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                if process.name() == "raylet" and os.readlink(f"/proc/{process.pid}/ns/pid") == here:
                    found.append(process)
        return found

    def lose(self) -> None:
        """kill -9 of all that runs here."""
        if self.first is not None:
            for process in psutil.Process(self.first.pid).children():
                process.kill()
            self.first.wait()
            self.first = None

    def cut(self) -> None:
        """Its link is down."""
        _run("ip", "link", "set", self.link, "down")

    def heal(self) -> None:
        _run("ip", "link", "set", self.link, "up")


@dataclass(frozen=True)
class Slow:
    """What a link lets through: seconds each way, bits a second each way."""

    seconds: float
    bits: float


@dataclass(frozen=True)
class Job:
    """A job on the head. What it says goes into files: a pipe that nobody reads would stop it when it is full."""

    process: subprocess.Popen
    printed: Path
    said: Path

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def summary(self, seconds: float = 400) -> dict[str, Any]:
        """Its last line, once it has ended well."""
        assert self.process.wait(timeout=seconds) == 0, self.said.read_text()[-3000:]
        summary: dict[str, Any] = json.loads(self.printed.read_text().splitlines()[-1])
        return summary


@dataclass
class Hosts:
    """A bridge and its hosts; the first one is the head."""

    folder: Path
    mark: str = field(default_factory=lambda: f"pcm{secrets.token_hex(3)}")
    hosts: list[Host] = field(default_factory=list)

    @property
    def ray_address(self) -> str:
        return f"{self.hosts[0].address}:{PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: one token, and gloo on the hosts' network, because namespaces share this machine's name."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.mark * 4, "GLOO_SOCKET_IFNAME": "eth0"}

    def wait_for_cpus(self, count: int) -> None:
        """Until the cluster has so many."""
        waits = f"import ray, time\nray.init()\nwhile ray.cluster_resources().get('CPU', 0) < {count}: time.sleep(0.5)"
        waiting = self.hosts[0].start(
            "env", f"RAY_ADDRESS={self.ray_address}", sys.executable, "-c", waits, stderr=subprocess.DEVNULL
        )
        assert waiting.wait(timeout=400) == 0

    def job(self, *arguments: str) -> Job:
        """`python -m jobs...` on the head."""
        name = secrets.token_hex(3)
        printed, said = self.folder / f"{name}.stdout", self.folder / f"{name}.stderr"
        with printed.open("w") as stdout, said.open("w") as stderr:
            process = self.hosts[0].start(
                "env", f"RAY_ADDRESS={self.ray_address}", sys.executable, "-m", *arguments,
                stdout=stdout, stderr=stderr,
            )  # fmt: skip
        return Job(process, printed, said)


@contextmanager
def several_hosts(count: int, *, slow: Mapping[int, Slow] | None = None) -> Iterator[Hosts]:
    """So many hosts, all linked, without Ray yet; `slow`: the links of some of them, by number."""
    with tempfile.TemporaryDirectory(prefix="pcm-hosts-") as folder, contextlib.ExitStack() as links:
        made = Hosts(Path(folder))
        bridge = f"{made.mark}-b"
        _run("ip", "link", "add", bridge, "type", "bridge")
        try:
            _run("ip", "link", "set", bridge, "up")
            for number in range(1, count + 1):
                host = Host(made, number)
                made.hosts.append(host)
                _run("ip", "netns", "add", host.name)
                if slow and number in slow:
                    links.enter_context(_slow_link(host, slow[number]))
                else:
                    veth = ["ip", "link", "add", host.link, "type", "veth"]
                    _run(*veth, "peer", "name", "eth0", "netns", host.name)
                _run("ip", "link", "set", host.link, "master", bridge, "up")
                for command in (
                    ["addr", "add", f"{host.address}/24", "dev", "eth0"],
                    ["link", "set", "eth0", "up"],
                    ["link", "set", "lo", "up"],
                ):
                    _run("ip", "-n", host.name, *command)
            yield made
        finally:
            for host in made.hosts:
                host.lose()
                subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
            _run("ip", "link", "del", bridge)


@contextmanager
def _slow_link(host: Host, slow: Slow) -> Iterator[None]:
    """Two network devices with a process between them; the host's one becomes its eth0."""
    inner = f"{host.link}-in"
    command = [sys.executable, "-m", "tests.helpers.slow_link", host.link, inner, str(slow.seconds), str(slow.bits)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        _run("ip", "link", "set", inner, "netns", host.name, "name", "eth0")
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def longest_pause(count: Callable[[], int]) -> Iterator[Callable[[], float]]:
    """Watches a count that grows with the work; gives the longest time, in seconds, between two of its steps."""
    over, steps = threading.Event(), [(0, time.monotonic())]

    def watch() -> None:
        while not over.wait(0.1):
            if (now := count()) != steps[-1][0]:
                steps.append((now, time.monotonic()))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    try:
        yield lambda: max((after - before for (_, before), (_, after) in pairwise(steps[1:])), default=0.0)
    finally:
        over.set()
        watching.join()


def _run(*command: str) -> Sequence[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
