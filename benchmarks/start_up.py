"""What the start of a job costs: seconds and CPU seconds of all its processes, at each of its log lines and by process.

    python -m benchmarks.start_up                                           # jobs.generate of eight embedded captions
    python -m benchmarks.start_up "jobs.train --data dataset --out run --epochs 1"

Seconds are worth something on a quiet machine alone. CPU seconds can be compared on a busy one too, of two trees that
run at the same time; they grow with the load as well, by less.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SAMPLE_SECONDS = 0.1
TICKS = os.sysconf("SC_CLK_TCK")


class ProcessTree:
    """The CPU seconds of a process and of all that it started, those that have ended included, by sampling."""

    def __init__(self, root: int) -> None:
        self._known = {root}
        self._seconds: dict[int, float] = {}
        self._names: dict[int, str] = {}

    def sample(self) -> None:
        """Note what each process has taken. One that ends loses what it took since the sample before."""
        running = {pid: stat for pid in _pids() if (stat := _stat(pid))}
        while found := {pid for pid, (parent, _) in running.items() if parent in self._known} - self._known:
            self._known |= found
        for pid in self._known & running.keys():
            self._seconds[pid] = running[pid][1]
            self._names[pid] = _name(pid) or self._names.get(pid, "")

    @property
    def cpu_seconds(self) -> float:
        return sum(self._seconds.values())

    def by_process(self) -> list[tuple[float, str]]:
        return sorted(((seconds, self._names[pid]) for pid, seconds in self._seconds.items()), reverse=True)


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _stat(pid: int) -> tuple[int, float] | None:
    """(parent, CPU seconds) of a process; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[1]), (int(fields[11]) + int(fields[12])) / TICKS


def _name(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").split()
    except OSError:
        return ""
    return " ".join(word.rpartition("/")[2] if word.startswith("/") else word for word in words)[:60]


def measure(command: list[str]) -> int:
    """Run a command and print its log lines, each with what it had taken until then; then a line a process."""
    started = time.monotonic()
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    assert job.stdout is not None
    tree, over = ProcessTree(job.pid), threading.Event()

    def sample() -> None:
        while not over.wait(SAMPLE_SECONDS):
            tree.sample()

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    print("seconds  CPU seconds  line")
    for line in job.stdout:
        print(f"{time.monotonic() - started:7.2f} {tree.cpu_seconds:12.2f}  {line.rstrip()[:120]}", flush=True)
    status = job.wait()
    over.set()
    sampler.join()
    print(f"{time.monotonic() - started:7.2f} {tree.cpu_seconds:12.2f}  ended with status {status}\n")
    print("CPU seconds  process")
    for seconds, name in tree.by_process():
        print(f"{seconds:11.2f}  {name}")
    return status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", nargs="?", help="what follows `python -m`; default: jobs.generate of eight captions")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = asked.job or f"jobs.generate --corpus embedded --limit 8 --out {folder}/dataset"
        sys.exit(measure([sys.executable, "-m", *job.split()]))


if __name__ == "__main__":
    main()
