"""The demo: what it asks of the stages that it runs."""

from pathlib import Path

import pytest

import cluster.demonstration.run
from cluster.demonstration.request import DemoRequest
from cluster.demonstration.run import run_demo, table


class Evaluated(Exception):
    """All stages have been asked."""


def test_a_device_is_that_of_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stage(request: object) -> dict:
        asked.append(request)
        return {}

    def evaluate(request: object) -> dict:
        stage(request)
        raise Evaluated

    monkeypatch.setattr(cluster.demonstration.run, "generate", stage)
    monkeypatch.setattr(cluster.demonstration.run, "verify", lambda store: {"ok": True})
    monkeypatch.setattr(cluster.demonstration.run, "train", stage)
    monkeypatch.setattr(cluster.demonstration.run, "evaluate", evaluate)
    with pytest.raises(Evaluated):
        run_demo(DemoRequest(out=str(tmp_path), device="cpu"))
    assert [each.device for each in asked] == ["cpu", "cpu", "cpu"]


@pytest.mark.parametrize(("rate", "said"), [(4.567, "4.57"), (None, "-")])
def test_a_demo_that_drew_nothing_has_no_rate(rate: float | None, said: str) -> None:
    generated = {"stored": 2000, "quarantined": 0, "images_per_second": rate, "clip_score_mean": 0.8}
    lines = table(generated, {"epochs": 1, "steps": 9}, {"CIDEr_shuffled": 0.1}, {"generate": 3.0}).splitlines()
    assert lines[1].split() == ["images", "per", "second", said]
