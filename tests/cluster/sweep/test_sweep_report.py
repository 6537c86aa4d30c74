"""What a sweep says of its trials."""

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq
import pytest

from cluster.store.store import open_store
from cluster.sweep.results import TrialResult, by_setting, tied
from cluster.sweep.tables import result_table, write_report
from cluster.training.config import TrainConfig

PARAMS = ("top_concepts", "tau", "focal_mode")


def result(ciders: list[float], *, seed: int = 1, status: str = "finished", reason: str = "", **changes) -> TrialResult:
    settings = {"top_concepts": 5, "tau": 0.01, "focal_mode": "batch", **changes}
    history = tuple({"epoch": i + 1, "CIDEr": cider, "loss": 2.0} for i, cider in enumerate(ciders))
    return TrialResult(
        overrides={**settings, "seed": seed}, status=status, reason=reason, history=history, seconds=10.0
    )


RESULTS = [
    result([0.5, 0.9], top_concepts=3, seed=1),
    result([0.5, 0.1], top_concepts=3, seed=2),
    result([0.6, 0.8], tau=0.1, seed=1),
    result([0.7, 0.7], tau=0.1, seed=2),
    result([0.99], focal_mode="off", seed=1, status="failed", reason="loss is nan"),
    result([0.98], focal_mode="off", seed=2),
]


def test_the_best_setting_is_that_of_the_best_mean_over_its_seeds() -> None:
    first, second, third = by_setting(RESULTS, base=TrainConfig())
    assert first.settings["tau"] == 0.1 and first.mean == pytest.approx(0.75)
    assert first.spread == pytest.approx(0.05 * math.sqrt(2))
    assert second.settings["top_concepts"] == 3 and second.mean == pytest.approx(0.7)
    assert math.isnan(third.mean), "a setting one seed of which failed has no mean"


def test_of_many_settings_the_log_has_the_best_and_names_the_table(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    results = [result([number / 100], top_concepts=number) for number in range(1, 41)]
    write_report(open_store(tmp_path), results, params=["top_concepts"], base=TrainConfig())
    title, header, *rows, more = caplog.messages[0].splitlines()
    assert title == "results, best first:" and header.startswith("top_concepts  CIDEr")
    assert [row.split()[0] for row in rows] == [str(number) for number in range(40, 25, -1)]
    assert more == f"25 more settings are in {tmp_path}/table.txt"
    assert len((tmp_path / "table.txt").read_text().splitlines()) == 41


def test_a_tie_is_won_by_the_presets_value_in_whatever_order_trials_come(tmp_path: Path) -> None:
    preset = TrainConfig()
    assert preset.model.top_concepts == 5
    tie = [result([0.9], top_concepts=top) for top in (3, 5, 8)]
    for order in (tie, tie[::-1], [tie[2], tie[0], tie[1]]):
        ranked = by_setting([*order, result([0.1], top_concepts=4)], base=preset)
        assert [setting.settings["top_concepts"] for setting in ranked] == [5, 3, 8, 4]
        assert len(tied(ranked)) == 3
        summary = write_report(open_store(tmp_path), order, params=["top_concepts"], base=preset)
        assert summary is not None
        assert summary["best"]["settings"]["top_concepts"] == 5 and summary["best"]["tied"] == 3
        best = TrainConfig.from_json((tmp_path / "best.json").read_bytes(), source="best.json")
        assert best.model.top_concepts == 5
        assert [line.split()[0] for line in (tmp_path / "table.txt").read_text().splitlines()[1:]] == ["5", "3", "8"]


def test_the_report_keeps_every_trial_and_the_best_config(tmp_path: Path) -> None:
    summary = write_report(open_store(tmp_path), RESULTS, params=PARAMS, base=TrainConfig())
    assert summary is not None
    assert summary["best"]["settings"] == {"top_concepts": 5, "tau": 0.1, "focal_mode": "batch"}
    assert summary["by_status"] == {"failed": 1, "finished": 5} and summary["trials"] == 6
    config = TrainConfig.from_json((tmp_path / "best.json").read_bytes(), source="best.json")
    assert config.differences(TrainConfig().with_overrides(summary["best"]["settings"])) == {}

    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert len(rows) == 6 and [row["seed"] for row in rows] == [1, 2, 1, 2, 1, 2]
    assert (rows[0]["CIDEr"], rows[0]["best_epoch"], rows[0]["CIDEr_by_epoch"]) == (0.9, 2, [0.5, 0.9])
    assert rows[4]["CIDEr"] is None and rows[4]["reason"] == "loss is nan"

    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {"top_concepts.svg", "tau.svg", "focal_mode.svg", "epochs.svg", "parallel_coordinates.svg"}
    for name in plots:
        drawing = ElementTree.fromstring((tmp_path / "plots" / name).read_bytes())
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg", name
    dots = len(re.findall("<circle", (tmp_path / "plots" / "tau.svg").read_text()))
    assert dots == 2, "one a setting that has a mean"
    lines = re.findall("<polyline", (tmp_path / "plots" / "epochs.svg").read_text())
    assert len(lines) == 4, "one a trial of these"


def test_the_table_has_a_line_a_setting_with_reasons() -> None:
    lines = result_table(by_setting(RESULTS, base=TrainConfig()), params=PARAMS).splitlines()
    assert lines[0].split() == [*PARAMS, "CIDEr", "spread", "seeds", "epochs", "seconds", "status"]
    assert lines[1].split()[:6] == ["5", "0.1", "batch", "0.75", "0.07071", "2"]
    assert lines[3].endswith("failed: loss is nan; finished")


def test_nothing_is_best_where_everything_failed(tmp_path: Path) -> None:
    failed = [result([], status="failed", reason="loss is nan")]
    assert write_report(open_store(tmp_path), failed, params=PARAMS, base=TrainConfig()) is None
    assert "loss is nan" in (tmp_path / "table.txt").read_text() and not (tmp_path / "best.json").exists()
    assert json.loads(json.dumps(pq.read_table(tmp_path / "results.parquet").to_pylist()))[0]["CIDEr"] is None
