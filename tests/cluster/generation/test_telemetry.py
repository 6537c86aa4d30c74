"""What Prometheus scrapes from a Ray node is what a run did."""

import math
import re
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from cluster.dataset.documents import load_manifest
from cluster.generation.cost import Billing
from cluster.generation.display import Room, ask_cluster
from cluster.generation.limits import FaultPolicy
from cluster.generation.progress import MonitorSnapshot, RunProgress
from cluster.generation.stages.monitor import start_monitor
from cluster.generation.telemetry import Telemetry
from cluster.store.store import open_store
from tests.helpers.job_runs import JobRun
from tests.helpers.tiny_generation import CAPTIONS, write_corpus

SCRAPE_FOR_SECONDS = 60  # far longer than Ray takes to collect its processes' metrics


def scrape() -> str:
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def series(text: str, dataset: str) -> dict[tuple[str, str], float]:
    """(name, its own label's value or "") -> value, of one dataset's metrics."""
    found = {}
    for name, labels, value in re.findall(r"^ray_(pcm_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if tags.get("dataset") == dataset:
            own = next((tags[key] for key in ("reason", "stage", "le") if key in tags), "")
            found[name, own] = float(value)
    return found


def test_a_scrape_after_a_run_says_what_it_made(tmp_path: Path, tiny_clip: Path, ray_session: None, call_job) -> None:
    corpus = write_corpus(tmp_path, [*CAPTIONS, "x" * 3000, "\x00"])
    run: JobRun = call_job(
        "generate", "--corpus", corpus, "--out", tmp_path / "data", "--t2i", "null", "--clip", tiny_clip,
        "--shard-size", 13, "--price-per-hour", 3600, "--device", "cpu",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    store = open_store(str(tmp_path / "data"))
    manifest = load_manifest(store)
    deadline, found = time.monotonic() + SCRAPE_FOR_SECONDS, {}
    while found.get(("pcm_samples_total", "")) != 26 and time.monotonic() < deadline:
        time.sleep(1)
        found = series(scrape(), store.root)
    assert found["pcm_samples_total", ""] == 26
    assert found["pcm_quarantined_total", "too_long"] == found["pcm_quarantined_total", "control_characters"] == 1
    assert found["pcm_bytes_total", ""] == manifest.shard_bytes == run.summary["bytes"]
    assert found["pcm_missing_samples", ""] == 0 and found["pcm_eta_seconds", ""] == 0
    assert found["pcm_images_per_second", ""] == pytest.approx(run.summary["images_per_second"], abs=0.001)
    assert found["pcm_cost_total", ""] == pytest.approx(run.summary["cost"], abs=1.0), "1 a second"
    for stage, seconds in run.summary["stage_seconds"].items():
        assert found["pcm_stage_seconds_total", stage] == pytest.approx(seconds, abs=0.002)
    assert found["pcm_clip_score_count", ""] == 24 == sum(run.summary["clip_score_histogram"])
    assert found["pcm_clip_score_bucket", "0.1"] == sum(run.summary["clip_score_histogram"][:22]), "bins end at 0.1"


class Recorded:
    """A gauge that remembers."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values.append(value)


def test_gauges_of_a_run_that_stands_still_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    telemetry, rate, eta = Telemetry("test", has_clip_scores=True), Recorded(), Recorded()
    monkeypatch.setattr(telemetry, "_rate", rate)
    monkeypatch.setattr(telemetry, "_eta", eta)
    run = RunProgress(total=9, skipped=0, actors={"draw": 1}, billing=Billing(price_per_hour=None, unit="machine"))
    known = run.status()
    moves = replace(known, images_per_second=2.0, recent_images_per_second=None, eta_seconds=60.0)
    between = replace(moves, images_per_second=1.6, recent_images_per_second=0.0)  # two batches of minutes each
    still = replace(between, eta_seconds=None, stalled=True)
    for status in (known, moves, between, still):
        telemetry.update(status)
    assert rate.values == [2.0, 1.6, 0.0]
    assert eta.values == [60.0, 60.0, pytest.approx(math.nan, nan_ok=True)], "none before it is known"


def test_metrics_that_cannot_be_recorded_stop_nothing(caplog: pytest.LogCaptureFixture) -> None:
    telemetry = Telemetry("test", has_clip_scores=True)
    for _ in range(3):
        telemetry.add({"count": 1, "bytes": "many"})
    assert len(caplog.messages) == 1 and "the run goes on without" in caplog.messages[0]


CLIP = Room({"GPU": 1})  # for an actor of it


def test_a_dead_monitor_is_a_silent_one(ray_session: None) -> None:
    monitor = start_monitor(FaultPolicy())
    ray.get(monitor.begin.remote("one", 0, [0, 1]))
    ray.get(monitor.end.remote("one", 2))
    ray.get(monitor.begin.remote("two", 1, [2]))
    told = ask_cluster(monitor, room=Room({"GPU": 0, "CPU": 1}), clip_room=CLIP)
    assert told.no_room == "" and told.full_for_clip == "0 of the cluster's 0 GPUs are free, and one takes 1"
    assert (told.live, told.machines, told.gpus) == (MonitorSnapshot(drawn=2, in_flight=1, generators=2), 1, 0.0)
    told = ask_cluster(monitor, room=Room({"GPU": 1, "CPU": 1}), clip_room=CLIP)
    assert told.no_room == "0 of the cluster's 0 GPUs are free, and one takes 1"
    assert told.live == MonitorSnapshot(drawn=2, in_flight=1, generators=0), "their GPUs are gone"
    ray.kill(monitor)
    assert ask_cluster(monitor, room=Room({}), clip_room=CLIP).live is None
