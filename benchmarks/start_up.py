"""What the start of a job costs: seconds and CPU seconds of all its processes, at each of its log lines and by process.

    python -m benchmarks.start_up                                           # jobs.generate of eight embedded captions
    python -m benchmarks.start_up "jobs.train --data dataset --out run --epochs 1"

Seconds are worth something on a quiet machine alone. CPU seconds can be compared on a busy one too, of two trees that
run at the same time; they grow with the load as well, by less.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time

from benchmarks.process_tree import ProcessTree

SAMPLE_SECONDS = 0.1


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
    for taken in sorted(tree.taken(), key=lambda taken: -taken.cpu_seconds):
        print(f"{taken.cpu_seconds:11.2f}  {taken.name[:60]}")
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
