"""The section about a sweep: its settings from best to worst, and each parameter against CIDEr."""

from collections import Counter
from collections.abc import Sequence

from cluster.charts.markup import Html, Node, tag
from cluster.numbers import short, times_100
from cluster.report.parts import absent, code, details, section, table
from cluster.report.sweep_facts import SweepFacts
from cluster.sweep.plots import against, epochs, parallel_coordinates, value_text
from cluster.sweep.results import SettingResult, tied
from cluster.sweep.tables import ROWS_SHOWN


def sweep(found: SweepFacts) -> Html:
    title = "What the settings change"
    statuses = Counter(trial.status for setting in found.ranked for trial in setting.trials)
    trials = ", ".join(f"{number} {status}" for status, number in sorted(statuses.items())) or "none has a result"
    unfinished = f"; {found.unfinished} more have no result yet" if found.unfinished else ""
    place: Node = ["Trials: ", trials, unfinished, f" ({found.search} search). ", code(found.root)]
    scored = found.scored
    if not scored:
        return section("sweep", "Sweep", title, place, absent("No setting has a result."), _table(found.ranked, found))
    best, ties = scored[0], tied(scored)
    chosen = ", ".join(f"{name} {value_text(best.settings.get(name))}" for name in found.params)
    charts = [*(against(scored, name) for name in found.params), epochs(scored)]
    return section(
        "sweep",
        "Sweep",
        title,
        f"Of {len(found.ranked)} settings the best is {chosen}: CIDEr {times_100(best.mean)}"
        + (f" +- {times_100(best.spread)} over {len(best.scores)} seeds." if len(best.scores) > 1 else ".")
        + (f" {len(ties)} settings tie; of those this one changes least of the preset." if len(ties) > 1 else ""),
        tag("p", place, class_="note"),
        tag("div", (chart.figure() for chart in charts), class_="charts"),
        len(found.params) > 1 and len(scored) > 1 and _parallel(scored, found.params),
        _table(found.ranked[:ROWS_SHOWN], found),
        len(found.ranked) > ROWS_SHOWN
        and details(f"{len(found.ranked) - ROWS_SHOWN} more settings", _table(found.ranked[ROWS_SHOWN:], found)),
    )


def _parallel(scored: list[SettingResult], params: Sequence[str]) -> Html:
    label = "Parallel coordinates of the sweep"
    chart = parallel_coordinates(scored, params).figure()
    return tag("div", chart, class_="scroll", tabindex=0, role="region", aria_label=label)


def _table(ranked: Sequence[SettingResult], found: SweepFacts) -> Html:
    seeded = _seeds(found.ranked)
    rows = []
    for setting in ranked:
        epochs = sorted({len([row for row in trial.history if not row.get("reason")]) for trial in setting.trials})
        said = sorted({f"{t.status}: {t.reason}" if t.reason else t.status for t in setting.trials})
        rows.append(
            [
                *(value_text(setting.settings.get(name)) for name in found.params),
                times_100(setting.mean),
                *([times_100(setting.spread), str(len(setting.trials))] if seeded else []),
                "/".join(map(str, epochs)),
                short(sum(trial.seconds for trial in setting.trials)),
                "; ".join(said),
            ]
        )
    header = [*found.params, "CIDEr", *(["spread", "seeds"] if seeded else []), "epochs", "seconds", "status"]
    return table(header, rows, label="Settings of the sweep, best first", numbers=range(len(header) - 1))


def _seeds(settings: Sequence[SettingResult]) -> bool:
    return any(len(setting.trials) > 1 for setting in settings)
