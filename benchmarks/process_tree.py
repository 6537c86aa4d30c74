"""What a process and all that descend from it take, on Linux: CPU seconds and peak memory."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Taken:
    """name: such as "ray::IDLE" or "python -m jobs.train --data ...". peak_bytes: as Linux counts it (VmHWM: with the
    shared memory and the mapped files that the process touched). own_bytes: the most that was its own (RssAnon)."""

    name: str
    cpu_seconds: float
    peak_bytes: int
    own_bytes: int


class ProcessTree:
    """A process and all that it started, those that have ended included, by sampling."""

    def __init__(self, root: int) -> None:
        self._known = {root}
        self._taken: dict[int, Taken] = {}

    def sample(self) -> None:
        """Note what each process has taken. One that ends loses what it took since the sample before."""
        running = {pid: stat for pid in _pids() if (stat := _stat(pid))}
        while found := {pid for pid, (parent, _) in running.items() if parent in self._known} - self._known:
            self._known |= found
        for pid in self._known & running.keys():
            before = self._taken.get(pid, Taken("", 0.0, 0, 0))
            peak, own = _memory(pid)
            self._taken[pid] = Taken(
                _name(pid, before.name), running[pid][1], max(before.peak_bytes, peak), max(before.own_bytes, own)
            )

    @property
    def cpu_seconds(self) -> float:
        return sum(taken.cpu_seconds for taken in self._taken.values())

    def of(self, pid: int) -> Taken:
        return self._taken[pid]

    def taken(self) -> list[Taken]:
        """A process each."""
        return list(self._taken.values())


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _stat(pid: int) -> tuple[int, float] | None:
    """(parent, CPU seconds) of a process; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS


def _memory(pid: int) -> tuple[int, int]:
    """(VmHWM, RssAnon) in bytes; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM:", "RssAnon:"))}
    return 1024 * int(kilobytes.get("VmHWM", 0)), 1024 * int(kilobytes.get("RssAnon", 0))


def _name(pid: int, before: str) -> str:
    """Its command line without folders; `before`, where it has ended or waits for Ray's next task."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    except OSError:
        return before
    name = " ".join(word.rpartition("/")[2] if word.startswith("/") else word for word in words)
    return before if before and (not name or name.startswith("ray::IDLE")) else name
