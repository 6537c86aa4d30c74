"""What a report is made of: markup that cannot be broken out of, charts, times, and which patches are shown."""

import math

import numpy as np
import pytest
import torch

from cluster.report.charts import Axis as ParallelAxis
from cluster.report.charts import Bar, Line, bars, histogram, line_chart, parallel, scatter, ticks
from cluster.report.dataset_facts import sample_shards
from cluster.report.html import Html, rendered, tag
from cluster.report.throughput import throughput
from pcm.captioners.pcmnet.mixup import MixUpFindings
from pcm.captioners.pcmnet.patch_overlay import textual_patches
from tests.helpers.page_reader import Page

NASTY = "<script>alert('x')</script> & \"quoted\" \x00\x1b\ud800 end"


def test_text_never_becomes_markup() -> None:
    found = Page(tag("p", NASTY, title=NASTY))
    assert found.names == ["p"]
    shown = "<script>alert('x')</script> & \"quoted\" \u2400\u241b\ufffd end"
    assert found.text == shown and found.attributes == [{"title": shown}]
    tag("p", NASTY).encode()  # a lone surrogate would not go into a file


def test_markup_is_not_escaped_twice_and_nothing_leaves_nothing() -> None:
    inner = tag("b", 1)
    assert tag("p", inner, None, False, [0.5, " & "], class_="x", hidden=True, id=None) == (
        '<p class="x" hidden><b>1</b>0.5 &amp; </p>'
    )
    assert isinstance(rendered(inner), Html) and tag("img", alt="") == '<img alt="">'


@pytest.mark.parametrize(("low", "high"), [(0.61, 0.93), (0, 7), (-3e-5, 4e-5), (5, 5), (0, 0), (1e9, 3e9)])
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9
    steps = np.diff(found)
    assert np.allclose(steps, steps[0]) and f"{steps[0]:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, 0.0), (2, 0.0)], [(1, 3.0), (2, -1.0), (9, 7.5)]])
def test_a_curve_of_few_or_equal_points_can_be_drawn(points: list[tuple[float, float]]) -> None:
    drawn = line_chart([Line(name="a", points=points, area=True, dots=True)], title="t", description="d", x_label="x",
                       best=points[0], whole_x=True)  # fmt: skip
    assert "nan" not in drawn and "inf" not in drawn and drawn.count("<circle") == len(points) + 1


def test_charts_name_what_they_show_for_those_who_do_not_see_them() -> None:
    charts = [
        histogram([0, 1, 2], [3, 0], title="Scores", description="Two bins.", x_label="x", y_label="y"),
        bars([Bar("<b>", 2, "two")], title="Bars", description="One bar."),
        scatter([(1, 2, math.nan, "one"), (10, 3, 1, "two")], title="Points", description="Two.", x_label="x",
                y_label="y", log_x=True),
        parallel([ParallelAxis("a", [0, 1], "0", "1"), ParallelAxis("b", [0.5, 0], "1", "2")], ["one", "two"],
                 title="Lines", description="Two lines."),
    ]  # fmt: skip
    for chart, title in zip(charts, ("Scores", "Bars", "Points", "Lines"), strict=True):
        found = Page(chart)
        picture = found.attributes[found.names.index("svg")]
        assert picture["role"] == "img" and str(picture["aria-label"]).startswith(f"{title}. ")
        assert "nan" not in chart and "<b>" not in chart.replace(f"<b>{title}</b>", "")


def test_a_sample_of_shards_is_drawn_by_the_seed_and_bounded() -> None:
    rows = [0, 100, 100, 0, *[100] * 5_000]
    chosen = sample_shards(rows, seed=3, most=10, most_rows=750)
    assert chosen == sample_shards(rows, seed=3, most=10, most_rows=750) == sorted(chosen)
    assert len(chosen) == 7 and all(rows[place] for place in chosen)
    assert chosen != sample_shards(rows, seed=4, most=10, most_rows=750)
    assert len(sample_shards([10**6] * 3, seed=0)) == 1 and sample_shards([0, 0], seed=0) == []
    assert sample_shards([5, 0, 5], seed=9) == [0, 2]


def _shard(start: float, end: float, *, successes: int = 10, draw: float | None = None) -> dict:
    return {
        "start_time": start, "end_time": end, "successes": successes, "device_name": "a",
        "draw_seconds": end - start if draw is None else draw, "featurise_seconds": 1.0, "encode_seconds": 0.5,
    }  # fmt: skip


def test_throughput_leaves_out_the_night_between_two_runs() -> None:
    night = 8 * 3600
    stats = [_shard(1000, 1100), _shard(1100, 1200), _shard(1200 + night, 1300 + night)]
    found = throughput(stats, stored=30)
    assert found is not None and found.runs == 2
    assert found.working_seconds == pytest.approx(300) and found.images_per_second == pytest.approx(0.1)
    assert found.stored[-1] == pytest.approx(30) and (np.diff(found.stored) > 0).all()
    assert found.machine_hours[-1] == pytest.approx(300 / 3600) == found.generator_hours[-1]
    assert found.rate == pytest.approx(0.1, rel=0.05)


def test_two_generators_at_once_are_paid_twice_and_one_machine_once() -> None:
    found = throughput([_shard(0.5, 100.5), _shard(0.5, 100.5, draw=50)], stored=20)
    assert found is not None
    assert found.generator_hours[-1] == pytest.approx(150 / 3600) and found.machine_hours[-1] == pytest.approx(
        100 / 3600
    )
    assert found.rate[0] == pytest.approx(0.2, rel=0.05)


def test_a_sample_of_shards_stands_for_all_pictures() -> None:
    found = throughput([_shard(5, 15), _shard(15, 25)], stored=2_000)
    assert found is not None and found.stored[-1] == pytest.approx(2_000)
    assert found.stage_seconds["featurise"] == pytest.approx(200)


def test_statistics_without_a_time_give_no_throughput() -> None:
    assert throughput([], stored=5) is None
    assert throughput([_shard(7, 7)], stored=5) is None


def test_a_selected_patch_is_shown_once_under_the_concept_it_fits_best() -> None:
    similarity = torch.tensor([[[0.1, 0.0], [0.9, 0.8], [0.2, 0.0], [0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]])  # (1, 6, 2)
    nothing = torch.zeros(1, 0)
    found = MixUpFindings(
        global_feature=nothing, concept_probabilities=nothing, top_concepts=torch.tensor([[7, 3]]),
        top_probabilities=torch.tensor([[0.7, 0.2]]), kept=torch.tensor([[True, False]]), concept_vectors=nothing,
        patch_embeddings=nothing, patch_concept_similarity=similarity, pair_probabilities=nothing,
        selected_pairs=torch.tensor([[2, 3, 6, 9]]), mix_mask=torch.zeros(1, 6, dtype=torch.bool),
    )  # fmt: skip
    patches = textual_patches(found, 0, columns=3)
    assert [(each.row, each.column, each.rank) for each in patches] == [(0, 1, 0), (1, 0, 0), (1, 1, None)]
    assert [round(each.similarity, 3) for each in patches] == [0.9, 0.5, 0.0]
