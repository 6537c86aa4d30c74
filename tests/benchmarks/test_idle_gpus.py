"""What the notes of a run say about idle GPUs."""

from pathlib import Path

import pytest

from benchmarks.idle_gpus import hosts_that_drew, seconds_by_cause


def test_every_second_of_a_gpu_from_its_joining_to_the_last_picture_has_one_cause(tmp_path: Path) -> None:
    notes = {
        "a": [(0, "joined"), (2, "started"), (5, "loaded"), (6, "begin"), (10, "end"), (11, "begin"), (15, "end")],
        "b": [(3, "joined"), (7, "started"), (9, "loaded"), (10, "begin"), (20, "end")],
        "c": [(16, "joined")],  # too late to draw
    }
    for node, events in notes.items():
        (tmp_path / f"{node}.log").write_text("".join(f"{at} {node} {what}\n" for at, what in events))
    spent = seconds_by_cause(tmp_path)
    assert spent == {"drawing": 18, "starting": 10, "loading": 5, "between": 3, "end": 5}
    assert sum(spent.values()) == 20 + 17 + 4
    assert hosts_that_drew(tmp_path) == 2


def test_a_generator_that_dies_and_loads_again_is_not_drawing_meanwhile(tmp_path: Path) -> None:
    events = [(0, "joined"), (0, "started"), (1, "loaded"), (1, "begin"), (4, "started"), (6, "loaded"), (6, "begin")]
    (tmp_path / "a.log").write_text("".join(f"{at} a {what}\n" for at, what in [*events, (9, "end")]))
    assert seconds_by_cause(tmp_path) == pytest.approx(
        {"drawing": 6, "starting": 0, "loading": 3, "between": 0, "end": 0}
    )
