"""The section about a sweep: its settings from best to worst, and each parameter against CIDEr."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cluster.charts.markup import Html, Node, tag
from cluster.charts.svg import Axis, Line, line_chart, parallel, scatter
from cluster.numbers import short, times_100
from cluster.report.parts import absent, code, details, section, table
from cluster.report.sweep_facts import ParameterAxis, SweepFacts, parameter_axis
from cluster.sweep.results import SettingResult

ROWS_SHOWN = 15


def sweep(found: SweepFacts) -> Html:
    title = "What the settings change"
    statuses = Counter(trial.status for setting in found.ranked for trial in setting.trials)
    trials = ", ".join(f"{number} {status}" for status, number in sorted(statuses.items())) or "none has a result"
    unfinished = f"; {found.unfinished} more have no result yet" if found.unfinished else ""
    place: Node = ["Trials: ", trials, unfinished, f" ({found.search} search). ", code(found.root)]
    scored = found.scored
    if not scored:
        return section("sweep", "Sweep", title, place, absent("No setting has a result."), _table(found.ranked, found))
    best = scored[0]
    chosen = ", ".join(f"{name} {_value(best.settings.get(name))}" for name in found.params)
    axes = {name: parameter_axis(scored, name) for name in found.params}
    charts: list[Node] = [_against(name, axis, scored) for name, axis in axes.items()]
    charts.append(_epochs(scored))
    return section(
        "sweep",
        "Sweep",
        title,
        f"Of {len(found.ranked)} settings the best is {chosen}: CIDEr {times_100(best.mean)}"
        + (f" +- {times_100(best.spread)} over {len(best.scores)} seeds." if len(best.scores) > 1 else "."),
        tag("p", place, class_="note"),
        tag("div", charts, class_="charts"),
        len(found.params) > 1 and len(scored) > 1 and _parallel(axes, scored),
        _table(found.ranked[:ROWS_SHOWN], found),
        len(found.ranked) > ROWS_SHOWN
        and details(f"{len(found.ranked) - ROWS_SHOWN} more settings", _table(found.ranked[ROWS_SHOWN:], found)),
    )


def _against(name: str, axis: ParameterAxis, scored: list[SettingResult]) -> Html:
    return scatter(
        [
            (place, 100 * setting.mean, 100 * setting.spread, _text(setting))
            for place, setting in zip(axis.places, scored, strict=True)
        ],
        title=f"CIDEr by {name}",
        description="One point a setting, the best in colour"
        + (", bars: spread over seeds." if _seeds(scored) else "."),
        x_label=name + (", logarithmic" if axis.log else ""),
        y_label="CIDEr",
        x_names=axis.names,
        log_x=axis.log,
    )


def _epochs(scored: list[SettingResult]) -> Html:
    lines = []
    for rank in reversed(range(len(scored))):
        for trial in scored[rank].trials:
            points = [(row["epoch"], 100 * row["CIDEr"]) for row in trial.history if not row.get("reason")]
            lines.append(Line(name=_text(scored[rank]), points=points, series=2 if rank == 0 else 1,
                              faint=rank > 0, dots=rank == 0))  # fmt: skip
    return line_chart(
        [line for line in lines if line.points],
        title="CIDEr by epoch", description="Every trial; those of the best setting in colour.", x_label="epoch",
        y_label="CIDEr", from_zero=True, whole_x=True, legend=False,
    )  # fmt: skip


def _parallel(axes: dict[str, ParameterAxis], scored: list[SettingResult]) -> Html:
    drawn = [_axis(name, axis) for name, axis in axes.items()]
    means = [setting.mean for setting in scored]
    low, high = min(means), max(means)
    places = [0.5 if high == low else (mean - low) / (high - low) for mean in means]
    drawn.append(Axis("CIDEr", places, times_100(low), times_100(high)))
    chart = parallel(
        drawn, [_text(setting) for setting in scored], title="All parameters at once",
        description="One line a setting through its value of every parameter to its CIDEr; the best in colour.",
    )  # fmt: skip
    return tag("div", chart, class_="scroll", tabindex=0, role="region", aria_label="Parallel coordinates of the sweep")


def _axis(name: str, axis: ParameterAxis) -> Axis:
    order = sorted(range(len(axis.unit)), key=lambda index: axis.unit[index])
    return Axis(name, axis.unit, _value(axis.values[order[0]]), _value(axis.values[order[-1]]))


def _table(ranked: Sequence[SettingResult], found: SweepFacts) -> Html:
    seeded = _seeds(found.ranked)
    rows = []
    for setting in ranked:
        epochs = sorted({len([row for row in trial.history if not row.get("reason")]) for trial in setting.trials})
        said = sorted({f"{t.status}: {t.reason}" if t.reason else t.status for t in setting.trials})
        rows.append(
            [
                *(_value(setting.settings.get(name)) for name in found.params),
                times_100(setting.mean),
                *([times_100(setting.spread), str(len(setting.trials))] if seeded else []),
                "/".join(map(str, epochs)),
                short(sum(trial.seconds for trial in setting.trials)),
                "; ".join(said),
            ]
        )
    header = [*found.params, "CIDEr", *(["spread", "seeds"] if seeded else []), "epochs", "seconds", "status"]
    return table(header, rows, label="Settings of the sweep, best first", numbers=range(len(header) - 1))


def _text(setting: SettingResult) -> str:
    values = ", ".join(f"{name} {_value(value)}" for name, value in setting.settings.items())
    return f"{values}: CIDEr {times_100(setting.mean)}"


def _seeds(settings: Sequence[SettingResult]) -> bool:
    return any(len(setting.trials) > 1 for setting in settings)


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
