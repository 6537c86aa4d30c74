"""A job run as a user runs it: a process of its own. None outlives its test."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.helpers.paths import ROOT


class JobRun(NamedTuple):
    """How a job ended: exit status, its summary (the last line of stdout) or None, and stderr."""

    returncode: int
    summary: dict | None
    stderr: str


def run_job_process(name: str, *args: object, env: dict[str, str] | None = None, timeout: float = 300) -> JobRun:
    """`python -m jobs.NAME ARGS` in the repository, as a user types it."""
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *map(str, args)],
        cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return JobRun(done.returncode, json.loads(lines[-1]) if lines else None, done.stderr)


@contextmanager
def running(command: Sequence[object], **options: Any) -> Iterator[subprocess.Popen]:
    """A process in the repository; `options` are those of Popen. However the block is left, it gets SIGKILL then, if
    it has not ended, and is waited for."""
    with subprocess.Popen([str(part) for part in command], **({"cwd": ROOT} | options)) as process:
        try:
            yield process
        finally:
            process.kill()


def kill_once(condition: Callable[[], object], command: Sequence[object], *, seconds: float = 240) -> None:
    """Start a process, and kill it by SIGKILL as soon as the condition holds.

    Raises AssertionError, with the end of what it printed, where it ends by itself before, or `seconds` have passed.
    """
    with tempfile.TemporaryFile() as log, running(command, stdout=log, stderr=log) as process:
        deadline = time.monotonic() + seconds
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                said = log.read().decode(errors="replace")[-3000:]
                raise AssertionError(f"it ended, or went on too long, before it could be killed: {said}")
            time.sleep(0.002)
