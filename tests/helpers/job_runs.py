"""A job run as a user runs it: a process of its own."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

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
