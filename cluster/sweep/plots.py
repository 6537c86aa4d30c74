"""Charts of a sweep: each parameter against CIDEr, CIDEr over the epochs, all parameters at once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.charts.svg import Axis, Chart, Line, line_chart, parallel, scatter
from cluster.numbers import times_100
from cluster.sweep.results import SettingResult

#: A parameter whose largest value is so many times its smallest has a logarithmic axis.
LOG_FROM = 20


def plots(ranked: Sequence[SettingResult], *, params: Sequence[str]) -> dict[str, bytes]:
    """SVG files by name, of the settings that have a result; none where there is no such setting."""
    scored = [setting for setting in ranked if not math.isnan(setting.mean)]
    if not scored:
        return {}
    charts = {name: against(scored, name) for name in params}
    charts["epochs"] = epochs(scored)
    if len(params) > 1:
        charts["parallel_coordinates"] = parallel_coordinates(scored, params)
    return {f"{name}.svg": chart.file() for name, chart in charts.items()}


def against(scored: Sequence[SettingResult], name: str) -> Chart:
    """CIDEr of every setting over one parameter; bars are the standard deviation over seeds."""
    axis = parameter_axis(scored, name)
    seeded = any(len(setting.trials) > 1 for setting in scored)
    return scatter(
        [
            (place, 100 * setting.mean, 100 * setting.spread, setting_text(setting))
            for place, setting in zip(axis.places, scored, strict=True)
        ],
        title=f"CIDEr by {name}",
        description="One point a setting, the best in colour" + (", bars: spread over seeds." if seeded else "."),
        x_label=name + (", logarithmic" if axis.log else ""),
        y_label="CIDEr",
        x_names=axis.names,
        log_x=axis.log,
    )


def epochs(scored: Sequence[SettingResult]) -> Chart:
    """CIDEr over the epochs of every trial, the best setting's in colour."""
    lines = []
    for rank in reversed(range(len(scored))):
        for trial in scored[rank].trials:
            points = [(row["epoch"], 100 * row["CIDEr"]) for row in trial.history if not row.get("reason")]
            lines.append(Line(name=setting_text(scored[rank]), points=points, series=2 if rank == 0 else 1,
                              faint=rank > 0, dots=rank == 0))  # fmt: skip
    return line_chart(
        [line for line in lines if line.points],
        title="CIDEr by epoch", description="Every trial; those of the best setting in colour.", x_label="epoch",
        y_label="CIDEr", from_zero=True, whole_x=True, legend=False,
    )  # fmt: skip


def parallel_coordinates(scored: Sequence[SettingResult], params: Sequence[str]) -> Chart:
    """One axis a parameter and CIDEr last, one line a setting, the best on top."""
    drawn = []
    for name in params:
        axis = parameter_axis(scored, name)
        order = sorted(range(len(axis.unit)), key=lambda index: axis.unit[index])
        drawn.append(Axis(name, axis.unit, value_text(axis.values[order[0]]), value_text(axis.values[order[-1]])))
    means = [setting.mean for setting in scored]
    drawn.append(Axis("CIDEr", _to_unit(means), times_100(min(means)), times_100(max(means))))
    return parallel(
        drawn, [setting_text(setting) for setting in scored], title="All parameters at once",
        description="One line a setting through its value of every parameter to its CIDEr; the best in colour.",
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ParameterAxis:
    """Where the settings lie along one parameter: `places` as values (or 0, 1, ... for names), `unit` in 0..1."""

    places: tuple[float, ...]
    unit: tuple[float, ...]
    log: bool
    names: tuple[str, ...]  # of the places, where they are no numbers
    values: tuple[Any, ...]


def parameter_axis(scored: Sequence[SettingResult], name: str) -> ParameterAxis:
    values = tuple(setting.settings[name] for setting in scored)
    names: tuple[str, ...] = ()
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        names = tuple(sorted({str(value) for value in values}))
        places = tuple(float(names.index(str(value))) for value in values)
    else:
        places = tuple(map(float, values))
    log = not names and min(places) > 0 and max(places) / min(places) >= LOG_FROM
    unit = _to_unit([math.log(place) for place in places] if log else places)
    return ParameterAxis(places=places, unit=tuple(unit), log=log, names=names, values=values)


def setting_text(setting: SettingResult) -> str:
    values = ", ".join(f"{name} {value_text(value)}" for name, value in setting.settings.items())
    return f"{values}: CIDEr {times_100(setting.mean)}"


def value_text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def _to_unit(numbers: Sequence[float]) -> list[float]:
    low, high = min(numbers), max(numbers)
    return [0.5 if high == low else (number - low) / (high - low) for number in numbers]
