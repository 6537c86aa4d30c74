"""Tasks on Ray: what they reserve, and what is said of them."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.curation.tasks import _Progress
from tests.helpers.paths import ROOT

#: On a cluster of a processor and a GPU, which Ray does not look for where it is told.
RESERVE = """
import ray
from cluster.curation.tasks import OnRay

def reserved(place):
    with open(place, "w") as file:
        file.write(str(ray.get_runtime_context().get_assigned_resources().get("GPU", 0)))

ray.init("local", num_cpus=2, num_gpus=1, include_dashboard=False, object_store_memory=100_000_000)
for gpus in (True, False):
    for on_device in (True, False):
        OnRay(gpus=gpus).run(reserved, [(f"{FOLDER}/{gpus}-{on_device}",)], what="reserved", on_device=on_device)
"""


def test_a_gpu_is_reserved_by_what_computes_on_it_where_there_are_gpus(tmp_path: Path) -> None:
    script = RESERVE.replace("{FOLDER}", str(tmp_path))
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=300)
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found == {"True-True": 1, "True-False": 0, "False-True": 0, "False-False": 0}


def test_the_time_left_does_not_count_the_wait_for_machines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("pcm.line_timer.time", SimpleNamespace(monotonic=lambda: now[0]))
    caplog.set_level("INFO")
    progress = _Progress("matching", 101)
    now[0] += 600
    progress.began(4.0)
    progress.done()
    assert caplog.messages[-1] == "matching: 1 of 101 pieces, 6 min 40 s left"
