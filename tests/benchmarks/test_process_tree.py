"""A command's processes and their CPU seconds and peak memory."""

import subprocess
import sys
import time

from benchmarks.process_tree import ProcessTree

BUSY = "import time\nwhile time.process_time() < 0.5: pass\n"


def test_the_cpu_seconds_of_children_and_of_their_children_are_counted() -> None:
    grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY + 'input()'!r}])"
    with subprocess.Popen([sys.executable, "-c", grandchild], stdin=subprocess.PIPE, text=True) as process:
        tree, deadline = ProcessTree(process.pid), time.monotonic() + 60
        while tree.cpu_seconds < 0.5 and time.monotonic() < deadline:
            tree.sample()
            time.sleep(0.01)
        process.communicate("\n")
    tree.sample()
    assert tree.cpu_seconds >= 0.5, "kept of processes that have ended"
    assert any("-c" in taken.name for taken in tree.taken())
    assert all(taken.peak_bytes > 1e6 for taken in tree.taken() if taken.cpu_seconds > 0.4)
