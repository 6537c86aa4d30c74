"""The dashboard shows what is measured: every metric and label that it asks for is one that a run exports."""

import inspect
import json
import re
from typing import Any

import pytest
from ray.util.metrics import Counter, Gauge, Histogram, Metric

from cluster.generation.telemetry import Telemetry
from tests.helpers.paths import ROOT

PATH = ROOT / "deploy/grafana-generation.json"
#: What Prometheus makes of a histogram.
OF_HISTOGRAM = ("_bucket", "_sum", "_count")


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(PATH.read_text())


def exported() -> dict[str, set[str]]:
    """Name in Prometheus -> labels, of every metric that a run makes."""
    found: dict[str, set[str]] = {}
    for metric in vars(Telemetry("s3://bucket/data", has_clip_scores=True)).values():
        if isinstance(metric, Metric):
            assert isinstance(metric, (Counter, Gauge, Histogram))
            name, labels = f"ray_{metric.info['name']}", set(metric.info["tag_keys"])
            if isinstance(metric, Histogram):
                found |= {f"{name}{ending}": labels for ending in OF_HISTOGRAM}
                found[f"{name}_bucket"] = labels | {"le"}
            else:
                found[name] = labels
    return found


def queries(dashboard: dict[str, Any]) -> list[str]:
    variables = [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    return [*variables, *(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])]


def unknown(query: str, known: dict[str, set[str]]) -> list[str]:
    """Metrics and labels of a query that no run exports."""
    metrics = re.findall(r"ray_\w+", query)
    grouped = [label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")]
    matched = re.findall(r"[{,]\s*(\w+)\s*(?:=~|!~|!=|=)", query)
    labels = set.intersection(*(known.get(metric, set()) for metric in metrics)) if metrics else set()
    return [metric for metric in metrics if metric not in known] + [
        label for label in (*grouped, *matched) if label not in labels
    ]


def test_every_metric_and_label_that_is_asked_for_is_exported(dashboard: dict) -> None:
    known = exported()
    for query in queries(dashboard):
        assert re.search(r"ray_pcm_\w+", query), query
        assert unknown(query, known) == [], query


def test_every_metric_that_is_exported_is_shown(dashboard: dict) -> None:
    asked = {name for query in queries(dashboard) for name in re.findall(r"ray_\w+", query)}
    assert asked == set(exported())


def test_every_metric_is_documented() -> None:
    documented = set(re.findall(r"`(ray_pcm_\w+)", (ROOT / "docs/operations.md").read_text()))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported()} == documented
    said = inspect.getdoc(inspect.getmodule(Telemetry))
    assert said and all(name in said for name in documented)


def test_an_unknown_metric_and_an_unknown_label_are_seen() -> None:
    known = exported()
    assert unknown('sum(ray_pcm_pictures_total{dataset="a"})', known) == ["ray_pcm_pictures_total", "dataset"]
    assert unknown("sum by (node) (rate(ray_pcm_bytes_total[5m]))", known) == ["node"]
    assert unknown('ray_pcm_bytes_total{node="a"}', known) == ["node"]


def test_panels_have_their_own_numbers_and_do_not_overlap(dashboard: dict) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not taken & cells, panel["title"]
        taken |= cells
        assert panel["description"]


def test_lines_of_several_datasets_are_told_apart(dashboard: dict) -> None:
    """A figure that is grouped by dataset names it, and so does each other figure beside it."""
    for panel in dashboard["panels"]:
        named = ["{{dataset}}" in target["legendFormat"] for target in panel["targets"]]
        grouped = [bool(re.search(r"by \([^)]*dataset", target["expr"])) for target in panel["targets"]]
        if any(grouped):
            assert all(named) and all(grouped), panel["title"]
