"""The section about how a derived dataset was made: its sources, each rule's count, and rows that went."""

import json
from typing import Any

from cluster.charts.markup import Html, Node, tag
from cluster.dataset.lineage import Lineage
from cluster.numbers import count, percent
from cluster.report.dataset_facts import DatasetFacts
from cluster.report.left_out import AGREEMENT, LeftOut
from cluster.report.parts import absent, code, facts, picture_card, section, table

#: The fact of a lineage that says what each round of redraws gained (cluster.curation.redraw.view).
CURVE = "curve"


def lineage(found: Lineage, data: DatasetFacts, left_out: dict[str, list[LeftOut]]) -> Html:
    stores = data.manifest.pictures
    kind = "points at pictures that stay where they are" if data.manifest.is_view else "holds its own pictures"
    if any(each.in_view for each in stores):
        kind += ". Some of them lie in its own folder: keep it as long as this view, or a view of it, is used"
    sources = [
        [code(each.path), each.generator, count(each.rows), _shards(each.shards, each.planned_shards)]
        for each in found.sources
    ]
    rules: list[Node] = [_rule(rule.rule, rule.setting, rule.dropped, found, data, left_out) for rule in found.rules]
    return section(
        "lineage",
        "Dataset",
        "What stayed, and what was left out",
        f"{count(data.manifest.stored)} of {count(found.rows_in)} pairs stayed. The dataset {kind}. Rules were applied "
        "in this order; a pair counts where it went first. Shown are those that went most narrowly.",
        facts([("Made by", code(f"jobs.{found.method}")), ("Fingerprint", code(data.manifest.fingerprint or "")),
               *(("Pictures in", code(each.path)) for each in stores),
               *((name.replace("_", " "), str(value)) for name, value in sorted(found.facts.items())
                 if name not in (AGREEMENT, CURVE))]),
        table(["source", "drawn by", "pairs", "shards"], sources, label="Sources", numbers=range(2, 4)),
        rules or absent("No rule left anything out."),
        _curve(found.facts.get(CURVE)),
        _agreement(found.facts.get(AGREEMENT), data, left_out),
    )  # fmt: skip


def _curve(points: list[dict[str, Any]] | None) -> Node:
    """What each round of redraws gained, beside what was expected of it."""
    if not points:
        return None
    before = [None, *(point["mean_score"] for point in points)]
    rows = [
        [
            count(point["drawn"]),
            f"{point['mean_score']:.4f}",
            "" if last is None else f"{point['mean_score'] - last:+.4f}",
            "" if point["expected_gain"] is None else f"{point['expected_gain']:+.4f}",
            count(point["failed"]),
        ]
        for point, last in zip(points, before, strict=False)
    ]
    return tag(
        "div",
        tag("h3", "What drawing again gained"),
        table(
            ["pictures drawn", "mean CLIP score", "gained", "expected", "not made"], rows, label="Rounds",
            numbers=range(5),
        ),
    )  # fmt: skip


def _agreement(told: dict[str, Any] | None, data: DatasetFacts, left_out: dict[str, list[LeftOut]]) -> Node:
    """How far the scores of two CLIPs agree, and the pairs that they rank most differently."""
    if not told:
        return None
    numbers = ", ".join(
        f"{name} {'not defined' if told[key] is None else format(told[key], '.3f')}"
        for name, key in (("Pearson", "pearson"), ("Spearman", "spearman"))
    )
    cards: list[Node] = [_card(each.picture, each.why, scored=data.scored) for each in left_out.get(AGREEMENT, [])]
    return tag(
        "div",
        tag("h3", "Agreement with the scores before", tag("small", f" {numbers}, of {count(told['rows'])} pairs")),
        tag("p", "Shown are the pairs that the two CLIPs rank most differently.", class_="note"),
        tag("div", cards, class_="gallery"),
        data_agreement="",
    )


def _shards(there: int, planned: int) -> str:
    return count(there) if there == planned else f"{count(there)} of {count(planned)}"


def _rule(
    name: str, setting: Any, dropped: int, found: Lineage, data: DatasetFacts, left_out: dict[str, list[LeftOut]]
) -> Html:
    cards: list[Node] = []
    for each in left_out.get(name, []):
        cards.append(_card(each.picture, each.why, scored=data.scored))
        if each.beside is not None:
            cards.append(_card(each.beside, "stays", scored=data.scored))
    share = f", {percent(dropped / found.rows_in)} of all" if found.rows_in else ""
    asked = json.dumps(setting, ensure_ascii=False)
    return tag(
        "div",
        tag(
            "h3",
            code(name),
            tag("small", f" {asked}: {count(dropped)} left out{share}"),
        ),
        cards and tag("div", cards, class_="gallery"),
        data_rule=name,
    )


def _card(picture: Any, said: str, *, scored: bool) -> Html:
    return tag("div", picture_card(picture, scored=scored, redraw=""), tag("p", said, class_="note"))
