"""Charts: few, equal and missing values, and names for those who do not see them."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from cluster.charts.svg import Axis as ParallelAxis
from cluster.charts.svg import Bar, Line, bars, histogram, line_chart, parallel, scatter, ticks
from tests.helpers.page_reader import Page

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(("low", "high"), [(0.61, 0.93), (0, 7), (-3e-5, 4e-5), (5, 5), (0, 0), (1e9, 3e9)])
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9
    steps = np.diff(found)
    assert np.allclose(steps, steps[0]) and f"{steps[0]:.1e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


@pytest.mark.parametrize("points", [[(1, 0.5)], [(1, 0.0), (2, 0.0)], [(1, 3.0), (2, -1.0), (9, 7.5)]])
def test_a_curve_of_few_or_equal_points_can_be_drawn(points: list[tuple[float, float]]) -> None:
    drawn = line_chart([Line(name="a", points=points, area=True, dots=True)], title="t", description="d", x_label="x",
                       best=points[0], whole_x=True).figure()  # fmt: skip
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
        figure = chart.figure()
        found = Page(figure)
        picture = found.attributes[found.names.index("svg")]
        assert picture["role"] == "img" and str(picture["aria-label"]).startswith(f"{title}. ")
        assert "nan" not in figure and "<b>" not in figure.replace(f"<b>{title}</b>", "")


def test_a_chart_stands_alone_as_a_file() -> None:
    points = [(1, 2, math.nan, "a & b"), (10, 3, 1, "two")]
    chart = scatter(points, title="<Points>", description="word " * 30, x_label="x", y_label="y", log_x=True)
    document = chart.file()
    drawing = ElementTree.fromstring(document)
    assert drawing.tag == f"{SVG}svg" and drawing[0].text == f"<Points>. {'word ' * 30}"
    assert len(drawing.findall(f".//{SVG}circle")) == 2
    assert b"var(" not in document and b"#d1591c" in document, "not every viewer knows variables of CSS"
    width, height = (float(drawing.attrib[name]) for name in ("width", "height"))
    (group,) = (each for each in drawing.findall(f"{SVG}g") if "transform" in each.attrib)
    left, top = map(float, re.findall(r"[\d.]+", group.attrib["transform"]))
    lines = [float(each.attrib["y"]) for each in drawing.findall(f"{SVG}text")]
    assert len(lines) >= 3 and max(lines) < top, "title and description stand above the drawing"
    assert left + chart.width <= width and top + chart.height <= height
