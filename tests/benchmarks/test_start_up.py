"""A command's processes are counted, those that have ended and those of its children included."""

import subprocess
import sys
import time

from benchmarks.start_up import ProcessTree

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
    assert any("while time.process_time()" in name or "-c" in name for _, name in tree.by_process())
