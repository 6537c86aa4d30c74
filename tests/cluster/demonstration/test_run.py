"""The demo: what it asks of the stages that it runs."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

import cluster.demonstration.run
from cluster.demonstration.request import DemoRequest
from cluster.demonstration.run import run_demo, table
from cluster.evaluation.request import EvaluateRequest
from cluster.generation.request import GenerateRequest
from pcm import embedded
from tests.helpers.tiny_dataset import write_dataset


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


def test_the_figures_are_shown_and_both_sheets_lie_in_the_folder(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(request: GenerateRequest) -> dict:
        write_dataset(Path(request.out), tiny_clip, rows=30)
        return {"stored": 30, "quarantined": 0, "images_per_second": 2.0, "clip_score_mean": 0.5}

    def evaluate(request: EvaluateRequest) -> dict:
        photos = pq.read_table(embedded.test_set_path("test"))["image_id"].to_pylist()
        Path(str(request.out)).mkdir(parents=True)
        captions = [{"image_id": photo, "caption": "a dog"} for photo in photos]
        (Path(str(request.out)) / "captions.json").write_text(json.dumps(captions))
        return {"CIDEr": 0.1, "CIDEr_shuffled": 0.0, "METEOR": 0.1, "Bleu_4": 0.2}

    monkeypatch.setattr(cluster.demonstration.run, "generate", generate)
    monkeypatch.setattr(cluster.demonstration.run, "verify", lambda store: {"ok": True, "fingerprint": "0f"})
    trained = {"epochs": 1, "steps": 9, "checkpoint": "best"}
    monkeypatch.setattr(cluster.demonstration.run, "train", lambda request: trained)
    monkeypatch.setattr(cluster.demonstration.run, "evaluate", evaluate)
    monkeypatch.setattr(cluster.demonstration.run, "make_report", lambda request: {})
    shown: list[str] = []
    summary = run_demo(DemoRequest(out=str(tmp_path / "out"), device="cpu"), show=shown.append)
    assert (summary["CIDEr"], summary["fingerprint"], summary["checkpoint"]) == (0.1, "0f", "best")
    assert list(summary["seconds"]) == ["generate", "verify", "train", "evaluate", "report"]
    assert [text.splitlines()[0].split() for text in shown] == [["images", "stored", "30", "(0", "quarantined)"]]
    for name in ("contact_sheet", "captions_sheet"):
        assert Image.open(summary[name]).width > 600
