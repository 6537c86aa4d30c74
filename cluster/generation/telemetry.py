"""Prometheus metrics of a generation run, through Ray's own: the metrics port of the driver's node serves them.

Ray puts `ray_` before each name and adds labels of its own (the driver's WorkerId among them). All carry `dataset`, the
place that is generated into:

    ray_pcm_samples_total                  committed samples, quarantined ones included
    ray_pcm_quarantined_total{reason}      samples that could not be made
    ray_pcm_bytes_total                    bytes of committed shards
    ray_pcm_stage_seconds_total{stage}     busy seconds of draw, featurise, encode, store, all actors together
    ray_pcm_cost_total                     cost so far, in the currency of --price-per-hour
    ray_pcm_clip_score                     histogram of raw cosines, to 0.05; those below 0 are counted as 0
    ray_pcm_images_per_second              stored pictures a second over the last minute, else since the first
    ray_pcm_eta_seconds                    until the last sample, at the rate of the last ten minutes, else of the run;
                                           no value while it is unknown
    ray_pcm_missing_samples                neither committed nor drawn

Counters begin at 0 with the driver's process, as Prometheus expects of a restart.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from cluster.dataset.clip_scores import NUM_BINS, bin_edge
from cluster.generation.progress import STAGES, Status

log = logging.getLogger(__name__)

#: Upper edges of the clip score's buckets: the bins of a shard's own histogram. Ray allows positive ones only.
CLIP_SCORE_BUCKETS = [round(bin_edge(index), 2) for index in range(NUM_BINS // 2 + 1, NUM_BINS + 1)]


class Telemetry:
    """Metrics of one run, recorded in the driver. A failure to record is logged once and never stops the run."""

    def __init__(self, dataset: str, *, has_clip_scores: bool) -> None:
        self._tags = {"dataset": dataset}
        self._has_clip_scores = has_clip_scores
        self._cost = 0.0
        self._failed = False
        self._has_eta = False
        tags = ("dataset",)
        self._samples = Counter("pcm_samples_total", "Committed samples, quarantined ones included", tags)
        self._quarantined = Counter("pcm_quarantined_total", "Samples that could not be made", (*tags, "reason"))
        self._bytes = Counter("pcm_bytes_total", "Bytes of committed shards", tags)
        self._stage_seconds = Counter("pcm_stage_seconds_total", "Busy seconds by stage", (*tags, "stage"))
        self._cost_total = Counter("pcm_cost_total", "Cost so far, in the currency of --price-per-hour", tags)
        self._clip_score = Histogram("pcm_clip_score", "Raw cosine of picture and caption", CLIP_SCORE_BUCKETS, tags)
        self._rate = Gauge("pcm_images_per_second", "Stored pictures a second", tags)
        self._eta = Gauge("pcm_eta_seconds", "Seconds until the last sample", tags)
        self._missing = Gauge("pcm_missing_samples", "Samples neither committed nor drawn", tags)

    def add(self, stats: Mapping[str, Any]) -> None:
        """One committed shard."""
        try:
            self._add(stats)
        except Exception as error:
            self._give_up(error)

    def update(self, status: Status) -> None:
        """The run as it stands."""
        try:
            self._update(status)
        except Exception as error:
            self._give_up(error)

    def _add(self, stats: Mapping[str, Any]) -> None:
        _increase(self._samples, stats["count"], self._tags)
        _increase(self._bytes, stats["bytes"], self._tags)
        for reason, count in stats["quarantined_by_reason"].items():
            _increase(self._quarantined, count, self._tags | {"reason": reason})
        for stage in STAGES:
            _increase(self._stage_seconds, stats[f"{stage}_seconds"], self._tags | {"stage": stage})
        if self._has_clip_scores:
            for index, count in enumerate(stats["clip_score_histogram"]):
                middle = max(0.0, bin_edge(index + 0.5))
                for _ in range(count):
                    self._clip_score.observe(middle, self._tags)

    def _update(self, status: Status) -> None:
        recent = status.recent_images_per_second
        # A batch may take longer than a minute: only of a run that stands still is it 0.
        rate = recent if recent or status.stalled else status.images_per_second
        if rate is not None:
            self._rate.set(rate, self._tags)
        if status.eta_seconds is not None:
            self._eta.set(status.eta_seconds, self._tags)
            self._has_eta = True
        elif self._has_eta:
            self._eta.set(math.nan, self._tags)  # else it would keep its last value; Ray exports none then
        self._missing.set(status.missing, self._tags)
        if status.cost is not None:
            _increase(self._cost_total, status.cost - self._cost, self._tags)
            self._cost = status.cost

    def _give_up(self, error: Exception) -> None:
        if not self._failed:
            self._failed = True
            log.warning("metrics: %s: %s; the run goes on without", type(error).__name__, error)


def _increase(counter: Counter, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray refuses 0
        counter.inc(value, tags)
