"""jobs.demo: what it asks of the jobs that it runs. tests/end_to_end runs it whole."""

from pathlib import Path

import pytest

import cluster.dataset.verify
import cluster.evaluation.evaluate
import cluster.generation
import cluster.training.train
from jobs.demo import DemoRequest, run, table


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

    monkeypatch.setattr(cluster.generation, "generate", stage)
    monkeypatch.setattr(cluster.dataset.verify, "verify", lambda store: {"ok": True})
    monkeypatch.setattr(cluster.training.train, "train", stage)
    monkeypatch.setattr(cluster.evaluation.evaluate, "evaluate", evaluate)
    with pytest.raises(Evaluated):
        run(DemoRequest(out=str(tmp_path), device="cpu"))
    assert [each.device for each in asked] == ["cpu", "cpu", "cpu"]


@pytest.mark.parametrize(("rate", "said"), [(4.567, "4.57"), (None, "-")])
def test_a_demo_that_drew_nothing_has_no_rate(rate: float | None, said: str) -> None:
    generated = {"stored": 2000, "quarantined": 0, "images_per_second": rate, "clip_score_mean": 0.8}
    lines = table(generated, {"epochs": 1, "steps": 9}, {"CIDEr_shuffled": 0.1}, {"generate": 3.0}).splitlines()
    assert lines[1].split() == ["images", "per", "second", said]
