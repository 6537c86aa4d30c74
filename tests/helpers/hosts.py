"""Several hosts on one machine: network, process and mount namespaces with addresses, memory and folders of their own.

Each host has its own address on a bridge, its own /tmp/ray and /dev/shm, and sees the disk of this machine, as hosts do
that share a file system. Needs root and iproute2.
"""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.paths import ROOT

PORT = 6379
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
        """SIGTERM to its raylet, which is all that Ray hears of a spot machine's notice. Waits for the raylet's end.

        Ray is started here again at once, as by a service manager.
        """
        wait_until(lambda: self._raylets(), seconds=300, said=f"no raylet on {self.name}")
        (raylet,) = self._raylets()
        raylet.terminate()
        raylet.wait(timeout=120)

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
        _run("ip", "link", "set", f"v{self.number}", "down")

    def heal(self) -> None:
        _run("ip", "link", "set", f"v{self.number}", "up")


@dataclass
class Hosts:
    """A bridge and its hosts; the first one is the head."""

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

    def job(self, *arguments: str) -> subprocess.Popen:
        """`python -m jobs...` on the head."""
        return self.hosts[0].start(
            "env", f"RAY_ADDRESS={self.ray_address}", sys.executable, "-m", *arguments,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@contextmanager
def several_hosts(count: int) -> Iterator[Hosts]:
    """So many hosts, all linked, without Ray yet."""
    made = Hosts()
    bridge = f"{made.mark}-b"
    _run("ip", "link", "add", bridge, "type", "bridge")
    try:
        _run("ip", "link", "set", bridge, "up")
        for number in range(1, count + 1):
            host = Host(made, number)
            made.hosts.append(host)
            _run("ip", "netns", "add", host.name)
            _run("ip", "link", "add", f"v{number}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _run("ip", "link", "set", f"v{number}", "master", bridge, "up")
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


def wait_until(condition, *, seconds: float, said: str) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def _run(*command: str) -> Sequence[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
