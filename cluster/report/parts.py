"""Parts of the page that every section is made of."""

import shlex
from collections.abc import Iterable, Sequence

from cluster.charts.markup import Html, Node, tag
from cluster.numbers import score
from cluster.report.gallery import Picture

#: Pictures up to this side are enlarged without smoothing.
PIXEL_ART_SIDE = 128


def section(name: str, eyebrow: str, title: str, lead: Node, *content: Node) -> Html:
    """A part of the report; `name` is its anchor, `lead`, if any, says in a sentence what there is to see."""
    return tag(
        "section",
        tag("header", tag("p", eyebrow, class_="eyebrow"), tag("h2", title), lead and tag("p", lead, class_="lead")),
        *content,
        id=name,
        aria_label=title,
    )


def facts(pairs: Iterable[tuple[str, Node]]) -> Html:
    return tag("dl", ((tag("dt", name), tag("dd", value)) for name, value in pairs), class_="facts")


def tiles(values: Iterable[tuple[str, str, str]]) -> Html:
    """Large numbers: (number, what it is, a word more or "")."""
    return tag(
        "dl",
        (
            tag("div", tag("dt", name), tag("dd", tag("b", number), more and tag("small", more)), class_="tile")
            for number, name, more in values
        ),
        class_="tiles",
    )


def table(header: Sequence[Node], rows: Iterable[Sequence[Node]], *, label: str, numbers: Iterable[int] = ()) -> Html:
    """A table that scrolls sideways where it is too wide; the columns `numbers` are set to the right."""
    right = set(numbers)

    def cells(name: str, row: Sequence[Node]) -> list[Html]:
        return [tag(name, cell, class_="n" if place in right else None) for place, cell in enumerate(row)]

    body = tag("tbody", (tag("tr", cells("td", row)) for row in rows))
    whole = tag("table", tag("thead", tag("tr", cells("th", header))), body)
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=label)


def details(summary: Node, *content: Node) -> Html:
    return tag("details", tag("summary", summary), *content)


def absent(text: Node) -> Html:
    """What is not there, said plainly."""
    return tag("p", text, class_="absent")


def caption_text(text: str) -> Html:
    """A caption of any script: its direction does not disturb what stands around it."""
    return tag("bdi", text, dir="auto")


def picture_card(picture: Picture, *, scored: bool, redraw: str) -> Html:
    """A picture with its caption, seed and score. `redraw`: what to type, before its id, to draw it again."""
    row = picture.row
    shown: Node = tag("p", picture.error, class_="broken")
    if picture.uri:
        small = max(picture.width, picture.height) <= PIXEL_ART_SIDE
        shown = tag(
            "img", src=picture.uri, alt=f"picture of: {row.caption}", width=picture.width, height=picture.height,
            decoding="async", class_="pixels" if small else None,
        )  # fmt: skip
    return tag(
        "figure",
        shown,
        tag(
            "figcaption",
            scored and tag("b", score(row.clip_score), class_="score"),
            " ",
            caption_text(row.caption),
            tag("small", f"seed {row.seed}"),
        ),
        class_="picture",
        data_redraw=f"{redraw} {shlex.quote(row.sample_id)}" if redraw else None,
    )


def code(text: str) -> Html:
    return tag("code", text)
