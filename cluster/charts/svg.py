"""Charts as SVG: text that a browser sets, colours of charts.css, numbers on hover.

A chart is WIDTH units wide with text of 12, so that it can be read at the width of a phone. It stands in a page as a
figure, or alone as a file.
"""

import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from cluster.charts.markup import Html, Node, tag
from cluster.numbers import short

WIDTH, HEIGHT = 420, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 24, 40
#: Parallel coordinates take the whole width of the page, and scroll on a phone.
WIDE = 940
#: Least distance of ticks, as a part of the axis.
_TICK_DISTANCE = 0.09
#: Of a chart that is a file of its own: around it, and its title and the lines of its description above it.
_MARGIN, _TITLE_LINE, _TEXT_LINE = 16, 20, 16
#: Characters of text of 12 that fit into 100 units of width.
_CHARACTERS_IN_100 = 16

#: The style of charts: colours as variables, in a page's `<style>`.
STYLE = files("cluster.charts").joinpath("charts.css").read_text(encoding="utf-8")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its title, and its description for those who do not see it."""

    title: str
    description: str
    drawn: Sequence[Node]  # SVG elements
    series: Sequence[tuple[str, int]] = ()  # of the legend: name, number of the colour
    width: int = WIDTH
    height: int = HEIGHT

    def figure(self) -> Html:
        """For a page that has STYLE."""
        picture = tag(
            "svg", *self.drawn, viewBox=f"0 0 {self.width} {self.height}", role="img",
            aria_label=f"{self.title}. {self.description}", class_="wide" if self.width > WIDTH else None,
        )  # fmt: skip
        caption = tag("figcaption", tag("b", self.title), " ", self.description)
        return tag("figure", caption, _legend(self.series) if self.series else None, picture, class_="chart")

    def file(self) -> bytes:
        """An SVG file that needs nothing else; without a legend."""
        lines = textwrap.wrap(self.description, self.width * _CHARACTERS_IN_100 // 100)
        top = _MARGIN + _TITLE_LINE + _TEXT_LINE * len(lines) + 10
        width, height = self.width + 2 * _MARGIN, top + self.height + _MARGIN
        document = tag(
            "svg",
            tag("title", f"{self.title}. {self.description}"),
            tag("style", Html(_with_colours(STYLE))),
            tag("rect", width=width, height=height, class_="paper"),
            tag("text", self.title, x=_MARGIN, y=_MARGIN + 14, class_="strong"),
            [
                tag("text", line, x=_MARGIN, y=_MARGIN + _TITLE_LINE + _TEXT_LINE * number + 12)
                for number, line in enumerate(lines)
            ],
            tag("g", *self.drawn, transform=f"translate({_MARGIN} {top})"),
            xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width, height=height,
        )  # fmt: skip
        return f"{document}\n".encode()


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve. `series`: 1.. chooses the colour; a faint one is the raw data behind a smoothed curve."""

    name: str
    points: Sequence[tuple[float, float]]
    series: int = 1
    faint: bool = False
    area: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A value worth a vertical line."""

    value: float
    label: str


@dataclass(frozen=True)
class Bar:
    """One bar: `note` stands behind it, `series` chooses its colour."""

    label: str
    value: float
    note: str
    series: int = 1


@dataclass(frozen=True)
class Scale:
    """From values to places on an axis, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * ((at - low) / (high - low) if high > low else 0.5)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str = "",
    from_zero: bool = False,
    best: tuple[float, float] | None = None,
    whole_x: bool = False,
    legend: bool = True,
) -> Chart:
    """Curves over one axis. `best` is pointed out; `whole_x`: only whole numbers on the x axis, such as epochs."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys))
    x_ticks = [tick for tick in ticks(min(xs), max(xs), count=6) if min(xs) <= tick <= max(xs)]
    if whole_x:
        x_ticks = sorted({round(tick) for tick in x_ticks})
    x = Scale(min(xs), max(xs), _LEFT, WIDTH - _RIGHT)
    y = Scale(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), HEIGHT - _BOTTOM, _TOP)
    drawn: list[Node] = [_frame(x, y, x_ticks, y_ticks, x_label=x_label, y_label=y_label)]
    for line in lines:
        places = [(x(a), y(b)) for a, b in line.points]
        if line.area:
            base = HEIGHT - _BOTTOM
            outline = [(places[0][0], base), *places, (places[-1][0], base)]
            drawn.append(tag("polygon", points=_points(outline), class_=f"area s{line.series}"))
        kind = "raw" if line.faint else "line"
        drawn.append(tag("polyline", points=_points(places), class_=f"{kind} s{line.series}"))
        if line.dots:
            drawn += [
                tag("circle", tag("title", f"{line.name}: {short(b)} at {x_label} {short(a)}"),
                    cx=_at(px), cy=_at(py), r=3.5, class_=f"dot s{line.series}")
                for (a, b), (px, py) in zip(line.points, places, strict=True)
            ]  # fmt: skip
    if best is not None:
        px, py = x(best[0]), y(best[1])
        side = "end" if px > WIDTH * 0.7 else "start"
        beside = py - 9 if py > _TOP + 12 else py + 19
        drawn += [
            tag("circle", cx=_at(px), cy=_at(py), r=6.5, class_="ring"),
            tag("text", f"best {short(best[1])}", x=_at(px + (-10 if side == "end" else 10)), y=_at(beside),
                text_anchor=side, class_="strong"),
        ]  # fmt: skip
    named = [(line.name, line.series) for line in lines if not line.faint]
    return Chart(drawn=drawn, title=title, description=description, series=named if legend and len(named) > 1 else ())


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
) -> Chart:
    """Counts between edges (one more than counts)."""
    x = Scale(edges[0], edges[-1], _LEFT, WIDTH - _RIGHT)
    y_ticks = [tick for tick in ticks(0, max(*counts, 1), count=4) if tick == int(tick)]
    y = Scale(0, max(y_ticks[-1], *counts), HEIGHT - _BOTTOM, _TOP + 10)
    x_ticks = [tick for tick in ticks(edges[0], edges[-1], count=6) if edges[0] <= tick <= edges[-1]]
    drawn: list[Node] = [_frame(x, y, x_ticks, y_ticks, x_label=x_label, y_label=y_label)]
    for low, high, found in zip(edges, edges[1:], counts, strict=False):
        left, top = x(low), y(found)
        drawn.append(
            tag("rect", tag("title", f"{short(low)} to {short(high)}: {found:,}"), x=_at(left + 0.5), y=_at(top),
                width=_at(max(0.5, x(high) - left - 1)), height=_at(HEIGHT - _BOTTOM - top), class_="fill s1")
        )  # fmt: skip
    drawn += [_mark(x, mark) for mark in marks]
    return Chart(drawn=drawn, title=title, description=description)


def bars(
    rows: Sequence[Bar],
    *,
    title: str,
    description: str,
    start: float = 0.0,
    label_width: int = 110,
    dots: bool = False,
) -> Chart:
    """Horizontal bars, one a row, the label before and the note behind; `dots` where they begin at another value
    than 0, because a bar's length would mislead.
    """
    row, bar = 26, 16
    room = max((len(each.note) for each in rows), default=0) * 7 + 10
    highest = max((each.value for each in rows), default=1.0)
    x = Scale(start, max(highest, start + 1e-9), label_width + 6, WIDTH - room)
    drawn: list[Node] = []
    for number, each in enumerate(rows):
        top = 4 + number * row
        end = x(max(each.value, start))
        drawn += [
            tag("text", _fitted(each.label, label_width), tag("title", each.label), x=label_width, y=top + 13,
                text_anchor="end"),
            tag("line", x1=label_width + 6, x2=WIDTH - room, y1=top + 8, y2=top + 8, class_="grid") if dots else None,
            tag("circle", tag("title", f"{each.label}: {each.note}"), cx=_at(end), cy=top + 8, r=5,
                class_=f"dot s{each.series}")
            if dots
            else tag("rect", tag("title", f"{each.label}: {each.note}"), x=label_width + 6, y=top,
                     width=_at(max(1.5, end - label_width - 6)), height=bar, rx=2, class_=f"fill s{each.series}"),
            tag("text", each.note, x=_at(max(end, label_width + 7.5) + (10 if dots else 6)), y=top + 13,
                class_="strong"),
        ]  # fmt: skip
    return Chart(drawn=drawn, title=title, description=description, height=8 + row * len(rows))


def scatter(
    points: Sequence[tuple[float, float, float, str]],
    *,
    title: str,
    description: str,
    x_label: str,
    y_label: str,
    x_names: Sequence[str] = (),
    log_x: bool = False,
) -> Chart:
    """Points (x, y, spread, text); the first is the best. `x_names`: what x = 0, 1, ... stand for."""
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    reach = [point[2] if math.isfinite(point[2]) else 0.0 for point in points]
    y_ticks = ticks(min(y - r for y, r in zip(ys, reach, strict=True)), max(map(sum, zip(ys, reach, strict=True))))
    y = Scale(y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP)
    inset = 24
    x = Scale(min(xs), max(xs), _LEFT + inset, WIDTH - _RIGHT - inset, log_x)
    different = sorted(set(xs))
    apart = min((x(b) - x(a) for a, b in itertools.pairwise(different)), default=WIDTH)
    values_fit = x_names or apart >= _TICK_DISTANCE * (WIDTH - _LEFT - _RIGHT)
    x_ticks = different if values_fit else _some_ticks(min(xs), max(xs), log=log_x)
    names = {float(place): name for place, name in enumerate(x_names)}
    drawn: list[Node] = [_frame(x, y, x_ticks, y_ticks, x_label=x_label, y_label=y_label, names=names)]
    for number in reversed(range(len(points))):
        value, height, _, text = points[number]
        kind = "s2" if number == 0 else "s1"
        if reach[number]:
            ends = (y(height - reach[number]), y(height + reach[number]))
            drawn.append(tag("line", x1=_at(x(value)), x2=_at(x(value)), y1=_at(ends[0]), y2=_at(ends[1]),
                             class_=f"line {kind}"))  # fmt: skip
        drawn.append(
            tag("circle", tag("title", text), cx=_at(x(value)), cy=_at(y(height)), r=6 if number == 0 else 5,
                class_=f"dot {kind}")
        )  # fmt: skip
    return Chart(drawn=drawn, title=title, description=description)


@dataclass(frozen=True)
class Axis:
    """One axis of parallel coordinates: places 0..1 of every line, and what its ends are called."""

    name: str
    places: Sequence[float]
    low: str
    high: str


def parallel(axes: Sequence[Axis], texts: Sequence[str], *, title: str, description: str) -> Chart:
    """One line a setting through every axis; the first line is the best, the last axis colours the lines."""
    width = max(WIDE, 130 * len(axes))
    height = 280
    top, bottom = 40, height - 22
    xs = [70 + index * (width - 140) / max(1, len(axes) - 1) for index in range(len(axes))]
    drawn: list[Node] = []
    for x, axis in zip(xs, axes, strict=True):
        drawn += [
            tag("line", x1=_at(x), x2=_at(x), y1=top, y2=bottom, class_="axis"),
            tag("text", _fitted(axis.name, 140), x=_at(x), y=12, text_anchor="middle", class_="strong"),
            tag("text", axis.high, x=_at(x), y=32, text_anchor="middle"),
            tag("text", axis.low, x=_at(x), y=bottom + 16, text_anchor="middle"),
        ]
    for number in reversed(range(len(texts))):
        places = [(x, bottom - (bottom - top) * axis.places[number]) for x, axis in zip(xs, axes, strict=True)]
        kind = "best s2" if number == 0 else "s1"
        opacity = 1.0 if number == 0 else 0.2 + 0.6 * axes[-1].places[number]
        drawn.append(
            tag("polyline", tag("title", texts[number]), points=_points(places), class_=f"line {kind}",
                opacity=f"{opacity:.2f}")
        )  # fmt: skip
    return Chart(drawn=drawn, title=title, description=description, width=width, height=height)


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Round numbers from below `low` to above `high`, about `count` of them."""
    if not high > low:
        low, high = (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))
    step = _round_step((high - low) / count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(each for each in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if each >= rough * (1 - 1e-9))


def _some_ticks(low: float, high: float, *, log: bool) -> list[float]:
    if not log:
        return [tick for tick in ticks(low, high) if low <= tick <= high]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [value for power in powers for digit in (1, 3) if low <= (value := digit * 10.0**power) <= high]


def _frame(
    x: Scale,
    y: Scale,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    names: dict[float, str] | None = None,
) -> Html:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    parts: list[Node] = []
    for value in y_ticks:
        place = _at(y(value))
        parts += [
            tag("line", x1=_LEFT, x2=right, y1=place, y2=place, class_="grid"),
            tag("text", short(value), x=_LEFT - 6, y=_at(y(value) + 4), text_anchor="end"),
        ]
    parts += [
        tag("text", (names or {}).get(value, short(value)), x=_at(x(value)), y=bottom + 16, text_anchor="middle")
        for value in x_ticks
    ]
    parts += [
        tag("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"),
        tag("text", x_label, x=right, y=HEIGHT - 5, text_anchor="end", class_="label"),
        y_label and tag("text", y_label, x=_LEFT - 42, y=10, class_="label"),
    ]
    return tag("g", *parts)


def _mark(x: Scale, mark: Mark) -> Html:
    place = x(mark.value)
    side = "end" if place > WIDTH * 0.6 else "start"
    return tag(
        "g",
        tag("line", x1=_at(place), x2=_at(place), y1=_TOP - 4, y2=HEIGHT - _BOTTOM, class_="mark"),
        tag("text", mark.label, x=_at(place + (-5 if side == "end" else 5)), y=_TOP + 2, text_anchor=side,
            class_="strong"),
    )  # fmt: skip


def _legend(entries: Sequence[tuple[str, int]]) -> Html:
    return tag("p", *(tag("span", name, class_=f"key s{series}") for name, series in entries), class_="legend")


def _with_colours(style: str) -> str:
    """The style with its variables written out: not every viewer of SVG files knows them."""
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", style))
    return re.sub(r"var\(--([\w-]+)\)", lambda match: colours[match[1]], style)


def _points(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_at(x)},{_at(y)}" for x, y in places)


def _at(place: float) -> str:
    return f"{place:.1f}"


def _fitted(text: str, width: int) -> str:
    most = max(3, width // 7)
    return text if len(text) <= most else text[: most - 1] + "…"
